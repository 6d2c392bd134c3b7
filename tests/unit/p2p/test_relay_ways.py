"""What one advert, or one relay, makes a node dial and wait for."""

from types import SimpleNamespace

import pytest
import trio

from config.errors import RemoteError
from p2p import links as links_module
from p2p import mesh as mesh_module
from p2p.core.advert import Advert
from p2p.core.doors import Limits as DoorLimits
from p2p.core.identity import Identity
from p2p.core.relay import Books, Limits
from p2p.doors import Doors
from p2p.relay import ASKED_AT_ONCE, RELAYS_WANTED, WAYS_MAX, Relay
from tests.unit.p2p.test_lane import echo, start

__all__ = ["echo", "start"]  # fixtures

CALLED = "called"
RELAYS = [Identity.from_seed(n.to_bytes(32, "big")).peer_id for n in range(1, 61)]


def own_address(relay: str) -> str:
    return f"/ip4/198.51.100.{RELAYS.index(relay) + 1}/tcp/4701"


def ways(relays, host: str = "203.0.113.66") -> tuple[str, ...]:
    """What an advert says: always one host, which it would like to have dialled."""
    return tuple(f"/ip4/{host}/tcp/{4000 + n}/p2p/{relay}/p2p-circuit" for n, relay in enumerate(relays))


