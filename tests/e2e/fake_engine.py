"""A fake engine that implements the gateway's port: it spells a fixed answer, one token a word, as a test tells it to.

Stands where the real engine cannot: to fail, wait or run for ever at a given token.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import trio

from config.errors import RequestError, RiosError
from config.generation import (
    Delta,
    Embedded,
    EmbeddingRequest,
    Finished,
    GenerationEvent,
    GenerationRequest,
    ModelInfo,
    PlaceLogprobs,
    Route,
    TokenLogprob,
)

ANSWER = ("Paris", " is", " the", " capital", " of", " France", ".")
CONTEXT_TOKENS = 4096


@dataclass(frozen=True)
class FakePrepared:
    request: GenerationRequest
    prompt_tokens: tuple[int, ...]
    max_tokens: int

    @property
    def route(self) -> Route:
        return self.request.route or "experts"


@dataclass(frozen=True)
class FakeEmbeddings:
    request: EmbeddingRequest
    prompt_tokens: int


@dataclass
class FakeEngine:
    """``pause_seconds`` before each token; ``fail_at``/``hang_at``: at this token raise ``error`` / wait for ever;
    ``endless``: the answer goes on to max_tokens. ``seeded``: the words come in an order that the seed tells."""

    pause_seconds: float = 0.0
    fail_at: int | None = None
    hang_at: int | None = None
    error: Exception | None = None
    endless: bool = False
    seeded: bool = False
    fail_choice: int = 0
    running: int = 0
    produced: int = 0
    stopped: trio.Event = field(default_factory=trio.Event)
    requests: list[GenerationRequest] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    """The last messages of conversations whose turn came, in that order."""

    def models(self) -> tuple[ModelInfo, ...]:
        return (
            ModelInfo(id="a" * 64, name="tiny", context_tokens=CONTEXT_TOKENS, created=1_700_000_000, ready=True),
            ModelInfo(id="b" * 64, name="cold", context_tokens=8, created=0, ready=False, reason="no replica"),
        )

    async def prepare(self, request: GenerationRequest) -> FakePrepared:
        if request.model not in ("tiny", "a" * 64):
            raise RequestError("not_found", f"the model {request.model!r} does not exist")
        self.requests.append(request)
        if request.messages is not None:
            words = " ".join(message.content for message in request.messages).split()
        else:
            words = request.prompt.split() if isinstance(request.prompt, str) else list(request.prompt or ())
        prompt = tuple(range(len(words)))
        room = CONTEXT_TOKENS - len(prompt)
        if room < 1:
            raise RequestError("context_length_exceeded", f"the prompt has {len(prompt)} tokens of {CONTEXT_TOKENS}")
        return FakePrepared(request, prompt, min(request.sampling.max_tokens or room, room))

    @asynccontextmanager
    async def stream(self, prepared: FakePrepared) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        self.running += 1
        if prepared.request.messages:
            self.answered.append(prepared.request.messages[-1].content)
        try:
            async with aclosing(self._events(prepared)) as events:
                yield events
        finally:
            self.running -= 1
            self.stopped.set()

    async def prepare_embeddings(self, request: EmbeddingRequest) -> FakeEmbeddings:
        if request.model not in ("tiny", "a" * 64):
            raise RequestError("not_found", f"the model {request.model!r} does not exist")
        tokens = sum(len(each.split()) if isinstance(each, str) else len(each) for each in request.inputs)
        return FakeEmbeddings(request, tokens)

    async def embed(self, prepared: FakeEmbeddings) -> Embedded:
        vector = bytes.fromhex("0000803f00000000")  # (1, 0)
        count = len(prepared.request.inputs)
        return Embedded(vectors=(vector,) * count, prompt_tokens=prepared.prompt_tokens, route="local", expert_rows={})

    async def _events(self, prepared: FakePrepared) -> AsyncIterator[GenerationEvent]:
        count = prepared.max_tokens if self.endless else min(len(ANSWER), prepared.max_tokens)
        for index in range(count):
            if index == self.hang_at:
                await trio.sleep_forever()
            if index == self.fail_at and prepared.request.choice == self.fail_choice:
                raise self.error or RiosError("no_replica", "no replica of expert 3 answers")
            await trio.sleep(self.pause_seconds)
            self.produced += 1
            sampling = prepared.request.sampling
            words = Random(sampling.seed).sample(ANSWER, len(ANSWER)) if self.seeded else ANSWER
            text = words[index % len(words)]
            places = () if sampling.logprobs is None else (_place(index, text, sampling.logprobs),)
            yield Delta(text=text, tokens=(index,), logprobs=places)
        yield Finished(
            reason="length" if count == prepared.max_tokens else "stop",
            prompt_tokens=len(prepared.prompt_tokens),
            completion_tokens=count,
            prefill_seconds=0.01,
            decode_seconds=0.02,
            route=prepared.request.route or "experts",
            expert_rows={"12D3KooWfake": 3 * count},
            serving={"12D3KooWfake": {"layers": [0, 1], "experts": [0, 2]}},
            retries=0,
        )


def _place(index: int, text: str, top: int) -> PlaceLogprobs:
    """The chosen token is the second likeliest; the likeliest is half of a character."""
    chosen = TokenLogprob(token=index, data=text.encode(), logprob=-0.5 - index)
    likeliest = TokenLogprob(token=99, data=b"\xe2\x82", logprob=-0.25)
    return PlaceLogprobs(chosen=chosen, top=(likeliest, chosen)[:top], offset=sum(map(len, ANSWER[:index])))


class FakeHealth:
    reasons: tuple[str, ...] = ()

    def ready(self) -> tuple[bool, tuple[str, ...]]:
        return not self.reasons, self.reasons
