"""Embeddings: texts in, vectors out, through the engine's passes beside everybody's answers.

Owns: checking such a request, and running its texts a few at a time. Does not own: slots and passes
(``dmoe/engine.py``), what a vector is (``dmoe/core/embedding.py``).

Invariants:

1. A request is checked as a whole before any of its texts is computed; the first failure ends all of them.
2. A text begins with nothing that another sequence computed: the hidden states of all its positions are needed.

Fails with RequestError naming the input, and with what a pass fails with.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from config.errors import RequestError
from config.generation import Embedded, EmbeddingRequest, Finished, Route
from dmoe.core.embedding import Pooled
from dmoe.text import Tokenizer

INPUTS_MAX = 2048
_AT_ONCE_MAX = 8
_INLINE_CHARACTERS_MAX = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedEmbeddings:
    """A request that was checked, its inputs as tokens. ``model`` is the engine's."""

    request: EmbeddingRequest
    inputs: tuple[tuple[int, ...], ...]
    model: Any
    route: Route

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all inputs together."""
        return sum(map(len, self.inputs))


async def tokens_of(
    request: EmbeddingRequest, tokenizer: Tokenizer, context_tokens: int
) -> tuple[tuple[int, ...], ...]:
    """The inputs as token ids. Raises RequestError."""
    if not 0 < len(request.inputs) <= INPUTS_MAX:
        raise _refused(f"input has {len(request.inputs)} texts", f"send 1 to {INPUTS_MAX}")
    encode = partial(_encode, request.inputs, tokenizer)
    characters = sum(map(len, request.inputs))
    found = (
        encode()
        if characters <= _INLINE_CHARACTERS_MAX and tokenizer.is_quick
        else await trio.to_thread.run_sync(encode, limiter=tokenizer.limiter)
    )
    for index, tokens in enumerate(found):
        if not request.inputs[index]:
            raise _refused(f"input {index} is empty", "leave it out")
        if len(tokens) > context_tokens:
            raise RequestError(
                "context_length_exceeded",
                f"input {index} has {len(tokens)} tokens, the model takes {context_tokens}",
                "split it",
                param="input",
            )
    return found


def _encode(inputs: Sequence[str | tuple[int, ...]], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    return tuple(
        _checked(index, each, tokenizer.vocabulary)
        if isinstance(each, tuple)
        else tokenizer.encode(each, control=False)
        for index, each in enumerate(inputs)
    )


def _checked(index: int, ids: tuple[int, ...], vocabulary: int) -> tuple[int, ...]:
    for token in ids:
        if not 0 <= token < vocabulary:
            raise _refused(f"input {index} has the token {token}", f"use token ids from 0 to {vocabulary - 1}")
    return ids


async def embed(
    prepared: PreparedEmbeddings, run: Callable[[PreparedEmbeddings, Pooled], Awaitable[Finished]]
) -> Embedded:
    """The vectors of all inputs. ``run`` computes one input."""
    works = [Pooled(tokens) for tokens in prepared.inputs]
    ends: list[Finished | None] = [None] * len(works)
    failures: list[Exception] = []
    limiter = trio.CapacityLimiter(_AT_ONCE_MAX)
    async with trio.open_nursery() as nursery:

        async def one(index: int, work: Pooled) -> None:
            try:
                async with limiter:
                    ends[index] = await run(prepared, work)
            except Exception as failure:  # noqa: BLE001 - raised below, outside of the nursery's group
                failures.append(failure)
                nursery.cancel_scope.cancel()

        for index, work in enumerate(works):
            nursery.start_soon(one, index, work)
    if failures:
        raise failures[0]
    rows: dict[str, int] = {}
    for finished in ends:
        assert finished is not None
        for peer, count in finished.expert_rows.items():
            rows[peer] = rows.get(peer, 0) + count
    return Embedded(
        vectors=tuple(work.vector().astype("<f4").tobytes() for work in works),
        prompt_tokens=prepared.prompt_tokens,
        route=prepared.route,
        expert_rows=rows,
    )


def _refused(message: str, hint: str) -> RequestError:
    return RequestError("invalid_request", message, hint, param="input")
