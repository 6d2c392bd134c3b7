"""The table of channels on which this node is paid: what is kept of each, what the disk brings back, what leaves again.

Owns the rows of the selling side; when a voucher counts is ``selling``'s business.

Invariants: a row whose channel is not known yet (the entry that opened it was lost with a part of the disk) is kept
aside until it is, so that no lower voucher replaces it; a channel that is closed leaves with everything kept about it
(its row stays, for people).
"""

from typing import Any

import trio

from config.errors import RiosError
from config.settings import LedgerSettings
from ledger.book import Book
from ledger.core.channel import NANO, STOP_BEFORE_EXPIRY_MS, SellerChannel
from ledger.core.objects import SMALL_BYTES_MAX, Entry, Item, Open, Voucher, channel_id
from ledger.core.rules import ChannelState
from ledger.notes import Notes
from ledger.records import ChannelRow
from p2p.core import codec
from p2p.core.identity import peer_id_of

CHANNELS_MAX = 65536
OFFENDER_HINT = "an account that equivocates gets no new service: rios ledger audit shows the evidence"


class Sold(SellerChannel):
    """A channel, and how far its exchange of receipts is."""

    __slots__ = ("asking", "busy", "claimed_ms", "failures", "hurry", "next_at", "taking", "unsaved")

    def __init__(self, net: bytes, channel: bytes, payer: bytes, lock: int, credit: int) -> None:
        super().__init__(net, channel, payer, lock, credit)
        self.busy = False
        self.failures = 0
        """Receipts in a row that were not answered."""
        self.next_at = 0.0
        """When the next receipt may follow, by trio's clock."""
        self.claimed_ms: int | None = None
        self.unsaved = False
        """Stopped, but not on the disk (it was full)."""
        self.asking = trio.Lock()
        self.taking = trio.Lock()
        self.hurry: trio.Event | None = None
        """Between two receipts; set when the money that is lent runs out."""

    def row(self, voucher: Voucher, signature: bytes) -> ChannelRow:
        """What to keep on disk."""
        return ChannelRow(
            side="sell",
            channel=self.id,
            peer_id=peer_id_of(self.payer),
            voucher=codec.encode(voucher),
            signature=signature,
            receipt_n=self.receipt_n,
            receipt_cumulative=self.earned,
            calls=self.calls,
            kflop=self.kflop,
            kv_units=self.kv_units,
            microcredits=self.nano // NANO,
            nano=self.nano % NANO,
            stopped="" if self.stopped == "no voucher yet" else self.stopped,
        )


class SoldChannels:
    """Every channel on which this node is paid, by id."""

    def __init__(self, book: Book, notes: Notes, settings: LedgerSettings) -> None:
        self._book = book
        self._notes = notes
        self._credit = settings.credit
        self.by_id: dict[bytes, Sold] = {}
        self._aside: set[bytes] = set()
        """Only names: below a checkpoint nobody can tell a channel that was closed from one whose entry was lost."""
        for row in book.store.channels("sell"):
            self._restore(row)
        book.listeners.append(lambda item, _: self._on_final(item))
        book.replaced.append(self.take_in)

    def find(self, key: bytes) -> Sold | None:
        """A channel of the table, also if what opened it has become known just now."""
        if key in self._aside and key in self._book.state.channels:
            row = self._book.store.channel("sell", key)
            if row is not None:
                self._restore(row)
        return self.by_id.get(key)

    def take_in(self) -> None:
        """Look at everything that is kept aside."""
        for key in list(self._aside):
            self.find(key)

    def _on_final(self, item: Item) -> None:
        if self._aside and isinstance(item.object, Entry):
            for index, op in enumerate(item.object.ops):
                if isinstance(op, Open):
                    self.find(channel_id(item.id, index))

    def _restore(self, row: ChannelRow) -> None:
        known = self._book.state.channels.get(row.channel)
        if known is None:
            self._aside.add(row.channel)
            return
        self._aside.discard(row.channel)
        if known.closed_at is not None:
            return
        voucher = codec.decode(Voucher, row.voucher, bytes_max=SMALL_BYTES_MAX)
        # a voucher was taken only under a final lock: where it lies above, the top-up did not reach this disk. Nothing
        # is lent on top of such a lock, so that no work goes beyond what the voucher can claim
        lock = max(known.lock, voucher.cumulative)
        channel = Sold(self._book.genesis.net, row.channel, known.payer, lock, self._credit)
        channel.calls, channel.kflop, channel.kv_units = row.calls, row.kflop, row.kv_units
        channel.nano = row.microcredits * NANO + row.nano
        channel.receipt_n = row.receipt_n
        channel.accept(voucher, row.signature)
        channel.due_calls += channel.calls
        channel.stopped = row.stopped or self.expired(known)
        if self._notes.is_offender(known.payer):
            channel.stopped = OFFENDER_HINT
        self.by_id[row.channel] = channel

    def add(self, key: bytes, known: ChannelState) -> Sold:
        """A channel that a payer introduced. Raises RiosError ``busy`` when there are too many that are open."""
        if len(self.by_id) >= CHANNELS_MAX:
            self.forget_closed()
        if len(self.by_id) >= CHANNELS_MAX:
            raise RiosError("busy", "too many channels", "try another worker")
        channel = self.by_id[key] = Sold(self._book.genesis.net, key, known.payer, known.lock, self._credit)
        return channel

    def forget_closed(self) -> None:
        """Nothing is earned on a closed channel any more: it makes room."""
        channels = self._book.state.channels
        for key in list(self.by_id):
            known = channels.get(key)
            if known is not None and known.closed_at is not None:
                self.by_id.pop(key).stopped = self.expired(known)  # an exchange under way ends with that

    def expired(self, known: ChannelState) -> str:
        """Why no work is done on a channel any more; empty if there is time left."""
        if known.closed_at is not None:
            return "the channel is closed"
        left_ms = known.expiry_ms - self._book.now_ms()
        return "" if left_ms > STOP_BEFORE_EXPIRY_MS else "the channel expires in less than an hour: open another"

    def lines(self) -> list[dict[str, Any]]:
        """Every channel, for people."""
        state = self._book.state.channels
        return [
            {
                "side": "sell",
                "channel": key.hex(),
                "peer_id": peer_id_of(channel.payer),
                "lock": channel.lock,
                "earned": channel.earned,
                "promised": channel.promised,
                "paid": state[key].paid,
                "closed": state[key].closed_at is not None,
                "calls": channel.calls,
                "kflop": channel.kflop,
                "stopped": channel.stopped,
            }
            for key, channel in self.by_id.items()
            if key in state
        ]
