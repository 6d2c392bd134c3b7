"""The next token from logits, and where an answer stops. Pure: no hidden state, no clock, no global randomness.

Invariants:

1. ``choose`` depends on its arguments alone: the draw at a position is a function of (seed, position), by a
   counter-based generator (Philox 4x64: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), so
   batches, chunks and retries never move it.
2. Filters apply in the order temperature, top-k, top-p, min-p; ties fall to the lower token id.
3. Text that may be the beginning of a stop string is held back until it is clear; a matched one is never emitted.

Fails with RequestError ``invalid_request`` naming the parameter, IntegrityError where logits are not numbers.
"""

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError, RequestError
from config.generation import Sampling

TEMPERATURE_MAX = 100.0
STOP_STRINGS_MAX = 16
STOP_CHARACTERS_MAX = 1024
PENALTY_MAX = 2.0
REPETITION_PENALTY_MAX = 10.0
LOGIT_BIAS_MAX = 100.0
LOGIT_BIASES_MAX = 1024
TOP_LOGPROBS_MAX = 20
_SEED_MIN, _SEED_MAX = -(1 << 63), (1 << 64) - 1
_PHILOX_DOMAIN = 0x52694F53 << 64  # the upper key half: draws of other parts of a program never coincide with these
_BLOCK = 256
_INVERSE_MAX = 1e30
_CHOICE_DOMAIN = 0x52694F54 << 64  # seeds of further choices


def check(sampling: Sampling) -> None:
    """Refuse impossible values: RequestError ``invalid_request`` that names the parameter and its bounds."""
    _require(
        "temperature", _is_number(sampling.temperature, 0.0, TEMPERATURE_MAX), f"between 0 and {TEMPERATURE_MAX:g}"
    )
    _require("top_p", _is_number(sampling.top_p, 0.0, 1.0) and sampling.top_p > 0, "above 0 and at most 1")
    _require("top_k", _is_whole(sampling.top_k, 0), "a whole number, 0 (off) or more")
    _require("min_p", _is_number(sampling.min_p, 0.0, 1.0), "between 0 (off) and 1")
    _check_penalties(sampling)
    logprobs_fit = sampling.logprobs is None or (
        _is_whole(sampling.logprobs, 0) and sampling.logprobs <= TOP_LOGPROBS_MAX
    )
    _require("logprobs", logprobs_fit, f"a whole number from 0 to {TOP_LOGPROBS_MAX}")
    _require("min_tokens", _is_whole(sampling.min_tokens, 0), "a whole number, 0 or more")
    _require(
        "max_tokens", sampling.max_tokens is None or _is_whole(sampling.max_tokens, 1), "a whole number, 1 or more"
    )
    if sampling.max_tokens is not None:
        _require(
            "min_tokens", sampling.min_tokens <= sampling.max_tokens, f"at most max_tokens ({sampling.max_tokens})"
        )
    seed_fits = sampling.seed is None or (_is_whole(sampling.seed, _SEED_MIN) and sampling.seed <= _SEED_MAX)
    _require("seed", seed_fits, "a whole number of at most 64 bits")
    _require("stop", len(sampling.stop) <= STOP_STRINGS_MAX, f"at most {STOP_STRINGS_MAX} strings")
    stops_fit = all(isinstance(text, str) and 0 < len(text) <= STOP_CHARACTERS_MAX for text in sampling.stop)
    _require("stop", stops_fit, f"strings of 1 to {STOP_CHARACTERS_MAX} characters")


def choose(logits: NDArray[np.float32], sampling: Sampling, position: int, banned: Collection[int] = ()) -> int:
    """The token at ``position`` (0 = the first token of the sequence) from ``logits`` f32[V], penalties applied.

    ``banned`` tokens are never chosen. ``sampling.seed`` must be set unless ``temperature`` is 0 (greedy).
    """
    best = int(logits.argmax())  # NaN counts as the largest, so one look at the winner finds it
    if banned and (best in banned or sampling.temperature != 0):
        logits = logits.copy()
        logits[list(banned)] = -np.inf
        best = int(logits.argmax())
    top = float(logits[best])
    if not math.isfinite(top):
        raise IntegrityError("integrity", f"the logits at position {position} are not finite", "a shard is damaged")
    if sampling.temperature == 0:
        return best
    assert sampling.seed is not None, "sampling needs a seed"
    ids, weights = _candidates(logits, top, sampling)
    drawn = _draw(weights, uniform(sampling.seed, position))
    return drawn if ids is None else int(ids[drawn])


