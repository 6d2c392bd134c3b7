"""What makes an entry or a claim valid: predicates over scratch copies, nothing is changed here.

Order (cheap first): network, sequence, ownership, funds, then the account's signature, then signatures inside
(freezes). Rules that gate a chain are monotone: an entry that is valid once stays valid whatever else becomes final,
so an honest payer cannot wedge itself. Time therefore never decides here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ledger.core import quorums
from ledger.core.committee import CommitteeChain
from ledger.core.errors import RuleError
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

    __slots__ = (
        "change",
        "channels",
        "committees",
        "credits",
        "entry",
        "genesis",
        "granted",
        "opens",
        "reclaims",
        "spend",
        "supply",
        "topups",
    )

    def __init__(self, committees: CommitteeChain, channels: Channels, supply: int, entry: Entry) -> None:
        self.committees = committees
        self.genesis = committees.genesis
        self.channels = channels
        self.supply = supply
        self.entry = entry
        self.spend = 0
        self.granted = 0
        self.credits: list[tuple[bytes, int]] = []
        # most entries have none of these: no list is made for them
        self.opens: tuple[tuple[int, Open], ...] = ()
        self.topups: tuple[tuple[bytes, int], ...] = ()
        self.reclaims: tuple[tuple[bytes, int], ...] = ()
        self.change: Committee | Issuer | None = None

    def own_channel(self, key: bytes) -> ChannelState:
        """A channel this entry may top up or reclaim: known, its own, not closed, also not by this very entry."""
        channel = self.channels.get(key)
        if channel is None or channel.payer != self.entry.account:
            raise RuleError("ownership", f"channel {key.hex()} was not opened by this account")
        if channel.closed_at is not None or self.closes(key):
            raise RuleError("closed", f"channel {key.hex()} is closed already")
        return channel

    def closes(self, key: bytes) -> bool:
        """Whether an earlier op of this very entry reclaims the channel: two reclaims in one entry would mint."""
        return any(key == closed for closed, _ in self.reclaims)

    def need_amount(self, amount: int, minimum: int) -> None:
        """Refuse dust."""
        if amount < minimum:
            raise RuleError("amount", f"{amount} is below the network's minimum of {minimum}")


def _grant(scratch: Scratch, index: int, op: Grant) -> None:
    if scratch.entry.account not in scratch.committees.issuers:
        # waits: the entry that makes this account the issuer may not have arrived
        raise RuleError("issuer", "only the network's issuer grants credits", wait=True)
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
    scratch.opens += ((index, op),)


def _topup(scratch: Scratch, index: int, op: TopUp) -> None:
    scratch.own_channel(op.channel)
    scratch.need_amount(op.amount, scratch.genesis.min_amount)
    scratch.spend += op.amount
    scratch.topups += ((op.channel, op.amount),)


def _reclaim(scratch: Scratch, index: int, op: Reclaim) -> None:
    channel = scratch.own_channel(op.channel)
    lock = channel.lock + sum(amount for key, amount in scratch.topups if key == op.channel)
    if op.total > lock:
        raise RuleError("lock", f"reclaim with {op.total} exceeds the channel's lock of {lock}")
    if op.total < channel.paid:
        raise RuleError("paid", f"reclaim with {op.total} is below the {channel.paid} already paid")
    scratch.reclaims += ((op.channel, op.total),)
    if len(scratch.reclaims) > RECLAIMS_MAX:
        raise RuleError("reclaims", f"more than {RECLAIMS_MAX} reclaims in one entry")


def _committee(scratch: Scratch, index: int, op: Committee) -> None:
    _root_alone(scratch)
    scratch.committees.check_committee(op)
    scratch.change = op


def _issuer(scratch: Scratch, index: int, op: Issuer) -> None:
    _root_alone(scratch)
    scratch.committees.check_issuer(op)
    scratch.change = op


def _root_alone(scratch: Scratch) -> None:
    if scratch.entry.account != scratch.genesis.root:
        raise RuleError("root", "only the network's root changes the committee or the issuer")
    if len(scratch.entry.ops) != 1:
        raise RuleError("alone", "a change of the committee or the issuer stands alone in its entry")


_OPS: dict[type, Callable[[Scratch, int, Any], None]] = {
    Grant: _grant,
    Transfer: _transfer,
    Open: _open,
    TopUp: _topup,
    Reclaim: _reclaim,
    Committee: _committee,
    Issuer: _issuer,
}


def check_entry(
    committees: CommitteeChain, accounts: Accounts, channels: Channels, supply: int, entry: Entry
) -> Scratch:
    """What ``entry`` does to the state, if it may be next on its chain.

    Raises :class:`RuleError`; its ``wait`` says that later final objects may still make it valid.
    """
    if entry.net != committees.net:
        raise RuleError("network", "the entry belongs to another network")
    account = accounts.get(entry.account)
    seq, head, balance = (account.seq, account.head, account.balance) if account is not None else (0, NO_HEAD, 0)
    if entry.seq != seq + 1:
        raise RuleError("sequence", f"entry {entry.seq} does not follow {seq}", wait=entry.seq > seq)
    if entry.prev != head:
        raise RuleError("prev", f"entry {entry.seq} does not build on the chain's head")
    scratch = Scratch(committees, channels, supply, entry)
    for index, op in enumerate(entry.ops):
        _OPS[type(op)](scratch, index, op)
    if scratch.spend > balance:
        raise RuleError("funds", f"the entry spends {scratch.spend}, the account has {balance}", wait=True)
    return scratch


def check_grants_now(committees: CommitteeChain, entry: Entry) -> None:
    """For votes only: an issuer that was replaced grants no more.

    The one gate that can be revoked, on purpose: a stolen issuer key must stop counting. The state itself takes a final
    grant of any issuer, present or past, so that it does not depend on the order in which objects come.
    """
    replaced = entry.account in committees.issuers and entry.account != committees.issuer
    if replaced and any(type(op) is Grant for op in entry.ops):
        raise RuleError("issuer", "this account is not the network's issuer any more")


def check_entry_signature(item: Item, entry: Entry) -> None:
    """The account signed the entry."""
    if not verify(entry.account, b"", item.id, item.signed.signature):
        raise RuleError("signature", f"entry {entry.seq} is not signed by its account")


def check_freezes(committees: CommitteeChain, entry: Entry) -> None:
    """Every reclaim carries a quorum of freezes that support its total (rule 5)."""
    for op in entry.ops:
        if type(op) is Reclaim:
            _check_freeze_set(committees, entry.account, op)


def _check_freeze_set(committees: CommitteeChain, payer: bytes, op: Reclaim) -> None:
    freezes = [check_freeze(committees, payer, signed, op.channel) for signed in op.freezes]
    epoch = freezes[0].epoch
    if any(freeze.epoch != epoch for freeze in freezes):
        raise RuleError("epoch", "a reclaim's freezes are of different epochs")
    witnesses, needed = quorums.distinct(freeze.witness for freeze in freezes), committees.of(epoch).quorum
    if len(witnesses) < needed:
        raise RuleError("quorum", f"{len(witnesses)} distinct freezes, {needed} are needed")
    highest = max(freeze.total for freeze in freezes)
    if highest != op.total:
        raise RuleError("freeze", f"reclaim with {op.total}, but the freezes say {highest}")


def check_freeze(committees: CommitteeChain, payer: bytes, signed: Signed, channel: bytes) -> Freeze:
    """One freeze of ``channel``: by a witness of its epoch, with the payer's voucher of exactly its total."""
    freeze = _open_freeze(signed)
    if freeze.net != committees.net or freeze.witness not in committees.of(freeze.epoch).members:
        raise RuleError("freeze", "a freeze is not by a witness of this network's epoch")
    if freeze.channel != channel:
        raise RuleError("freeze", "a freeze is about another channel")
    if not proves_total(committees.net, payer, channel, freeze.total, freeze.voucher, freeze.voucher_signature):
        raise RuleError("freeze", f"a freeze at {freeze.total} lacks the payer's voucher of that amount")
    return freeze


def proves_total(
    net: bytes, payer: bytes, channel: bytes, total: int, voucher: Voucher | None, signature: bytes | None
) -> bool:
    """Whether a frozen total has its evidence: the payer's voucher of exactly that amount, none for zero."""
    if total == 0:
        return True
    return (
        voucher is not None
        and signature is not None
        and voucher.channel == channel
        and voucher.net == net
        and voucher.cumulative == total
        and verify(payer, b"", id_of(voucher), signature)
    )


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
