"""A second, independent reading of LEDGER.md's state: what the objects that became final add up to.

Shares the objects' types with ``ledger.core`` and nothing else. It is fed the objects in the order in which they
became final; each must be valid at that moment, else :class:`Violation` names the invariant.
"""

from dataclasses import dataclass, field
from hashlib import sha256

from ledger.core.genesis import Genesis
from ledger.core.objects import (
    Claim,
    Committee,
    Entry,
    Freeze,
    Grant,
    Issuer,
    Item,
    Open,
    Reclaim,
    Signed,
    TopUp,
    Transfer,
)
from p2p.core import codec
from p2p.core import identity as identities


class Violation(Exception):
    """An invariant is broken."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant


@dataclass(slots=True)
class Account:
    """One chain."""

    seq: int = 0
    head: bytes = bytes(32)
    balance: int = 0


@dataclass(slots=True)
class Channel:
    """One channel."""

    payer: bytes
    signer: bytes
    payout: bytes
    lock: int
    expiry_ms: int
    opened: tuple[int, int]
    paid: int = 0
    closed_at: int | None = None


@dataclass(slots=True)
class Epoch:
    """A committee."""

    keys: tuple[bytes, ...]
    f: int

    @property
    def quorum(self) -> int:
        """2f+1."""
        return 2 * self.f + 1


def signed_by(key: bytes, tag: bytes, body: bytes, signature: bytes) -> bool:
    """Whether the key's owner signed it."""
    return identities.verify(key, b"", sha256(tag + body).digest(), signature)


