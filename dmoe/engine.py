"""Generation requests in, answers out: what the gateway and the command line talk to.

Owns: which models there are, checking a request before anything streams, slots and the waiting line, statistics.
Does not own: the loop over tokens (``dmoe/generate.py``), the models themselves (a :class:`Models` provider).

Invariants:

1. At most ``generations_max`` answers run and ``waiting_max`` wait, first come first served; more are refused ``busy``.
2. An answer's cache and slot are free when its context has been left, however it was left.
3. Events pass through a bounded channel: a slow consumer slows its own answer only.
4. A prepared request holds its seed: streaming it again gives the same tokens.

Fails before streaming with RequestError (``not_found``, ``invalid_request``, ``context_length_exceeded``), BusyError or
the model's own fault (``no_replica`` ...); in the stream with the RiosError that ended the answer.
"""

import secrets
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Protocol

import trio

from config.errors import RequestError, RiosError
from config.generation import Delta, GenerationEvent, GenerationRequest, ModelInfo, Route, RouteWish, Sampling
from dmoe.constraint import Compiled, Compilers
from dmoe.core.sampling import check, choice_seed
from dmoe.core.spans import Ask
from dmoe.generate import Job, generate
from dmoe.line import Line, Place
from dmoe.runner import Runner
from dmoe.text import Tokenizer
from dmoe.tools import Plan, plan, reading

_EVENTS_MAX = 64
_INLINE_CHARACTERS_MAX = 8192
"""Text up to this length is tokenised at once (about 10 ms), longer text in a thread."""
_RATE_WINDOW_SECONDS = 10
_ANSWER_TOKENS_EXPECTED = 256
"""Few answers use the whole of what they may: routes are chosen for one of this length."""