class FakeEnds:
    """Links that notes what is dialled; calls of ``deaf`` peers never come to an end."""

    def __init__(self, linked=(), *, deaf=(), round_trips=None, may_dial: bool = True) -> None:
        self.linked = list(linked)
        self.deaf = set(deaf)
        self.round_trips = round_trips or {}
        self.may = may_dial
        self.dialled: list[tuple[str, tuple[str, ...], bool]] = []
        self.asked: list[str] = []

    def peers(self):
        return tuple(self.linked)

    def host_of(self, peer_id: str) -> str:
        return "198.51.100.1" if peer_id in self.linked else ""

    def round_trip_s(self, peer_id: str) -> float:
        return self.round_trips.get(peer_id, 0.0)

    def may_dial(self, peer_id: str) -> bool:
        return self.may

    async def dial_at(self, peer_id: str, texts, *, spare: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self.dialled.append((peer_id, tuple(texts), spare))
        self.linked.append(peer_id)

    async def call(self, peer_id: str, method: str, header, buffers=(), *, deadline_ms: int):
        self.asked.append(peer_id)
        await trio.sleep(deadline_ms / 1000 if peer_id in self.deaf else 0)
        if method == "relay.reserve" and peer_id not in self.deaf:
            return SimpleNamespace(header={"seconds": 600})
        raise RemoteError("deadline", "it did not answer in time", peer_id=peer_id)


def relay_of(ends: FakeEnds, known=RELAYS) -> Relay:
    adverts = {
        peer: Advert(peer_id=peer, seq=1, expires_ms=1, addresses=(own_address(peer),), relay=True) for peer in known
    }
    return Relay(
        "me",
        ends,
        Books(Limits(1, 1, 1, 1, 1)),
        None,
        adverts=lambda: adverts,
        dialable=tuple,
        willing=bool,
        needed=lambda: True,
        changed=lambda: None,
    )


async def asked_for(ends: FakeEnds, known, texts) -> None:
    with pytest.raises(RemoteError):
        await relay_of(ends, known).connect(CALLED, texts)


async def test_relays_that_nobody_knows_are_not_dialled():
    ends = FakeEnds()
    await asked_for(ends, (), ways(RELAYS[:16]))
    assert ends.dialled == []
    assert ends.asked == []


async def test_few_known_relays_are_dialled_where_they_say_themselves_and_may_be_let_go():
    ends = FakeEnds()
    await asked_for(ends, RELAYS, ways(RELAYS[:16]))
    assert ends.dialled == [(relay, (own_address(relay),), True) for relay in RELAYS[:WAYS_MAX]]


async def test_a_node_that_dials_nobody_more_uses_the_relays_it_is_linked_to():
    ends = FakeEnds([RELAYS[9]], may_dial=False)
    await asked_for(ends, RELAYS, ways(RELAYS[:16]))
    assert ends.dialled == []
    assert ends.asked == [RELAYS[9]]


async def test_linked_and_measured_relays_come_first():
    ends = FakeEnds(RELAYS[3:6], round_trips={RELAYS[4]: 0.3, RELAYS[5]: 0.1})
    await asked_for(ends, RELAYS, ways(RELAYS[:16]))
    assert ends.asked == [RELAYS[5], RELAYS[4], RELAYS[3]], "one whose round trip nobody knows is not the nearest"


async def test_relays_that_stall_hold_up_no_reservation_for_long(autojump_clock):
    near, unmeasured, good = RELAYS[:8], RELAYS[8:20], RELAYS[20:22]
    trips = {**dict.fromkeys(near, 0.001), **dict.fromkeys(good, 0.1)}
    ends = FakeEnds([*near, *unmeasured, *good], deaf=[*near, *unmeasured], round_trips=trips)
    relay = relay_of(ends)
    before = trio.current_time()
    await relay._reserve()
    assert set(relay.relays) == set(good)
    assert trio.current_time() - before <= 10, "two rounds of the near ones; who is not measured comes last"
    ends.asked.clear()
    for peer in good:
        relay.link_down(peer)
    await relay._reserve()
    assert ends.asked[:2] == good, "who failed just now is not asked first again"
    assert set(relay.relays) == set(good)


async def test_no_more_relays_than_wanted_are_kept_and_few_are_asked(autojump_clock):
    ends = FakeEnds(RELAYS[:20])
    relay = relay_of(ends)
    await relay._reserve()
    await relay._reserve()
    assert len(relay.relays) == RELAYS_WANTED
    assert len(ends.asked) < ASKED_AT_ONCE + RELAYS_WANTED


@pytest.mark.parametrize(("word", "read_up"), [("public", []), ("", []), ("relayed", [RELAYS[0]])])
async def test_only_who_says_that_it_needs_relays_is_looked_for_behind_them(start, monkeypatch, word, read_up):
    node = await start("node")
    advert = Advert(peer_id=CALLED, seq=1, expires_ms=1, addresses=ways(RELAYS[:16]), reach=word)
    adverts, read = {CALLED: advert}, []

    async def read_up_relay(peer_id: str) -> None:
        await trio.lowlevel.checkpoint()
        read.append(peer_id)

    known = SimpleNamespace(
        adverts=lambda: adverts, finder=SimpleNamespace(read_up=read_up_relay), own=node.directory.own
    )
    monkeypatch.setattr(node.reachability, "_directory", known)
    with pytest.raises(RemoteError, match="no relay leads"):
        await node.reachability.connect(CALLED)
    assert read == read_up, "where no relay is known, the first one's advert is looked up in the DHT"


# -- links and the mesh


async def for_ever(peer_id: str) -> None:
    await trio.sleep_forever()


async def test_a_detour_that_never_ends_does_not_hold_its_callers(start, monkeypatch):
    monkeypatch.setattr(links_module, "DETOUR_S", 0.1)
    node = await start("node")
    node.links.detour = for_ever
    with trio.fail_after(5), pytest.raises(RemoteError, match="way through a relay"):
        await node.links.get(RELAYS[0])


async def test_a_fault_in_a_dial_leaves_no_dial_that_hangs(start, monkeypatch, no_hidden_faults):
    node = await start("node")

    async def broken(peer_id: str) -> bool:
        raise ValueError

    monkeypatch.setattr(node.links, "_dial_lane", broken)
    for _ in range(2):
        with trio.fail_after(5), pytest.raises(RemoteError):
            await node.links.get(RELAYS[0])
    assert node.links._dials == {}
    no_hidden_faults.clear()  # the faults were meant


async def test_a_dial_that_never_ends_keeps_no_other_one_waiting(start, monkeypatch):
    monkeypatch.setattr(mesh_module, "TRY_S", 0.1)
    node = await start("node")
    monkeypatch.setattr(node.links, "get", for_ever)
    with trio.fail_after(5):
        await node._mesh._try(RELAYS[0])
    assert node._mesh._dialling.available_tokens == mesh_module.DIALS_MAX
    monkeypatch.setattr(mesh_module, "TRY_S", 60)
    monkeypatch.setattr(node._mesh, "_is_enough", lambda: True)
    with trio.fail_after(5):
        await node._mesh._try(RELAYS[0])  # it waited for its turn while others were linked


async def test_who_is_unwanted_is_not_dialled_for_others_and_nobody_is_once_it_is_full(start, monkeypatch):
    node = await start("node", peers_max=1)
    other = await start("other")
    assert node.links.may_dial(other.peer_id)
    node.doors.ban(other.peer_id, 1)
    assert not node.links.may_dial(other.peer_id)
    with pytest.raises(RemoteError, match="banned here"):
        await node.links.dial_at(other.peer_id, other.addresses)
    node.doors.unban(other.peer_id)
    await node.links.dial_at(other.peer_id, other.addresses, spare=True)
    assert node.links.full
    assert not node.links.may_dial(RELAYS[0])


async def test_who_was_dialled_for_another_s_sake_makes_room():
    doors = Doors(DoorLimits(), peers_max=2)
    for relay, spare in ((RELAYS[0], True), (RELAYS[1], False)):
        doors.dialled(relay, "198.51.100.1")
        if spare:
            doors.spare(relay)
    doors.standing.linked(RELAYS[2], 3600_000, 0)
    visit = doors.enter("203.0.113.1")
    assert visit is not None
    assert visit.known(RELAYS[2])
    assert set(doors._visits) == {RELAYS[1], RELAYS[2]}
