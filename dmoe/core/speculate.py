"""Drafts of what comes next, and whether feeding them pays. Pure: times come in as arguments.

Owns: guesses from the text itself (prompt lookup: Saxena, "Prompt Lookup Decoding", 2023), how often guesses come true,
what a pass of n rows costs, how many guesses are worth a row. Does not own: checking them (``dmoe/core/answer.py``).

Invariants:

1. Nothing here can change an answer, only how many passes it takes.
2. A guess gets a row only if it is expected to raise tokens per second: with T(n) the measured seconds of a pass of n
   rows, rows are added, likeliest first, to where expected tokens / T is largest. Where rows cost as much as passes
   that is none; where a pass is mostly round trip it is many.
3. Guesses that get no row are compared all the same with what was said, so that the odds stay true while drafting is
   off, at no cost.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAFT_TOKENS_MAX = 24
NGRAM_MIN, NGRAM_MAX = 2, 8
MODEL_KIND = 3
_CLASSES = 4
_PRIOR = (0.3, 0.5, 0.7, 0.6)
"""How likely a guess after a match of 2, of 3 or 4, of 5 or more tokens, or of a model, is right, before anything is
known."""
MODEL_DRAFT_MAX = 8
_PROBE_PASSES = 48
"""A draft model that did not pay is asked for one guess again after so many passes."""
_PRIOR_WEIGHT = 2.0
_MEMORY = 0.93
"""Weight of a trial against the next one: about the last 14 count."""
_ODDS_MIN = 0.02
_SAMPLES = 7
_STALE_PASSES = 400
_GAIN_MIN = 1.05
"""Expected gains below this are within what is mismeasured."""
_HOPED_SHARE_PER_ROW = 0.02
"""What a row beyond the measured counts is hoped to cost, as a share of the pass: low, so that it is tried."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens; ``kind`` says how well founded they are (a class of :class:`Odds`)."""

    tokens: tuple[int, ...]
    kind: int


NO_DRAFT = Draft((), 0)


class Lookup:
    """Guesses an answer's next tokens from where its last ones stood before, in the prompt or in the answer itself."""

    def __init__(self, tokens: Sequence[int], capacity: int) -> None:
        """``capacity``: most tokens there will ever be."""
        self._tokens = np.empty(max(capacity, len(tokens)), np.int32)
        self._count = 0
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """More tokens stand."""
        end = self._count + len(tokens)
        self._tokens[self._count : end] = tokens
        self._count = end

    def draft(self, count: int) -> Draft:
        """Up to ``count`` tokens that followed the latest of the longest matches of the last tokens; none if fewer than
        NGRAM_MIN of them stood together before."""
        count = min(count, DRAFT_TOKENS_MAX)
        if count < 1 or self._count <= NGRAM_MIN:
            return NO_DRAFT
        seen = self._tokens[: self._count]
        ends = np.flatnonzero(seen[NGRAM_MIN - 1 : -1] == seen[-1]) + NGRAM_MIN - 1
        length = 1
        while length < NGRAM_MAX and ends.size:
            longer = ends[(ends >= length) & (seen[ends - length] == seen[-1 - length])]
            if not longer.size:
                break
            ends, length = longer, length + 1
        if length < NGRAM_MIN or not ends.size:
            return NO_DRAFT
        return Draft(self._following(int(ends[-1]) + 1, count), kind_of(length))

    def _following(self, start: int, count: int) -> tuple[int, ...]:
        """``count`` tokens from ``start``; past the end the guesses themselves go on, as in a repetition they do."""
        found: list[int] = self._tokens[start : min(start + count, self._count)].tolist()
        period = self._count - start
        while len(found) < count:
            found.append(found[len(found) - period])
        return tuple(found)


def kind_of(match: int) -> int:
    """The class of a guess after a match of so many tokens."""
    return 0 if match <= 2 else 1 if match <= 4 else 2


class Odds:
    """How likely a guess is right, by its kind: a moving share of those that were, begun with what is usual."""

    __slots__ = ("_parent", "_right", "_trials")

    def __init__(self, parent: "Odds | None" = None) -> None:
        """``parent``: the odds of all answers, where a new one's start; it learns from this one too."""
        self._parent = parent
        self._right = [0.0] * _CLASSES
        self._trials = [0.0] * _CLASSES

    def of(self, kind: int) -> float:
        """The share of right guesses, between 0 and 1."""
        base = self._parent.of(kind) if self._parent is not None else _PRIOR[kind]
        return (self._right[kind] + _PRIOR_WEIGHT * base) / (self._trials[kind] + _PRIOR_WEIGHT)

    def observe(self, draft: Draft, fed: int, said: Sequence[int]) -> int:
        """Learn from what was said where ``draft`` was guessed and ``fed`` of its tokens had a row. Returns how many
        guesses in a row were right, of those that can be told."""
        if not draft.tokens or not said:
            return 0
        trials = right = 0
        for guess, token in zip(draft.tokens[: max(fed, 1)], said, strict=False):
            trials += 1
            if guess != token:
                break
            right += 1
        self._learn(draft.kind, right, trials)
        return right

    def _learn(self, kind: int, right: int, trials: int) -> None:
        keep: float = _MEMORY**trials
        self._right[kind] = self._right[kind] * keep + right
        self._trials[kind] = self._trials[kind] * keep + trials
        if self._parent is not None:
            self._parent._learn(kind, right, trials)


