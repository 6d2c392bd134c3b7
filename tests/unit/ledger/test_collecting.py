"""Handovers are fetched each on its own: who dribbles, stalls or sends something else delays nobody."""

import pytest
import trio

from config.errors import RemoteError
from ledger.collecting import DEADLINE_MS, PIECE_BYTES, Collecting
from ledger.core.objects import HANDOVER_BYTES_MAX, Signed
from p2p.face import Reply
from p2p.memory import MemoryHub
from tests.unit.ledger.test_committee_change import NEW, USER, epochs
from tests.unit.ledger.test_network import CREDIT, identity, until

NET, KEY = bytes(16), b"k" * 32
BODY = bytes(range(250)) * 10_000
SIGNATURE = b"s" * 64


async def dribble(call):
    return Reply({"bytes": HANDOVER_BYTES_MAX, "signature": SIGNATURE}, [b"x"])


async def crawl(call):
    await trio.sleep(DEADLINE_MS / 1000 - 1)
    return Reply({"bytes": HANDOVER_BYTES_MAX, "signature": SIGNATURE}, [bytes(PIECE_BYTES)])


async def nothing(call):
    await trio.sleep_forever()


@pytest.mark.parametrize("lie", [dribble, crawl, nothing])
async def test_an_old_witness_that_never_ends_stops_no_committee(tmp_path, autojump_clock, lie):
    async with epochs(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        await s.stop(1)
        s.hub.add(s.ids[1]).serve("ledger.handover", lie)
        await s.change(s.committee(1, s.made.values()), (0, 2, 3))
        with trio.fail_after(20):
            await until(lambda: all(s.phase(n) == "voting" for n in NEW))
        await s.ledgers[USER].transfer(s.ids[5].public_key, 7)


async def honest(call):
    offset = call.header["offset"]
    return Reply({"bytes": len(BODY), "signature": SIGNATURE}, [BODY[offset : offset + PIECE_BYTES]])


async def grows(call):
    offset = call.header["offset"]
    size = len(BODY) + offset
    return Reply({"bytes": size, "signature": SIGNATURE}, [bytes(min(PIECE_BYTES, size - offset))])


async def another(call):
    return Reply({"bytes": 5, "signature": SIGNATURE}, [b"other"])


async def absent(call):
    raise RemoteError("not_found", "no handover is here")


async def fetched(*handlers, keys=(KEY,), seconds=3600.0):
    """What is taken when peers answer like this, and when."""
    hub, taken = MemoryHub(1), {}
    collecting = Collecting(hub.add(identity(99)), NET)
    peers = []
    for n, handler in enumerate(handlers):
        network = hub.add(identity(n + 1))
        network.serve("ledger.handover", handler)
        peers.append(network.peer_id)

    def take_for(key):
        async def take(signed):
            if signed == Signed(BODY, SIGNATURE):
                taken[key] = trio.current_time()
                return True
            return False

        return take

    start = trio.current_time()
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for key in keys:
                for _ in range(2):  # the second is under way already
                    collecting.begin(nursery, 0, key, peers[0], peers[1:], 1, take_for(key))
    assert not collecting._under_way or trio.current_time() - start >= seconds
    return {key: at - start for key, at in taken.items()}


async def test_pieces_are_put_together_and_whoever_has_them_will_do(autojump_clock):
    assert KEY in await fetched(honest)
    for lie in (absent, dribble, grows, another):
        assert (await fetched(lie, honest))[KEY] < 1
        assert await fetched(lie) == {}


async def test_a_peer_that_crawls_is_overtaken_by_the_next(autojump_clock):
    assert (await fetched(crawl, honest))[KEY] < 60


async def test_liars_leave_room_for_the_others(autojump_clock):
    """One liar in each committee, and both crawl: of many large handovers all that are to be had come."""
    keys = [bytes([n]) * 32 for n in range(16)]

    async def liar_for_the_first(call):
        return await (crawl if call.header["witness"] == keys[0] else honest)(call)

    taken = await fetched(liar_for_the_first, crawl, keys=keys, seconds=100)
    assert set(taken) == set(keys[1:])
    assert max(taken.values()) < 20
