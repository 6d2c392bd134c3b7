"""Who rests after a failure, and how it comes back: holds per (peer, shard) with half-open probes. Pure state.

Invariants:
1. A hold lasts twice as long as the one before it, up to :data:`HOLD_MAX_US`, until an answer ends it.
2. After a hold has passed, one probe is let through at a time.
3. An ejection (the peer is far off its like) is ended by the good outcome of its own probe, not by answers of calls
   that left before.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from config.vocabulary import PeerId

HOLD_FIRST_US = 500_000
HOLD_MAX_US = 30_000_000
REST_MAX_US = 5_000_000
EJECT_FIRST_US = 5_000_000
PEER_WIDE = -1
"""The "shard" of a hold that covers a whole peer (unreachable, deadline)."""
EJECTED = -2
"""The "shard" of an ejection."""


@dataclass(slots=True)
class _Hold:
    until_us: int
    length_us: int
    probing: bool = False


@dataclass(slots=True)
class Holds:
    """All holds of a node."""

    changes: int = 0
    """Counts changes: a plan made before the last one may be stale."""
    _holds: dict[tuple[PeerId, int], _Hold] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._holds)

    def rests(self, peer: PeerId, shard: int, now_us: int) -> bool:
        """Whether this replica rests now. A hold that has passed lets one probe through at a time."""
        return bool(self._holds) and any(self._rests((peer, what), now_us) for what in (shard, PEER_WIDE, EJECTED))

    def _rests(self, key: tuple[PeerId, int], now_us: int) -> bool:
        hold = self._holds.get(key)
        if hold is None:
            return False
        if hold.probing:
            return now_us < hold.until_us + hold.length_us  # a probe that never reported does not block for ever
        return now_us < hold.until_us

    def probe(self, peer: PeerId, shard: int, now_us: int) -> None:
        """A call goes to this replica."""
        for key in ((peer, shard), (peer, PEER_WIDE), (peer, EJECTED)):
            hold = self._holds.get(key)
            if hold is not None and now_us >= hold.until_us:
                hold.probing, hold.until_us = True, now_us
                self.changes += 1

    def answered(self, peer: PeerId, shards: Collection[int]) -> None:
        """A peer answered for these shards: it is there again. An ejection stays."""
        if self._holds:
            for shard in (*shards, PEER_WIDE):
                if self._holds.pop((peer, shard), None):
                    self.changes += 1

    def failed(self, peer: PeerId, shards: Collection[int], now_us: int) -> None:
        """Its shards rest, twice as long as the last time."""
        for shard in shards:
            old = self._holds.get((peer, shard))
            if old is not None and not old.probing and now_us < old.until_us:
                continue  # a call that left before the hold: the same fault, counted already
            length = min(2 * old.length_us, HOLD_MAX_US) if old else HOLD_FIRST_US
            self._holds[peer, shard] = _Hold(now_us + length, length)
        self.changes += 1

    def rest(self, peer: PeerId, shards: Collection[int], now_us: int, length_us: int) -> None:
        """Its shards rest for as long as it asked, or twice as long as the last time if it asks again and again."""
        length_us = min(length_us, REST_MAX_US)
        for shard in shards:
            old = self._holds.get((peer, shard))
            rest_us = length_us
            if old is not None and (old.probing or now_us >= old.until_us):
                rest_us = max(length_us, min(2 * old.length_us, REST_MAX_US))
            elif old is not None:
                rest_us = max(length_us, old.until_us - now_us)
            self._holds[peer, shard] = _Hold(now_us + rest_us, max(rest_us, HOLD_FIRST_US // 2))
        self.changes += 1

    # --- ejections

    def eject(self, peer: PeerId, now_us: int) -> None:
        """A peer rests although it answers."""
        old = self._holds.get((peer, EJECTED))
        length = min(2 * old.length_us, HOLD_MAX_US) if old else EJECT_FIRST_US
        self._holds[peer, EJECTED] = _Hold(now_us + length, length)
        self.changes += 1

    def ejected(self) -> set[PeerId]:
        """Peers that are ejected, or on probation."""
        return {peer for peer, shard in self._holds if shard == EJECTED} if self._holds else set()

    def on_probation(self, peer: PeerId) -> bool:
        """Whether an ejected peer's probe is out."""
        hold = self._holds.get((peer, EJECTED)) if self._holds else None
        return hold is not None and hold.probing

    def acquit(self, peer: PeerId) -> None:
        """An ejected peer's probe went well."""
        if self._holds.pop((peer, EJECTED), None):
            self.changes += 1

    def keep(self, here: Collection[PeerId]) -> None:
        """Drop the holds of peers that have left."""
        self._holds = {key: hold for key, hold in self._holds.items() if key[0] in here}