class Model(Protocol):
    """A model that this node may answer with; cheap to hold, loaded when first needed."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def created(self) -> int: ...
    @property
    def stop_tokens(self) -> tuple[int, ...]: ...

    def fault(self, route: RouteWish) -> RiosError | None:
        """Why the model cannot answer by this route now (a shard without replica, files not here), or None."""

    def route_for(self, ask: Ask) -> Route:
        """What ``auto`` means for such a request now. Raises RiosError where no route is possible."""

    async def tokenizer(self) -> Tokenizer:
        """Its tokenizer, loaded once."""

    async def runner(self, route: Route) -> Runner:
        """The model by this route, the same object each time. Loads what the route needs. Raises RiosError."""


class Models(Protocol):
    """Where models come from."""

    def models(self) -> Sequence[Model]:
        """All of them, in the order to list them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that was checked: its prompt as tokens, its limit within the context, its seed and route filled in."""

    request: GenerationRequest
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    model: Model
    route: Route
    plan: Plan
    constraint: Compiled | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """A snapshot. ``tokens_per_s`` is over the last ten seconds, all answers together."""

    active: int
    waiting: int
    finished: int
    failed: int
    cancelled: int
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float


class Engine:
    """All generation of a node. Use within one trio run."""

    def __init__(
        self,
        models: Models,
        *,
        generations_max: int = 4,
        waiting_max: int = 64,
        default_route: RouteWish = "experts",
        events_max: int = _EVENTS_MAX,
    ) -> None:
        self._models = models
        self._line = Line(generations_max, waiting_max)
        self._default_route = default_route
        self._events_max = events_max
        self._compilers = Compilers()
        self._outcomes = {"finished": 0, "failed": 0, "cancelled": 0}
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._rate = _Rate()
        self._answer_seconds = 1.0  # moving average, for retry hints

    def models(self) -> Sequence[ModelInfo]:
        """Every model, ready or with the reason why not."""
        return [self._info(model) for model in self._models.models()]

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """Check a request and turn its prompt into tokens. Raises what the file docstring lists."""
        check(request.sampling)
        model = self._find(request.model)
        wish = request.route or self._default_route
        fault = model.fault(wish)
        if fault is not None:
            raise fault
        self._line.require_room(self._answer_seconds)
        tokenizer = await model.tokenizer()
        _check_bias(request.sampling, tokenizer.vocabulary)
        planned = plan(request, tokenizer)
        request = planned.request
        prompt = await _tokens(planned, tokenizer)
        max_tokens = _room(model, len(prompt), request)
        route = self._route(model, wish, len(prompt), max_tokens)
        asked = request.sampling.seed
        seed = secrets.randbits(63) if asked is None else choice_seed(asked, request.choice)
        if seed != asked:
            request = replace(request, sampling=replace(request.sampling, seed=seed))
        wanted = request.sampling.constraint
        constraint = None
        if wanted is not None:
            constraint = await self._compilers.compile(wanted, model.id, tokenizer, model.stop_tokens)
        return Prepared(
            request=request,
            prompt_tokens=prompt,
            max_tokens=max_tokens,
            model=model,
            route=route,
            plan=planned,
            constraint=constraint,
        )

    def _route(self, model: Model, wish: RouteWish, prompt_tokens: int, max_tokens: int) -> Route:
        """The route an answer takes from its beginning to its end."""
        if wish != "auto":
            return wish
        expected = min(max_tokens, _ANSWER_TOKENS_EXPECTED)
        return model.route_for(Ask(prompt_tokens=prompt_tokens, answer_tokens=expected, batch=1 + self._line.active))

    def stream(self, prepared: Prepared) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """The answer's events. Entering raises BusyError where the line has filled up since ``prepare``;
        leaving cancels what is left of the answer and frees everything it held."""
        return reading(_Stream(self, prepared, self._events_max), prepared.plan.reader())

    def statistics(self) -> EngineStatistics:
        """What the engine does now and did since it was made."""
        return EngineStatistics(
            active=self._line.active,
            waiting=self._line.waiting,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            tokens_per_s=self._rate.per_second(trio.current_time()),
            **self._outcomes,
        )

    def _info(self, model: Model) -> ModelInfo:
        fault = model.fault(self._default_route)
        return ModelInfo(
            id=model.id,
            name=model.name,
            context_tokens=model.context_tokens,
            created=model.created,
            ready=fault is None,
            reason="" if fault is None else str(fault),
        )

    def _find(self, name: str) -> Model:
        known = self._models.models()
        for model in known:
            if name in (model.id, model.name):
                return model
        names = ", ".join(model.name for model in known) or "none"
        raise RequestError("not_found", f"there is no model {name!r} on this node", f"known models: {names}")

    def admit(self) -> Place:
        """Take a place: a slot or one in the line. BusyError if there is none. :meth:`answer` gives it back."""
        self._line.require_room(self._answer_seconds)
        return self._line.join()

    async def answer(self, place: Place, prepared: Prepared, send: trio.MemorySendChannel[GenerationEvent]) -> None:
        """Wait for the slot and generate. Raises RiosError."""
        outcome = "cancelled"
        try:
            await place.turn.wait()
            await self._generate(prepared, send)
            outcome = "finished"
        except RiosError:
            outcome = "failed"
            raise
        finally:
            self._line.leave(place)
            self._outcomes[outcome] += 1

    async def _generate(self, prepared: Prepared, send: trio.MemorySendChannel[GenerationEvent]) -> None:
        started = trio.current_time()
        job = Job(
            prompt_tokens=prepared.prompt_tokens,
            max_tokens=prepared.max_tokens,
            sampling=prepared.request.sampling,
            stop_tokens=frozenset(prepared.model.stop_tokens),
            route=prepared.route,
            constraint=prepared.constraint.begin() if prepared.constraint else None,
        )
        tokenizer = (await prepared.model.tokenizer()).showing(prepared.plan.shown)
        runner = await prepared.model.runner(prepared.route)
        sequence = await runner.open(len(job.prompt_tokens) + job.max_tokens)

        async def emit(event: GenerationEvent) -> None:
            self._count(event)
            await send.send(event)

        try:
            await generate(runner, sequence, job, tokenizer, emit)
        finally:
            sequence.close()
        self._answer_seconds += 0.2 * (trio.current_time() - started - self._answer_seconds)

    def _count(self, event: GenerationEvent) -> None:
        if isinstance(event, Delta):
            self._completion_tokens += len(event.tokens)
            self._rate.add(len(event.tokens), trio.current_time())
        else:
            self._prompt_tokens += event.prompt_tokens


class _Stream(AbstractAsyncContextManager[AsyncIterator[GenerationEvent]], AsyncIterator[GenerationEvent]):
    """One answer as a context manager: a nursery whose failures reach the consumer as plain RiosErrors."""

    def __init__(self, engine: Engine, prepared: Prepared, events_max: int) -> None:
        self._engine = engine
        self._prepared = prepared
        self._send, self._receive = trio.open_memory_channel[GenerationEvent](events_max)
        self._manager = trio.open_nursery()
        self._failure: RiosError | None = None

    async def __aenter__(self) -> AsyncIterator[GenerationEvent]:
        place = self._engine.admit()
        self._nursery = await self._manager.__aenter__()
        self._nursery.start_soon(self._produce, place)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The body's own exception is not shown to the nursery, so it leaves as it is and not in a group."""
        self._nursery.cancel_scope.cancel()
        await self._manager.__aexit__(None, None, None)

    def __aiter__(self) -> AsyncIterator[GenerationEvent]:
        return self

    async def __anext__(self) -> GenerationEvent:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            if self._failure is not None:
                raise self._failure from None
            raise StopAsyncIteration from None

    async def _produce(self, place: Place) -> None:
        with self._send:
            try:
                await self._engine.answer(place, self._prepared, self._send)
            except RiosError as failure:
                self._failure = failure


