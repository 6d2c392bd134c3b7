"""A node with limits on bandwidth, over both carriers: what passes is what is allowed, and calls stay quick."""

import os
from contextlib import asynccontextmanager

import pytest
import trio

from config.settings import P2pSettings
from p2p.core.identity import Identity
from p2p.face import Call, Reply
from p2p.network import open_network

RATE = 2 << 20
SIZE = 96 << 10


@asynccontextmanager
async def pair(tmp_path, lane: bool, **limits):
    """A server with limits and a caller without."""

    def settings(seeds=(), **more):
        return P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=seeds, lane=lane, **more)

    server, caller = Identity.from_seed(b"s" * 32), Identity.from_seed(b"c" * 32)
    async with (
        open_network(server, settings(**limits), data_dir=tmp_path / "server", version="1") as one,
        open_network(caller, settings(one.addresses), data_dir=tmp_path / "caller", version="1") as two,
    ):

        async def echo(call: Call) -> Reply:
            return Reply({}, [os.urandom(call.header["size"])])

        one.serve("test.echo", echo)
        with trio.fail_after(20):
            kind = await two.links.get(server.peer_id)
            assert kind.carrier.kind == ("lane" if lane else "stream")
        yield one, two


@pytest.mark.parametrize("lane", [True, False], ids=["lane", "stream"])
@pytest.mark.parametrize("direction", ["upload", "download"])
async def test_a_limit_holds_and_small_calls_pass(tmp_path, lane, direction):
    limits = {f"{direction}_bytes_per_second_max": RATE}
    async with pair(tmp_path, lane, **limits) as (server, caller):
        moved = 0

        async def load() -> None:
            nonlocal moved
            up = direction == "upload"
            while True:
                buffers = () if up else (bytes(SIZE),)
                size = SIZE if up else 0
                await caller.call(server.peer_id, "test.echo", {"size": size}, buffers, deadline_ms=30_000, bulk=True)
                moved += SIZE

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(load)
            started = trio.current_time()
            for _ in range(5):
                await caller.call(server.peer_id, "test.echo", {"size": 10}, deadline_ms=10_000)
                await trio.sleep(0.15)
            spent = trio.current_time() - started
            nursery.cancel_scope.cancel()
        assert moved < RATE * (spent + 1.5), "the limit holds (a burst, and what was under way, come on top)"
        assert moved > 0.2 * RATE * spent, "and is used"
        assert server.doors.statistics()["waited"][direction] > 0


async def test_without_limits_nothing_waits(tmp_path):
    async with pair(tmp_path, True) as (server, caller):
        assert server.doors.paces == (None, None)
        await caller.call(server.peer_id, "test.echo", {"size": SIZE}, deadline_ms=10_000)
        assert server.doors.statistics()["waited"] == {}