@dataclass(slots=True)
class Model:
    """The books as they should be."""

    genesis: Genesis
    accounts: dict[bytes, Account] = field(default_factory=dict)
    channels: dict[bytes, Channel] = field(default_factory=dict)
    slots: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    epochs: list[Epoch] = field(default_factory=list)
    issuers: set[bytes] = field(default_factory=set)
    """Present and past: what a replaced one was promised votes for may become final later."""
    supply: int = 0
    objects: int = 0

    def __post_init__(self) -> None:
        self.epochs.append(Epoch(tuple(self.genesis.witnesses), self.genesis.f))
        self.issuers.add(self.genesis.issuer)

    def account(self, key: bytes) -> Account:
        """The account, made on first sight."""
        return self.accounts.setdefault(key, Account())

    def add(self, item: Item) -> None:
        """An object became final."""
        self.objects += 1
        if isinstance(item.object, Entry):
            self._entry(item, item.object)
        else:
            self._claim(item, item.object)
        self._conserved()

    def _conserved(self) -> None:
        free = sum(account.balance for account in self.accounts.values())
        locked = sum(c.lock - c.paid for c in self.channels.values() if c.closed_at is None)
        if free + locked != self.supply:
            raise Violation("I2", f"{free} free and {locked} locked, but {self.supply} were granted")
        if self.supply > self.genesis.max_supply:
            raise Violation("I2", f"{self.supply} were granted, the network has {self.genesis.max_supply}")

    def _entry(self, item: Item, entry: Entry) -> None:
        slot = (entry.account, entry.seq)
        other = self.slots.setdefault(slot, item.id)
        if other != item.id:
            raise Violation("I1", f"two final entries {other.hex()[:8]} and {item.id.hex()[:8]} in slot {entry.seq}")
        if entry.net != self.genesis.net:
            raise Violation("valid", "an entry of another network is final")
        if not signed_by(entry.account, Entry.TAG, item.signed.body, item.signed.signature):
            raise Violation("valid", "an entry that its account did not sign is final")
        account = self.account(entry.account)
        if entry.seq != account.seq + 1 or entry.prev != account.head:
            raise Violation("I1", f"entry {entry.seq} does not follow entry {account.seq}")
        if sum(isinstance(op, Reclaim) for op in entry.ops) > 8:
            raise Violation("valid", "more than 8 reclaims in an entry")
        before = account.balance
        credits: list[tuple[bytes, int]] = []
        spent = sum(self._op(item, entry, index, credits) for index in range(len(entry.ops)))
        if spent > before:
            raise Violation("I3", f"an entry spends {spent} of {before}")
        account.balance -= spent
        for to, amount in credits:
            self.account(to).balance += amount
        account.seq, account.head = entry.seq, item.id

    def _op(self, item: Item, entry: Entry, index: int, credits: list[tuple[bytes, int]]) -> int:
        """Note what an op credits; what it spends."""
        op, genesis = entry.ops[index], self.genesis
        if isinstance(op, Grant):
            if entry.account not in self.issuers:
                raise Violation("valid", "somebody else than an issuer granted")
            self._minimum(op.amount, genesis.min_amount)
            credits.append((op.to, op.amount))
            self.supply += op.amount
            return 0
        if isinstance(op, Transfer):
            self._minimum(op.amount, genesis.min_amount)
            credits.append((op.to, op.amount))
            return op.amount
        if isinstance(op, Open):
            self._minimum(op.amount, genesis.min_lock)
            if not identities.is_valid_key(op.signer):
                raise Violation("valid", "a channel's signer is no valid key")
            key = sha256(b"rios/channel/1\0" + item.id + bytes([index])).digest()
            self.channels[key] = Channel(
                entry.account, op.signer, op.payout, op.amount, op.expiry_ms, (entry.seq, index)
            )
            return op.amount
        if isinstance(op, TopUp):
            self._minimum(op.amount, genesis.min_amount)
            self._own(entry, op.channel).lock += op.amount
            return op.amount
        if isinstance(op, Reclaim):
            self._reclaim(entry, op, credits)
            return 0
        self._root(entry, op)
        return 0

    @staticmethod
    def _minimum(amount: int, minimum: int) -> None:
        if amount < minimum:
            raise Violation("valid", f"an amount of {amount} is below the minimum of {minimum}")

    def _own(self, entry: Entry, key: bytes) -> Channel:
        channel = self.channels.get(key)
        if channel is None or channel.payer != entry.account:
            raise Violation("valid", "a stranger's channel was topped up or reclaimed")
        if channel.closed_at is not None:
            raise Violation("I4", "a closed channel was topped up or reclaimed again")
        return channel

    def _reclaim(self, entry: Entry, op: Reclaim, credits: list[tuple[bytes, int]]) -> None:
        channel = self._own(entry, op.channel)
        freezes = [self.freeze(channel, op.channel, signed) for signed in op.freezes]
        if not all(freezes) or len({freeze.epoch for freeze in freezes if freeze}) != 1:
            raise Violation("valid", "a reclaim with freezes that are none, or of several epochs")
        epoch = self.epochs[freezes[0].epoch]  # type: ignore[union-attr]
        witnesses = {freeze.witness for freeze in freezes if freeze}
        if len(witnesses) < epoch.quorum or not witnesses <= set(epoch.keys):
            raise Violation("valid", f"a reclaim with freezes of {len(witnesses)} witnesses")
        if op.total != max(freeze.total for freeze in freezes if freeze):
            raise Violation("valid", "a reclaim's total is not the highest freeze")
        if not channel.paid <= op.total <= channel.lock:
            raise Violation("I4", f"reclaimed at {op.total}: {channel.paid} were paid of {channel.lock}")
        credits.append((channel.payout, op.total - channel.paid))
        credits.append((entry.account, channel.lock - op.total))
        channel.paid = channel.closed_at = op.total

    def freeze(self, channel: Channel, key: bytes, signed: Signed) -> Freeze | None:
        """The freeze, if it is one of this channel."""
        body = codec.decode(Freeze, signed.body, bytes_max=4096)
        voucher = body.voucher
        good = body.net == self.genesis.net and body.channel == key and body.epoch < len(self.epochs)
        good = good and signed_by(body.witness, Freeze.TAG, signed.body, signed.signature)
        if good and body.total:
            good = voucher is not None and voucher.cumulative == body.total and voucher.channel == key
            good = good and voucher is not None and voucher.net == self.genesis.net
            good = good and signed_by(
                channel.payer, b"rios/voucher/1\0", codec.encode(voucher), body.voucher_signature or b""
            )
        return body if good else None

    def _root(self, entry: Entry, op: Committee | Issuer) -> None:
        if entry.account != self.genesis.root or len(entry.ops) != 1:
            raise Violation("valid", "a change of committee or issuer that root did not make alone in its entry")
        if isinstance(op, Issuer):
            self.issuers.add(op.key)
            return
        if op.epoch != len(self.epochs):
            raise Violation("I1", f"committee {op.epoch} follows committee {len(self.epochs) - 1}")
        if len(op.keys) != 3 * op.f + 1 or len(set(op.keys)) != len(op.keys):
            raise Violation("valid", f"a committee of {len(set(op.keys))} with f = {op.f}")
        self.epochs.append(Epoch(tuple(op.keys), op.f))

    def _claim(self, item: Item, claim: Claim) -> None:
        voucher = claim.voucher
        channel = self.channels.get(voucher.channel)
        if channel is None:
            raise Violation("valid", "a claim on a channel that is not final")
        if voucher.net != self.genesis.net or (claim.seq, claim.op_index) != channel.opened:
            raise Violation("valid", "a claim of another network or channel is final")
        if not signed_by(channel.signer, Claim.TAG, item.signed.body, item.signed.signature):
            raise Violation("valid", "a claim that the channel's signer did not sign")
        if not signed_by(channel.payer, b"rios/voucher/1\0", codec.encode(voucher), claim.voucher_signature):
            raise Violation("valid", "a claim with a forged voucher is final")
        total = voucher.cumulative
        if total > channel.lock:
            raise Violation("I4", f"a claim of {total} on a lock of {channel.lock} is final")
        if channel.closed_at is not None and total > channel.closed_at:
            raise Violation("I4", f"a claim of {total} is final on a channel closed at {channel.closed_at}")
        if channel.closed_at is None and total > channel.paid:
            self.account(channel.payout).balance += total - channel.paid
            channel.paid = total
