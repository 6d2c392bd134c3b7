"""Calls while the node stops."""

from types import SimpleNamespace

import trio
import trio.testing

from p2p.face import Reply
from p2p.guarded import Guarded
from p2p.pool import Pool
from p2p.waiting import Waiter


async def test_jobs_run_and_one_that_comes_after_the_end_is_left_undone():
    done = []

    async def job():
        done.append(1)

    async with trio.open_nursery() as nursery:
        pool = Pool(Guarded(nursery))
        pool.submit(job)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert done == [1]
    pool.submit(job)  # a connection that is closed a moment later than the nursery still hands over what it read
    assert (done, pool.busy) == ([1], 0)


async def test_a_call_that_is_cancelled_may_start_tasks_and_everybody_is_cancelled_all_the_same():
    """To give a call up may find that its link is gone, and tasks begin that look after that. Trio's walk over its
    tasks did not survive it: a node that stopped then went on for ever."""
    given_up = []

    async with trio.open_nursery() as nursery:

        def give_up(call_id: int) -> None:
            given_up.append(call_id)
            nursery.start_soon(trio.sleep, 0)

        for call_id in range(3):
            nursery.start_soon(Waiter(SimpleNamespace(give_up=give_up), call_id, "job.run").wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sorted(given_up) == [0, 1, 2]


async def test_an_answer_that_comes_when_the_call_is_cancelled_wakes_nobody_twice():
    waiter = Waiter(SimpleNamespace(give_up=lambda call_id: None), 1, "job.run")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter.wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        waiter.settle(Reply({}, ()))
        waiter.leave()
    assert waiter.over
