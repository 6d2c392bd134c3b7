"""Whether a row of what only this node knows is still what was written: it can be read, agrees with itself, is signed.

Each table's check is here and nowhere else; ``salvage`` walks the tables. What a row says only by its place in a column
(the epoch of a vote, the counts of a channel) has nothing to compare it with; nor have signatures of those whom only
the ledger's state names (the payer of a voucher that was shown, the signer of a claim).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from config.errors import RiosError
from ledger.core.equivocation import check_proof
from ledger.core.objects import (
    HANDOVER_BYTES_MAX,
    SMALL_BYTES_MAX,
    Claim,
    Entry,
    Equivocation,
    Freeze,
    Handover,
    Item,
    Seat,
    Signed,
    Voucher,
    id_of,
    open_signed,
    parse,
)
from ledger.core.rules import check_entry_signature
from ledger.core.witness import COLLECTING, HANDED_OVER, STOPPED, VOTING
from ledger.promises import CHAIN
from p2p.core import codec
from p2p.core.identity import public_key_of, verify

Row = tuple[Any, ...]


@dataclass(slots=True)
class Owner:
    """Whose file it is. ``account`` is empty as long as no entry of the own chain was seen."""

    net: bytes
    account: bytes = b""


def is_sound(table: str, row: Row, owner: Owner) -> bool:
    """Whether a row of one of ``salvage.OWN_TABLES`` or ``accounts`` is what was written. An own entry tells whose
    the file is: the wallet's rows come first."""
    try:
        return _CHECKS[table](row, owner)
    except (RiosError, msgspec.DecodeError, KeyError, TypeError, ValueError):
        return False


def _entry(body: bytes, signature: bytes, net: bytes) -> tuple[Item, Entry]:
    item = parse(Signed(body, signature))
    if not isinstance(item.object, Entry) or item.object.net != net:
        raise ValueError("no entry of this network")
    check_entry_signature(item, item.object)
    return item, item.object


def _wallet(row: Row, owner: Owner) -> bool:
    seq, body, signature = row
    _, entry = _entry(body, signature, owner.net)
    owner.account = owner.account or entry.account
    return (entry.account, entry.seq) == (owner.account, seq)


def _vote(row: Row, owner: Owner) -> bool:
    _, _, seq, object_id, body, signature = row
    item, entry = _entry(body, signature, owner.net)
    return (item.id, entry.seq) == (object_id, seq)


def _claim_vote(row: Row, owner: Owner) -> bool:
    channel, cumulative, body, signature = row
    claim = parse(Signed(body, signature)).object
    if not isinstance(claim, Claim):
        return False
    voucher = claim.voucher
    named = (voucher.net, voucher.channel, voucher.cumulative) == (owner.net, channel, cumulative)
    return named and len(signature) == 64 and verify(claim.account, b"", id_of(voucher), claim.voucher_signature)


def _freeze(row: Row, owner: Owner) -> bool:
    epoch, channel, body, signature = row
    witness = codec.decode(Freeze, body, bytes_max=SMALL_BYTES_MAX).witness
    freeze = open_signed(Freeze, Signed(body, signature), witness)
    return freeze is not None and (freeze.net, freeze.epoch, freeze.channel) == (owner.net, epoch, channel)


def _voucher(body: bytes, channel: bytes, net: bytes) -> Voucher:
    voucher = codec.decode(Voucher, body, bytes_max=SMALL_BYTES_MAX)
    if (voucher.net, voucher.channel) != (net, channel):
        raise ValueError("a voucher of another channel")
    return voucher


def _channel(row: Row, owner: Owner) -> bool:
    side, channel, peer_id, body, signature = row[:5]
    voucher = _voucher(body, channel, owner.net)
    payer = {"sell": public_key_of(peer_id), "buy": owner.account}[side]
    return not payer or verify(payer, b"", id_of(voucher), signature)


def _shown(row: Row, owner: Owner) -> bool:
    channel, cumulative, body, signature = row
    return _voucher(body, channel, owner.net).cumulative == cumulative and len(signature) == 64


def _proof(row: Row, owner: Owner) -> bool:
    account, seq, body_a, signature_a, body_b, signature_b = row
    proof = Equivocation(Signed(body_a, signature_a), Signed(body_b, signature_b))
    return check_proof(owner.net, proof) == (account, seq)


def _witness(row: Row, owner: Owner) -> bool:
    _, key, phase, _ = row
    return len(key) == 32 and phase in (COLLECTING, VOTING, STOPPED, HANDED_OVER)


def _handover(row: Row, owner: Owner) -> bool:
    epoch, witness, body, signature = row
    handover = open_signed(Handover, Signed(body, signature), witness, HANDOVER_BYTES_MAX)
    return handover is not None and (handover.net, handover.epoch, handover.witness) == (owner.net, epoch, witness)


def _seat(row: Row, owner: Owner) -> bool:
    epoch, witness, body, signature = row
    seat = open_signed(Seat, Signed(body, signature), witness)
    return seat is not None and (seat.net, seat.epoch, seat.witness) == (owner.net, epoch, witness)


def _meta(row: Row, owner: Owner) -> bool:
    key, value = row
    if key == "forgotten":
        msgspec.msgpack.decode(value, type=list[bytes])
    sizes = {"net": 16, "mark": 16, "promises": 8}
    size = 40 if key.startswith(CHAIN) else sizes.get(key, len(value))
    return len(value) == size and (key != "net" or value == owner.net)


_CHECKS: Mapping[str, Callable[[Row, Owner], bool]] = {
    "accounts": lambda row, owner: len(row[1]) == 32,
    "wallet": _wallet,
    "votes": _vote,
    "claim_votes": _claim_vote,
    "freezes": _freeze,
    "channels": _channel,
    "proofs": _proof,
    "witnesses": _witness,
    "handovers": _handover,
    "shown": _shown,
    "seats": _seat,
    "listed": lambda row, owner: len(row[0]) == 32,
    "meta": _meta,
}
