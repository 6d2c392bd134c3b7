"""What a constraint means for the next token. Pure: the grammar behind it is somebody else's (``dmoe/constraint.py``).

Invariants:

1. A token outside of the constraint is never chosen, whatever its logit, the penalties and the bias are.
2. The constraint comes before ``min_tokens``: an answer that is complete ends, as there is nothing left to say.
3. Only tokens that stand in the answer are accepted, so nothing is ever taken back: drafts are compared with what was
   chosen under the constraint, one row after the other.
"""

from collections.abc import Collection
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """The state of one constrained answer."""

    def allowed(self) -> NDArray[np.bool_]:
        """bool[v], v <= V: which tokens may come next; those from v on may not. Where the answer may end, the model's
        stop tokens are among them. At least one is. RequestError where the constraint grew beyond its limits."""

    def accept(self, token: int) -> None:
        """The answer has one more token, which was allowed and is no stop token."""

    @property
    def complete(self) -> bool:
        """Nothing but the end may follow."""


def constrained(
    logits: NDArray[np.float32], constraint: Constraint, banned: Collection[int] = ()
) -> tuple[NDArray[np.float32], Collection[int]]:
    """``logits`` f32[V] with what is not allowed at minus infinity, as a copy, and which of the ``banned`` tokens (the
    stop tokens of an answer that is too short) stay banned: none of them where nothing else may come."""
    allowed = constraint.allowed()
    masked = np.full_like(logits, -np.inf)
    ids = np.flatnonzero(allowed[: len(logits)])
    masked[ids] = logits[ids]
    if banned and np.isin(ids, list(banned)).all():
        banned = ()
    return masked, banned
