"""The till: puts every running request's money operations into few, durable database transactions (group commit).

One writer, in a thread of its own, takes whatever waits and writes it at once: a hundred requests that come together
cost one commit. A reservation that comes alone, and need not be durable, is written in trio's thread instead, if that
waits for nothing. A ticker records the progress of running requests each second and settles what crashed gateways left
behind.

Invariants:
1. ``reserve`` returns only after the reservation is committed, durably if it says so; ``settle`` after it is durable.
2. A settlement that was handed over is written even if nobody waits for it any more; while the database is down it is
   tried again each second. By then its requester was told that it failed, so an answer of which nothing was told before
   its end is charged nothing.
3. The answers of one request are charged together or not at all.
4. The queue is bounded by the number of answers: each has at most one operation waiting, and while many wait nothing
   new is reserved.
"""

import logging
import math
import queue
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import sqlalchemy as sa
import trio

from config.errors import LocalError, RiosError
from gateway import books, idempotency
from gateway.billing.costs import CostBook
from gateway.books import Batch
from gateway.db import stamps
from gateway.db.session import POOL_SIZE, Database, Kept
from gateway.errors import ApiError
from gateway.money import Closing, Progress, Refused, Reservation, Settlement

_logger = logging.getLogger("rios.gateway")

_QUEUE_MAX = 8192
_BATCH_MAX = 256
_ALONE_SECONDS = 0.001
"""So long after another a reservation comes alone."""
_BATCHES_LOGGED = 100
"""After so many SQLite's log is brought into the file: a few megabytes."""
_TICK_SECONDS = 1.0
_SWEEP_TICKS = 15
_TOUCH_TICKS = 10
_REST_TICKS = 2 * _SWEEP_TICKS
"""So long after an outage nothing is taken for abandoned: no gateway could show that it was alive."""
_TRIES = 3
_RETRY_SECONDS = 0.2
_HANDOVER_SECONDS = 1.0
_DRAIN_SECONDS = 1.0
_ABANDONED_SECONDS = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Ends:
    """How the answers of one request ended."""

    settlements: tuple[Settlement, ...]


@dataclass(slots=True, eq=False)
class _Operation:
    """Something that waits for the writer. ``abandoned``: its requester was cancelled while it waited."""

    work: Reservation | _Ends | Closing | tuple[Progress, ...]
    costs: bool = False
    """Whatever the swarm was paid is to be written too."""
    done: trio.Event = field(default_factory=trio.Event)
    error: RiosError | None = None
    refused: Refused | None = None
    abandoned: bool = False
    tried: bool = False
    """It may have been written already."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A running request's reservation. The request writes how many tokens it delivered."""

    reservation: Reservation
    started_ms: int = field(default_factory=stamps.now_ms)
    delivered_tokens: int = 0
    recorded_tokens: int = 0


