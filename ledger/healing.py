"""Fetches from a payer what its channel builds on: few at once, one per payer, and not for long.

Whoever greets decides whom this node asks, so it is bounded apart from the rounds that this node begins itself. A
payer whose ``open`` carries a good certificate has paid for being asked; one that shows a certificate of a committee
that is not known here may be anybody: of these there is one at a time.
"""

import trio

from config.errors import RiosError
from config.vocabulary import PeerId
from ledger.quorum import Heal

HEALS_MAX = 8
HEAL_S = 10.0
"""A payer waits 15 s for its introduction."""


class Healing:
    """Rounds of anti-entropy that payers ask for."""

    def __init__(self, heal: Heal) -> None:
        self._heal = heal
        self._asked: dict[PeerId, bool] = {}
        """Who is being asked now, and whether its channel is certified."""

    async def __call__(self, payer: PeerId, *, certified: bool) -> None:
        """Ask a payer. Raises RiosError ``busy`` while it or too many others are being asked, or its failure."""
        alike = sum(each == certified for each in self._asked.values())
        if payer in self._asked or alike >= (HEALS_MAX if certified else 1):
            raise RiosError("busy", "this node is fetching what other channels build on", "try again in some seconds")
        self._asked[payer] = certified
        try:
            with trio.move_on_after(HEAL_S):
                await self._heal(payer)
        finally:
            del self._asked[payer]
