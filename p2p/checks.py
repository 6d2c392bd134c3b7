"""What the adverts and questions of a sender may cost here: checks of signatures, and looks at the view.

Invariant: a linked peer makes this node check :data:`CHECKS_PER_SECOND` signatures and look at
:data:`LOOKS_PER_SECOND` adverts at most; all authors of gossip together, :data:`GOSSIP_CHECKS_PER_SECOND` signatures.
"""

from collections.abc import Callable

import trio

from config.vocabulary import PeerId
from p2p.core.allowance import Allowances
from p2p.core.buckets import Bucket
from p2p.core.strangers import NOBODY

CHECKS_PER_SECOND, CHECKS_BURST = 200.0, 1000.0
GOSSIP_CHECKS_PER_SECOND = 1000.0
READING = 1 / 8
"""What reading an advert costs, of checking it."""
CHECK_BYTES = 32 << 10
"""So many bytes cost as much again as the curve."""
LOOKS_PER_SECOND, LOOKS_BURST = 100_000.0, 1_000_000.0


class Checks:
    """The count of it."""

    def __init__(self, is_linked: Callable[[PeerId], bool]) -> None:
        self._is_linked = is_linked
        self._checks = Allowances(CHECKS_PER_SECOND, CHECKS_BURST)
        self._gossip = Bucket(GOSSIP_CHECKS_PER_SECOND, 5 * GOSSIP_CHECKS_PER_SECOND)
        self._looks = Allowances(LOOKS_PER_SECOND, LOOKS_BURST)

    def may_check(self, sender: PeerId, size: int, share: float = 1.0) -> bool:
        """Whether something of this size may be checked (or that ``share`` of it done) for its sender."""
        if sender == NOBODY:
            return True  # this node asked for it
        cost, now = share * (1 + size / CHECK_BYTES), trio.current_time()
        if self._is_linked(sender):
            return self._checks.take(sender, cost, now)
        return self._gossip.take(cost, now)

    def may_look(self, sender: PeerId, adverts: int) -> bool:
        """Whether so many adverts may be looked at for a peer."""
        return self._looks.take(sender, adverts, trio.current_time())
