"""A text as one vector, as work for the loop of a runner: the mean of its positions' hidden states. Pure.

The hidden states are those behind the last norm; they are added in fp64, position after position, so that the vector
has the same bits however the text is cut into passes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dmoe.core.answer import FloatRows, Step, Taken


class Pooled:
    """The work on one text (:class:`dmoe.slots.Work`). It says nothing; its end is the last token's hidden state."""

    cached = said = drafts_max = 0

    def __init__(self, tokens: Sequence[int]) -> None:
        assert tokens, "an empty text has no mean"
        self.tokens = tokens
        self.length = 0
        self._sum: NDArray[np.float64] | None = None

    @property
    def prompt_left(self) -> int:
        """Tokens that are not in the sequence yet."""
        return len(self.tokens) - self.length

    def next(self, rows_max: int, drafts: Sequence[int] = ()) -> Step:
        """Up to ``rows_max`` tokens, with the hidden states of all of them."""
        fed = tuple(self.tokens[self.length : self.length + rows_max])
        return Step(fed, len(fed), "hidden")

    def take(self, step: Step, outputs: FloatRows) -> Taken:
        """Add what a step gave, f32[rows, H]."""
        if self._sum is None:
            self._sum = np.zeros(outputs.shape[1], dtype=np.float64)
        for row in outputs:
            self._sum += row
        self.length += len(step.tokens)
        return Taken((), self.length, None if self.prompt_left else "stop")

    def vector(self) -> NDArray[np.float32]:
        """f32[H] of length 1, once every token has been taken."""
        assert self._sum is not None
        assert not self.prompt_left
        mean = self._sum / len(self.tokens)
        return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
