"""What makes an entry or a claim valid: predicates over scratch copies, nothing is changed here.

Order (cheap first): network, sequence, ownership, funds, then the account's signature, then signatures inside
(freezes). Rules that gate a chain are monotone: an entry that is valid once stays valid whatever else becomes final,
so an honest payer cannot wedge itself. Time therefore never decides here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import (
    NO_HEAD,
    RECLAIMS_MAX,
    SMALL_BYTES_MAX,
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
    Voucher,
    id_of,
)
from p2p.core import codec
from p2p.core.identity import is_valid_key, verify


class AccountState(msgspec.Struct):
    """An account: the last applied ``seq``, its entry's id, free microcredits."""

    seq: int = 0
    head: bytes = NO_HEAD
    balance: int = 0


class ChannelState(msgspec.Struct):
    """A channel: ``lock`` and ``paid`` in microcredits; ``closed_at`` is X* once the payer reclaimed."""

    payer: bytes
    signer: bytes
    payout: bytes
    lock: int
    expiry_ms: int
    seq: int
    op_index: int
    paid: int = 0
    closed_at: int | None = None


Accounts = Mapping[bytes, AccountState]
Channels = Mapping[bytes, ChannelState]


class Scratch:
    """What an entry would do."""

    __slots__ = ("channels", "credits", "entry", "genesis", "granted", "opens", "reclaims", "spend", "supply", "topups")

    def __init__(self, genesis: Genesis, channels: Channels, supply: int, entry: Entry) -> None:
        self.genesis = genesis
        self.channels = channels
        self.supply = supply
        self.entry = entry
        self.spend = 0
        self.granted = 0
        self.credits: list[tuple[bytes, int]] = []
        self.opens: list[tuple[int, Open]] = []
        self.topups: list[tuple[bytes, int]] = []
        self.reclaims: list[tuple[bytes, int]] = []

    def own_channel(self, key: bytes) -> ChannelState:
        """A channel this entry may top up or reclaim: known, its own, not closed, also not by this very entry."""
        channel = self.channels.get(key)
        if channel is None or channel.payer != self.entry.account:
            raise RuleError("ownership", f"channel {key.hex()} was not opened by this account")
        if channel.closed_at is not None or any(key == closed for closed, _ in self.reclaims):
            raise RuleError("closed", f"channel {key.hex()} is closed already")
        return channel

    def need_amount(self, amount: int, minimum: int) -> None:
        """Refuse dust."""
        if amount < minimum:
            raise RuleError("amount", f"{amount} is below the network's minimum of {minimum}")


def _grant(scratch: Scratch, index: int, op: Grant) -> None:
    if scratch.entry.account != scratch.genesis.issuer:
        raise RuleError("issuer", "only the network's issuer grants credits")
    scratch.need_amount(op.amount, scratch.genesis.min_amount)
    scratch.granted += op.amount
    if scratch.supply + scratch.granted > scratch.genesis.max_supply:
        raise RuleError("supply", f"grants would exceed the network's {scratch.genesis.max_supply} microcredits")
    scratch.credits.append((op.to, op.amount))


def _transfer(scratch: Scratch, index: int, op: Transfer) -> None:
    scratch.need_amount(op.amount, scratch.genesis.min_amount)
    scratch.spend += op.amount
    scratch.credits.append((op.to, op.amount))


def _open(scratch: Scratch, index: int, op: Open) -> None:
    scratch.need_amount(op.amount, scratch.genesis.min_lock)
    if not is_valid_key(op.signer):
        raise RuleError("signer", "the channel's signer is not a valid Ed25519 key")
    scratch.spend += op.amount
    scratch.opens.append((index, op))


def _topup(scratch: Scratch, index: int, op: TopUp) -> None:
    scratch.own_channel(op.channel)
    scratch.need_amount(op.amount, scratch.genesis.min_amount)
    scratch.spend += op.amount
    scratch.topups.append((op.channel, op.amount))


def _reclaim(scratch: Scratch, index: int, op: Reclaim) -> None:
    channel = scratch.own_channel(op.channel)
    lock = channel.lock + sum(amount for key, amount in scratch.topups if key == op.channel)
    if op.total > lock:
        raise RuleError("lock", f"reclaim with {op.total} exceeds the channel's lock of {lock}")
    if op.total < channel.paid:
        raise RuleError("paid", f"reclaim with {op.total} is below the {channel.paid} already paid")
    scratch.reclaims.append((op.channel, op.total))
    if len(scratch.reclaims) > RECLAIMS_MAX:
        raise RuleError("reclaims", f"more than {RECLAIMS_MAX} reclaims in one entry")


def _unsupported(scratch: Scratch, index: int, op: Committee | Issuer) -> None:
    raise RuleError("epoch", "committee and issuer changes are not supported in this epoch")


