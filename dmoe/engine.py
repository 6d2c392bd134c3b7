"""Generation requests in, answers out: what the gateway and the command line talk to.

Owns: which models there are, checking a request before anything streams, admission, statistics. Does not own: passes
(``dmoe/passes.py``, one loop per model and route), what an answer is (``dmoe/core/answer.py``), who is next
(``dmoe/core/scheduler.py``), the models themselves (a :class:`Models` provider).

Invariants:

1. At most ``generations_max`` answers run with at most ``kv_tokens_max`` positions of cache, and ``waiting_max`` wait,
   users in turn; more are refused ``busy``.
2. An answer's slot is free when its context has been left, however it was left; its cache is, as soon as the pass that
   uses it is over.
3. Events pass through a bounded outbox: a slow consumer slows its own answer only.
4. A prepared request holds its seed: streaming it again gives the same tokens, whatever runs beside it.
5. A request that wants more privacy shares no pass, no cache and no peer with those that do not; a route within this
   process has nothing to keep apart.
6. Answers come only while :meth:`Engine.run` runs; when it ends, those under way end with ``unavailable``.

Fails before streaming with RequestError (``not_found``, ``invalid_request``, ``context_length_exceeded``), BusyError or
the model's own fault (``no_replica`` ...); in the stream with the RiosError that ended the answer.
"""

import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import trio

from config.errors import RequestError, RiosError
from config.generation import (
    Embedded,
    EmbeddingRequest,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    ModelInfo,
    PrivacyWish,
    Route,
    RouteWish,
    Sampling,
)
from dmoe.bills import Bill, Bills
from dmoe.constraint import Compiled, Compilers
from dmoe.core.answer import Answer, Job
from dmoe.core.embedding import Pooled
from dmoe.core.sampling import check, choice_seed
from dmoe.core.scheduler import Admission
from dmoe.core.spans import Ask
from dmoe.drafting import Drafter
from dmoe.embedding import PreparedEmbeddings, embed, tokens_of
from dmoe.outbox import Outbox
from dmoe.passes import Passes, PassOptions
from dmoe.runner import Runner
from dmoe.slots import Slot
from dmoe.tallies import Totals
from dmoe.text import Tokenizer
from dmoe.tools import Plan, plan, reading
from p2p import trace

log = logging.getLogger(__name__)

_EVENTS_MAX = 64
DEFAULT_PASSES = PassOptions()
_INLINE_CHARACTERS_MAX = 8192
"""Text up to this length is tokenised at once (about 10 ms), longer text in a thread."""
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

    def under(self, asked: PrivacyWish) -> "Model":
        """The same model for requests that want more privacy than the operator laid down."""

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
    """A snapshot. ``tokens_per_s`` is over the last ten seconds, all answers together; ``rows`` of ``passes`` are
    tokens fed, of prompts, answers and drafts; ``prefix_tokens`` are prompt tokens that ``prefix_hits`` answers did not
    have to compute; ``kv_positions`` are held by running answers, ``prefix_positions`` are kept for later prompts."""

    active: int
    waiting: int
    finished: int
    failed: int
    cancelled: int
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float
    passes: int
    rows: int
    drafts_proposed: int
    drafts_accepted: int
    prefix_hits: int
    prefix_tokens: int
    prefix_positions: int
    kv_positions: int


