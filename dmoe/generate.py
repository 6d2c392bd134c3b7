"""One answer: prompt in, events out, over whatever computes the logits.

Owns: prefill in chunks, the decode loop, what ends an answer. Does not own: admission (``dmoe/engine.py``), how logits
come about (a :class:`Run`).

Invariants:

1. Exactly one ``Finished``, last, unless a RiosError or cancellation ends the answer before.
2. The ids of all deltas are the answer's tokens, without the stop token; ``completion_tokens`` is their number.
3. The same prompt, sampling (with its seed) and logits give the same events, whatever runs beside it.
4. Between two checkpoints lies at most one forward call.
"""

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

import numpy as np
import trio
from numpy.typing import NDArray

from config.generation import (
    Delta,
    Finished,
    FinishReason,
    GenerationEvent,
    PlaceLogprobs,
    Route,
    Sampling,
    TokenLogprob,
)
from dmoe.core.constraint import Constraint, only
from dmoe.core.logprobs import logprobs
from dmoe.core.penalties import penalties_of
from dmoe.core.sampling import StopMatcher, choose
from dmoe.runner import Feed, Runner, Sequence
from dmoe.text import Tokenizer

PREFILL_TOKENS_MAX = 256
"""Prompt tokens per forward call: how long a cancelled or a neighbouring answer waits at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to generate. ``sampling.seed`` is set unless greedy; ``max_tokens`` fits the sequence."""

    prompt_tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    route: Route
    constraint: Constraint | None = None
    """Its state at the beginning of the answer."""


Emit = Callable[[GenerationEvent], Awaitable[None]]


async def generate(runner: Runner, sequence: Sequence, job: Job, tokenizer: Tokenizer, emit: Emit) -> Finished:
    """Send the answer's events to ``emit`` (a checkpoint each); return the last one."""
    started = trio.current_time()
    logits = await _prefill(runner, sequence, job.prompt_tokens)
    prefilled = trio.current_time()
    reason, count = await _decode(runner, sequence, job, tokenizer, emit, logits)
    report = sequence.report()
    finished = Finished(
        reason=reason,
        prompt_tokens=len(job.prompt_tokens),
        completion_tokens=count,
        prefill_seconds=prefilled - started,
        decode_seconds=trio.current_time() - prefilled,
        route=job.route,
        expert_rows=report.expert_rows,
        serving=report.serving,
        retries=report.retries,
    )
    await emit(finished)
    return finished


async def _prefill(runner: Runner, sequence: Sequence, prompt: tuple[int, ...]) -> NDArray[np.float32]:
    assert prompt, "an empty prompt has no logits"
    for start in range(0, len(prompt), PREFILL_TOKENS_MAX):
        await trio.lowlevel.checkpoint()
        logits = await _forward(runner, sequence, prompt[start : start + PREFILL_TOKENS_MAX])
    return logits


async def _forward(runner: Runner, sequence: Sequence, tokens: tuple[int, ...]) -> NDArray[np.float32]:
    """Logits f32[V] behind the last token."""
    (logits,) = await runner.forward([Feed(sequence=sequence, tokens=tokens)])
    last: NDArray[np.float32] = logits[-1]
    return last


async def _decode(
    runner: Runner, sequence: Sequence, job: Job, tokenizer: Tokenizer, emit: Emit, logits: NDArray[np.float32]
) -> tuple[FinishReason, int]:
    """The loop over tokens. Returns why it ended and how many tokens the answer has.

    Until ``min_tokens`` are there, stop tokens are banned and stop strings are ordinary text. A constrained answer ends
    when it is complete.
    """
    constraint = job.constraint
    text, stops = tokenizer.detokenizer(), StopMatcher(job.sampling.stop)
    penalties = penalties_of(job.sampling, job.prompt_tokens)
    places: tuple[PlaceLogprobs, ...] = ()
    offset = 0
    for count in range(job.max_tokens):
        early = count < job.sampling.min_tokens
        banned: Collection[int] = job.stop_tokens if early else ()
        moved = logits if penalties is None else penalties.apply(logits)
        if constraint is not None:
            moved = constraint.mask(moved)
            banned = () if only(moved, job.stop_tokens) else banned
        token = choose(moved, job.sampling, len(job.prompt_tokens) + count, banned)
        if token in job.stop_tokens:
            await _emit_rest(emit, text.finish(), stops)
            return "stop", count
        if penalties is not None:
            penalties.push(token)
        if constraint is not None:
            constraint.accept(token)
        if job.sampling.logprobs is not None:
            places = (_place(logits, token, job.sampling.logprobs, offset, tokenizer),)
        piece = text.push(token)
        offset += len(piece)
        await emit(Delta(text=piece if early else stops.push(piece), tokens=(token,), logprobs=places))
        if stops.stopped:
            return "stop", count + 1
        if constraint is not None and constraint.done:
            await _emit_rest(emit, text.finish(), stops)
            return "stop", count + 1
        if count + 1 < job.max_tokens:
            logits = await _forward(runner, sequence, (token,))
    await _emit_rest(emit, text.finish(), stops)
    return "length", job.max_tokens


def _place(logits: NDArray[np.float32], token: int, top: int, offset: int, tokenizer: Tokenizer) -> PlaceLogprobs:
    """The log probabilities at one place, from the model's logits as they came."""
    logprob, likeliest = logprobs(logits, token, top)
    return PlaceLogprobs(
        chosen=TokenLogprob(token=token, data=tokenizer.token_bytes(token), logprob=logprob),
        top=tuple(TokenLogprob(token=i, data=tokenizer.token_bytes(i), logprob=value) for i, value in likeliest),
        offset=offset,
    )


async def _emit_rest(emit: Emit, tail: str, stops: StopMatcher) -> None:
    rest = stops.push(tail) + stops.finish()
    if rest:
        await emit(Delta(text=rest, tokens=()))
