"""One generation from admission to settlement: limits, money and engine in the right order.

Invariants:
1. Nothing runs before its worst case is reserved, and of a stream nothing is told before that is durable.
2. However the block ends, the request is settled: finished ones on the engine's count, ones the client left on what
   was produced, failed ones on what was delivered.
3. A finished request is settled before the caller sees its end.
4. A request goes on only as long as its caller may generate (``gateway/standing.py``); one that is ended is settled as
   one that the client left is.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from config.errors import RiosError
from config.generation import Delta, EmbeddingRequest, Finished, GenerationEvent, GenerationRequest, Prompt
from gateway.accounts import LOCAL, Principal
from gateway.db.stamps import new_id
from gateway.errors import invalid
from gateway.guard import Guard
from gateway.limits import Meter, Metering, Place
from gateway.metrics import Metrics
from gateway.money import Prices, Reservation, Settlement
from gateway.ports import Engine
from gateway.standing import Hold
from gateway.till import Ticket, Till
from gateway.turns import Reader, Turn, Turns
from p2p import trace

if TYPE_CHECKING:
    from gateway.openai.keyed import Runs
    from gateway.openai.remembered import Remembered


SEEDS = 1 << 63
"""How many there are to draw from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What every generation needs."""

    engine: Engine
    guard: Guard
    metering: Metering
    turns: Turns
    till: Till
    prices: Prices
    local_prices: Prices
    metrics: Metrics
    runs: "Runs"
    remembered: "Remembered"

    def while_allowed(self, principal: Principal) -> AbstractContextManager[Hold]:
        """Run the block as long as its caller may generate. Raises ApiError if it was ended."""
        return self.guard.standing.while_allowed(principal, "inference")


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
    """Answers to each prompt."""
    others: tuple[Prompt, ...] = ()
    """Prompts beside the request's own."""
    held: Held | None = None
    prices: Prices | None = None
    """Others than usual."""
    meter: Meter | None = None
    """Of the HTTP request that it came with; None: it came with none."""
    whole: bool = False
    """Nothing is told of it before its end."""
    reader: Reader | None = None
    """Of what is told before its end."""
    batch: bool = False
    """Nobody waits for it: those who do go first."""
    drawn: bool = False
    """Its seed is not the caller's wish, so the same prompt twice has two answers."""

    @property
    def answers(self) -> int:
        """To all prompts: those to the first one come first."""
        return self.choices * (1 + len(self.others))

    def part(self, number: int) -> "Order":
        """What asks for the answer of that number."""
        prompt, choice = divmod(number, self.choices)
        one = replace(self.request, choice=choice)
        if prompt:
            one = replace(one, prompt=self.others[prompt - 1])
            if self.drawn and one.sampling.seed is not None:
                seed = (one.sampling.seed + prompt) % SEEDS
                one = replace(one, sampling=replace(one.sampling, seed=seed))
        return replace(self, request=one)


class Job:
    """A generation that runs. Iterate it for the answer's pieces, then ``finished`` holds how it ended; settle it
    (:meth:`conclude`) before the caller sees that."""

    def __init__(self, service: Service, admitted: "Admitted") -> None:
        self.events: AsyncIterator[GenerationEvent]
        self._service = service
        self._admitted = admitted
        self._ticket = admitted.ticket
        self._produced = 0
        self._started = trio.current_time()
        self._settled = False
        self._finished: Finished | None = None

    @property
    def finished(self) -> Finished:
        """The engine's account of the answer, once the iteration ended."""
        assert self._finished is not None
        return self._finished

    @property
    def produced(self) -> int:
        """Tokens of the answer so far."""
        return self._produced

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

    def conclude(self, prompt_tokens: int) -> Settlement:
        """What settles the finished answer: so many tokens of its prompt, and all of its own. The caller hands it to
        the till at once."""
        finished = self.finished
        return self._settlement(finished.completion_tokens, finished.reason, prompt_tokens)

    def stop(self) -> Settlement:
        """What settles an answer that is ended here, as far as it came; the caller hands it to the till at once."""
        return self._settlement(self._produced, "cancelled")

    def mark_delivered(self) -> None:
        """All that was produced up to now has reached the client."""
        self._ticket.delivered_tokens = self._produced

    def cut_off(self, *, failed: bool) -> list[Settlement]:
        """What settles it if nothing has yet: the client left, or something failed. For the till at once."""
        if self._settled:
            return []
        tokens = self._ticket.delivered_tokens if failed else self._produced
        if self._ticket.reservation.idempotency_id:
            tokens = 0  # who tries again under the same key gets the same answer, and pays for that
        return [self._settlement(tokens, "failed" if failed else "cancelled")]

    def _settlement(self, completion_tokens: int, outcome: str, prompt_tokens: int | None = None) -> Settlement:
        reservation = self._ticket.reservation
        if prompt_tokens is None:
            prompt_tokens = reservation.prompt_if_cut_off
        settlement = Settlement(
            reservation=reservation,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            outcome=outcome,
        )
        # It is handed over before anything can be cancelled: from here on the till sees to it.
        self._settled = True
        unused = reservation.prompt_tokens + reservation.max_tokens - completion_tokens
        if completion_tokens:
            unused -= settlement.prompt_tokens
            self._service.metrics.observe_tokens(settlement.prompt_tokens, completion_tokens)
        self._admitted.give_back(unused)
        return settlement