class _Rate:
    """Tokens per second over a sliding window, in one bucket per second."""

    def __init__(self) -> None:
        self._buckets: deque[tuple[int, int]] = deque(maxlen=_RATE_WINDOW_SECONDS)

    def add(self, tokens: int, now: float) -> None:
        second = int(now)
        if self._buckets and self._buckets[-1][0] == second:
            tokens += self._buckets.pop()[1]
        self._buckets.append((second, tokens))

    def per_second(self, now: float) -> float:
        recent = sum(tokens for second, tokens in self._buckets if now - second < _RATE_WINDOW_SECONDS)
        return recent / _RATE_WINDOW_SECONDS


async def _tokens(planned: Plan, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt as token ids. RequestError for none, two or an impossible one."""
    messages, prompt = planned.request.messages, planned.request.prompt
    if (messages is None) == (prompt is None):
        raise RequestError("invalid_request", "set exactly one of messages and prompt", "")
    if not messages and not prompt:
        raise RequestError("invalid_request", "the prompt is empty", "send at least one message or one character")
    if isinstance(prompt, tuple):
        _check_ids(prompt, tokenizer.vocabulary)
        return prompt
    if prompt is not None:
        encode, characters = partial(tokenizer.encode, prompt), len(prompt)
    else:
        encode, characters = partial(planned.prompt, tokenizer), planned.characters
    if characters <= _INLINE_CHARACTERS_MAX:
        return encode()
    return await trio.to_thread.run_sync(encode, abandon_on_cancel=True)


def _check_ids(ids: tuple[int, ...], vocabulary: int) -> None:
    for index, token in enumerate(ids):
        if not isinstance(token, int) or not 0 <= token < vocabulary:
            raise RequestError(
                "invalid_request", f"prompt token {index} is {token!r}", f"use token ids from 0 to {vocabulary - 1}"
            )


def _check_bias(sampling: Sampling, vocabulary: int) -> None:
    for token, _ in sampling.logit_bias:
        if token >= vocabulary:
            raise RequestError(
                "invalid_request",
                f"logit_bias names token {token}, this model has {vocabulary}",
                f"use token ids from 0 to {vocabulary - 1}",
            )


def _room(model: Model, prompt: int, request: GenerationRequest) -> int:
    """How many tokens the answer may have: what was asked for, within what the context leaves."""
    left = model.context_tokens - prompt
    if left < max(1, request.sampling.min_tokens):
        wanted = f" and min_tokens {request.sampling.min_tokens}" if left > 0 else ""
        raise RequestError(
            "context_length_exceeded",
            f"the prompt has {prompt} tokens{wanted}, the context of {model.name} is {model.context_tokens}",
            "shorten the prompt",
        )
    return min(left, request.sampling.max_tokens or left)