class Till:
    """The money side of a running gateway. ``instance`` names the gateway in reservations, stable over restarts."""

    def __init__(self, database: Database, instance: str) -> None:
        self.instance = instance
        self._database = database
        self._kept = Kept(database.engine)
        """The writer's connection, which trio's thread uses for what it writes while nobody else does."""
        self._batches = 0
        self._log_is_new, self._wrote_here_at = True, -math.inf
        self._limiter = trio.CapacityLimiter(POOL_SIZE)
        self._queue = queue.SimpleQueue[_Operation | None]()
        """What waits for the writer; after None it ends."""
        self._open = True
        self._given_up = False
        self._active: dict[str, Ticket] = {}
        self._scope = trio.CancelScope(shield=True)
        self.closed = trio.Event()
        self._late: list[_Ends | Closing] = []
        self._problem = ""
        self.spending: CostBook | None = None
        """What the swarm is paid; None: nobody counts it."""
        self.on_settled: Callable[[Settlement], None] | None = None
        """Told of what was settled, when that is written."""

    @property
    def problem(self) -> str:
        """Why the accounts database does not work, or nothing; as of the last use."""
        return self._problem

    @property
    def database(self) -> Database:
        """The accounts database, for :meth:`in_thread`."""
        return self._database

    def running(self) -> Sequence[Ticket]:
        """The requests that this gateway answers now."""
        return tuple(self._active.values())

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a blocking database call in a thread."""
        try:
            result = await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter, abandon_on_cancel=True)
        except LocalError as error:
            self._problem = error.message
            raise
        self._problem = ""
        return result

    async def drain(self) -> None:
        """Wait a moment for calls that nobody waits for any more, so that their connections can be closed."""
        places = [object() for _ in range(POOL_SIZE)]
        with trio.move_on_after(_ABANDONED_SECONDS):
            for place in places:
                await self._limiter.acquire_on_behalf_of(place)
        for place in self._limiter.statistics().borrowers:
            if place in places:
                self._limiter.release_on_behalf_of(place)

    async def recover(self) -> int:
        """Settle what a crash left behind; returns how many requests."""
        found = await self.in_thread(books.find_abandoned, self._database, self.instance)
        # A ticket stays active until its settlement is written, so what is not active now is nobody's.
        lost = [settlement for settlement in found if settlement.reservation.id not in self._active]
        if lost:
            await self.in_thread(books.write_batch, self._database, Batch(settle=lost))
            _logger.warning("settled %d requests that a stopped gateway left behind", len(lost))
        return len(lost)

    async def reserve(self, reservation: Reservation) -> Ticket:
        """Hold a request's worst case back (durably, if the reservation says so).

        Raises ApiError ``payment_required``, or LocalError if the database cannot be used.
        """
        if self._queue.qsize() >= _QUEUE_MAX:
            raise LocalError("unavailable", "the gateway is overloaded", "try again later")
        ticket = Ticket(reservation)
        self._active[reservation.id] = ticket
        operation = _Operation(reservation)
        came = False
        try:
            if not self._reserve_here(operation):
                await self._submit(operation)
            came = True
        finally:
            if not came:
                self._leave(operation)
        if operation.refused is not None:
            self._active.pop(reservation.id, None)
            raise _payment_required(operation.refused)
        return ticket

    async def settle(self, *settlements: Settlement) -> None:
        """Charge what was produced and give the rest back, durably, in one transaction. Handed over at once, even when
        cancelled."""
        await self.hand_over(*settlements)()

    def hand_over(self, *settlements: Settlement) -> Callable[[], Awaitable[None]]:
        """:meth:`settle`, for who has something else to do until that is durable: what to wait with."""
        operation = _Operation(_Ends(settlements))
        self._put(operation)
        return partial(self._written, operation)

    async def finish(self, closing: Closing) -> None:
        """Charge the answers under an idempotency key and keep what the client is told, in one transaction."""
        await self._submit(_Operation(closing))

    async def settle_after_cancel(self, *settlements: Settlement) -> None:
        """:meth:`settle` from a task that may be cancelled: waits a moment, and leaves the rest to the writer."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _HANDOVER_SECONDS):
            try:
                await self.settle(*settlements)
            except RiosError as error:
                names = ", ".join(each.reservation.id for each in settlements)
                _logger.error("request %s is not settled yet: %s", names, error)

    def _leave(self, operation: _Operation) -> None:
        """Its requester was cancelled, or told that it failed: nothing stays held back."""
        assert isinstance(operation.work, Reservation)
        self._active.pop(operation.work.id, None)
        if not operation.done.is_set():
            operation.abandoned = True  # the writer gives it back
        elif operation.error is None and operation.refused is None:
            self._give_back(operation.work)  # it was cancelled in the moment it was done

    def _reserve_here(self, operation: _Operation) -> bool:
        """Write a reservation at once, without the writer, if that should wait for nothing: it need not be durable,
        nobody else writes, and SQLite only appends to its log (it waits for the disk where another process has just
        brought the log into the file). What comes alone is handed over once less then; what comes together with others
        is written with them. False: the writer does it."""
        reservation, now = operation.work, trio.current_time()
        assert isinstance(reservation, Reservation)
        if reservation.synced or not (self._open and self._queue.empty()):
            return False
        if self._log_is_new or now - self._wrote_here_at < _ALONE_SECONDS or self._database.is_written_now():
            return False
        try:
            refused = books.write_batch(self._database, Batch(reserve=[reservation]), self._kept, waits=False)
        except RiosError:
            operation.tried = True
            return False
        self._wrote_here_at = trio.current_time()
        operation.refused = refused.get(reservation.id)
        operation.done.set()
        return True

    async def _submit(self, operation: _Operation) -> None:
        self._put(operation)
        await self._written(operation)

    def _put(self, operation: _Operation) -> None:
        if not self._open:
            raise LocalError("unavailable", "the gateway is stopping")
        self._queue.put(operation)

    async def _written(self, operation: _Operation) -> None:
        await operation.done.wait()
        if operation.error is not None:
            raise operation.error

    async def run(self) -> None:
        """The writer. Ends after :meth:`close`, when all that waits is written or the time for that is over."""
        try:
            with self._scope:
                token = trio.lowlevel.current_trio_token()
                await trio.to_thread.run_sync(self._serve, token, limiter=self._limiter, abandon_on_cancel=True)
        finally:
            self._given_up = True
            self.closed.set()

    async def tick(self) -> None:
        """The ticker: progress each second, and now and then a look at what others left behind."""
        count, failed = 0, -_REST_TICKS
        while True:
            await trio.sleep(_TICK_SECONDS)
            count += 1
            try:
                self._settle_late()
                # After a failure all of it: what was not written then, and others may take this gateway for dead.
                await self._record_progress(touch=count % _TOUCH_TICKS == 0 or failed == count - 1)
                if count % _SWEEP_TICKS == 0:
                    if count - failed >= _REST_TICKS:
                        await self.recover()
                    await self.in_thread(idempotency.expire, self._database)
            except RiosError as error:
                failed = count
                _logger.error("accounts: %s", error)

    def close(self) -> None:
        """Take nothing more; :meth:`run` ends soon. What was refused before is tried a last time."""
        if self._open:
            self._open = False
            self._settle_late()
            self._queue.put(None)
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + _DRAIN_SECONDS)

    def _settle_late(self) -> None:
        """Try again what the database refused when it was due."""
        late, self._late = self._late, []
        for work in late:
            self._queue.put(_Operation(work))

    async def _record_progress(self, *, touch: bool) -> None:
        steps = []
        for ticket in self._active.values():
            if touch or ticket.delivered_tokens != ticket.recorded_tokens:
                ticket.recorded_tokens = ticket.delivered_tokens
                steps.append(Progress(ticket.reservation.id, ticket.delivered_tokens))
        has_costs = self.spending is not None and self.spending.has_changed()
        if steps or has_costs:
            await self._submit(_Operation(tuple(steps), costs=has_costs))

    # --- in the writer's thread

    def _serve(self, token: trio.lowlevel.TrioToken) -> None:
        """Write what comes until the end is called, or nobody waits for it any more."""
        try:
            while not self._given_up:
                first = self._queue.get()
                if first is not None:
                    self._write(token, [first, *self._others()])
                    self._shorten_log()
                    continue
                # What was written last may have left something to give back.
                trio.from_thread.run_sync(int, trio_token=token)
                if self._queue.empty():
                    if self.spending is not None and self.spending.has_changed():
                        self._write(token, [_Operation((), costs=True)])
                    return
                self._queue.put(None)
        except trio.RunFinishedError:
            pass  # it took so long that nobody is left to tell
        finally:
            with suppress(LocalError):
                self._database.release(self._kept, for_good=self._given_up)

    def _shorten_log(self) -> None:
        """Now and then. The transaction after that begins the log anew and waits for the disk: it is the writer's."""
        if self._database.is_postgresql:
            return
        try:
            self._log_is_new, self._batches = False, self._batches + 1
            if self._batches >= _BATCHES_LOGGED:
                self._log_is_new, self._batches = True, 0
                self._log_is_new = self._database.shorten_log(self._kept)
        except (RiosError, sa.exc.SQLAlchemyError) as error:
            _logger.warning("the log of the accounts database is not shortened: %s", error)

    def _others(self) -> list[_Operation]:
        """What else waits."""
        found: list[_Operation] = []
        while len(found) + 1 < _BATCH_MAX:
            try:
                one = self._queue.get_nowait()
            except queue.Empty:
                break
            if one is None:
                self._queue.put(None)
                break
            found.append(one)
        return found

    def _write(self, token: trio.lowlevel.TrioToken, operations: list[_Operation]) -> None:
        """Write a batch and have those told who wait; a database that fails is tried again a few times."""
        live = [operation for operation in operations if not operation.abandoned]
        for each in operations:
            if each.abandoned and each.tried and isinstance(each.work, Reservation):
                token.run_sync_soon(self._give_back, each.work)
        if not live:
            return
        refused, failure = self._try_batch(token, live)
        if failure is not None and failure.code == "local" and len(live) > 1:
            # One of them cannot be booked; the others shall not suffer for it.
            for operation in live:
                self._write(token, [operation])
            return
        token.run_sync_soon(self._tell, live, refused, failure)

    def _try_batch(
        self, token: trio.lowlevel.TrioToken, live: list[_Operation]
    ) -> tuple[dict[str, Refused], RiosError | None]:
        """Write, trying again what may pass; returns what was refused, or why nothing was written."""
        batch, spending = _batch_of(live), self.spending
        names = [each.reservation.id for each in books.settlements_of(batch)]
        wanted = None if any(operation.costs for operation in live) else names
        if spending is not None and wanted != []:  # counted in trio's thread
            batch.costs = trio.from_thread.run_sync(spending.take, wanted, trio_token=token)
        failure: RiosError | None = None
        for _ in range(_TRIES):
            if failure is not None:
                batch.again = True
                time.sleep(_RETRY_SECONDS)
            try:
                refused = books.write_batch(self._database, batch, self._kept)
            except RiosError as error:
                failure = error
                self._problem = error.message
                if error.code == "local":  # it will not pass
                    break
            else:
                self._problem = ""
                return refused, None
        if spending is not None and batch.costs is not None:
            trio.from_thread.run_sync(spending.put_back, batch.costs, trio_token=token)
        return {}, failure

    # --- in trio's thread again

    def _tell(self, live: list[_Operation], refused: dict[str, Refused], failure: RiosError | None) -> None:
        for operation in live:
            operation.error = failure
            if isinstance(operation.work, Reservation):
                operation.refused = refused.get(operation.work.id)
                if operation.abandoned and not failure and not operation.refused:
                    self._give_back(operation.work)
            elif isinstance(operation.work, _Ends | Closing):
                self._finish(operation.work, failed=failure is not None)
            operation.done.set()

    def _finish(self, work: _Ends | Closing, *, failed: bool) -> None:
        if failed:
            self._late.append(_Ends(tuple(map(_unheard, work.settlements))) if isinstance(work, _Ends) else work)
            return
        for settlement in work.settlements:
            if self.on_settled is not None:
                self.on_settled(settlement)
            self._active.pop(settlement.reservation.id, None)

    def _give_back(self, unused: Reservation) -> None:
        """Release a reservation whose requester left while it was being written."""
        nothing = Settlement(reservation=unused, prompt_tokens=0, completion_tokens=0, outcome="cancelled")
        self._queue.put(_Operation(_Ends((nothing,))))