@asynccontextmanager
async def open_job(service: Service, order: Order, turn: Turn) -> AsyncIterator[Job]:
    """Admit an order, wait for its turn and run it. Raises RiosError of limits, money and engine."""
    bill = new_id()
    request = replace(order.request, user=order.principal.account_id, bill=bill)
    prepared = await service.engine.prepare(request)
    size = Size(bill, len(prepared.prompt_tokens), prepared.max_tokens, prepared.route, another_pays=request.choice > 0)
    async with admission(service, order, size) as admitted:
        job = Job(service, admitted)
        span = trace.begin("generation", model=request.model, choice=request.choice)
        failure: Exception | None = None
        try:
            with trace.span("turn"):
                await turn.come()
            with span.here():
                stream = service.engine.stream(prepared)
            async with stream as events:
                job.events = events
                yield job
        except Exception as error:
            failure = error
            raise
        finally:
            span.set(prompt_tokens=size.prompt_tokens, completion_tokens=job.produced)
            span.end(failure)
            await _settle_rest(service, [job], failed=failure is not None)


async def _settle_rest(service: Service, jobs: Sequence[Job], *, failed: bool) -> None:
    """All at once: however many they are, their end waits for the till only a moment."""
    rest = [settlement for job in jobs for settlement in job.cut_off(failed=failed)]
    if rest:
        await service.till.settle_after_cancel(*rest)


@asynccontextmanager
async def open_jobs(service: Service, order: Order) -> AsyncIterator[list[Job]]:
    """One job for each answer of an order, each admitted, limited, charged and settled like a request of its own. They
    run side by side; what one refuses ends them all. Raises RiosError as :func:`open_job`."""
    at_once = service.metering.at_once
    if order.answers > at_once:
        where = "prompt" if order.others else "n"
        raise invalid(where, f"{order.answers} answers are more than the {at_once} that may run at the same time")
    user = order.principal.user_id
    with service.turns.place(user, order.answers, batch=order.batch, reader=order.reader) as turn:
        if order.answers == 1:
            async with open_job(service, order, turn) as job:
                yield [job]
            return
        async with AsyncExitStack() as stack:
            jobs: list[Job] = []
            try:
                for number in range(order.answers):
                    jobs.append(await stack.enter_async_context(open_job(service, order.part(number), turn)))
                yield jobs
            except BaseException as error:
                await _settle_rest(service, jobs, failed=isinstance(error, Exception))
                raise


@dataclass(frozen=True, slots=True)
class Size:
    """What a request needs at most, and the route that its answer will take. ``bill``: its usage row's id, under which
    the engine books what it costs."""

    bill: str
    prompt_tokens: int
    max_tokens: int
    route: str = ""
    another_pays: bool = False


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request whose worst case is counted and paid for."""

    ticket: Ticket
    meter: Meter
    place: Place

    def give_back(self, tokens: int) -> None:
        """Return the part of the worst case that was not used."""
        self.meter.give_back(self.place, max(tokens, 0))


@asynccontextmanager
async def admission(service: Service, order: "Order | Embedding", size: Size) -> AsyncIterator[Admitted]:
    """Count a request's worst case and hold its price back; the block settles it. Raises ApiError ``rate_limited``,
    ``payment_required``."""
    meter = order.meter or service.metering.meter(order.principal)
    worst_case = size.prompt_tokens + size.max_tokens
    with trace.span("limits"):
        place = await meter.enter(worst_case)
    try:
        reserved = False
        try:
            with trace.span("reservation"):
                ticket = await service.till.reserve(_reservation(service, order, size))
            reserved = True
        finally:
            if not reserved:
                meter.give_back(place, worst_case)
        yield Admitted(ticket, meter, place)
    finally:
        place.leave()


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Who asks for vectors of what."""

    principal: Principal
    request: EmbeddingRequest
    endpoint: str
    prices: Prices | None = None
    meter: Meter | None = None
    held: None = None
    whole: bool = True


def _reservation(service: Service, order: Order | Embedding, size: Size) -> Reservation:
    principal, held = order.principal, order.held
    return Reservation(
        id=size.bill,
        synced=not order.whole,
        instance=service.till.instance,
        account_id=principal.account_id,
        user_id=principal.user_id,
        key_id=principal.key_id,
        request_id=order.request.request_id,
        endpoint=order.endpoint,
        model=order.request.model,
        prompt_tokens=size.prompt_tokens,
        max_tokens=size.max_tokens,
        another_pays=size.another_pays,
        prices=order.prices or (service.local_prices if principal == LOCAL else service.prices),
        idempotency_id=held.id if held else "",
        holder=held.holder if held else "",
        route=size.route,
    )
