"""Which peers are far off their like: they answer, but fail or come late much more often, or take much longer. Pure.

A call of a peer ends well or badly: it failed, or it took more than :data:`LATE` times what was expected of it. A peer
is an outlier if, with enough calls known, its share of bad ends is more than :data:`FAR` times the median of the other
peers' and above :data:`BAD_MIN`, or its typical call takes more than :data:`FAR` times their median and a good
millisecond longer. (Outlier detection as in Envoy: consecutive and success-rate ejection with a bounded share.)

Invariants:
1. Nobody is judged by fewer than :data:`SAMPLES_MIN` calls, nor against fewer than :data:`OTHERS_MIN` others.
2. At most a third of the peers that are known well enough are ejected at a time: where all are slow, nobody is.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median

from config.vocabulary import PeerId

WINDOW = 32
SAMPLES_MIN = 8
OTHERS_MIN = 1
FAR = 3.0
LATE = 3.0
LATE_MIN_US = 5_000.0
BAD_MIN = 0.25
SLOWER_MIN_US = 2_000.0
SHARE_MAX = 1 / 3
LOOK = 8
ROWS = 8
"""Peers are compared by a call of so many rows."""


@dataclass(slots=True)
class _Record:
    bad: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    typical_us: float = 0.0
    calls: int = 0

    @property
    def share(self) -> float:
        return sum(self.bad) / len(self.bad)


@dataclass(slots=True)
class Outliers:
    """The last calls of every peer."""

    _records: dict[PeerId, _Record] = field(default_factory=dict)

    def ended(self, peer: PeerId, *, bad: bool, typical_us: float) -> bool:
        """A call ended; ``typical_us`` is what a call of :data:`ROWS` rows is expected to take there now. True if it is
        time to look at the peer: after every bad call, and now and then."""
        record = self._records.get(peer)
        if record is None:
            record = self._records[peer] = _Record()
        record.bad.append(bad)
        record.typical_us = typical_us
        record.calls += 1
        return bad or record.calls % LOOK == 0

    def is_outlier(self, peer: PeerId, ejected: Collection[PeerId]) -> bool:
        """Whether a peer is to be ejected beside those who are already."""
        record = self._records.get(peer)
        if record is None or len(record.bad) < SAMPLES_MIN or peer in ejected:
            return False
        known = {other: each for other, each in self._records.items() if len(each.bad) >= SAMPLES_MIN}
        if len(ejected) + 1 > SHARE_MAX * len(known.keys() | set(ejected)):
            return False
        others = [each for other, each in known.items() if other != peer and other not in ejected]
        if len(others) < OTHERS_MIN:
            return False
        share, usual_us = median(each.share for each in others), median(each.typical_us for each in others)
        fails = record.share > max(BAD_MIN, FAR * share)
        return fails or record.typical_us > max(FAR * usual_us, usual_us + SLOWER_MIN_US)

    def clear(self, peer: PeerId) -> None:
        """Forget a peer's calls: it starts anew."""
        self._records.pop(peer, None)

    def keep(self, here: Collection[PeerId]) -> None:
        """Forget peers that have left."""
        self._records = {peer: record for peer, record in self._records.items() if peer in here}


def is_late(took_us: float, expected_us: float) -> bool:
    """Whether a call took far longer than was expected of it."""
    return took_us > max(LATE * expected_us, LATE_MIN_US)
