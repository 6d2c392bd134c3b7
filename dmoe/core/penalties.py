"""What moves logits before a token is chosen: penalties for what was said already, and the request's bias. Pure.

Order: repetition penalty, then frequency and presence penalty, then bias, so that a bias has the last word.

Invariants:

1. The caller's logits stay as they were; where nothing is asked for there is no :class:`Penalties` at all.
2. A step costs time in the number of distinct tokens so far (and one copy of the logits), not in the answer's length.

Sources: frequency and presence penalty, logit bias: OpenAI API reference ("Create chat completion" and the guide's
"Frequency and presence penalties"). Repetition penalty: Keskar et al., "CTRL", 2019, section 4.1, with the sign rule
of Hugging Face's ``RepetitionPenaltyLogitsProcessor``.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from config.generation import Sampling


class Penalties:
    """The penalties and the bias of one answer. Tell it each token of the answer; ask it before each choice.

    With c[j] = how often token j stands in the answer so far, the logit z[j] becomes

    - repetition (j in prompt or answer): z[j] / penalty if z[j] > 0, else z[j] * penalty;
    - frequency, presence (answer only): z[j] - c[j] * frequency_penalty - (c[j] > 0) * presence_penalty;
    - bias: z[j] + logit_bias[j].
    """

    __slots__ = ("_bias", "_biased", "_counts", "_frequency", "_presence", "_repetition", "_seen")

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._repetition = sampling.repetition_penalty
        self._frequency, self._presence = sampling.frequency_penalty, sampling.presence_penalty
        self._seen = set(prompt) if self._repetition != 1 else set()
        self._counts: dict[int, int] = {}
        self._biased = np.array([token for token, _ in sampling.logit_bias], dtype=np.intp)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32)

    def push(self, token: int) -> None:
        """The answer has one more token."""
        if self._repetition != 1:
            self._seen.add(token)
        if self._frequency or self._presence:
            self._counts[token] = self._counts.get(token, 0) + 1

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """``logits`` f32[V] with penalties and bias, as a copy."""
        logits = logits.copy()
        if self._seen:
            seen = np.fromiter(self._seen, np.intp, len(self._seen))
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / self._repetition, values * self._repetition)
        if self._counts:
            said = np.fromiter(self._counts, np.intp, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[said] -= counts * self._frequency + self._presence
        logits[self._biased] += self._bias
        return logits


def penalties_of(sampling: Sampling, prompt: Sequence[int]) -> Penalties | None:
    """The penalties that a request asks for, or None: then logits are used as they come, uncopied."""
    asked = (
        sampling.repetition_penalty != 1
        or sampling.frequency_penalty
        or sampling.presence_penalty
        or sampling.logit_bias
    )
    return Penalties(sampling, prompt) if asked else None
