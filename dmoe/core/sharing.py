"""An amount shared exactly: what several answers pay for a call that computed rows of each of them.

Invariant: the parts add up to the whole, to the last unit, and depend on nothing but the arguments.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dmoe.core.calls import Indices

Chosen = Sequence[int] | NDArray[np.intp] | None
"""Which rows, ascending; None: all."""


def split(total: int, weights: Sequence[int]) -> list[int]:
    """``total`` (0 or more) in proportion to ``weights`` (0 or more, at least one of them): every part is rounded down,
    and the units that are left go, one each, to the largest remainders, of equal ones to the first. If no weight is
    more than 0, the first part is all of it."""
    whole = sum(weights)
    if not whole:
        return [total, *(0 for _ in weights[1:])]
    parts = [total * weight // whole for weight in weights]
    left = total - sum(parts)
    if left:
        rests = [total * weight % whole for weight in weights]
        for at in sorted(range(len(rests)), key=rests.__getitem__, reverse=True)[:left]:  # stable: the first of equals
            parts[at] += 1
    return parts


def weights_of(
    counts: Sequence[int],
    first: int,
    chosen: Chosen,
    rows: int,
    members: Sequence[Sequence[int]],
    costs: Sequence[int],
    experts: Indices | None,
) -> list[int]:
    """The work of a call per answer, in FLOP. ``counts``: the rows of each answer in the pass, in its order; the call
    had ``rows`` of the pass' rows: those from ``first`` on, or of them those ``chosen`` (ascending). ``members``,
    ``costs`` and ``experts`` (of the rows sent) as in :func:`dmoe.core.calls.kflop`."""
    ends = _ends(tuple(counts)) - first
    cuts = np.minimum(np.maximum(ends, 0), rows) if chosen is None else np.asarray(chosen, np.intp).searchsorted(ends)
    if experts is None:
        done = cuts * sum(costs)
    else:
        table = _table(tuple(map(tuple, members)), tuple(costs))
        until = np.zeros(rows + 1, np.int64)
        np.cumsum(table.take(experts + 1, mode="clip").sum(axis=1), out=until[1:])
        done = until[cuts]
    return [last - begun for begun, last in pairwise([0, *done.tolist()])]


@lru_cache(maxsize=256)
def _ends(counts: tuple[int, ...]) -> NDArray[np.int64]:
    """Behind the last row of each answer."""
    return np.cumsum(counts)


@lru_cache(maxsize=4096)
def _table(members: tuple[tuple[int, ...], ...], costs: tuple[int, ...]) -> NDArray[np.int64]:
    """What a row costs that chose an expert, by its number plus 1; 0 for nobody's and for those of other groups."""
    found = np.zeros(max(map(max, members)) + 3, np.int64)
    for group, cost in zip(members, costs, strict=True):
        found[[expert + 1 for expert in group]] = max(1, cost // len(group)) if cost else 0
    return found
