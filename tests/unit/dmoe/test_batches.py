"""What runs when: at once, in turn, together, in parts; and that rows do not notice."""

from contextlib import asynccontextmanager
from threading import Barrier, get_ident

import numpy as np
import pytest
import trio

from config.errors import RemoteError
from dmoe import batches as batches_module
from dmoe.batches import PART_ROWS_MIN, Batches
from dmoe.loaded import Job, LoadedShard, plan_of
from dmoe.runtime import weighted_sum
from dmoe.threads import Threads
from tests.unit.dmoe.swarm_kit import HIDDEN, FakeShard, make_manifest

MANIFEST = make_manifest()


def rows(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, HIDDEN)).astype(np.float32)


def loaded(index=0, *, seconds=0.001):
    """A shard believed to take so long per row: by default long enough for a thread, not too long for the loop."""
    shard = MANIFEST.shards[index]
    return LoadedShard(plan_of(MANIFEST, shard), FakeShard(shard), row_seconds=seconds)


def forever():
    return trio.current_time() + 60


@asynccontextmanager
async def running(*, threads=2, **limits):
    limits = {"queue_rows_max": 4096, "batch_rows_max": 512} | limits
    made = Batches(threads=threads, **limits)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await trio.testing.wait_all_tasks_blocked()
        yield made
        nursery.cancel_scope.cancel()


async def test_what_is_quicker_than_a_thread_runs_on_the_loop_even_in_a_crowd():
    async with running() as made:
        shard, home, used = loaded(seconds=1e-6), get_ident(), []
        compute = shard.shard.partial
        shard.shard.partial = lambda *args: used.append(get_ident()) or compute(*args)
        async with trio.open_nursery() as nursery:
            for n in range(1, 6):
                nursery.start_soon(made.later, [shard], 0, rows(n), None, None, forever())
        assert used == [home]
        assert shard.shard.batches == [15]
        shard.row_seconds = 1.0
        await made.later([shard], 0, rows(1), None, None, forever())
        assert used[1] != home


async def test_a_small_call_that_finds_nobody_runs_at_once():
    async with running() as made:
        shard, h = loaded(), rows(2)
        (answer,) = made.now([shard], 0, h, None, None)
        assert answer.tobytes() == shard.shard.partial(0, h, None, None).tobytes()
        assert shard.statistics()["calls_at_once"] == 1


async def test_calls_that_crowd_queue_instead(monkeypatch):
    async with running() as made:
        shard, h = loaded(), rows(1)
        monkeypatch.setattr(batches_module, "CROWD_SECONDS", 60.0)
        monkeypatch.setattr(batches_module, "CROWD_MEMORY_SECONDS", 0.5)
        made.answered()  # a call has ended just now: this one was waiting for it
        assert made.now([shard], 0, h, None, None) is None
        monkeypatch.setattr(batches_module, "CROWD_SECONDS", 0.0)
        assert made.now([shard], 0, h, None, None) is None, "and those after it, for a while"
        await trio.sleep(0.6)
        assert made.now([shard], 0, h, None, None) is not None
        shard.running = 1
        assert made.now([shard], 0, h, None, None) is None, "somebody is computing"


async def test_work_that_takes_long_never_runs_on_the_loop():
    async with running() as made:
        shard = loaded()
        shard.row_seconds = batches_module.INLINE_SECONDS_MAX
        assert made.now([shard], 0, rows(2), None, None) is None
        (answer,) = await made.later([shard], 0, rows(2), None, None, forever())
        assert len(answer) == 2
        assert shard.batches == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
