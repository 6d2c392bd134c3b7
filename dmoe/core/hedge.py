"""When a second replica is asked as well, and how often: the tail of what calls took, and a budget. Pure state.

A call's time is kept as a ratio to what was expected of it, so that calls of any size share one window. The limit of a
call is the 95th percentile of those ratios, of its peer where enough are known, else of all peers, times what is
expected of it. (Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013: hedged requests.)

Invariants:
1. A window holds the last :data:`WINDOW` ratios; fewer than :data:`SAMPLES_MIN` say nothing.
2. Within any span, hedges are at most :data:`SAVED_MAX` plus :data:`SHARE` of the calls made in it.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from config.vocabulary import PeerId

WINDOW = 128
SAMPLES_MIN = 20
QUANTILE = 0.95
FRESH = 8
"""A percentile is computed anew after so many further ratios."""
RATIO_MAX = 1000.0
LIMIT_MIN_US = 3_000.0
"""No hedge before this: less is the jitter of a busy machine, not a slow peer."""
SHARE = 0.05
SAVED_MAX = 8.0


@dataclass(slots=True)
class Tail:
    """The upper end of a bounded window of numbers."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _known: float = 0.0
    _stale: int = FRESH

    def add(self, value: float) -> None:
        """One more; the oldest falls out."""
        self.values.append(value)
        self._stale += 1

    def p95(self) -> float | None:
        """The 95th percentile, a few values old; None while too little is known."""
        count = len(self.values)
        if count < SAMPLES_MIN:
            return None
        if self._stale >= FRESH:
            self._known, self._stale = sorted(self.values)[min(count - 1, int(QUANTILE * count))], 0
        return self._known


@dataclass(slots=True)
class Tails:
    """What calls to each peer took, and to all of them."""

    _all: Tail = field(default_factory=Tail)
    _own: dict[PeerId, Tail] = field(default_factory=dict)

    def took(self, peer: PeerId, took_us: float, expected_us: float) -> None:
        """A call was answered."""
        ratio = min(took_us / max(expected_us, 1.0), RATIO_MAX)
        own = self._own.get(peer)
        if own is None:
            own = self._own[peer] = Tail()
        own.add(ratio)
        self._all.add(ratio)

    def limit_us(self, peer: PeerId, expected_us: float) -> float | None:
        """After how long a call of which this is expected is late; None while nobody knows."""
        own = self._own.get(peer)
        ratio = own.p95() if own is not None else None
        if ratio is None:
            ratio = self._all.p95()
        return None if ratio is None else max(LIMIT_MIN_US, ratio * expected_us)

    def forget(self, here: Collection[PeerId]) -> None:
        """Drop peers that have left."""
        self._own = {peer: tail for peer, tail in self._own.items() if peer in here}


@dataclass(slots=True)
class HedgeBudget:
    """A bucket that every call fills a little and every hedge empties by one."""

    saved: float = SAVED_MAX
    calls: int = 0
    hedges: int = 0

    def called(self) -> None:
        """A call left."""
        self.calls += 1
        self.saved = min(SAVED_MAX, self.saved + SHARE)

    def take(self, count: int = 1) -> bool:
        """Pay for this many hedges; False, and nothing taken, if that is too much now."""
        if self.saved < count:
            return False
        self.saved -= count
        self.hedges += count
        return True
