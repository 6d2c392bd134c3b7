"""Who was seen to offer a shard, and when last: for the error that says where its replicas have gone.

Owns: the memory. Does not own: who offers what now (``replicas``, ``stages/directions``).

Invariant: of each shard at most :data:`KNOWN_MAX` peers are remembered, those that were seen latest.
"""

from collections.abc import Callable, Iterable

from config.vocabulary import PeerId

KNOWN_MAX = 8


class Sightings:
    """Times are seconds of one clock, the caller's."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], dict[PeerId, float]] = {}

    def saw(self, model_id: str, shard: int, peers: Iterable[PeerId], now: float) -> None:
        """They offer the shard, or answered with it, at this moment."""
        seen = self._seen.setdefault((model_id, shard), {})
        for peer in peers:
            seen.pop(peer, None)  # the latest come last
            seen[peer] = now
        while len(seen) > KNOWN_MAX:
            del seen[next(iter(seen))]

    def seconds_ago(self, model_id: str, shard: int, now: float) -> float | None:
        """How long ago the last replica of a shard was seen; None: none ever was."""
        last = max(self._seen.get((model_id, shard), {}).values(), default=None)
        return None if last is None else now - last

    def each(self, model_id: str, shard: int, now: float, answered: Callable[[PeerId], str]) -> str:
        """Every known replica of a shard, the latest first, with what ``answered`` says of it."""
        known = self._seen.get((model_id, shard), {})
        return ", ".join(f"{peer} ({ago(now - when)}, {answered(peer)})" for peer, when in reversed(known.items()))

    def gone(self, model_id: str, shard: int, now: float, answered: Callable[[PeerId], str]) -> str:
        """What is said of a shard that nobody offers any more."""
        seconds = self.seconds_ago(model_id, shard, now)
        if seconds is None:
            return "it was never seen"
        return f"last seen {seconds:.0f} s ago; replicas: {self.each(model_id, shard, now, answered)}"


def ago(seconds: float) -> str:
    """When a peer was last seen, in words."""
    return f"last seen {seconds:.0f} s ago" if seconds >= 1 else "seen now"


def answered_ago(at_us: int | None, now_us: int) -> str:
    """When a peer last answered, in words; None: never."""
    return "never answered" if at_us is None else f"last answered {(now_us - at_us) / 1e6:.0f} s ago"