class Pace:
    """What a pass of n rows takes, from measured passes: the median of the last few per power of two, joined by lines.

    Times that have not been seen for a while are forgotten, so that what was dear under load is tried again.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[tuple[int, float]]] = {}
        self._seen_at: dict[int, int] = {}
        self._passes = 0
        self._rows = np.ones(1)
        self._seconds = np.ones(1)

    @property
    def known(self) -> bool:
        """Anything was measured."""
        return bool(self._samples)

    def observe(self, rows: int, seconds: float) -> None:
        """A pass of ``rows`` rows took so long."""
        self._passes += 1
        bucket = (rows - 1).bit_length()
        self._samples.setdefault(bucket, deque(maxlen=_SAMPLES)).append((rows, seconds))
        self._seen_at[bucket] = self._passes
        for old in [each for each, seen in self._seen_at.items() if self._passes - seen > _STALE_PASSES]:
            del self._samples[old], self._seen_at[old]
        self._refit()

    def seconds(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Expected seconds of passes of ``rows`` rows."""
        inside: NDArray[np.float64] = np.interp(rows, self._rows, self._seconds)
        beyond = np.maximum(rows - self._rows[-1], 0)
        expected: NDArray[np.float64] = inside * (1 + _HOPED_SHARE_PER_ROW * beyond)
        return expected

    def _refit(self) -> None:
        points = []
        for bucket in sorted(self._samples):
            samples = self._samples[bucket]
            if len(samples) == 1 and len(self._samples) > 1:
                continue  # the first pass of a new size also makes its buffers
            middle = sorted(samples, key=lambda sample: sample[1])[len(samples) // 2]
            points.append((sum(rows for rows, _ in samples) / len(samples), middle[1]))
        if points:
            rows, seconds = zip(*points, strict=True)
            self._rows = np.array(rows)
            self._seconds = np.maximum.accumulate(np.array(seconds))


def allot(chances: Sequence[tuple[float, int]], pace: Pace, base_rows: int, spare_rows: int) -> list[int]:
    """How many guesses of each answer get a row. ``chances``: per answer the odds of one guess and how many there are;
    ``base_rows``: rows the pass has anyway, one of them per answer; ``spare_rows``: most rows for guesses.

    The k-th guess of an answer counts only if those before it are right, so it is worth odds**k tokens.
    """
    counts = [0] * len(chances)
    worth = [
        (odds**place, answer)
        for answer, (odds, available) in enumerate(chances)
        if odds > _ODDS_MIN
        for place in range(1, available + 1)
    ]
    if not worth or spare_rows < 1 or not pace.known:
        return counts
    worth.sort(key=lambda each: -each[0])  # stable, and falling within an answer: its guesses stay in their order
    worth = worth[:spare_rows]
    tokens = len(chances) + np.concatenate(([0.0], np.cumsum([share for share, _ in worth])))
    rates = tokens / pace.seconds(base_rows + np.arange(len(worth) + 1))
    best = int(rates.argmax())
    if rates[best] >= _GAIN_MIN * rates[0]:
        for _, answer in worth[:best]:
            counts[answer] += 1
    return counts


class ModelDrafts:
    """How many guesses a draft model is asked for: each costs a pass of its own, so they pay rarely where the model
    itself is near."""

    def __init__(self) -> None:
        self._since = _PROBE_PASSES

    def count(self, odds: Sequence[float], pace: Pace, draft_pace: Pace, rows: int, most: int) -> int:
        """Guesses for each of the answers with these ``odds``, at most ``most``; ``rows``: of the pass without them."""
        if not odds or most < 1 or not pace.known:
            return 0
        self._since += 1
        best = self._best(odds, pace, draft_pace, rows, min(most, MODEL_DRAFT_MAX)) if draft_pace.known else 0
        if not best and self._since >= _PROBE_PASSES:
            best = min(2, most)  # the second guess is a pass that shows the draft model's pace
        if best:
            self._since = 0
        return best

    def _best(self, odds: Sequence[float], pace: Pace, draft_pace: Pace, rows: int, most: int) -> int:
        counts = np.arange(most + 1)
        powers = np.array(odds)[:, None] ** counts  # how likely the k-th guess is right with all before it
        tokens = powers.cumsum(axis=1).sum(axis=0)
        seconds = pace.seconds(rows + len(odds) * counts) + counts * draft_pace.seconds(np.array([len(odds)]))
        rates = tokens / seconds
        best = int(rates.argmax())
        return best if rates[best] >= _GAIN_MIN * rates[0] else 0
