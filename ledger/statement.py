"""What an account's money did, line by line, as the final objects of a ledger tell it.

Pure: objects go in in the order in which they were learned, which is not always the order of the chains.
"""

from dataclasses import dataclass

from ledger.core.checkpoint import Snapshot
from ledger.core.checkpoint import channels as checkpoint_channels
from ledger.core.objects import Claim, Entry, Grant, Item, Op, Open, Reclaim, TopUp, Transfer, channel_id
from ledger.core.rules import ChannelState
from p2p.core.identity import peer_id_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of an account's statement; ``amount`` is what it added to (or took from) the free balance, ``balance``
    what was free after it."""

    seen_ms: int
    kind: str
    amount: int
    peer_id: str
    reference: str
    balance: int


class Statement:
    """Collects the lines of one account."""

    def __init__(self, account: bytes) -> None:
        self.account = account
        self.lines: list[Line] = []
        self._channels: dict[bytes, ChannelState] = {}
        self._balance = 0
        self._done: dict[bytes, int] = {}
        self._held: dict[bytes, dict[int, tuple[Item, int]]] = {}
        """Entries that were learned before those that they follow: a top-up needs its channel."""

    def carry(self, snapshot: Snapshot, root: bytes) -> None:
        """Begin with a checkpoint: what lies below it is not here."""
        self._done = {line.key: line.seq for line in snapshot.accounts.values()}
        self._channels = checkpoint_channels(snapshot)
        line = snapshot.accounts.get(self.account)
        if line is not None and line.balance:
            self._balance = line.balance
            self.lines.append(
                Line(
                    seen_ms=0,
                    kind="carried",
                    amount=line.balance,
                    peer_id=peer_id_of(self.account),
                    reference=root.hex(),
                    balance=line.balance,
                )
            )

    def is_below(self, item: Item) -> bool:
        """Whether an entry is in what was carried over already; claims say themselves what is new in them."""
        return isinstance(item.object, Entry) and item.object.seq <= self._done.get(item.object.account, 0)

    def _add(self, item: Item, seen_ms: int, kind: str, amount: int, other: bytes) -> None:
        self._balance += amount
        self.lines.append(
            Line(
                seen_ms=seen_ms,
                kind=kind,
                amount=amount,
                peer_id=peer_id_of(other),
                reference=item.id.hex(),
                balance=self._balance,
            )
        )

    def take(self, item: Item, seen_ms: int) -> None:
        """Look at one final object; an entry counts once all before it on its chain did."""
        body = item.object
        if isinstance(body, Claim):
            self._settled(item, seen_ms, body.voucher.channel, body.voucher.cumulative)
            return
        held = self._held.setdefault(body.account, {})
        held[body.seq] = item, seen_ms
        while (following := held.pop(self._done.get(body.account, 0) + 1, None)) is not None:
            self._entry(*following)

    def _entry(self, item: Item, seen_ms: int) -> None:
        entry = item.object
        assert isinstance(entry, Entry)
        self._done[entry.account] = entry.seq
        for index, op in enumerate(entry.ops):
            self._op(item, entry, seen_ms, index, op)

    def _op(self, item: Item, entry: Entry, seen_ms: int, index: int, op: Op) -> None:
        own = entry.account == self.account
        if isinstance(op, Grant | Transfer):
            kind = "grant" if isinstance(op, Grant) else "transfer"
            if own and kind == "transfer":
                self._add(item, seen_ms, kind, -op.amount, op.to)
            if op.to == self.account:
                self._add(item, seen_ms, kind, op.amount, entry.account)
        elif isinstance(op, Open):
            self._channels[channel_id(item.id, index)] = ChannelState(
                entry.account, op.signer, op.payout, op.amount, op.expiry_ms, entry.seq, index
            )
            if own:
                self._add(item, seen_ms, "open", -op.amount, op.signer)
        elif isinstance(op, TopUp) and (channel := self._channels.get(op.channel)) is not None:
            channel.lock += op.amount
            if own:
                self._add(item, seen_ms, "topup", -op.amount, channel.signer)
        elif isinstance(op, Reclaim) and (channel := self._channels.get(op.channel)) is not None:
            self._settled(item, seen_ms, op.channel, op.total)
            if own and channel.lock > op.total:
                self._add(item, seen_ms, "reclaim", channel.lock - op.total, channel.signer)

    def _settled(self, item: Item, seen_ms: int, key: bytes, total: int) -> None:
        channel = self._channels.get(key)
        if channel is None:
            return
        if channel.payout == self.account and total > channel.paid:
            self._add(item, seen_ms, "claim", total - channel.paid, channel.payer)
        channel.paid = max(channel.paid, total)