async def test_a_large_batch_is_divided_over_free_threads_without_changing_a_bit(threads):
    async with running(threads=threads) as made:
        shard, h = loaded(), rows(5 * PART_ROWS_MIN + 3)
        used, together = set(), Barrier(threads)
        compute = shard.shard.partial

        def partial(layer, part, experts, weights):
            together.wait(10)  # broken unless all parts run at the same time
            used.add(get_ident())
            return compute(layer, part, experts, weights)

        shard.shard.partial = partial
        (answer,) = await made.later([shard], 0, h, None, None, forever())
        assert len(used) == threads
        assert answer.tobytes() == compute(0, h, None, None).tobytes()
        assert shard.batches == 1
        assert shard.batch_rows_max == len(h)


async def test_in_a_crowd_of_small_calls_one_thread_stays_idle_large_batches_get_all(monkeypatch):
    monkeypatch.setattr(batches_module, "CROWD_MEMORY_SECONDS", 60.0)
    async with running(threads=2) as made:
        shards = [loaded(index) for index in range(3)]
        for shard in shards:
            shard.shard.gate.clear()
        made.crowded(followed=True)
        async with trio.open_nursery() as nursery:
            for shard, count in zip(shards, (3, 2, 1), strict=True):
                nursery.start_soon(made.later, [shard], 0, rows(count), None, None, forever())
            await trio.testing.wait_all_tasks_blocked()
            assert [shard.running for shard in shards] == [1, 0, 0]
            nursery.start_soon(made.later, [shards[2]], 0, rows(2 * PART_ROWS_MIN), None, None, forever())
            await trio.testing.wait_all_tasks_blocked()
            assert [shard.running for shard in shards] == [1, 0, 1]
            for shard in shards:
                shard.shard.gate.set()


async def test_a_part_that_fails_fails_its_calls_and_nothing_else():
    async with running() as made:
        shard, h = loaded(), rows(3 * PART_ROWS_MIN)
        compute, seen = shard.shard.partial, []

        def partial(layer, part, experts, weights):
            seen.append(len(part))
            if len(seen) == 1:
                raise ValueError("broken")
            return compute(layer, part, experts, weights)

        shard.shard.partial = partial
        with pytest.raises(ValueError, match="broken"):
            await made.later([shard], 0, h, None, None, forever())
        (answer,) = await made.later([shard], 0, h, None, None, forever())
        assert answer.tobytes() == compute(0, h, None, None).tobytes()
        assert shard.free


async def test_what_comes_while_a_batch_runs_is_one_batch_after_it():
    async with running(threads=1) as made:
        shard = loaded()
        shard.shard.gate.clear()
        got = {}

        async def ask(n):
            (got[n],) = await made.later([shard], 0, rows(n, n), None, None, forever())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert shard.running
            for n in range(2, 9):
                nursery.start_soon(ask, n)
            await trio.testing.wait_all_tasks_blocked()
            shard.shard.gate.set()
        assert shard.shard.batches == [1, sum(range(2, 9))]
        for n, answer in got.items():
            assert answer.tobytes() == shard.shard.partial(0, rows(n, n), None, None).tobytes()


async def test_most_rows_first_but_nobody_waits_for_ever():
    async with running(threads=1) as made:
        busy, few, many = (loaded(index) for index in range(3))
        order = []
        for shard, name in ((few, "few"), (many, "many")):
            compute = shard.shard.partial
            shard.shard.partial = lambda *args, c=compute, n=name: order.append(n) or c(*args)
        busy.shard.gate.clear()

        async def ask(shard, count, times=1):
            for _ in range(times):
                await made.later([shard], 0, rows(count), None, None, forever())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, busy, 1)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask, few, 1)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask, many, 9)
            await trio.testing.wait_all_tasks_blocked()
            busy.shard.gate.set()
        assert order == ["many", "few"]

        made._ready.extend((few, many))
        few.put(Job(0, rows(1), None, None, lambda: None))
        taken = []
        for _ in range(2 * (batches_module.PASSED_OVER_MAX + 1)):
            many.rows_waiting = 9
            shard = made._next()
            taken.append(shard is few)
            made._ready.appendleft(few) if shard is few else made._ready.append(many)
        many.rows_waiting = 0
        few.forget(few.waiting[0])
        made._ready.clear()
        assert taken.count(True) == 2


