"""A second replica for calls that are late: it is asked for the same sum groups while the first call stays open.

Owns: when a call is late, the race between the two, the budget. Does not own: calls (``jobs``), who is asked
(``core.dispatch``), the arithmetic of limits (``core.hedge``).

Invariants:
1. A sum group's first answer is taken; the bits are the same whoever wins.
2. Who loses is waited for by nobody, but its answer is still counted for payment if it comes before its own deadline:
   the peer counts it, and both sides must count alike.
3. Hedges are at most a twentieth of all calls, and a few (``core.hedge``); a late call beyond that waits on.
4. A hedge ends with the layer that it was made for, unless that layer has its answer already.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import trio

from config.errors import RemoteError, RiosError
from dmoe.asking import Work
from dmoe.core.dispatch import Need
from dmoe.core.hedge import HedgeBudget
from dmoe.core.routes import Table
from dmoe.jobs import Job, Jobs
from dmoe.replicas import Replicas, now_us
from p2p.deadlines import Deadlines
from p2p.face import LeftError, Reply

log = logging.getLogger(__name__)

READS = 3
"""So many rounds of the event loop may still bring in an answer that has arrived, before it is called late."""


class Hedges:
    """All races of a node. While :meth:`run` does not run, nobody is hedged."""

    def __init__(self, replicas: Replicas) -> None:
        self.budget = HedgeBudget()
        self.won = 0
        """Hedges that were quicker than the call they were for."""
        self.nursery: trio.Nursery | None = None
        self.timer = Deadlines()
        self.dispatcher = replicas.dispatcher

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        try:
            async with trio.open_nursery() as self.nursery:
                self.nursery.start_soon(self.timer.run)
                task_status.started()
        finally:
            self.nursery = None

    def watch(self, jobs: Jobs, work: Work, job: Job, needs: Sequence[Need], table: Table) -> None:
        """A call to a peer is about to leave: from its limit on, others are asked as well."""
        self.budget.called()
        if self.nursery is None or not any(len(need.replicas) > 1 for need in needs):
            return
        known = self.dispatcher.estimate(job.peer)
        limit_us = self.dispatcher.tails.limit_us(job.peer, known.finish_us(job.group_rows))
        if limit_us is None:
            return
        job.race = Race(self, jobs, work, job, needs, table)
        job.race.wait(limit_us / 1e6)

    def later(self, jobs: Jobs, work: Work, job: Job) -> bool:
        """Take a beaten job's answer when it comes. False if nothing can go on here."""
        if self.nursery is None:
            return False
        job.late = True
        self.nursery.start_soon(jobs.take_late, work, job)
        return True

    def detached(self, call: Callable[[], Awaitable[Reply]]) -> "Detached | None":
        """A call that goes on when nobody waits for it any more; None if nothing can go on here."""
        return Detached(self.nursery, call) if self.nursery is not None else None


