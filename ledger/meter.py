"""Usage to vouchers to claims: both sides of every channel of this node.

``selling`` is the worker's side, ``buying`` the caller's; this file only joins them.
"""

from dataclasses import dataclass
from typing import Any

import trio

from ledger.buying import Buying
from ledger.selling import Selling


@dataclass(frozen=True, slots=True)
class Meter:
    """Both sides."""

    seller: Selling
    buyer: Buying

    async def run(self) -> None:
        """Receipts, claims, top-ups until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.seller.run)
            nursery.start_soon(self.buyer.run)

    def channels(self) -> list[dict[str, Any]]:
        """Every channel of both sides."""
        return self.seller.channels() + self.buyer.channels()
