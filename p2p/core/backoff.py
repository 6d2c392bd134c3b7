"""When something that failed with a peer is tried again: later each time.

Invariants: of at most ``kept_max`` peers it is known, the longest untouched are forgotten; who is not known is due.
"""

from config.vocabulary import PeerId


class Backoff:
    """The first wait is ``first_s``, each further one ``growth`` times longer, ``most_s`` at most."""

    __slots__ = ("_first_s", "_growth", "_kept_max", "_most_s", "_waits")

    def __init__(self, first_s: float, most_s: float, *, growth: float, kept_max: int) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._growth = growth
        self._kept_max = kept_max
        self._waits: dict[PeerId, tuple[float, float]] = {}  # due when, then wait how long

    def is_due(self, peer_id: PeerId, now: float) -> bool:
        """Whether it is time to try again."""
        known = self._waits.get(peer_id)
        return known is None or known[0] <= now

    def put_off(self, peer_id: PeerId, now: float, jitter: float) -> None:
        """Not before the next wait is over, which is taken ``jitter`` times (near 1)."""
        wait_s = self._waits.pop(peer_id, (0.0, self._first_s))[1]
        self._waits[peer_id] = now + wait_s * jitter, min(wait_s * self._growth, self._most_s)
        while len(self._waits) > self._kept_max:
            del self._waits[next(iter(self._waits))]

    def forget(self, peer_id: PeerId) -> None:
        """It worked."""
        self._waits.pop(peer_id, None)
