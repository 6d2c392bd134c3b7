"""The till: puts every running request's money operations into few, durable database transactions (group commit).

One writer task takes whatever waits and writes it at once, so a hundred requests that start together cost one commit.
A ticker records the progress of running requests each second and settles what crashed gateways left behind.

Invariants:
1. ``reserve`` returns only after the reservation is durable; ``settle`` likewise.
2. A settlement that was handed over is written even if nobody waits for it any more; while the database is down it is
   tried again each second.
3. Both queues are bounded by the number of connections: a request has at most one operation waiting.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from config.errors import LocalError, RiosError
from gateway import books, idempotency
from gateway.books import Batch
from gateway.db.session import POOL_SIZE, Database
from gateway.errors import ApiError
from gateway.money import Closing, Progress, Refused, Reservation, Settlement

_logger = logging.getLogger("rios.gateway")

_QUEUE_MAX = 8192
_BATCH_MAX = 256
_TICK_SECONDS = 1.0
_SWEEP_TICKS = 15
_TOUCH_TICKS = 10
_TRIES = 3
_RETRY_SECONDS = 0.2
_HANDOVER_SECONDS = 1.0
_DRAIN_SECONDS = 1.0

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Operation:
    """Something that waits for the writer. ``abandoned``: its requester was cancelled while it waited."""

    work: Reservation | Settlement | Closing | tuple[Progress, ...]
    done: trio.Event = field(default_factory=trio.Event)
    error: RiosError | None = None
    refused: Refused | None = None
    abandoned: bool = False


@dataclass(slots=True, eq=False)
class Ticket:
    """A running request's reservation. The request writes how many tokens it delivered."""

    reservation: Reservation
    delivered_tokens: int = 0
    recorded_tokens: int = 0


