"""How long hosts of stages may keep a pass waiting before its sequences are rebuilt at others.

Owns: what passes of one model took, the limit of the next one, the budget for giving up early. Does not own: rebuilding
(``caller``), whose fault it was (``legs``).

A cache is rebuilt by replaying the sequence, which costs far more than a second expert call: hence a multiple of the
95th percentile and a floor, where hedges of experts have neither.

Invariants:
1. Nobody is given up early if one of the stages has no other host, nor in a second try.
2. At most a twentieth of the passes, and a few, are given up early: a swarm that is slow as a whole is waited for.
"""

from collections.abc import Sequence

import trio

from dmoe.core.hedge import HedgeBudget, Tail
from dmoe.core.manifest import Manifest
from dmoe.core.privacy import OPEN, Privacy
from dmoe.stages.chain import Link
from dmoe.stages.legs import Shared, has_spare

LIMIT_MIN_SECONDS = 1.0
TIMES = 3.0
"""A pass is late after so many times the 95th percentile of its like."""
UNKNOWN = 0.5
"""The part of a call's timeout that is waited while nothing is known."""


class Patience:
    """The limits of one model's passes."""

    def __init__(self, shared: Shared, manifest: Manifest, privacy: Privacy = OPEN) -> None:
        self._privacy = privacy
        self.budget = HedgeBudget()
        self._shared = shared
        self._manifest = manifest
        self._tails: dict[tuple[int, int], Tail] = {}

    def until(self, links: Sequence[Link], rows: int, latest: float) -> float:
        """The trio time until which these hosts are waited for; never after ``latest``."""
        self.budget.called()
        if self.budget.saved < 1 or not all(
            has_spare(self._shared, self._manifest, link, self._privacy) for link in links
        ):
            return latest
        return min(latest, trio.current_time() + self._limit_seconds(len(links), rows))

    def took(self, links: Sequence[Link], rows: int, seconds: float) -> None:
        """A pass came back."""
        self._tails.setdefault((len(links), rows.bit_length()), Tail()).add(seconds)

    def gave_up(self) -> None:
        """A pass was given up before its last moment."""
        self.budget.take()

    def _limit_seconds(self, stages: int, rows: int) -> float:
        """From passes of as many rows, to the next power of two; or from those of more, which take longer."""
        for size in range(rows.bit_length(), 1 + max((size for _, size in self._tails), default=0)):
            tail = self._tails.get((stages, size))
            known = tail.p95() if tail is not None else None
            if known is not None:
                return max(LIMIT_MIN_SECONDS, TIMES * known)
        return UNKNOWN * self._shared.timeout_ms / 1000
