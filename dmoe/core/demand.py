"""Where the work is: which shards here have queues that stay long, and which are idle.

Owns: what follows from samples of the own queues, with hysteresis. Does not own: the queues, the clock (times come in
as arguments), what is done about it (``helping``).

Invariants:
1. A queue is long only after it has been so without a break for ``long_ms``, a shard idle only after ``idle_ms``; what
   is between the two bounds changes nothing.
2. After help was asked for, a shard asks again only ``long_ms`` later: the help needs time to come.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

WAIT_LONG_US = 50_000.0
"""Time that a new row would wait in the queue."""
BUSY_IDLE = 0.1
"""Share of the time that an idle shard computes at most."""
SMOOTHING = 0.25
ASKED_MAX = 4
"""A shard has at most so many times the replicas that were deployed."""

Key = tuple[str, int]
"""Model id and manifest index."""


@dataclass(frozen=True, slots=True)
class Use:
    """A sample of one shard: rows that wait, rows computed since it was loaded, microseconds for a row."""

    rows_waiting: int
    rows_computed: int
    row_us: float


@dataclass(slots=True)
class _Record:
    at_ms: int
    rows_computed: int
    wait_us: float = 0.0
    busy: float = 0.0
    long_since_ms: int | None = None
    quiet_since_ms: int | None = None

    def observe(self, use: Use, now_ms: int) -> None:
        """Take a sample in."""
        elapsed_us = max(1, now_ms - self.at_ms) * 1000
        rows = max(0, use.rows_computed - self.rows_computed)
        self.wait_us += SMOOTHING * (use.rows_waiting * use.row_us - self.wait_us)
        self.busy += SMOOTHING * (min(1.0, rows * use.row_us / elapsed_us) - self.busy)
        self.at_ms, self.rows_computed = now_ms, use.rows_computed
        if self.wait_us >= WAIT_LONG_US:
            self.long_since_ms = now_ms if self.long_since_ms is None else self.long_since_ms
        elif self.wait_us < WAIT_LONG_US / 2:
            self.long_since_ms = None
        if self.busy >= 2 * BUSY_IDLE or self.wait_us >= WAIT_LONG_US:
            self.quiet_since_ms = None
        elif self.busy < BUSY_IDLE and self.quiet_since_ms is None:
            self.quiet_since_ms = now_ms


@dataclass(slots=True)
class Demand:
    """What is known about the shards served here."""

    long_ms: int
    idle_ms: int
    _records: dict[Key, _Record] = field(default_factory=dict)

    def observe(self, uses: Mapping[Key, Use], now_ms: int) -> None:
        """Take a sample of every shard served; the others are forgotten."""
        self._records = {
            key: self._records.get(key) or _Record(now_ms, use.rows_computed, quiet_since_ms=now_ms)
            for key, use in uses.items()
        }
        for key, use in uses.items():
            self._records[key].observe(use, now_ms)

    def long(self, now_ms: int) -> list[Key]:
        """The shards whose queues stay long, the longest wait first."""
        found = [
            (-record.wait_us, key)
            for key, record in self._records.items()
            if record.long_since_ms is not None and now_ms - record.long_since_ms >= self.long_ms
        ]
        return [key for _, key in sorted(found)]

    def asked(self, key: Key, now_ms: int) -> None:
        """Help for a shard was asked for."""
        if key in self._records:
            self._records[key].long_since_ms = now_ms

    def idle(self, key: Key, now_ms: int) -> bool:
        """Whether a shard has been idle for long enough to go."""
        record = self._records.get(key)
        return (
            record is not None and record.quiet_since_ms is not None and now_ms - record.quiet_since_ms >= self.idle_ms
        )
