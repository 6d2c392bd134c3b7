"""What was refused, by the name of the limit, and who hits limits so often that it is a flood.

Invariants: the log tells of each limit at most every :data:`LOG_SECONDS`, with the number it left out; what is
remembered of single peers and places is bounded.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

from p2p.core.buckets import Bucket
from p2p.core.doors import Refusal

log = logging.getLogger("rios.security.doors")

LOG_SECONDS = 10.0
WHO_MAX = 1024
FLOOD_PER_SECOND, FLOOD_BURST = 100.0, 1000.0
"""Refusals above this are no eager caller's: whoever is told "busy" waits before it asks again."""

_NONE: Mapping[str, int] = MappingProxyType({})


class Refusals:
    """Counters of one node."""

    def __init__(self) -> None:
        self.by_limit: Counter[str] = Counter()
        self._hits: OrderedDict[str, tuple[Counter[str], Bucket]] = OrderedDict()
        self._said: dict[str, tuple[float, int]] = {}

    def count(self, refusal: Refusal, who: str, now: float, times: int = 1) -> bool:
        """Count one of a peer or a place, as ``times`` towards a flood; whether that makes one."""
        self.by_limit[refusal.limit] += 1
        known = self._hits.pop(who, None) or (Counter(), Bucket(FLOOD_PER_SECOND, FLOOD_BURST))
        known[0][refusal.limit] += 1
        flood = not known[1].take(times, now)
        self._hits[who] = (known[0], Bucket(FLOOD_PER_SECOND, FLOOD_BURST)) if flood else known
        if len(self._hits) > WHO_MAX:
            self._hits.popitem(last=False)
        self._say(refusal, who, now)
        return flood

    def _say(self, refusal: Refusal, who: str, now: float) -> None:
        said_at, left_out = self._said.get(refusal.limit, (float("-inf"), 0))
        if now - said_at < LOG_SECONDS:
            self._said[refusal.limit] = (said_at, left_out + 1)
            return
        self._said[refusal.limit] = (now, 0)
        more = f" ({left_out} more since the last line)" if left_out else ""
        log.warning("limit %s: %s: %s%s", refusal.limit, who, refusal.text, more)

    def of(self, who: str) -> Mapping[str, int]:
        """Limits a peer or a place hit lately."""
        known = self._hits.get(who)
        return _NONE if known is None else known[0]
