"""Who was seen to offer a shard, and when last: for the error that says where its replicas have gone.

Owns: the memory. Does not own: who offers what now (``replicas``, ``stages/directions``), the adverts (``p2p``).

Invariants:
1. Of each shard at most :data:`KNOWN_MAX` peers are remembered, those that were seen latest; of peers that left, the
   last :data:`LEFT_MAX`.
2. Nobody is seen after it left, however late its shards are looked for.
"""

from collections.abc import Callable, Collection, Iterable

from config.vocabulary import PeerId

KNOWN_MAX = 8
LEFT_MAX = 1024
Answered = Callable[[PeerId], str]
"""What is said of a peer's last answer."""


class Sightings:
    """Times are seconds of one clock, the caller's."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], dict[PeerId, float]] = {}
        self._here: frozenset[PeerId] = frozenset()
        self._left: dict[PeerId, float] = {}

    def present(self, peers: Collection[PeerId], now: float) -> None:
        """These are in the directory from now on; who was and is not among them has just left."""
        here = frozenset(peers)
        for peer in self._here - here:
            self._left[peer] = now
        for peer in here - self._here:
            self._left.pop(peer, None)
        while len(self._left) > LEFT_MAX:
            del self._left[next(iter(self._left))]
        self._here = here

    def saw(self, model_id: str, shard: int, peers: Iterable[PeerId], now: float) -> None:
        """They offer the shard, or answered with it, at this moment; those that have left did until then."""
        seen = self._seen.setdefault((model_id, shard), {})
        for peer in peers:
            seen.pop(peer, None)  # the latest come last
            seen[peer] = self._left.get(peer, now)
        while len(seen) > KNOWN_MAX:
            del seen[next(iter(seen))]

    def each(self, model_id: str, shards: Collection[int], now: float, answered: Answered) -> str:
        """Every known replica of these shards, the latest first, with what is known of its answers."""
        known = self._known(model_id, shards)
        return ", ".join(f"{peer} ({_ago(now - when)}, {answered(peer)})" for peer, when in known)

    def gone(self, model_id: str, shards: Collection[int], now: float, answered: Answered) -> str:
        """What is said of shards that nobody offers any more."""
        known = self._known(model_id, shards)
        if not known:
            return "it was never seen"
        return f"last seen {now - known[0][1]:.0f} s ago; replicas: {self.each(model_id, shards, now, answered)}"

    def _known(self, model_id: str, shards: Collection[int]) -> list[tuple[PeerId, float]]:
        latest: dict[PeerId, float] = {}
        for shard in shards:
            for peer, when in self._seen.get((model_id, shard), {}).items():
                latest[peer] = max(when, latest.get(peer, when))
        return sorted(latest.items(), key=lambda each: each[1], reverse=True)[:KNOWN_MAX]


def _ago(seconds: float) -> str:
    return f"last seen {seconds:.0f} s ago" if seconds >= 1 else "seen now"


def answered_ago(at_us: int | None, now_us: int) -> str:
    """When a peer last answered, in words; None: never."""
    return "never answered" if at_us is None else f"last answered {(now_us - at_us) / 1e6:.0f} s ago"