def _draw(weights: NDArray[np.float32], share: float) -> int:
    """The index behind which the cumulative weight first exceeds ``share`` of all. A block first, then in the block:
    a running sum over a large vocabulary costs more than its exponentials."""
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    reached = blocks.cumsum()
    wanted = share * float(reached[-1])
    block = min(int(reached.searchsorted(wanted, side="right")), len(blocks) - 1)
    wanted -= float(reached[block - 1]) if block else 0.0
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    at = min(int(inside.searchsorted(wanted, side="right")), len(inside) - 1)
    while weights[block * _BLOCK + at] == 0:  # the product was rounded up beyond the last that can be drawn
        at -= 1
    return block * _BLOCK + at


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of its arguments alone."""
    raw = np.random.Philox(key=_PHILOX_DOMAIN | (seed & _SEED_MAX), counter=position).random_raw()
    return float(int(raw) >> 11) * 2.0**-53


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the ``choice``-th answer (0 = the first) to a request with ``seed``: the first one's is the request's
    own, so it is the answer that a request for one would get."""
    if choice == 0:
        return seed
    raw = np.random.Philox(key=_CHOICE_DOMAIN | (seed & _SEED_MAX), counter=choice).random_raw()
    return int(raw) >> 1


def largest(values: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """Indices of the ``count`` largest values, ascending; among equals the lower index."""
    border = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > border)
    equal = np.flatnonzero(values == border)[: count - len(above)]
    return np.sort(np.concatenate((above, equal)))


class StopMatcher:
    """Finds stop strings in text that arrives in pieces. One per answer.

    Each call costs time in the piece and the held text only, never in the whole answer.
    """

    __slots__ = ("_held", "_stops", "stopped")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take a piece; return what may be shown now. Sets ``stopped`` when a stop string is complete."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [index for index in map(text.find, self._stops) if index >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = len(text) - self._beginnings(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """The text still held: the answer ended, so it begins no stop string."""
        held, self._held = self._held, ""
        return held

    def _beginnings(self, text: str) -> int:
        """The length of the longest end of ``text`` that is the beginning of a stop string."""
        for length in range(min(len(text), max(map(len, self._stops)) - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def _check_penalties(sampling: Sampling) -> None:
    for name in ("frequency_penalty", "presence_penalty"):
        fits = _is_number(getattr(sampling, name), -PENALTY_MAX, PENALTY_MAX)
        _require(name, fits, f"between {-PENALTY_MAX:g} and {PENALTY_MAX:g}")
    repetition = sampling.repetition_penalty
    fits = _is_number(repetition, 0.0, REPETITION_PENALTY_MAX) and repetition > 0
    _require("repetition_penalty", fits, f"above 0 and at most {REPETITION_PENALTY_MAX:g}")
    biases = sampling.logit_bias
    _require("logit_bias", len(biases) <= LOGIT_BIASES_MAX, f"for at most {LOGIT_BIASES_MAX} tokens")
    _require("logit_bias", len({token for token, _ in biases}) == len(biases), "one bias per token")
    fits = all(_is_whole(token, 0) and _is_number(bias, -LOGIT_BIAS_MAX, LOGIT_BIAS_MAX) for token, bias in biases)
    _require("logit_bias", fits, f"token ids, each with a number between {-LOGIT_BIAS_MAX:g} and {LOGIT_BIAS_MAX:g}")


def _require(parameter: str, fits: bool, bounds: str) -> None:
    if not fits:
        raise RequestError("invalid_request", f"{parameter} must be {bounds}", f"change {parameter}", param=parameter)


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _candidates(
    logits: NDArray[np.float32], top: float, sampling: Sampling
) -> tuple[NDArray[np.intp] | None, NDArray[np.float32]]:
    """Token ids that may be drawn (None: all, in order) and their unnormalised probabilities, the likeliest's 1."""
    ids: NDArray[np.intp] | None = None
    if 0 < sampling.top_k < len(logits):
        ids = largest(logits, sampling.top_k)
        logits = logits[ids]
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature sends all but the best to exp(-inf) = 0
        weights = np.exp((logits - np.float32(top)) * np.float32(min(1 / sampling.temperature, _INVERSE_MAX)))
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    if sampling.min_p > 0:
        # Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024: at least min_p times as likely as the likeliest,
        # whose weight is 1.
        kept = np.flatnonzero(weights >= sampling.min_p)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    return ids, weights


def _nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.intp]:
    """The smallest set of most probable indices whose share reaches ``top_p`` (Holtzman et al., 2019), ascending.

    Sorting all of a large vocabulary costs more than the rest together, so the likeliest are tried first.
    """
    enough = top_p * float(weights.sum(dtype=np.float64))
    for least in (1e-3, 1e-6, 0.0):
        head = np.flatnonzero(weights >= least)
        order = head[np.argsort(-weights[head], kind="stable")]
        reached = int(weights[order].cumsum(dtype=np.float64).searchsorted(enough))
        if reached < len(order):
            break
    return np.sort(order[: reached + 1])