class Engine:
    """All generation of a node. Use within one trio run."""

    def __init__(
        self,
        models: Models,
        *,
        generations_max: int = 16,
        waiting_max: int = 64,
        kv_tokens_max: int = 1 << 17,
        passes: PassOptions = DEFAULT_PASSES,
        default_route: RouteWish = "experts",
        draft_model: str = "",
        events_max: int = _EVENTS_MAX,
        walls_demanded: bool = False,
        bills: Bills | None = None,
    ) -> None:
        """``walls_demanded``: no user's grammar is read where there are no walls for that. ``bills``: of what is paid
        to peers."""
        self._bills = bills or Bills()
        self._models = models
        self._admission: Admission[Slot] = Admission(
            slots_max=generations_max, positions_max=kv_tokens_max, waiting_max=waiting_max
        )
        self._kv_tokens_max = kv_tokens_max
        self._options = passes
        self._default_route = default_route
        self._draft_model = draft_model
        self._events_max = events_max
        self.compilers = Compilers(demanded=walls_demanded)
        self._outcomes = {"finished": 0, "failed": 0, "cancelled": 0}
        self._answer_seconds = 1.0  # moving average, for retry hints
        self._totals = Totals()
        self._nursery: trio.Nursery | None = None
        self._passes: dict[tuple[str, Route, PrivacyWish], Passes] = {}
        self._locks: dict[tuple[str, Route, PrivacyWish], trio.Lock] = {}
        self._slots: dict[Slot, Passes] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compute answers until cancelled."""
        assert self._nursery is None, "the engine runs already"
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self.compilers.close()
            for passes in self._passes.values():
                passes.close()
            self._passes.clear()
            stopped = RiosError("unavailable", "this node is stopping", "ask another node, or try again later")
            for slot in list(self._slots):
                self._close(slot, "cancelled")
                slot.outbox.end(stopped)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """:meth:`run` for as long as the block."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.run)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()

    def models(self) -> Sequence[ModelInfo]:
        """Every model, ready or with the reason why not."""
        return [self._info(model) for model in self._models.models()]

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """Check a request and turn its prompt into tokens. Raises what the file docstring lists."""
        check(request.sampling)
        model, wish = self._asked(request.model, request.route, request.privacy)
        fault = model.fault(wish)
        if fault is not None:
            raise fault
        self._admission.require_room(self._answer_seconds)
        tokenizer = await model.tokenizer()
        _check_bias(request.sampling, tokenizer.vocabulary)
        planned = plan(request, tokenizer)
        request = planned.request
        prompt = await _tokens(planned, tokenizer)
        max_tokens = _room(model, len(prompt), request, self._kv_tokens_max)
        route = self._route(model, wish, len(prompt), max_tokens)
        asked = request.sampling.seed
        seed = secrets.randbits(63) if asked is None else choice_seed(asked, request.choice)
        if seed != asked:
            request = replace(request, sampling=replace(request.sampling, seed=seed))
        wanted = request.sampling.constraint
        constraint = None
        if wanted is not None:
            constraint = await self.compilers.compile(wanted, model.id, tokenizer, model.stop_tokens)
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
        return model.route_for(
            Ask(prompt_tokens=prompt_tokens, answer_tokens=expected, batch=1 + self._admission.active)
        )

    def stream(self, prepared: Prepared) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """The answer's events. Entering raises BusyError where the line has filled up since ``prepare``;
        leaving cancels what is left of the answer and frees everything it held."""
        return reading(self._answering(prepared), prepared.plan.reader())

    def statistics(self) -> EngineStatistics:
        """What the engine does now and did since it was made."""
        return EngineStatistics(
            active=self._admission.active,
            waiting=self._admission.waiting,
            tokens_per_s=self._totals.rate.per_second(trio.current_time()),
            prefix_positions=sum(passes.kept_positions for passes in self._passes.values()),
            kv_positions=self._admission.positions,
            **self._totals.numbers(),
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

    def _asked(self, name: str, route: RouteWish | None, privacy: PrivacyWish) -> tuple[Model, RouteWish]:
        """The model of a request under the rule it wants, and its route: any of those here if nothing may leave."""
        model = self._find(name)
        wish = route or ("auto" if privacy == "local" else self._default_route)
        return (model.under(privacy) if privacy else model), wish

    async def prepare_embeddings(self, request: EmbeddingRequest) -> PreparedEmbeddings:
        """Check a request for vectors and turn its texts into tokens. Raises what the file docstring lists."""
        model, wish = self._asked(request.model, request.route, request.privacy)
        fault = model.fault(wish)
        if fault is not None:
            raise fault
        self._admission.require_room(self._answer_seconds)
        context = min(model.context_tokens, self._kv_tokens_max)
        inputs = await tokens_of(request, await model.tokenizer(), context)
        route = self._route(model, wish, max(map(len, inputs)), 1)
        return PreparedEmbeddings(request=request, inputs=inputs, model=model, route=route)

    async def embed(self, prepared: PreparedEmbeddings) -> Embedded:
        """The vectors of a prepared request. Raises RiosError; cancelling it frees everything it held."""
        bill = self._bills.of(prepared.request.bill)  # one, held until all of its texts are through
        return await embed(prepared, partial(self._embed_one, prepared.model, bill))

    async def _embed_one(self, model: Model, bill: Bill, prepared: PreparedEmbeddings, work: Pooled) -> Finished:
        async def make(length: int) -> Pooled:
            return work

        passes = self._passes_of(model, prepared.route, prepared.request.privacy)
        slot = Slot(
            prompt_tokens=tuple(work.tokens),
            positions=len(work.tokens),
            user=prepared.request.user,
            route=prepared.route,
            make=make,
            outbox=Outbox(self._events_max, passes.wake),
            reuse=False,
            trace=trace.current.get(),
            bill=bill,
        )
        async with self._placed(slot, passes) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event
        raise RiosError("internal", "the text's vector ended without an end")

    def _answering(self, prepared: Prepared) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        passes = self._passes_of(prepared.model, prepared.route, prepared.request.privacy)
        return self._placed(self._slot(prepared, passes), passes)

    @asynccontextmanager
    async def _placed(self, slot: Slot, passes: Passes) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        self._admission.require_room(self._answer_seconds)
        self._slots[slot] = passes
        self._admission.join(slot, slot.user, slot.positions)
        self._admit()
        try:
            yield slot.outbox
        finally:
            self._close(slot, "cancelled")

    def _slot(self, prepared: Prepared, passes: Passes) -> Slot:
        job = Job(
            prompt_tokens=prepared.prompt_tokens,
            max_tokens=prepared.max_tokens,
            sampling=prepared.request.sampling,
            stop_tokens=frozenset((*prepared.model.stop_tokens, *prepared.request.sampling.stop_tokens)),
            constraint=prepared.constraint.begin() if prepared.constraint else None,
        )

        async def make(length: int) -> Answer:
            tokenizer = (await prepared.model.tokenizer()).showing(prepared.plan.shown)
            return Answer(job, tokenizer, length=length)

        return Slot(
            prompt_tokens=job.prompt_tokens,
            positions=len(job.prompt_tokens) + job.max_tokens,
            user=prepared.request.user,
            route=prepared.route,
            make=make,
            outbox=Outbox(self._events_max, passes.wake),
            reuse=not prepared.request.sampling.prompt_logprobs,
            trace=trace.current.get(),
            bill=self._bills.of(prepared.request.bill),
        )

    def _passes_of(self, model: Model, route: Route, privacy: PrivacyWish) -> Passes:
        """The loop for a model's route under one rule, started when first needed."""
        assert self._nursery is not None, "Engine.run must run"
        if route in ("local", "fused"):  # nothing leaves this process by them
            model, privacy = self._find(model.id), ""
        key = (model.id, route, privacy)
        if key not in self._passes:
            self._forget_models()
            self._passes[key] = Passes(
                partial(model.runner, route),
                self._lock(key),
                self._nursery,
                self._options,
                self._totals,
                self._ended,
                partial(self._drafter, model) if self._draft_model and self._options.drafts_max else None,
            )
            self._nursery.start_soon(self._passes[key].run)
        return self._passes[key]

    def _lock(self, key: tuple[str, Route, PrivacyWish]) -> trio.Lock:
        return self._locks.setdefault(key, trio.Lock())

    async def _drafter(self, model: Model) -> Drafter | None:
        """The draft model for ``model``; None, and a word in the log, if it does not fit."""
        try:
            small = self._find(self._draft_model)
            if small.id == model.id:
                return None
            route: Route = "local" if small.fault("fused") else "fused"
            fault = small.fault(route)
            if fault is not None:
                raise fault
            if not (await small.tokenizer()).same_vocabulary(await model.tokenizer()):
                raise RequestError(
                    "invalid_request",
                    f"{small.name} has another vocabulary than {model.name}",
                    "set dmoe.draft_model to a smaller model of the same family",
                )
            return Drafter(await small.runner(route), self._lock((small.id, route, "")))
        except RiosError as failure:
            log.warning("%s is answered without a draft model: %s", model.name, failure)
            return None

    def _forget_models(self) -> None:
        """End the loops of models that are gone from this node."""
        known = {model.id for model in self._models.models()}
        for key, passes in list(self._passes.items()):
            if key[0] not in known and passes.idle and passes not in self._slots.values():
                self._passes.pop(key).close()

    def _admit(self) -> None:
        for slot in self._admission.admit():
            self._slots[slot].start(slot)

    def _ended(self, slot: Slot, how: FinishReason | Exception) -> None:
        """An answer has ended by itself."""
        if not isinstance(how, Exception):
            self._answer_seconds += 0.2 * (trio.current_time() - slot.started - self._answer_seconds)
        self._close(slot, "failed" if isinstance(how, Exception) else "finished")

    def _close(self, slot: Slot, outcome: str) -> None:
        """Give the slot back; the first who says how it ended is heard."""
        passes = self._slots.pop(slot, None)
        if passes is None:
            return
        self._outcomes[outcome] += 1
        self._admission.leave(slot)
        passes.leave(slot)
        if self._nursery is not None:
            self._admit()


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
    if characters <= _INLINE_CHARACTERS_MAX and tokenizer.is_quick:
        return encode()
    return await trio.to_thread.run_sync(encode, abandon_on_cancel=True, limiter=tokenizer.limiter)


def _check_ids(ids: tuple[int, ...], vocabulary: int, what: str = "prompt") -> None:
    for index, token in enumerate(ids):
        if not isinstance(token, int) or not 0 <= token < vocabulary:
            raise RequestError(
                "invalid_request",
                f"{what}: token {index} is {token!r}",
                f"use token ids from 0 to {vocabulary - 1}",
                param=what,
            )


def _check_bias(sampling: Sampling, vocabulary: int) -> None:
    _check_ids(sampling.stop_tokens, vocabulary, "stop_token_ids")
    for token, _ in sampling.logit_bias:
        if token >= vocabulary:
            raise RequestError(
                "invalid_request",
                f"logit_bias names token {token}, this model has {vocabulary}",
                f"use token ids from 0 to {vocabulary - 1}",
                param="logit_bias",
            )


def _room(model: Model, prompt: int, request: GenerationRequest, kv_tokens_max: int) -> int:
    """How many tokens the answer may have: what was asked for, within what context and memory leave."""
    where = "prompt" if request.prompt is not None else "messages"
    if kv_tokens_max < model.context_tokens and prompt + max(1, request.sampling.min_tokens) > kv_tokens_max:
        raise RequestError(
            "context_length_exceeded",
            f"the prompt has {prompt} tokens, this node gives an answer {kv_tokens_max} with its prompt",
            "shorten the prompt, or ask its operator to raise dmoe.kv_tokens_max",
            param=where,
        )
    left = min(model.context_tokens, kv_tokens_max) - prompt
    if left < max(1, request.sampling.min_tokens):
        wanted = f" and min_tokens {request.sampling.min_tokens}" if left > 0 else ""
        raise RequestError(
            "context_length_exceeded",
            # clients tell this error from others by these very words, which are OpenAI's
            f"the prompt has {prompt} tokens{wanted}, this model's maximum context length is {model.context_tokens}",
            "shorten the prompt",
            param=where,
        )
    return min(left, request.sampling.max_tokens or left)
