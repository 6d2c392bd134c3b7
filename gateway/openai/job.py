"""One generation from admission to settlement: limits, money and engine in the right order.

Invariants:
1. Nothing runs before its worst case is reserved durably.
2. However the block ends, the request is settled: finished ones on the engine's count, ones the client left on what
   was produced, failed ones on what was delivered.
3. A finished request is settled before the caller sees its end.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from config.errors import RiosError
from config.generation import Delta, EmbeddingRequest, Finished, GenerationEvent, GenerationRequest
from gateway.accounts import Principal
from gateway.books import new_id
from gateway.errors import invalid
from gateway.guard import Guard
from gateway.limits import Limits
from gateway.metrics import Metrics
from gateway.money import Prices, Reservation, Settlement
from gateway.ports import Engine
from gateway.till import Ticket, Till

if TYPE_CHECKING:
    from gateway.openai.keyed import Runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What every generation needs."""

    engine: Engine
    guard: Guard
    limits: Limits
    till: Till
    prices: Prices
    local_prices: Prices
    metrics: Metrics
    runs: "Runs"


@dataclass(frozen=True, slots=True)
class Held:
    """An idempotency key in the database, and as whom this gateway holds it."""

    id: str
    holder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Who asks for what, and through which endpoint."""

    principal: Principal
    request: GenerationRequest
    endpoint: str
    choices: int = 1
    held: Held | None = None

    @property
    def limit_key(self) -> str:
        """Under what the limits count it."""
        return self.principal.key_id or self.principal.user_id


class Job:
    """A generation that runs. Iterate it for the answer's pieces, then ``finished`` holds how it ended; :meth:`settle`
    it before the caller sees that."""

    def __init__(self, service: Service, ticket: Ticket) -> None:
        self.events: AsyncIterator[GenerationEvent]
        self._service = service
        self._ticket = ticket
        self._produced = 0
        self._started = trio.current_time()
        self._settled = False
        self._finished: Finished | None = None

    @property
    def finished(self) -> Finished:
        """The engine's account of the answer, once the iteration ended."""
        assert self._finished is not None
        return self._finished

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self) -> Delta:
        event = await anext(self.events, None)
        if isinstance(event, Delta):
            if not self._produced:
                self._service.metrics.first_token_seconds.observe(trio.current_time() - self._started)
            self._produced += len(event.tokens)
            return event
        if event is None:
            raise RiosError("internal", "the generation ended without an end")
        if event.reason == "cancelled":
            raise RiosError("unavailable", "this node stopped the generation", "try again")
        self._finished = event
        raise StopAsyncIteration

    async def settle(self, prompt_tokens: int) -> None:
        """Charge for the finished answer, durably: so many tokens of its prompt, and all of its own."""
        await self._service.till.settle(self.conclude(prompt_tokens))

    def conclude(self, prompt_tokens: int) -> Settlement:
        """What settles the finished answer; the caller hands it to the till at once."""
        finished = self.finished
        return self._settlement(finished.completion_tokens, finished.reason, prompt_tokens)

    def stop(self) -> Settlement:
        """What settles an answer that is ended here, as far as it came; the caller hands it to the till at once."""
        return self._settlement(self._produced, "cancelled")

    def mark_delivered(self) -> None:
        """All that was produced up to now has reached the client."""
        self._ticket.delivered_tokens = self._produced

    async def close(self, *, failed: bool) -> None:
        """Settle what has not been: the client left, or something failed."""
        if self._settled:
            return
        tokens = self._ticket.delivered_tokens if failed else self._produced
        if self._ticket.reservation.idempotency_id:
            tokens = 0  # who tries again under the same key gets the same answer, and pays for that
        settlement = self._settlement(tokens, "failed" if failed else "cancelled")
        with trio.CancelScope(shield=True):  # Till.settle_after_cancel bounds it.
            await self._service.till.settle_after_cancel(settlement)

    def _settlement(self, completion_tokens: int, outcome: str, prompt_tokens: int | None = None) -> Settlement:
        reservation = self._ticket.reservation
        settlement = Settlement(
            reservation=reservation,
            prompt_tokens=reservation.prompt_tokens if prompt_tokens is None else prompt_tokens,
            completion_tokens=completion_tokens,
            outcome=outcome,
        )
        # It is handed over before anything can be cancelled: from here on the till sees to it.
        self._settled = True
        unused = reservation.prompt_tokens + reservation.max_tokens - completion_tokens
        if completion_tokens:
            unused -= settlement.prompt_tokens
            self._service.metrics.observe_tokens(settlement.prompt_tokens, completion_tokens)
        self._service.limits.give_back_tokens(reservation.key_id or reservation.user_id, max(unused, 0))
        return settlement


@asynccontextmanager
async def open_job(service: Service, order: Order) -> AsyncIterator[Job]:
    """Admit and run an order. Raises RiosError of limits, money and engine."""
    with service.limits.running(order.limit_key):
        request = replace(order.request, user=order.principal.account_id)
        prepared = await service.engine.prepare(request)
        ticket = await reserve(
            service,
            order.principal,
            order.request,
            order.endpoint,
            len(prepared.prompt_tokens),
            prepared.max_tokens,
            held=order.held,
            route=prepared.route,
        )
        job = Job(service, ticket)
        failed = False
        try:
            async with service.engine.stream(prepared) as events:
                job.events = events
                yield job
        except Exception:
            failed = True
            raise
        finally:
            await job.close(failed=failed)


@asynccontextmanager
async def open_jobs(service: Service, order: Order) -> AsyncIterator[list[Job]]:
    """One job per choice of an order, each admitted, limited, charged and settled like a request of its own. They run
    side by side; what one refuses ends them all. Raises RiosError as :func:`open_job`."""
    at_once = service.limits.concurrent_per_key
    if order.choices > at_once:
        raise invalid("n", f"n {order.choices} is more than the {at_once} answers that a key may have at the same time")
    async with AsyncExitStack() as stack:
        jobs = []
        for choice in range(order.choices):
            one = replace(order, request=replace(order.request, choice=choice))
            jobs.append(await stack.enter_async_context(open_job(service, one)))
        yield jobs


async def reserve(
    service: Service,
    principal: Principal,
    request: GenerationRequest | EmbeddingRequest,
    endpoint: str,
    prompt_tokens: int,
    max_tokens: int,
    *,
    held: Held | None = None,
    route: str = "",
) -> Ticket:
    """Count a request's worst case and hold its price back. Raises ApiError ``rate_limited``, ``payment_required``."""
    reservation = Reservation(
        id=new_id(),
        instance=service.till.instance,
        account_id=principal.account_id,
        user_id=principal.user_id,
        key_id=principal.key_id,
        request_id=request.request_id,
        endpoint=endpoint,
        model=request.model,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        prices=service.prices if principal.key_id else service.local_prices,
        idempotency_id=held.id if held else "",
        holder=held.holder if held else "",
        route=route,
    )
    key, worst_case = principal.key_id or principal.user_id, prompt_tokens + max_tokens
    service.limits.take_tokens(key, worst_case)
    reserved = False
    try:
        ticket = await service.till.reserve(reservation)
        reserved = True
    finally:
        if not reserved:
            service.limits.give_back_tokens(key, worst_case)
    return ticket