class Race:
    """A call and those that are made because it is late (:class:`p2p.deadlines.Waiter`). It is ``over`` once nobody
    need be asked any more."""

    __slots__ = ("_hedges", "_job", "_jobs", "_needs", "_scope", "_table", "_wait_s", "_work", "asked", "ended", "over")

    def __init__(self, hedges: Hedges, jobs: Jobs, work: Work, job: Job, needs: Sequence[Need], table: Table) -> None:
        self.over = False
        self.asked = 0
        self.ended: trio.Event | None = None
        """Set once the hedges have ended; None before there are any."""
        self._hedges = hedges
        self._jobs = jobs
        self._work = work
        self._job = job
        self._needs = needs
        self._table = table
        self._scope: trio.CancelScope | None = None
        self._wait_s = 0.0

    def wait(self, wait_s: float) -> None:
        """Become late after this long."""
        self._wait_s = wait_s
        self._hedges.timer.add(trio.current_time() + wait_s, self)

    def expire(self) -> None:
        """The call is late."""
        if self._hedges.nursery is not None:
            self.ended = trio.Event()
            self._hedges.nursery.start_soon(self._hedge)

    async def finish(self) -> None:
        """The first call is over: wait for the hedges only if its groups have no answer."""
        self.over = True
        if self.ended is not None and not self._work.has(self._job.groups):
            await self.ended.wait()

    def drop(self) -> None:
        """The layer is over, perhaps without an answer."""
        self.over = True
        if self._scope is not None and not self._work.has(self._job.groups):
            self._scope.cancel()

    async def _hedge(self) -> None:
        assert self.ended is not None
        try:
            with trio.CancelScope() as self._scope:
                for _ in range(READS):
                    await trio.lowlevel.checkpoint()
                hedges = [] if self.over or self._job.has_answered else self._spares()
                if hedges:
                    async with trio.open_nursery() as nursery:
                        for hedge in hedges:
                            nursery.start_soon(self._ask, hedge)
        finally:
            self.ended.set()

    def _spares(self) -> list[Job]:
        """Calls to others for the same groups, as many as the budget has; none: it is late, and waits on."""
        needs = [spare for need in self._needs if (spare := self._spare(need)).replicas]
        plan = self._hedges.dispatcher.plan(needs, self._work.count, now_us(), 1.0) if needs else {}
        if not plan or not self._hedges.budget.take(len(plan)):
            self.wait(2 * self._wait_s)
            return []
        self.asked = len(plan)
        log.debug("layer %d at %s is late: %s asked as well", self._work.layer, self._job.peer, list(plan))
        return [
            self._jobs.job(self._work, peer, [needs[position] for position in positions], self._table)
            for peer, positions in plan.items()
        ]

    def _spare(self, need: Need) -> Need:
        gone = self._work.tried.get(need.group, ())
        spare = [
            replica for replica in need.replicas if (peer := replica.peer_id) != self._job.peer and peer not in gone
        ]
        return replace(need, replicas=tuple(spare))

    async def _ask(self, hedge: Job) -> None:
        """One hedge; if it is the quicker one, nobody waits for the first call any more."""
        first = self._work.has(self._job.groups)
        await self._jobs.ask(self._work, hedge)
        if not first and not self.over and self._work.has(self._job.groups):
            self._hedges.won += 1
            self._jobs.beaten(self._job)
        if self.over:
            self._jobs.settle()  # the layer may be long over


class Detached:
    """A call in a task of its own (:class:`p2p.face.Pending`), for networks that cannot send it at once."""

    def __init__(self, nursery: trio.Nursery, call: Callable[[], Awaitable[Reply]]) -> None:
        self.answered_ns = 0
        self._outcome: Reply | RiosError | None = None
        self._scope = trio.CancelScope()
        self._happened = trio.Event()
        self._left = self._waiting = False
        nursery.start_soon(self._run, call)

    async def _run(self, call: Callable[[], Awaitable[Reply]]) -> None:
        try:
            with self._scope:
                self._outcome = await call()
        except RiosError as error:
            self._outcome = error
        finally:
            if self._outcome is None:  # cancelled, perhaps with the whole node
                self._outcome = RemoteError("unavailable", "the call was given up", "try again")
            self.answered_ns = now_us() * 1000
            self._happened.set()

    async def wait(self) -> Reply:
        """See :meth:`p2p.face.Pending.wait`."""
        self._waiting = True
        try:
            await self._happened.wait()
        except trio.Cancelled:
            self.cancel()
            raise
        finally:
            self._waiting = False
        if self._left and self._outcome is None:
            self._left, self._happened = False, trio.Event()
            raise LeftError
        if isinstance(self._outcome, RiosError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def leave(self) -> None:
        """See :meth:`p2p.face.Pending.leave`."""
        if self._waiting and not self._happened.is_set():
            self._left = True
            self._happened.set()

    def cancel(self) -> None:
        """See :meth:`p2p.face.Pending.cancel`."""
        self._scope.cancel()
