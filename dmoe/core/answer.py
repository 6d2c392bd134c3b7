"""One answer as a state machine: what to feed next, what the outputs mean, and when it is over. Pure.

``next()`` says what to feed, ``take()`` turns the outputs into events. Owns: sampling with (seed, position), penalties,
stop strings, log probabilities, the check of drafts. Does not own: the key/value cache, when a pass runs
(``dmoe/core/scheduler.py``), where drafts come from (``dmoe/core/speculate.py``).

Invariants:

1. The same prompt, sampling (with its seed) and logits give the same tokens and text, whatever is drafted and in
   whatever chunks the prompt is fed: each row's token is chosen as it would be without drafts, and the next row counts
   only if that token is the one that was drafted.
2. The ids of all deltas are the answer's tokens, without the stop token; their number is ``said``.
3. ``next()`` changes nothing: a pass that failed is repeated by asking again. Only ``take()`` moves on.
4. What a constraint has accepted is never taken back: it is told a token only once the token stands.

Fails with IntegrityError where logits are not numbers.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from config.generation import Delta, FinishReason, PlaceLogprobs, Sampling, TokenLogprob
from dmoe.core.constraint import Constraint, only
from dmoe.core.logprobs import logprobs
from dmoe.core.penalties import penalties_of
from dmoe.core.sampling import StopMatcher, choose

FloatRows = NDArray[np.float32]

PLACES_MAX = 16
"""Prompt rows per pass whose log probabilities are told: each takes about a millisecond between two passes."""


class Decoder(Protocol):
    """Tokens to text, one at a time (:class:`dmoe.text.Detokenizer`)."""

    def push(self, token: int, /) -> str: ...
    def finish(self) -> str: ...


class Vocabulary(Protocol):
    """What an answer needs of a tokenizer (:class:`dmoe.text.Tokenizer`)."""

    def detokenizer(self) -> Decoder: ...
    def token_bytes(self, token: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to generate. ``sampling.seed`` is set unless greedy; prompt and ``max_tokens`` together fit the cache."""

    prompt_tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What a sequence contributes to the next pass: tokens, and of how many of the last rows outputs are wanted."""

    tokens: tuple[int, ...]
    outputs: int
    want: Literal["logits", "hidden"] = "logits"


@dataclass(frozen=True, slots=True)
class Taken:
    """What a step came to. ``length``: how many positions of the sequence stay. ``reason``: set when it is over."""

    deltas: tuple[Delta, ...]
    length: int
    reason: FinishReason | None = None


class Answer:
    """One answer on its way. ``tokens`` is the prompt and what was said; ``length`` of them are in the sequence."""

    def __init__(self, job: Job, vocabulary: Vocabulary, *, length: int = 0) -> None:
        """``length``: the sequence begins with so many positions of the prompt (prefix reuse); the last is never one
        of them, as its logits are needed."""
        assert 0 <= length < len(job.prompt_tokens), "an empty prompt has no logits"
        self.tokens = list(job.prompt_tokens)
        self.length = length
        self.cached = length
        self.drafted = 0
        self.accepted = 0
        self._job = job
        self._sampling = job.sampling
        self._prompt = len(job.prompt_tokens)
        self._vocabulary = vocabulary
        self._text = vocabulary.detokenizer()
        self._stops = StopMatcher(job.sampling.stop)
        self._penalties = penalties_of(job.sampling, job.prompt_tokens)
        self._offset = 0
        self._prompt_text = vocabulary.detokenizer()
        self._prompt_offset = 0

    @property
    def said(self) -> int:
        """How many tokens the answer has."""
        return len(self.tokens) - self._prompt

    @property
    def prompt_left(self) -> int:
        """Prompt tokens that are not in the sequence yet; 0: the answer is being said."""
        return max(0, self._prompt - self.length)

    @property
    def drafts_max(self) -> int:
        """How many drafts could still come true: one token is chosen behind them."""
        return 0 if self.prompt_left else self._job.max_tokens - self.said - 1

    def next(self, rows_max: int, drafts: Sequence[int] = ()) -> Step:
        """What to feed: up to ``rows_max`` tokens of the prompt, then the last token and guesses of what follows."""
        assert rows_max >= 1
        if self.prompt_left:
            if self._sampling.prompt_logprobs:
                rows_max = min(rows_max, PLACES_MAX)
            end = min(self._prompt, self.length + rows_max)
            outputs = end - self.length if self._sampling.prompt_logprobs else int(end == self._prompt)
            return Step(tuple(self.tokens[self.length : end]), outputs)
        useful = min(rows_max - 1, self.drafts_max)
        guesses = tuple(drafts[:useful]) if useful > 0 else ()
        return Step((self.tokens[-1], *guesses), 1 + len(guesses))

    def take(self, step: Step, outputs: FloatRows) -> Taken:
        """Move on by a step that was fed, with its ``outputs`` f32[step.outputs, V]."""
        if self._sampling.prompt_logprobs and self.prompt_left:
            return self._take_places(step, outputs)
        end = self.length + len(step.tokens)
        if end < self._prompt:
            self.length = end
            return Taken((), end)
        drafts = step.tokens[len(step.tokens) - step.outputs + 1 :]
        self.length = end - len(drafts)
        self.drafted += len(drafts)
        return self._say(drafts, outputs)

    def _take_places(self, step: Step, outputs: FloatRows) -> Taken:
        """Move on in a prompt whose log probabilities are asked for: a row foretells the token behind its own."""
        places = [] if self.length else [self._first_place()]
        for row, token in zip(outputs, self.tokens[self.length + 1 :], strict=False):
            places.append(self._prompt_place(row, token))
        self.length += len(step.tokens)
        told = Delta(text="", tokens=(), prompt_logprobs=tuple(places))
        if self.prompt_left:
            return Taken((told,), self.length)
        taken = self._say((), outputs[-1:])
        return replace(taken, deltas=(told, *taken.deltas))

    def _first_place(self) -> PlaceLogprobs:
        token = self.tokens[0]
        self._prompt_offset = len(self._prompt_text.push(token))
        chosen = TokenLogprob(token=token, data=self._vocabulary.token_bytes(token), logprob=None)
        return PlaceLogprobs(chosen=chosen, top=(), offset=0)

    def _prompt_place(self, logits: FloatRows, token: int) -> PlaceLogprobs:
        place = _place(logits, token, self._sampling.logprobs or 0, self._prompt_offset, self._vocabulary)
        self._prompt_offset += len(self._prompt_text.push(token))
        return place

    def _say(self, drafts: Sequence[int], outputs: FloatRows) -> Taken:
        """Choose a token per row, as long as it is the one that the next row was computed for."""
        pieces: list[str] = []
        tokens: list[int] = []
        places: list[PlaceLogprobs] = []
        reason: FinishReason | None = None
        for row, logits in enumerate(outputs):
            token = self._choose(logits)
            if token in self._job.stop_tokens:
                reason = "stop"
                break
            pieces.append(self._push(token, logits, places))
            tokens.append(token)
            reason = self._ended()
            if reason is not None or row >= len(drafts) or drafts[row] != token:
                break
            self.accepted += 1
            self.length += 1
        if reason is not None:
            pieces.append(self._stops.push(self._text.finish()) + self._stops.finish())
        return Taken(_deltas(pieces, tokens, places), self.length, reason)

    def _choose(self, logits: FloatRows) -> int:
        """The token for one row. Until ``min_tokens`` are there, stop tokens are banned; what a constraint leaves no
        other choice than is allowed all the same."""
        banned: Collection[int] = self._job.stop_tokens if self.said < self._sampling.min_tokens else ()
        moved = logits if self._penalties is None else self._penalties.apply(logits)
        if self._job.constraint is not None:
            moved = self._job.constraint.mask(moved)
            banned = () if banned and only(moved, self._job.stop_tokens) else banned
        return choose(moved, self._sampling, len(self.tokens), banned)

    def _push(self, token: int, logits: FloatRows, places: list[PlaceLogprobs]) -> str:
        """Take a token into the answer; the text that may be shown now. Stop strings are ordinary text until
        ``min_tokens`` are there."""
        early = self.said < self._sampling.min_tokens
        if self._penalties is not None:
            self._penalties.push(token)
        if self._job.constraint is not None:
            self._job.constraint.accept(token)
        if self._sampling.logprobs is not None:
            places.append(_place(logits, token, self._sampling.logprobs, self._offset, self._vocabulary))
        self.tokens.append(token)
        piece = self._text.push(token)
        self._offset += len(piece)
        return piece if early else self._stops.push(piece)

    def _ended(self) -> FinishReason | None:
        if self._stops.stopped or (self._job.constraint is not None and self._job.constraint.done):
            return "stop"
        return "length" if self.said >= self._job.max_tokens else None


def _deltas(pieces: list[str], tokens: list[int], places: list[PlaceLogprobs]) -> tuple[Delta, ...]:
    text = "".join(pieces)
    return (Delta(text=text, tokens=tuple(tokens), logprobs=tuple(places)),) if tokens or text else ()


def _place(logits: FloatRows, token: int, top: int, offset: int, vocabulary: Vocabulary) -> PlaceLogprobs:
    """The log probabilities at one place, from the model's logits as they came."""
    logprob, likeliest = logprobs(logits, token, top)
    return PlaceLogprobs(
        chosen=TokenLogprob(token=token, data=vocabulary.token_bytes(token), logprob=logprob),
        top=tuple(TokenLogprob(token=i, data=vocabulary.token_bytes(i), logprob=value) for i, value in likeliest),
        offset=offset,
    )
