"""The short form of ``bench_faults``: the real engine answers while hosts die, stall or are slow, and says the same."""

from functools import partial

import pytest
import trio

from tests.bench.bench_faults import Series
from tests.bench.fault_swarm import cases, fault_swarm, model, references

RUNS = 8
TOKENS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return model(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def expected(made):
    return trio.run(partial(references, made, cases(TOKENS)))


async def series_of(made, tmp_path, expected, fault, mend, *, seed, warm=0):
    async with fault_swarm(made, tmp_path, seed=seed) as swarm:
        series = Series(swarm, cases(TOKENS), expected, seed)
        if warm:
            await series.without_faults(warm)
        await series.with_faults(RUNS, "fault", partial(fault, swarm), partial(mend, swarm))
        return series, swarm


async def test_a_host_that_dies_changes_no_text(made, tmp_path, expected):
    async def kill(swarm, host):
        swarm.hub.kill(host.network.peer_id)
        await trio.lowlevel.checkpoint()

    def revive(swarm, host):
        swarm.hub.revive(host.network.peer_id)

    series, _ = await series_of(made, tmp_path, expected, kill, revive, seed=3)
    assert (series.failed, series.changed) == (0, 0), f"seed 3: {series.failed} failed, {series.changed} changed"


async def test_a_host_that_stalls_changes_no_text(made, tmp_path, expected):
    async def stall(swarm, host):
        swarm.hub.stall(host.network.peer_id)
        await trio.lowlevel.checkpoint()

    def wake(swarm, host):
        swarm.hub.wake(host.network.peer_id)

    series, _ = await series_of(made, tmp_path, expected, stall, wake, seed=4, warm=2)
    assert (series.failed, series.changed) == (0, 0), f"seed 4: {series.failed} failed, {series.changed} changed"


async def test_hosts_that_stop_cleanly_cost_a_retry_and_no_more(made, tmp_path, expected):
    """Draining: what a host has taken it answers; what comes later goes elsewhere."""
    async with fault_swarm(made, tmp_path, seed=5) as swarm:
        series = Series(swarm, cases(TOKENS), expected, 5)
        leaving = swarm.hosts[1]
        left = trio.Event()

        async def drain(host):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leaving.worker.drain)
                nursery.start_soon(leaving.stages.drain)
            assert leaving.worker.statistics()["active"] == 0
            assert leaving.stages.statistics()["active"] == 0
            swarm.hub.kill(leaving.network.peer_id)
            left.set()

        await series.with_faults(RUNS, "drain", drain, lambda host: None)
        assert (series.failed, series.changed) == (0, 0), "seed 5"
        assert left.is_set()


async def test_a_slow_host_does_not_multiply_calls(made, tmp_path, expected):
    async with fault_swarm(made, tmp_path, seed=6, hosts=3, delay_s=(0.0005, 0.001)) as swarm:
        series = Series(swarm, cases(TOKENS), expected, 6)
        swarm.hub.slow[swarm.hosts[1].network.peer_id] = 20.0
        wanted = [case for case in cases(TOKENS) if case.route == "experts"]
        for _ in range(2):
            for case in wanted:
                series.compare(case, await swarm.run(case), "grey")
        assert (series.failed, series.changed) == (0, 0), "seed 6"
        sent = swarm.calls["expert.run"]
        assert sent > 100
        assert sent <= 1.2 * (sent - swarm.repeated)
