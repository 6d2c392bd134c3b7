"""Bandwidth limits: what passes in a simulated second, and who goes first."""

import pytest
import trio

from p2p.pace import Pace, pace_of


def test_no_limit_is_no_pace():
    assert pace_of(0) is None
    assert pace_of(1) is not None


@pytest.mark.parametrize("rate", [10_000, 1 << 20])
async def test_many_carriers_share_one_limit(rate, autojump_clock):
    pace, moved, seconds = Pace(rate), [0] * 8, max(20, 4_000_000 / rate)  # whose turn it is, is chance

    async def carry(n: int) -> None:
        while True:
            await pace.room()
            pace.used(pace.piece)
            moved[n] += pace.piece
            await trio.lowlevel.checkpoint()

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for n in range(8):
                nursery.start_soon(carry, n)
    assert sum(moved) == pytest.approx(seconds * rate, rel=0.1)
    assert min(moved) > 0.2 * max(moved)


async def test_calls_go_before_background_transfers(autojump_clock):
    pace, calls, bulk = Pace(100_000), [], 0

    async def transfer() -> None:
        nonlocal bulk
        while True:
            await pace.room(bulk=True)
            pace.used(pace.piece)
            bulk += pace.piece
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(transfer)
        for _ in range(200):
            await trio.sleep(0.05)
            started = trio.current_time()
            await pace.room()
            pace.used(1000)
            calls.append(trio.current_time() - started)
        nursery.cancel_scope.cancel()
    assert max(calls) == 0, "a call never waits for a transfer"
    assert bulk == pytest.approx(10 * 80_000, rel=0.1), "which takes what the calls leave"
