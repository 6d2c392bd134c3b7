"""What each sender may make this node do: a token bucket per sender, for work that costs far more than asking for it.

Invariant: at most :data:`SENDERS_MAX` senders are remembered; forgotten is the one heard of longest ago.
"""

from collections import OrderedDict

from p2p.core.buckets import Bucket

SENDERS_MAX = 1024


class Allowances:
    """``rate`` units per second for each sender, at most ``burst`` at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, sender: str, amount: float, now: float) -> bool:
        """Whether so much may be done for a sender."""
        bucket = self._buckets.get(sender)
        if bucket is None:
            if len(self._buckets) >= SENDERS_MAX:
                self._buckets.popitem(last=False)
            bucket = self._buckets[sender] = Bucket(self._rate, self._burst)
        else:
            self._buckets.move_to_end(sender)
        return bucket.take(amount, now)
