"""How far a clock is off, as its peers see it."""

import time

from p2p import clock
from p2p.face import Call, Reply
from p2p.memory import MemoryHub

HOUR_MS = 3600_000


async def test_the_median_of_the_peers_counts():
    hub = MemoryHub(1)
    me, *others = [hub.add() for _ in range(5)]
    assert await clock.measure(me, []) is None

    def wrong(by_ms: object):
        async def serve(_call: Call) -> Reply:
            return Reply({"unix_ms": int(time.time() * 1000) + by_ms if isinstance(by_ms, int) else by_ms})

        return serve

    peers = [node.peer_id for node in others]
    for node, by_ms in zip(others, (HOUR_MS, HOUR_MS + 40, -7 * HOUR_MS, "noon"), strict=True):
        node.serve(clock.METHOD, wrong(by_ms))
    skew = await clock.measure(me, peers)
    assert skew is not None
    assert skew.peers == 3
    assert abs(skew.offset_ms - HOUR_MS) <= skew.error_ms
    silent = hub.add()  # an older version: it does not know the method
    assert await clock.measure(me, [silent.peer_id]) is None
