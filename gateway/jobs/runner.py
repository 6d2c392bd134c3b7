"""Works on batches: takes one that nobody works on, answers its lines as if each had come over HTTP, writes its files.

Each gateway has some of these workers. A line goes through the limits, the money and the engine of a direct request;
under an idempotency key of its own, so that it is charged once even if a gateway dies between answer and note.

Invariants:
1. At most ``lines_at_once`` lines of all batches run here at the same time: those who wait for answers come first.
2. A line that cannot be answered now (limits, no replica, a full engine) is tried again until the batch's time is over.
3. A batch that another gateway took over is left alone at once. One is also let go, after a turn, while a user waits
   of whom fewer are worked on: nobody's long batches keep out the others'.
4. One pass over a whole file at a time, in a thread that is not one of the till's: what others wait for has those.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import trio

from config.errors import BusyError, RiosError
from gateway.accounts import LOCAL, Accounts, Principal
from gateway.db.session import Database
from gateway.db.stamps import now_ms
from gateway.endpoint import permitted
from gateway.errors import ApiError, error_body, error_status, internal_error
from gateway.idempotency import wanted
from gateway.jobs import batches, files
from gateway.jobs.batches import HOLD_MS, Batch, Line, request_id
from gateway.openai.chat import chat_order
from gateway.openai.completions import completion_order
from gateway.openai.embeddings import EmbeddingBody, embed
from gateway.openai.job import Service
from gateway.openai.keyed import keyed_answer
from gateway.openai.requests import ChatBody, CompletionBody, decode

if TYPE_CHECKING:
    from gateway.openai.job import Order
    from gateway.openai.stream import Shape

T = TypeVar("T")

_logger = logging.getLogger("rios.gateway")

WORKERS = 4
_POLL_SECONDS = 1.0
_SWEEP_SECONDS = 600.0
_FETCH_LINES = 64
_TURN_SECONDS = 10.0
_PAUSE_SECONDS, _PAUSE_SECONDS_MAX = 1.0, 30.0
_ABANDONED_SECONDS = 0.5
_LATER = frozenset((408, 409, 429, 503, 507))
"""Statuses of what may be answered later; also a full disk, which leaves a charge to be booked when there is room."""


class Runner:
    """The workers of a gateway. :meth:`run` must be running."""

    def __init__(self, service: Service, accounts: Accounts, *, lines_at_once: int) -> None:
        self._service, self._accounts = service, accounts
        self._till = service.till
        self._limiter = trio.CapacityLimiter(lines_at_once)
        self._passes = trio.CapacityLimiter(1)
        self._wake = trio.Event()

    def wake(self) -> None:
        """There is a new batch."""
        self._wake.set()
        self._wake = trio.Event()

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            await self._till.in_thread(batches.let_all_go, self._till.database, self._till.instance)
        except RiosError as error:
            _logger.warning("batches of an earlier run wait until they are free: %s", error)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sweep)
                for _ in range(WORKERS):
                    nursery.start_soon(self._serve)
        finally:
            # A pass that nobody waits for any more has its connection a moment longer.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _ABANDONED_SECONDS):
                await self._passes.acquire()

    async def _serve(self) -> None:
        while True:
            try:
                batch = await self._till.in_thread(batches.claim, self._till.database, self._till.instance)
                if batch is not None:
                    await self._work(batch)
                    continue
            except RiosError as error:
                _logger.warning("batches: %s", error)
            except Exception:
                # One batch must never take the node down.
                _logger.exception("a batch failed")
            wake = self._wake
            with trio.move_on_after(_POLL_SECONDS):
                await wake.wait()

    async def _sweep(self) -> None:
        while True:
            try:
                await self._till.in_thread(files.sweep, self._till.database)
            except RiosError as error:
                _logger.warning("files: %s", error)
            await trio.sleep(_SWEEP_SECONDS)

    async def _work(self, batch: Batch) -> None:
        work = _Work(self._service, self._accounts, self._limiter, self._passes, batch)
        try:
            await work.run()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                try:
                    await self._till.in_thread(batches.let_go, self._till.database, batch)
                except RiosError as error:
                    _logger.warning("batch %s is let go later: %s", batch.id, error)


class _Work:
    """One batch, from where it stands to its end."""

    def __init__(
        self,
        service: Service,
        accounts: Accounts,
        limiter: trio.CapacityLimiter,
        passes: trio.CapacityLimiter,
        batch: Batch,
    ) -> None:
        self._service, self._accounts, self._limiter, self._passes = service, accounts, limiter, passes
        self._till, self._batch = service.till, batch
        self._ends_as = ""
        """How it shall end before its lines do."""
        self._seen_before = batch.status == "in_progress"
        """The first lines may have been paid for, here or in another gateway, without their answers being noted."""

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hold, nursery.cancel_scope)
            try:
                await self._advance()
            except RiosError as error:
                _logger.warning("batch %s goes on later: %s", self._batch.id, error)
                await trio.sleep(_PAUSE_SECONDS)
            nursery.cancel_scope.cancel()

    async def _advance(self) -> None:
        self._note(self._batch)
        if self._batch.status == "validating" and not self._ends_as:
            validated = await self._pass(batches.validate)
            if validated is None or validated.status == "failed":
                return
            self._note(validated)
        if not await self._answer_all():
            return
        if not self._ends_as:
            await self._call(batches.set_finalizing)
        await self._pass(partial(batches.finish, status=self._ends_as or "completed"))

    async def _pass(self, function: Callable[[Database, Batch], T]) -> T:
        """What takes as long as the file is large."""
        return await trio.to_thread.run_sync(
            function, self._till.database, self._batch, limiter=self._passes, abandon_on_cancel=True
        )

    async def _call(self, function: Callable[[Database, Batch], T]) -> T:
        return await self._till.in_thread(function, self._till.database, self._batch)

    async def _hold(self, scope: trio.CancelScope) -> None:
        """Keep it; stop if it was lost, cancelled, or its time is over."""
        while True:
            await trio.sleep(HOLD_MS / 4000)
            try:
                now = await self._call(batches.hold)
            except RiosError as error:
                _logger.warning("batch %s: %s", self._batch.id, error)
                continue
            if now is None:
                scope.cancel()
                return
            self._note(now)

    def _note(self, batch: Batch) -> None:
        if batch.status == "cancelling":
            self._ends_as = "cancelled"
        elif batch.status == "finalizing":
            self._ends_as = "completed"
        elif batch.expires_at_ms < now_ms():
            self._ends_as = "expired"

    async def _answer_all(self) -> bool:
        """Answer what has no answer yet, whatever it takes, or until it shall end; what was begun is answered: it is
        charged. False: it is others' turn before that."""
        pause, turn_ends = _PAUSE_SECONDS, trio.current_time() + _TURN_SECONDS
        while not self._ends_as:
            if trio.current_time() > turn_ends:
                if await self._call(batches.somebody_waits):
                    return False
                turn_ends = trio.current_time() + _TURN_SECONDS
            fetch = partial(batches.waiting, self._till.database, self._batch, _FETCH_LINES)
            lines = await self._till.in_thread(fetch)
            if not lines:
                return True
            self._later = 0
            async with trio.open_nursery() as nursery:
                for line in lines:
                    await self._limiter.acquire_on_behalf_of(line)
                    if self._ends_as:
                        self._limiter.release_on_behalf_of(line)
                        break
                    nursery.start_soon(self._answer, line)
            self._seen_before = self._later > 0  # what is put off comes first in the next round
            if self._later:
                await trio.sleep(pause)
            pause = min(2 * pause, _PAUSE_SECONDS_MAX) if self._later == len(lines) else _PAUSE_SECONDS
        return True

    async def _answer(self, line: Line) -> None:
        try:
            status, answer, key = await self._try(line)
            if status in _LATER:
                self._later += 1
                return
            write = partial(batches.answered, self._till.database, self._batch, line, status, answer, key=key)
            await self._till.in_thread(write)
        except RiosError as error:  # of the database: the line is as it was
            self._later += 1
            _logger.warning("line %d of batch %s is tried again: %s", line.place, self._batch.id, error)
        finally:
            self._limiter.release_on_behalf_of(line)

    async def _try(self, line: Line) -> tuple[int, bytes, str]:
        """Status, answer, and the idempotency key in the database that has it (empty: none)."""
        name = request_id(self._batch.id, line.place)
        try:
            principal = await self._principal()
            if self._batch.endpoint == "/v1/embeddings":
                return 200, await self._embed(line, principal, name), ""
            return await self._generate(line, principal, name)
        except RiosError as error:
            return error_status(error), error_body(error), ""
        except Exception:
            _logger.exception("line %d of batch %s failed", line.place, self._batch.id)
            return 500, error_body(internal_error(name)), ""

    async def _generate(self, line: Line, principal: Principal, name: str) -> tuple[int, bytes, str]:
        body: ChatBody | CompletionBody
        order: Order
        shape: Shape
        if self._batch.endpoint == "/v1/chat/completions":
            body = decode(line.body, ChatBody)
            order, shape = chat_order(body, principal, name)
        else:
            body = decode(line.body, CompletionBody)
            order, shape = completion_order(body, principal, name)
        if body.stream:
            raise ApiError("invalid_request", "a line of a batch is not streamed", param="stream")
        key = f"batch {name}"  # with a blank, which keys of clients do not have
        order = replace(order, batch=True)
        response = await keyed_answer(self._service, order, shape, key, body, streamed=False)
        data = msgspec.json.encode(body, order="deterministic")
        asked = wanted(principal.account_id, key, order.endpoint, data, order.request.privacy)
        return response.status_code, bytes(response.body), asked.id

    async def _embed(self, line: Line, principal: Principal, name: str) -> bytes:
        paid = self._seen_before and await self._is_paid(principal, name)
        body = decode(line.body, EmbeddingBody)
        return msgspec.json.encode(await embed(self._service, principal, body, name, "", free=paid, batch=True))

    async def _is_paid(self, principal: Principal, name: str) -> bool:
        """Whether vectors of an earlier try were charged. Raises BusyError while that is not known yet."""
        if any(ticket.reservation.request_id == name for ticket in self._till.running()):
            raise BusyError(f"request {name} is still being settled", "try again later")
        since_ms = self._batch.created_at_ms
        return await self._till.in_thread(self._accounts.has_usage, principal.user_id, name, since_ms)

    async def _principal(self) -> Principal:
        """Who pays, as they are now. Raises ApiError ``forbidden``."""
        batch = self._batch
        if batch.key_id is None and batch.user_id == LOCAL.user_id:
            return LOCAL
        found = await self._till.in_thread(self._accounts.principal_of, batch.user_id, batch.key_id)
        if found is None or found.disabled:
            raise ApiError("forbidden", "the user or the key that made this batch does not work any more")
        permitted(found, "inference")
        return found