_OPS: dict[type, Callable[[Scratch, int, Any], None]] = {
    Grant: _grant,
    Transfer: _transfer,
    Open: _open,
    TopUp: _topup,
    Reclaim: _reclaim,
    Committee: _unsupported,
    Issuer: _unsupported,
}


def check_entry(genesis: Genesis, accounts: Accounts, channels: Channels, supply: int, entry: Entry) -> Scratch:
    """What ``entry`` does to the state, if it may be next on its chain.

    Raises :class:`RuleError`; its ``wait`` says that later final objects may still make it valid.
    """
    if entry.net != genesis.net:
        raise RuleError("network", "the entry belongs to another network")
    account = accounts.get(entry.account)
    seq, head, balance = (account.seq, account.head, account.balance) if account is not None else (0, NO_HEAD, 0)
    if entry.seq != seq + 1:
        raise RuleError("sequence", f"entry {entry.seq} does not follow {seq}", wait=entry.seq > seq)
    if entry.prev != head:
        raise RuleError("prev", f"entry {entry.seq} does not build on the chain's head")
    scratch = Scratch(genesis, channels, supply, entry)
    for index, op in enumerate(entry.ops):
        _OPS[type(op)](scratch, index, op)
    if scratch.spend > balance:
        raise RuleError("funds", f"the entry spends {scratch.spend}, the account has {balance}", wait=True)
    return scratch


def check_entry_signature(item: Item, entry: Entry) -> None:
    """The account signed the entry."""
    if not verify(entry.account, b"", item.id, item.signed.signature):
        raise RuleError("signature", f"entry {entry.seq} is not signed by its account")


def check_freezes(genesis: Genesis, entry: Entry) -> None:
    """Every reclaim carries a quorum of freezes that support its total (rule 5)."""
    for op in entry.ops:
        if type(op) is Reclaim:
            _check_freeze_set(genesis, entry.account, op)


def _check_freeze_set(genesis: Genesis, payer: bytes, op: Reclaim) -> None:
    witnesses: set[bytes] = set()
    highest = 0
    for signed in op.freezes:
        freeze = check_freeze(genesis, payer, signed, op.channel)
        witnesses.add(freeze.witness)
        highest = max(highest, freeze.total)
    if len(witnesses) < genesis.quorum:
        raise RuleError("quorum", f"{len(witnesses)} distinct freezes, {genesis.quorum} are needed")
    if highest != op.total:
        raise RuleError("freeze", f"reclaim with {op.total}, but the freezes say {highest}")


def check_freeze(genesis: Genesis, payer: bytes, signed: Signed, channel: bytes) -> Freeze:
    """One freeze of ``channel``: by a witness, with the payer's voucher of exactly its total."""
    freeze = _open_freeze(signed)
    if freeze.net != genesis.net or freeze.epoch != 0 or freeze.witness not in genesis.witnesses:
        raise RuleError("freeze", "a freeze is not by a witness of this network's epoch")
    if freeze.channel != channel:
        raise RuleError("freeze", "a freeze is about another channel")
    if freeze.total == 0:
        return freeze
    voucher, signature = freeze.voucher, freeze.voucher_signature
    if (
        voucher is None
        or signature is None
        or voucher.channel != channel
        or voucher.net != genesis.net
        or voucher.cumulative != freeze.total
        or not verify(payer, b"", id_of(voucher), signature)
    ):
        raise RuleError("freeze", f"a freeze at {freeze.total} lacks the payer's voucher of that amount")
    return freeze


def _open_freeze(signed: Signed) -> Freeze:
    freeze = codec.decode(Freeze, signed.body, bytes_max=SMALL_BYTES_MAX)
    if not verify(freeze.witness, b"", codec.digest(Freeze.TAG, signed.body), signed.signature):
        raise RuleError("signature", "a freeze is not signed by its witness")
    return freeze


def check_claim(channel: ChannelState, key: bytes, claim: Claim) -> None:
    """The claim is about ``channel``, whose id is ``key``."""
    if claim.voucher.channel != key or (claim.account, claim.seq, claim.op_index) != (
        channel.payer,
        channel.seq,
        channel.op_index,
    ):
        raise RuleError("channel", "the claim does not name the entry that opened its channel")


def check_claim_signatures(channel: ChannelState, item: Item) -> None:
    """The payer signed the voucher, the channel's signer the claim."""
    claim = item.object
    assert isinstance(claim, Claim)
    if not verify(channel.signer, b"", item.id, item.signed.signature):
        raise RuleError("signature", "the claim is not signed by the channel's signer")
    check_voucher_signature(channel, claim.voucher, claim.voucher_signature)


def check_voucher_signature(channel: ChannelState, voucher: Voucher, signature: bytes) -> None:
    """The payer signed the voucher."""
    if not verify(channel.payer, b"", id_of(voucher), signature):
        raise RuleError("signature", "the voucher is not signed by the channel's payer")
