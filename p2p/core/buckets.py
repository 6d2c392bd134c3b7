"""Token buckets: how much of something may happen per second, with a burst.

A bucket is one number, the time at which it will be full again (the generic cell rate algorithm, ITU-T I.371): it needs
no refilling, and a full one is recognised without arithmetic.

Invariants: over any time span at most ``burst + rate * span`` is taken; a clock that steps back never frees anything.
"""


class Bucket:
    """``rate`` units per second, at most ``burst`` units at once."""

    __slots__ = ("_burst_s", "_full_at", "_unit_s")

    def __init__(self, rate: float, burst: float) -> None:
        assert min(rate, burst) > 0
        self._unit_s = 1.0 / rate
        self._burst_s = burst / rate
        self._full_at = float("-inf")

    def take(self, amount: float, now: float) -> bool:
        """Take ``amount`` if it is there."""
        full_at = self._full_at
        full_at = (full_at if full_at > now else now) + amount * self._unit_s
        if full_at - now > self._burst_s:
            return False
        self._full_at = full_at
        return True

    def spend(self, amount: float, now: float) -> float:
        """Take ``amount`` in any case; the seconds after which that much was allowed (0: at once)."""
        full_at = self._full_at
        self._full_at = full_at = (full_at if full_at > now else now) + amount * self._unit_s
        wait_s = full_at - now - self._burst_s
        return wait_s if wait_s > 0 else 0.0

    def wait_s(self, now: float) -> float:
        """Seconds until something may be taken again."""
        wait_s = self._full_at - now - self._burst_s
        return wait_s if wait_s > 0 else 0.0

    def left_s(self, now: float) -> float:
        """What is there to take, in seconds of the rate; below 0: so much too much was taken."""
        full_at = self._full_at
        return self._burst_s if full_at <= now else self._burst_s - (full_at - now)

    def idle(self, now: float) -> bool:
        """Whether it is full: a new one would be the same."""
        return self._full_at <= now
