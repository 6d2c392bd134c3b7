"""Which shards keep ending their cell: arithmetic without a clock of its own.

An end counts against the shards that were being asked, or against all of the cell's if none was. The bound is far
above what a machine short of memory does, and far below what makes callers suffer.
"""

from collections import deque
from collections.abc import Iterable

ENDS_MAX, WINDOW_SECONDS = 5, 600.0
"""A shard that so many ends within this time count against is not served for a while."""


class Blame:
    """Counts ends by shard."""

    def __init__(self) -> None:
        self._ends: dict[int, deque[float]] = {}

    def ended(self, numbers: Iterable[int], now: float) -> list[int]:
        """Count an end against these shards; those that had their share, whose count begins anew."""
        full = []
        for number in numbers:
            ends = self._ends.setdefault(number, deque(maxlen=ENDS_MAX))
            ends.append(now)
            if len(ends) == ENDS_MAX and now - ends[0] <= WINDOW_SECONDS:
                full.append(number)
        for number in full:
            self.forget(number)
        return full

    def forget(self, number: int) -> None:
        """It is not in the cell any more."""
        self._ends.pop(number, None)