async def test_a_caller_that_goes_takes_its_rows_out_of_the_queue():
    async with running(threads=1) as made:
        shard = loaded()
        shard.shard.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.later, [shard], 0, rows(1), None, None, forever())
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.01):
                await made.later([shard], 0, rows(5), None, None, forever())
            assert shard.rows_waiting == 0
            shard.shard.gate.set()
        assert shard.shard.batches == [1]
        assert shard.free


async def test_at_the_end_what_runs_is_finished_and_what_waits_is_told():
    shard, outcomes = loaded(), {}

    async def ask(made, name):
        try:
            (outcomes[name],) = await made.later([shard], 0, rows(1), None, None, forever())
        except RemoteError as error:
            outcomes[name] = error.code

    async def open_at_the_end():
        try:
            await trio.sleep_forever()
        finally:
            shard.shard.gate.set()  # in the turn in which all is cancelled: what runs still does

    with trio.fail_after(20):
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            made = Batches(threads=1, queue_rows_max=4096, batch_rows_max=512)
            inner.start_soon(made.run)
            inner.start_soon(open_at_the_end)
            await trio.testing.wait_all_tasks_blocked()
            shard.shard.gate.clear()
            for name in ("runs", "waits"):
                outer.start_soon(ask, made, name)
                await trio.testing.wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
    assert outcomes["waits"] == "unavailable"
    assert len(outcomes["runs"]) == 1
    assert shard.free


async def test_threads_survive_faults_and_report_on_the_loop(caplog):
    threads, done = Threads(1), trio.Event()
    home = get_ident()

    def fail():
        raise ValueError("a bug")

    def finish():
        assert get_ident() == home
        done.set()
        raise ValueError("another bug")

    threads.submit(fail, finish)
    await done.wait()
    again = trio.Event()
    await trio.testing.wait_all_tasks_blocked()
    threads.submit(lambda: None, again.set)
    await again.wait()
    threads.close()
    assert {record.getMessage() for record in caplog.records} == {
        "a fault in a compute thread",
        "a fault after a compute thread",
    }


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_weighted_sum_is_what_it_says(count):
    dice = np.random.default_rng(count)
    h = rows(count)
    members = (2, 3, 4)
    experts = np.stack([dice.permutation(6)[:3] for _ in range(count)]).astype(np.int32)
    weights = dice.random(experts.shape, np.float32)
    for chosen in (experts, np.full((count, 1), 3, np.int32), np.full((count, 1), 5, np.int32)):
        scales = weights[:, : chosen.shape[1]]
        expected = np.zeros_like(h)
        for expert in members:
            for row, choices in enumerate(chosen):
                for choice, scale in zip(choices, scales[row], strict=True):
                    if choice == expert:
                        expected[row] += scale * (h[row] * np.float32(expert))
        got = weighted_sum(members, h, chosen, scales, lambda expert, part: part * np.float32(expert))
        assert got.tobytes() == expected.tobytes()
        assert got is not h


async def test_what_fails_on_the_loop_is_tried_in_a_thread_and_stays_there_for_a_while():
    async with running() as made:
        shard, home, used = loaded(seconds=1e-6), get_ident(), []
        compute = shard.shard.partial

        def partial(*args):
            used.append(get_ident())
            if used[-1] == home:
                raise RemoteError("unavailable", "it is late", "ask another replica")
            return compute(*args)

        shard.shard.partial = partial
        x = rows(2)
        assert made.now([shard], 0, x, None, None) is None
        (found,) = await made.later([shard], 0, x, None, None, forever())
        assert (found == compute(0, x, None, None)).all()
        assert len(used) == 2
        made._crowd_until = made._last_end = 0.0
        assert made.now([shard], 0, x, None, None) is None
        assert len(used) == 2
