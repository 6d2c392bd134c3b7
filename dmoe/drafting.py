"""Drafts from a small model of the same vocabulary.

Owns: the small model's sequences, one per answer, kept in step with what the answer says. Does not own: whether a draft
is worth its time (``dmoe/core/speculate.py``), its check (``dmoe/core/answer.py``).

Invariants:

1. A draft that cannot be made is no draft: nothing that fails here ends an answer.
2. All answers that want drafts share the small model's passes, and only one loop at a time uses it.
"""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import trio

from config.errors import RiosError
from dmoe.core.speculate import Pace
from dmoe.runner import Feed, FloatRows, Runner
from dmoe.runner import Sequence as Cached

log = logging.getLogger(__name__)

_ROWS_MAX = 256
_SECONDS_MIN = 1e-6


@dataclass(slots=True)
class _Shadow:
    """An answer's sequence in the small model and the tokens in it; the first ``sure`` of them are the answer's."""

    sequence: Cached
    tokens: list[int] = field(default_factory=list)
    sure: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """An answer that wants guesses: what it is, its prompt and what it said, and the room it may need."""

    answer: Hashable
    tokens: Sequence[int]
    positions: int


class Drafter:
    """A small model that guesses what answers will say, greedily."""

    def __init__(self, runner: Runner, lock: trio.Lock) -> None:
        """``lock`` is held during each use: others may use the runner too."""
        self.pace = Pace()
        self._runner = runner
        self._lock = lock
        self._shadows: dict[Hashable, _Shadow] = {}
        self._refused: set[Hashable] = set()
        self._busy = False
        self._gone: list[Hashable] = []

    def serves(self, answer: Hashable) -> bool:
        """Whether guesses for this answer may be asked for."""
        return answer not in self._refused

    async def draft(self, wanted: Sequence[Wanted], count: int) -> list[tuple[int, ...]]:
        """``count`` guesses for each; none where the small model fails, which is not asked for those again."""
        async with self._lock:
            self._busy = True
            try:
                return await self._guess(wanted, count)
            except RiosError as failure:
                log.warning("no drafts from the draft model for %d answers: %s", len(wanted), failure)
                self._refused.update(each.answer for each in wanted)
                return [() for _ in wanted]
            finally:
                self._busy = False
                for answer in self._gone:
                    self.forget(answer)
                self._gone.clear()

    def forget(self, answer: Hashable) -> None:
        """The answer is over, or does without from now on. A sequence in use is closed behind its use."""
        if self._busy:
            self._gone.append(answer)
            return
        self._refused.discard(answer)
        shadow = self._shadows.pop(answer, None)
        if shadow is not None:
            shadow.sequence.close()

    def close(self) -> None:
        """Free all sequences."""
        for answer in list(self._shadows):
            self.forget(answer)

    async def _guess(self, wanted: Sequence[Wanted], count: int) -> list[tuple[int, ...]]:
        shadows = [await self._shadow(each) for each in wanted]
        fed = [tuple(each.tokens[len(shadow.tokens) :]) for each, shadow in zip(wanted, shadows, strict=True)]
        guesses: list[tuple[int, ...]] = [() for _ in wanted]
        for _ in range(count):
            found = await self._pass(shadows, fed)
            guesses = [(*before, token) for before, token in zip(guesses, found, strict=True)]
            fed = [(token,) for token in found]
        return guesses

    async def _shadow(self, wanted: Wanted) -> _Shadow:
        """The answer's sequence, cut back to what stands; the last token is always fed anew."""
        shadow = self._shadows.get(wanted.answer)
        if shadow is None:
            sequence = await self._runner.open(wanted.positions)
            shadow = self._shadows[wanted.answer] = _Shadow(sequence)
        end = min(len(shadow.tokens), len(wanted.tokens) - 1)
        stands = min(shadow.sure, end)
        while stands < end and shadow.tokens[stands] == wanted.tokens[stands]:
            stands += 1
        if stands < len(shadow.tokens):
            shadow.sequence.truncate(stands)
            del shadow.tokens[stands:]
        shadow.sure = stands
        return shadow

    async def _pass(self, shadows: Sequence[_Shadow], fed: Sequence[tuple[int, ...]]) -> list[int]:
        """Feed tokens to each, and the likeliest next token of each."""
        rest = list(fed)
        for index, shadow in enumerate(shadows):
            while len(rest[index]) > _ROWS_MAX:
                await self._forward([(shadow, rest[index][:_ROWS_MAX])], 0)
                rest[index] = rest[index][_ROWS_MAX:]
        started = trio.current_time()
        outputs = await self._forward(list(zip(shadows, rest, strict=True)), 1)
        if all(len(each) == 1 for each in fed):
            self.pace.observe(len(fed), max(trio.current_time() - started, _SECONDS_MIN))
        return [int(rows[0].argmax()) for rows in outputs]

    async def _forward(self, steps: Sequence[tuple[_Shadow, tuple[int, ...]]], outputs: int) -> list[FloatRows]:
        feeds = [Feed(sequence=shadow.sequence, tokens=tokens, outputs=outputs) for shadow, tokens in steps]
        found = await self._runner.forward(feeds)
        for shadow, tokens in steps:
            shadow.tokens += tokens
        return found
