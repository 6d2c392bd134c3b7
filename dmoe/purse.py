"""What a caller owes: the channels to its workers, and the answers that are not counted for payment yet.

Owns: when a channel is opened, when an answer is counted. Does not own: money (the ledger, behind
:class:`dmoe.ports.Buyer`).

Invariants:
1. Calls that need the same channel open it once.
2. Every answer that arrived is counted once, with the same kFLOP and leaf as at the worker, and is on somebody's bill.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from config.vocabulary import PeerId
from dmoe.bills import Bill, Bills, Payers
from dmoe.core import calls
from dmoe.core.calls import Indices
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.routes import Place
from dmoe.core.sharing import Chosen
from dmoe.ports import Buyer, Quote


@dataclass(frozen=True, slots=True)
class Owed:
    """An answer that arrived and is not counted yet. ``experts`` are the routing that was sent, if any."""

    peer: PeerId
    channel: bytes
    quote: Quote
    model_id: str
    layer: int
    places: Sequence[Place]
    rows: int
    experts: Indices | None
    asked: calls.Bytes
    answered: calls.Bytes
    device: str = ""
    privacy: Privacy = OPEN
    """Who else may see the rows: an audit shows them to others."""

    def leaf(self) -> bytes:
        """What the worker signs for."""
        groups = [place.group for place in self.places]
        return calls.leaf(self.model_id, self.layer, groups, self.rows, self.device, self.asked, self.answered)


class Purse:
    """Channels of this node to its workers. Without a buyer nothing is ever paid."""

    def __init__(self, buyer: Buyer | None, bills: Bills | None = None) -> None:
        self.buyer = buyer
        self.bills = bills or Bills()
        self._opening: dict[PeerId, trio.Lock] = {}

    def ready(self, worker: PeerId, quote: Quote) -> bytes | None:
        """The channel to name in a call at once; None if one has to be asked for (:meth:`channel`)."""
        channel = self.buyer.channel(worker) if self.buyer is not None else None
        if channel is None and (self.buyer is None or not quote.microcredits_per_tflop):
            return b""
        return channel

    async def channel(self, worker: PeerId, quote: Quote, *, reopen: bool = False) -> bytes:
        """The channel to pay a worker with; opened first where there is none (or ``reopen``)."""
        if self.buyer is None:
            return b""
        channel = None if reopen else self.ready(worker, quote)
        if channel is not None:
            return channel
        lock = self._opening.setdefault(worker, trio.Lock())
        async with lock:  # calls that wait here find it open
            channel = None if reopen else self.buyer.channel(worker)
            return channel if channel is not None else await self.buyer.open_channel(worker)

    def lost(self, peer: PeerId, channel: bytes, quote: Quote, kflop: int) -> None:
        """A call was given up after it had left; nothing where nothing is paid."""
        if self.buyer is not None and channel:
            self.buyer.lost(peer, channel, quote, kflop)

    def count(self, owed: Owed, payers: Payers, first: int = 0, chosen: Chosen = None) -> None:
        """Count an answer for payment, by those whose rows it has: of their pass' rows those from ``first`` on, or of
        these those ``chosen``."""
        assert self.buyer is not None
        members = [place.experts for place in owed.places]
        costs = [place.flops_per_row for place in owed.places]
        kflop = calls.kflop(members, costs, owed.rows, owed.experts)
        self.buyer.used(owed.peer, owed.channel, owed.quote, kflop, owed.leaf())
        nano = kflop * owed.quote.microcredits_per_tflop
        work, at = (members, costs), (first, chosen)
        payers.pay(owed.peer, owed.channel, nano, owed.rows, owed.experts, work, at)

    def count_run(self, peer: PeerId, channel: bytes, quote: Quote, kflop: int, leaf: bytes, bill: Bill) -> None:
        """Count what a host did of one sequence's rows."""
        assert self.buyer is not None
        self.buyer.used(peer, channel, quote, kflop, leaf)
        bill.add(peer, channel, kflop * quote.microcredits_per_tflop)
