"""What a constraint means for the next token. Pure: the grammar behind it is somebody else's (``dmoe/constraint.py``).

Invariants:

1. A token outside of the constraint is never chosen, whatever its logit, the penalties and the bias are.
2. The constraint comes before ``min_tokens``: an answer that is complete ends, as there is nothing left to say.
3. Only tokens that stand in the answer are accepted, so nothing is ever taken back: drafts are compared with what was
   chosen under the constraint, one row after the other.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FloatRow = NDArray[np.float32]


class Constraint(Protocol):
    """What an answer may say, token by token (a schema, a grammar). One per answer; used by one thread at a time."""

    @property
    def done(self) -> bool:
        """Nothing may follow: the answer is complete."""

    def mask(self, logits: FloatRow) -> FloatRow:
        """``logits`` f32[V] with -inf for tokens that may not come next; a copy, the caller's stay as they were. Stop
        tokens are allowed where the answer may end here; at least one token is. RequestError where the constraint grew
        beyond its limits."""

    def accept(self, token: int) -> None:
        """The answer has one more token, one that the mask allowed. Not called for stop tokens."""


def masked(logits: FloatRow, allowed: NDArray[np.bool_]) -> FloatRow:
    """``logits`` f32[V] with -inf where ``allowed`` bool[v] is not set, and from v on."""
    out = np.full_like(logits, -np.inf)
    ids = np.flatnonzero(allowed[: len(logits)])
    out[ids] = logits[ids]
    return out


def only(logits: FloatRow, banned: frozenset[int]) -> bool:
    """Whether nothing but ``banned`` tokens is left in masked ``logits``."""
    left = np.flatnonzero(np.isfinite(logits))
    return bool(np.isin(left, list(banned)).all())
