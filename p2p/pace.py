"""The node's own limits on bandwidth: two token buckets, one per direction, shared by every carrier.

A carrier asks :meth:`Pace.room` before it reads or writes and says with :meth:`Pace.used` what it did. With no limit
set there is no pace at all (``None``), so that the hot path pays one test.

Invariants:
1. Over any second at most the limit and one burst pass; a carrier takes pieces of at most :data:`PIECE_SECONDS` worth,
   so that many of them share fairly and none stands still for long.
2. Background transfers (``bulk``) leave :data:`RESERVE` of the burst to calls: what people wait for goes first.
"""

from typing import NamedTuple

import trio

from p2p.core.buckets import Bucket

BURST_SECONDS = 0.25
PIECE_SECONDS = 0.05
PIECE_BYTES_MIN = 2048
WAIT_SECONDS_MIN = 1e-4
"""Shorter waits are rounding errors."""
RESERVE = 0.5
"""The share of the burst that only calls may use."""


class Pace:
    """One direction."""

    __slots__ = ("_bucket", "_piece", "_reserve_s", "waited")

    def __init__(self, bytes_per_second: int) -> None:
        burst = max(BURST_SECONDS * bytes_per_second, 2 * PIECE_BYTES_MIN)
        self._bucket = Bucket(bytes_per_second, burst)
        self._piece = max(PIECE_BYTES_MIN, int(PIECE_SECONDS * bytes_per_second))
        self._reserve_s = RESERVE * burst / bytes_per_second
        self.waited = 0
        """How often somebody had to wait."""

    @property
    def piece(self) -> int:
        """Bytes to move at once at most."""
        return self._piece

    def used(self, count: int) -> None:
        """So many bytes passed."""
        self._bucket.spend(count, trio.current_time())

    def wait_s(self, *, bulk: bool = False) -> float:
        """Seconds until something may pass; 0: now."""
        wait_s = (self._reserve_s if bulk else 0.0) - self._bucket.left_s(trio.current_time())
        return wait_s if wait_s > WAIT_SECONDS_MIN else 0.0

    async def room(self, *, bulk: bool = False) -> None:
        """Return when something may pass. A checkpoint only if it waits."""
        while (wait_s := self.wait_s(bulk=bulk)) > 0:
            self.waited += 1
            await trio.sleep(wait_s)


class Paces(NamedTuple):
    """Both directions of a node; None: no limit."""

    upload: Pace | None = None
    download: Pace | None = None


NO_LIMITS = Paces()


def pace_of(bytes_per_second: int) -> Pace | None:
    """The pace of a setting; None without a limit."""
    return Pace(bytes_per_second) if bytes_per_second else None
