"""What generation did, in numbers."""

from collections import deque
from dataclasses import asdict, dataclass, field

_RATE_WINDOW_SECONDS = 10


class Rate:
    """Events per second over the last ten seconds, in one bucket per second."""

    def __init__(self) -> None:
        self._buckets: deque[tuple[int, int]] = deque(maxlen=_RATE_WINDOW_SECONDS)

    def add(self, count: int, now: float) -> None:
        """So many happened now."""
        second = int(now)
        if self._buckets and self._buckets[-1][0] == second:
            count += self._buckets.pop()[1]
        self._buckets.append((second, count))

    def per_second(self, now: float) -> float:
        """The mean rate."""
        recent = sum(count for second, count in self._buckets if now - second < _RATE_WINDOW_SECONDS)
        return recent / _RATE_WINDOW_SECONDS


@dataclass(slots=True)
class Totals:
    """What all loops of a node did since they began."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    passes: int = 0
    rows: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    rate: Rate = field(default_factory=Rate)

    def said(self, tokens: int, now: float) -> None:
        """An answer has so many more tokens."""
        self.completion_tokens += tokens
        self.rate.add(tokens, now)

    def numbers(self) -> dict[str, int]:
        """The counts by name."""
        found = asdict(self)
        del found["rate"]
        return found
