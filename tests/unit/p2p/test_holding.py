"""What peers' bytes may hold: frames that came in part count, the oldest go, and slow lines are no attack."""

from types import SimpleNamespace

import pytest

from p2p import holding
from p2p.core import frames
from p2p.core.frames import HEAD, REQUEST
from p2p.holding import FRAME_SECONDS, STUCK_SECONDS
from p2p.rpc import Connection, Context

MIB = 1 << 20
FRAME = 4 * MIB


class FakeCarrier:
    """Notes what the window was opened by, and whether it was closed."""

    congested = more = outbound = False

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self.window = 0
        self.closed = False

    def open(self, receive, lost) -> None:
        self.receive, self.lost = receive, lost

    def send(self, chunks, urgent=False) -> None:
        return

    def consumed(self, count: int) -> None:
        self.window += count

    def close(self) -> None:
        self.closed = True
        self.lost()


@pytest.fixture
async def context(monkeypatch) -> Context:
    monkeypatch.setattr(holding, "PARTS_BYTES_MAX", 8 * MIB)
    monkeypatch.setattr(holding, "HELD_BYTES_TOTAL", 20 * MIB)
    fake_pool = SimpleNamespace(submit=lambda job: job())
    return Context(services={}, pool=fake_pool, deadlines=None, frame_bytes_max=FRAME, calls_max=8)


def connected(context: Context, peer_id: str) -> tuple[Connection, FakeCarrier]:
    carrier = FakeCarrier(peer_id)
    return Connection(carrier, context, lambda _: None), carrier


def head(size: int, call_id: int = 1) -> bytes:
    return HEAD.pack(size, REQUEST, 1, 1, call_id, 1000, 1)


def begin(context: Context, peer_id: str, came: int) -> tuple[Connection, FakeCarrier]:
    """A connection over which so much of a frame came."""
    link, carrier = connected(context, peer_id)
    carrier.receive(memoryview(head(FRAME) + bytes(came)))
    return link, carrier


async def test_what_came_in_part_counts_until_it_is_complete_or_given_up(context):
    link, carrier = connected(context, "a")
    whole = b"".join(frames.Machine(frame_bytes_max=FRAME).request("m", {}, [bytes(3 * MIB)], 1000)[1])
    for at in range(0, len(whole) - 1, 65536):
        carrier.receive(memoryview(whole[at : min(at + 65536, len(whole) - 1)]))
        assert context.held.total >= min(at, 3 * MIB), "no byte is forgotten"
    assert context.held.total <= FRAME
    carrier.receive(memoryview(whole[-1:]))
    assert context.held.total == 0, "the call was refused at once: nothing is held for it"
    assert carrier.window == len(whole)
    begin(context, "a", MIB)[1].close()
    assert context.held.total == 0
    _, broken = begin(context, "a", MIB)
    broken.receive(memoryview(bytes(FRAME)))
    assert broken.closed
    assert context.held.total == 0
    assert link.alive


async def test_one_peer_holds_no_more_over_many_connections(context):
    links = [begin(context, "a", 3 * MIB) for _ in range(8)]
    assert context.held.total <= 8 * MIB
    assert [carrier.closed for _, carrier in links] == [True] * 6 + [False] * 2, "the oldest went"
    before = context.held.total
    links[0][1].receive(memoryview(bytes(MIB)))
    assert context.held.total == before, "nothing more is heard of them"


async def test_when_it_is_crowded_the_oldest_frames_in_part_go_until_it_is_not(context):
    links = [begin(context, f"peer {n}", 3 * MIB) for n in range(20)]
    assert context.held.total <= 20 * MIB
    assert [carrier.closed for _, carrier in links] == [True] * 15 + [False] * 5
    _, busy = links[-1]
    busy.close()
    links[0][0].hold(30 * MIB)
    _, honest = begin(context, "honest", 3 * MIB)
    assert not honest.closed, "calls in progress leave the frames in part their share"


async def test_a_connection_that_goes_on_with_new_frames_is_not_the_oldest(context):
    machine = frames.Machine(frame_bytes_max=FRAME)
    calls = [b"".join(machine.request("m", {}, [bytes(3 * MIB)], 1000)[1]) for _ in range(2)]
    _, lively = connected(context, "a")
    lively.receive(memoryview(calls[0][:-9]))
    _, idle = begin(context, "a", 3 * MIB)
    lively.receive(memoryview(calls[0][-9:] + calls[1][: 3 * MIB]))
    begin(context, "a", 3 * MIB)
    assert idle.closed
    assert not lively.closed


async def test_a_large_frame_that_trickles_is_stuck_and_a_slow_line_is_not(context, monkeypatch):
    context.frame_bytes_max = 64 * MIB
    monkeypatch.setattr(holding, "PARTS_BYTES_MAX", 512 * MIB)
    monkeypatch.setattr(holding, "HELD_BYTES_TOTAL", 512 * MIB)

    def stuck(whole: int, bytes_per_second: int) -> bool:
        link, carrier = connected(context, "a")
        carrier.receive(memoryview(head(whole)))
        now, came = 0.0, 0
        while came + bytes_per_second < whole and now < 4 * STUCK_SECONDS:
            if link.is_stuck(now):
                return True
            carrier.receive(memoryview(bytes(bytes_per_second)))
            now, came = now + 1.0, came + bytes_per_second
        return False

    assert stuck(64 * MIB, 300)
    assert stuck(64 * MIB, int(64 * MIB / FRAME_SECONDS) - 1000)
    assert not stuck(16 * MIB, 256 << 10)
    assert not stuck(16 * MIB, 64 << 10), "four of them at once"
    assert not stuck(60_000, 300), "a small one has its time"
    assert stuck(60_000, 200)


async def test_whoever_may_not_send_is_not_stuck(context):
    link, carrier = begin(context, "a", MIB)
    link.hold(holding.HELD_BYTES_MAX)
    assert not link.is_stuck(0.0)
    carrier.receive(memoryview(bytes(100)))
    for now in range(0, 200, 10):
        assert not link.is_stuck(float(now))
    link.release(holding.HELD_BYTES_MAX)
    assert [link.is_stuck(float(now)) for now in (300, 340)] == [False, True]