class Till:
    """The money side of a running gateway. ``instance`` names the gateway in reservations, stable over restarts."""

    def __init__(self, database: Database, instance: str) -> None:
        self.instance = instance
        self._database = database
        self._limiter = trio.CapacityLimiter(POOL_SIZE)
        self._send, self._receive = trio.open_memory_channel[_Operation](_QUEUE_MAX)
        self._active: dict[str, Ticket] = {}
        self._scope = trio.CancelScope(shield=True)
        self.closed = trio.Event()
        self._late: list[Settlement | Closing] = []
        self._problem = ""

    @property
    def problem(self) -> str:
        """Why the accounts database does not work, or nothing; as of the last use."""
        return self._problem

    @property
    def database(self) -> Database:
        """The accounts database, for :meth:`in_thread`."""
        return self._database

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a blocking database call in a thread."""
        try:
            result = await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter, abandon_on_cancel=True)
        except LocalError as error:
            self._problem = error.message
            raise
        self._problem = ""
        return result

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
        """Hold a request's worst case back, durably.

        Raises ApiError ``payment_required``, or LocalError if the database cannot be used.
        """
        ticket = Ticket(reservation)
        self._active[reservation.id] = ticket
        operation = _Operation(reservation)
        try:
            await self._submit(operation)
        finally:
            if not operation.done.is_set():
                operation.abandoned = True  # The writer gives it back.
            if not operation.done.is_set() or operation.error or operation.refused:
                self._active.pop(reservation.id, None)
        if operation.refused is not None:
            raise _payment_required(operation.refused)
        return ticket

    async def settle(self, settlement: Settlement) -> None:
        """Charge what was produced and give the rest back, durably. Handed over at once, even when cancelled."""
        await self._submit(_Operation(settlement))

    async def finish(self, closing: Closing) -> None:
        """Charge the answers under an idempotency key and keep what the client is told, in one transaction."""
        await self._submit(_Operation(closing))

    async def settle_after_cancel(self, settlement: Settlement) -> None:
        """:meth:`settle` from a task that may be cancelled: waits a moment, and leaves the rest to the writer."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _HANDOVER_SECONDS):
            try:
                await self.settle(settlement)
            except RiosError as error:
                _logger.error("request %s is not settled yet: %s", settlement.reservation.id, error)

    async def _submit(self, operation: _Operation) -> None:
        try:
            self._send.send_nowait(operation)
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            operation.error = LocalError("unavailable", "the gateway is stopping or overloaded")
            operation.done.set()
        await operation.done.wait()
        if operation.error is not None:
            raise operation.error

    async def run(self) -> None:
        """The writer. Ends after :meth:`close`, when all that waits is written or the time for that is over."""
        try:
            with self._scope:
                async for first in self._receive:
                    batch = [first]
                    while len(batch) < _BATCH_MAX:
                        try:
                            batch.append(self._receive.receive_nowait())
                        except (trio.WouldBlock, trio.EndOfChannel):
                            break
                    await self._write(batch)
        finally:
            self.closed.set()

    async def tick(self) -> None:
        """The ticker: progress each second, and now and then a look at what others left behind."""
        count = 0
        while True:
            await trio.sleep(_TICK_SECONDS)
            count += 1
            try:
                await self._settle_late()
                await self._record_progress(touch=count % _TOUCH_TICKS == 0)
                if count % _SWEEP_TICKS == 0:
                    await self.recover()
                    await self.in_thread(idempotency.expire, self._database)
            except RiosError as error:
                _logger.error("accounts: %s", error)

    def close(self) -> None:
        """Take nothing more; :meth:`run` ends soon."""
        self._send.close()
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + _DRAIN_SECONDS)

    async def _settle_late(self) -> None:
        """Try again what the database refused when it was due."""
        for work in self._late[:_BATCH_MAX]:
            try:
                self._send.send_nowait(_Operation(work))
            except trio.WouldBlock:
                return
            self._late.remove(work)

    async def _record_progress(self, *, touch: bool) -> None:
        steps = []
        for ticket in self._active.values():
            if touch or ticket.delivered_tokens != ticket.recorded_tokens:
                ticket.recorded_tokens = ticket.delivered_tokens
                steps.append(Progress(ticket.reservation.id, ticket.delivered_tokens))
        if steps:
            await self._submit(_Operation(tuple(steps)))

    async def _write(self, operations: list[_Operation]) -> None:
        """Write a batch and wake who waits; a database that fails is tried again a few times."""
        for operation in operations:
            if operation.abandoned:
                operation.done.set()
        live = [operation for operation in operations if not operation.abandoned]
        if not live:
            return
        refused, failure = await self._try_batch(live)
        if failure is not None and failure.code == "local" and len(live) > 1:
            # One of them cannot be booked; the others shall not suffer for it.
            for operation in live:
                await self._write([operation])
            return
        for operation in live:
            operation.error = failure
            if isinstance(operation.work, Reservation):
                operation.refused = refused.get(operation.work.id)
            elif isinstance(operation.work, Settlement | Closing):
                self._finish(operation.work, failed=failure is not None)
            operation.done.set()
        await self._give_back([o for o in live if o.abandoned and not failure and not o.refused])

    async def _try_batch(self, live: list[_Operation]) -> tuple[dict[str, Refused], RiosError | None]:
        """Write, trying again what may pass; returns what was refused, or why nothing was written."""
        batch = _batch_of(live)
        failure: RiosError | None = None
        for _ in range(_TRIES):
            if failure is not None:
                batch.again = True
                await trio.sleep(_RETRY_SECONDS)
            try:
                return await self.in_thread(books.write_batch, self._database, batch), None
            except RiosError as error:
                failure = error
        return {}, failure

    def _finish(self, work: Settlement | Closing, *, failed: bool) -> None:
        if failed:
            self._late.append(work)
            return
        for settlement in work.settlements if isinstance(work, Closing) else (work,):
            self._active.pop(settlement.reservation.id, None)

    async def _give_back(self, operations: list[_Operation]) -> None:
        """Release reservations whose requester left while they were being written."""
        unused = [
            _Operation(Settlement(reservation=o.work, prompt_tokens=0, completion_tokens=0, outcome="cancelled"))
            for o in operations
            if isinstance(o.work, Reservation)
        ]
        if unused:
            await self._write(unused)


def _batch_of(operations: list[_Operation]) -> Batch:
    return Batch(
        reserve=[o.work for o in operations if isinstance(o.work, Reservation)],
        settle=[o.work for o in operations if isinstance(o.work, Settlement)],
        close=[o.work for o in operations if isinstance(o.work, Closing)],
        progress=[step for o in operations if isinstance(o.work, tuple) for step in o.work],
    )


def _payment_required(refused: Refused) -> ApiError:
    message = f"this request may cost {refused.needed} microcredits and the balance has {refused.available} left"
    return ApiError("payment_required", message, "lower max_tokens or add credit")