def _batch_of(operations: list[_Operation]) -> Batch:
    return Batch(
        again=any(o.tried for o in operations),
        reserve=[o.work for o in operations if isinstance(o.work, Reservation)],
        settle=[each for o in operations if isinstance(o.work, _Ends) for each in o.work.settlements],
        close=[o.work for o in operations if isinstance(o.work, Closing)],
        progress=[step for o in operations if isinstance(o.work, tuple) for step in o.work],
    )


def _unheard(settlement: Settlement) -> Settlement:
    """What is left to settle once the requester was told that it failed. Answers under a key need none of this: a retry
    gets what was kept, or takes the key over, and then the late one charges nothing."""
    if settlement.reservation.synced or settlement.outcome == "cancelled":
        return settlement  # something was told of it, or the client had left
    return replace(settlement, completion_tokens=0, outcome="failed")


def _payment_required(refused: Refused) -> ApiError:
    if refused.budget:
        return ApiError(
            "payment_required",
            f"this request may cost {refused.needed} microcredits and the budget of {refused.budget} has "
            f"{max(refused.available, 0)} left this month",
            "lower max_tokens, raise the budget, or wait for the next month (UTC)",
            public_code="budget_exceeded",
        )
    message = f"this request may cost {refused.needed} microcredits and the balance has {refused.available} left"
    return ApiError("payment_required", message, "lower max_tokens or add credit")
