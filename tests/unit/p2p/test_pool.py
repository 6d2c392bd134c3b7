"""Calls that come in while the node stops."""

import trio
import trio.testing

from p2p.guarded import Guarded
from p2p.pool import Pool


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
