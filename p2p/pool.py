"""Tasks that wait for calls to serve: handing a call to a waiting task is much cheaper than starting one.

Invariants: a job runs in exactly one task; at most ``idle_max`` tasks wait; a job never raises (it is guarded).
"""

import logging
from collections.abc import Awaitable, Callable

import outcome
import trio

from p2p.guarded import Nursery

log = logging.getLogger(__name__)

Job = Callable[[], Awaitable[None]]


class Pool:
    """Runs jobs in tasks of one nursery."""

    def __init__(self, nursery: Nursery, *, idle_max: int = 64) -> None:
        self._nursery = nursery
        self._idle_max = idle_max
        self._idle: list[trio.lowlevel.Task] = []
        self.busy = 0

    def submit(self, job: Job) -> None:
        """Run ``job`` soon, in the task that became idle last. Once the nursery has ended it is left undone."""
        self.busy += 1
        if self._idle:
            trio.lowlevel.reschedule(self._idle.pop(), outcome.Value(job))
            return
        try:
            self._nursery.start_soon(self._work, job)
        except RuntimeError:  # trio's word for a nursery that ended: the node stops, its connections close next
            self.busy -= 1

    async def _work(self, job: Job) -> None:
        while True:
            try:
                await job()
            except Exception:
                log.exception("a call could not be served")
            finally:
                self.busy -= 1
            if len(self._idle) >= self._idle_max:
                return
            task = trio.lowlevel.current_task()
            self._idle.append(task)
            job = await trio.lowlevel.wait_task_rescheduled(self._leave)

    def _leave(self, _raise_cancel: Callable[[], object]) -> trio.lowlevel.Abort:
        # only the nursery's own end cancels an idle task, so nobody will submit to it any more
        self._idle.clear()
        return trio.lowlevel.Abort.SUCCEEDED
