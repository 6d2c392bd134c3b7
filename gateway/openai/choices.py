"""Several answers to one request, side by side: a few to each of its prompts.

Owns: how their pieces come together, what they cost together. Each is a job of its own (``gateway/openai/job.py``).

Invariants:

1. The pieces of one answer come in their order; those of different answers as they are generated.
2. The first failure ends all of them and leaves as it is, not in a group.
3. They are settled as finished only when all have finished: who got no answer does not pay for the others' text.
"""

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import trio

from config.generation import Delta, Finished, PlaceLogprobs, ToolDelta
from gateway.money import Settlement
from gateway.openai.job import Job
from gateway.till import Till


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. ``places``: its tokens' log probabilities, if they were asked for."""

    text: str
    places: tuple[PlaceLogprobs, ...]
    finished: Finished
    calls: tuple[ToolDelta, ...] = ()
    reasoning: str = ""
    prompt_places: tuple[PlaceLogprobs, ...] = ()

    @classmethod
    def of(cls, deltas: Sequence[Delta], finished: Finished) -> "Answer":
        """The answer that the pieces make."""
        text = "".join(delta.text for delta in deltas)
        return cls(
            text,
            tuple(place for delta in deltas for place in delta.logprobs),
            finished,
            calls=tuple(call for delta in deltas for call in delta.tool_calls),
            reasoning="".join(delta.reasoning for delta in deltas),
            prompt_places=tuple(place for delta in deltas for place in delta.prompt_logprobs),
        )


async def run_jobs(
    till: Till, jobs: Sequence[Job], each: int, take: Callable[[int, Delta], Awaitable[None]], end: Callable[[], bytes]
) -> bytes:
    """:func:`generate`, and settle the jobs, of which every ``each`` have the same prompt. Returns what ``end`` makes
    of the finished jobs while the till writes."""
    await generate(jobs, take)
    settled = till.hand_over(*conclude(jobs, each))
    made = end()
    time.sleep(0)  # noqa: ASYNC251 - the till's thread is awake by now, and need not wait until this one sleeps
    await settled()
    return made


def conclude(jobs: Sequence[Job], each: int) -> list[Settlement]:
    """What settles finished jobs, for the till at once."""
    shares = prompt_shares([job.finished for job in jobs], each)
    return [job.conclude(tokens) for job, tokens in zip(jobs, shares, strict=True)]


async def generate(jobs: Sequence[Job], take: Callable[[int, Delta], Awaitable[None]]) -> None:
    """Run the jobs to their ends; ``take`` gets each piece with its choice, one call at a time. Raises what the first
    failure raised."""
    if len(jobs) == 1:  # nearly every request: no task of its own
        async for delta in jobs[0]:
            await take(0, delta)
    else:
        await _side_by_side(jobs, take)


async def _side_by_side(jobs: Sequence[Job], take: Callable[[int, Delta], Awaitable[None]]) -> None:
    lock = trio.Lock()
    failures: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def run(choice: int, job: Job) -> None:
            try:
                async for delta in job:
                    async with lock:
                        await take(choice, delta)
            except Exception as failure:  # noqa: BLE001 - raised below, outside of the nursery's group
                failures.append(failure)
                nursery.cancel_scope.cancel()

        for choice, job in enumerate(jobs):
            nursery.start_soon(run, choice, job)
    if failures:
        raise failures[0]


def prompt_shares(parts: Sequence[Finished], each: int) -> list[int]:
    """How many tokens of its prompt each answer is charged; ``each`` answers belong to a prompt: one of them pays for
    all of it, the others for what was computed again. (The last token of a prompt is always computed, so one token is
    no second computation.)"""
    groups = (parts[start : start + each] for start in range(0, len(parts), each))
    return [share for group in groups for share in _shares(group)]


def _shares(parts: Sequence[Finished]) -> list[int]:
    first = min(range(len(parts)), key=lambda index: parts[index].cached_tokens)
    again = [part.prompt_tokens - part.cached_tokens for part in parts]
    return [
        part.prompt_tokens if index == first else (again[index] if again[index] > 1 else 0)
        for index, part in enumerate(parts)
    ]


def best(answers: Sequence[Answer], count: int) -> list[Answer]:
    """The ``count`` answers whose tokens are the likeliest on average, best first."""
    return sorted(answers, key=_mean_logprob, reverse=True)[:count]


def _mean_logprob(answer: Answer) -> float:
    values = [place.chosen.logprob for place in answer.places if place.chosen.logprob is not None]
    return sum(values) / len(values) if values else -math.inf


def joined(parts: Sequence[Finished], each: int) -> Finished:
    """The account of all answers together, ``each`` to a prompt: tokens, rows and retries add up (of prompts: what is
    charged), times are the longest."""
    if len(parts) == 1:
        return parts[0]
    rows: dict[str, int] = {}
    serving: dict[str, dict[str, list[int]]] = {}
    for part in parts:
        for peer, count in part.expert_rows.items():
            rows[peer] = rows.get(peer, 0) + count
        for peer, served in part.serving.items():
            into = serving.setdefault(peer, {})
            for kind, numbers in served.items():
                into[kind] = sorted({*into.get(kind, ()), *numbers})
    return replace(
        parts[0],
        prompt_tokens=sum(prompt_shares(parts, each)),
        completion_tokens=sum(part.completion_tokens for part in parts),
        prefill_seconds=max(part.prefill_seconds for part in parts),
        decode_seconds=max(part.decode_seconds for part in parts),
        expert_rows=rows,
        serving=serving,
        retries=sum(part.retries for part in parts),
        cached_tokens=min(part.cached_tokens for part in parts),
    )
