"""What the ledger is made of: typed array structs, their tags, their ids.

Owns the encodings. Whether an object is *valid* is said in ``rules``, ``certificate`` and ``channel``.

Invariants:
1. A body has exactly one encoding (``p2p.core.codec``), so an object has exactly one id: ``sha256(tag || body)``.
2. A signature covers the id; every body carries the network's id (a claim carries it in its voucher).
3. Every field is bounded here: amounts ``0..2**62``, at most 64 ops an entry, at most 256 votes a batch.
"""

from typing import Annotated, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from ledger.core.quorums import COMMITTEE_MAX, F_MAX
from p2p.core import codec
from p2p.core.identity import Identity, verify

AMOUNT_MAX = 1 << 62
OPS_MAX = 64
RECLAIMS_MAX = 8
VOTES_PER_BATCH_MAX = 256
SMALL_BYTES_MAX = 4096
ENTRY_BYTES_MAX = 256 << 10
CERTIFICATE_BYTES_MAX = 320 << 10
HANDOVER_BYTES_MAX = 128 << 20

Net = Annotated[bytes, Meta(min_length=16, max_length=16)]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Amount = Annotated[int, Meta(ge=0, le=AMOUNT_MAX)]
Count = Annotated[int, Meta(ge=0, le=AMOUNT_MAX)]
Seq = Annotated[int, Meta(ge=1, le=AMOUNT_MAX)]
Epoch = Annotated[int, Meta(ge=0, le=1 << 31)]
OpIndex = Annotated[int, Meta(ge=0, lt=OPS_MAX)]
SmallBody = Annotated[bytes, Meta(max_length=SMALL_BYTES_MAX)]

CHANNEL_TAG = b"rios/channel/1\0"
NO_HEAD = bytes(32)
"""``prev`` of an account's first entry."""


class _Array(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """A canonical array struct. ``gc=False``: it holds no cycles, so the collector need not look at it."""


class Signed(_Array, frozen=True):
    """A body and its author's signature over its id."""

    body: Annotated[bytes, Meta(max_length=ENTRY_BYTES_MAX)]
    signature: Signature


class Grant(_Array, tag=1, frozen=True):
    """New credits from the issuer."""

    to: Key
    amount: Amount


class Transfer(_Array, tag=2, frozen=True):
    """Credits from the chain's account to another."""

    to: Key
    amount: Amount


class Open(_Array, tag=3, frozen=True):
    """Lock credits in a channel: ``signer`` signs receipts and claims, ``payout`` is paid."""

    signer: Key
    payout: Key
    amount: Amount
    expiry_ms: Count


class TopUp(_Array, tag=4, frozen=True):
    """Lock more credits in one's own channel."""

    channel: Hash
    amount: Amount


class Reclaim(_Array, tag=5, frozen=True):
    """Close one's own expired channel: the payee has ``total`` in all, the rest returns."""

    channel: Hash
    total: Amount
    freezes: Annotated[tuple[Signed, ...], Meta(min_length=1, max_length=COMMITTEE_MAX)]


class Committee(_Array, tag=6, frozen=True):
    """Replace the witnesses (root only)."""

    epoch: Epoch
    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=COMMITTEE_MAX)]
    f: Annotated[int, Meta(ge=0, le=F_MAX)]


class Issuer(_Array, tag=7, frozen=True):
    """Replace the issuer (root only)."""

    key: Key


Op = Grant | Transfer | Open | TopUp | Reclaim | Committee | Issuer


class Entry(_Array, tag=1, frozen=True):
    """One link of an account's chain, signed by the account."""

    TAG: ClassVar[bytes] = b"rios/entry/1\0"

    net: Net
    account: Key
    seq: Seq
    prev: Hash
    ops: Annotated[tuple[Op, ...], Meta(min_length=1, max_length=OPS_MAX)]


class Receipt(_Array, tag=2, frozen=True):
    """A worker's record of all work on a channel so far, signed by the channel's signer."""

    TAG: ClassVar[bytes] = b"rios/receipt/1\0"

    net: Net
    channel: Hash
    n: Count
    cumulative: Amount
    calls: Count
    kflop: Count
    kv_units: Count
    use_root: Hash


class Voucher(_Array, tag=3, frozen=True):
    """A payer's cumulative promise on a channel, signed by the payer."""

    TAG: ClassVar[bytes] = b"rios/voucher/1\0"

    net: Net
    channel: Hash
    n: Count
    cumulative: Amount
    use_root: Hash


class Claim(_Array, tag=4, frozen=True):
    """A voucher put on the ledger, signed by the channel's signer.

    ``account, seq, op_index`` say where the channel was opened.
    """

    TAG: ClassVar[bytes] = b"rios/claim/1\0"

    account: Key
    seq: Seq
    op_index: OpIndex
    voucher: Voucher
    voucher_signature: Signature


class Votes(_Array, tag=5, frozen=True):
    """A witness's votes for up to 256 objects: the Merkle root of their ids, signed by the witness."""

    TAG: ClassVar[bytes] = b"rios/votes/1\0"

    net: Net
    epoch: Epoch
    witness: Key
    batch_no: Count
    prev: Hash
    root: Hash


class Freeze(_Array, tag=6, frozen=True):
    """A witness's promise never to vote for a claim above ``total``, signed by the witness."""

    TAG: ClassVar[bytes] = b"rios/freeze/1\0"

    net: Net
    epoch: Epoch
    witness: Key
    channel: Hash
    total: Amount
    voucher: Voucher | None
    voucher_signature: Signature | None


class Frontier(_Array, frozen=True):
    """What a witness has applied: accounts with their last ``seq``, channels with what was paid. Sorted by key."""

    accounts: tuple[tuple[Key, Seq], ...]
    channels: tuple[tuple[Hash, Amount], ...]


class Shown(_Array, frozen=True):
    """A voucher and its payer's signature."""

    voucher: Voucher
    signature: Signature


class Held(_Array, frozen=True):
    """A freeze as it is handed over: own or inherited. ``total`` > 0 comes with the payer's voucher of it."""

    channel: Hash
    total: Amount
    shown: Shown | None


class Handover(_Array, tag=7, frozen=True):
    """Everything an old witness leaves to the next committee, signed by it with the key of ``epoch``.

    ``locks`` are entries as their payers signed them, that this witness voted for or inherited, and that are not final.
    """

    TAG: ClassVar[bytes] = b"rios/handover/1\0"

    net: Net
    epoch: Epoch
    witness: Key
    frontier: Frontier
    locks: tuple[Signed, ...]
    claims: tuple[Shown, ...]
    freezes: tuple[Held, ...]


class Seat(_Array, tag=9, frozen=True):
    """Where a witness is found: the node (its identity) that holds the key of ``epoch``; signed by that key."""

    TAG: ClassVar[bytes] = b"rios/seat/1\0"

    net: Net
    epoch: Epoch
    witness: Key
    node: Key


class Equivocation(_Array, frozen=True):
    """Two entries that one account signed for one slot: proves itself (``equivocation``)."""

    a: Signed
    b: Signed


class Vote(_Array, frozen=True):
    """One witness's part of a certificate: the signed batch header and the way from the object's id to its root."""

    header: SmallBody
    signature: Signature
    index: Annotated[int, Meta(ge=0, lt=VOTES_PER_BATCH_MAX)]
    path: Annotated[tuple[Hash, ...], Meta(max_length=8)]


class Certificate(_Array, frozen=True):
    """An object with the votes of a quorum: what makes it final for everybody."""

    object: Signed
    epoch: Epoch
    votes: Annotated[tuple[Vote, ...], Meta(min_length=1, max_length=COMMITTEE_MAX)]


Body = TypeVar("Body", Entry, Receipt, Voucher, Claim, Votes, Freeze, Handover, Seat)
AnyBody = Entry | Receipt | Voucher | Claim | Votes | Freeze | Handover | Seat


class Item(msgspec.Struct, frozen=True, gc=False):
    """A decoded entry or claim with its id and the bytes that prove it."""

    object: Entry | Claim
    id: bytes
    signed: Signed


def id_of(body: AnyBody) -> bytes:
    """The id of an object."""
    return codec.digest(body.TAG, codec.encode(body))


def channel_id(entry_id: bytes, op_index: int) -> bytes:
    """The id of the channel that op ``op_index`` of an entry opens."""
    return codec.digest(CHANNEL_TAG, entry_id + op_index.to_bytes(1, "big"))


def sign(identity: Identity, body: AnyBody) -> Signed:
    """Sign one's own object."""
    data = codec.encode(body)
    return Signed(data, identity.sign(b"", codec.digest(body.TAG, data)))


def open_signed(kind: type[Body], signed: Signed, signer: bytes, bytes_max: int = SMALL_BYTES_MAX) -> Body | None:
    """The body if ``signer`` signed it, None if the signature is wrong.

    Raises :class:`config.errors.IntegrityError` if the body is malformed.
    """
    body = codec.decode(kind, signed.body, bytes_max=bytes_max)
    return body if verify(signer, b"", codec.digest(kind.TAG, signed.body), signed.signature) else None


def parse(signed: Signed) -> Item:
    """Decode an entry or a claim (their signatures are checked by ``rules``).

    Raises :class:`config.errors.IntegrityError` for anything else.
    """
    body = signed.body
    if body[1:2] == b"\x04":
        claim = codec.decode(Claim, body, bytes_max=SMALL_BYTES_MAX)
        return Item(claim, codec.digest(Claim.TAG, body), signed)
    entry = codec.decode(Entry, body, bytes_max=ENTRY_BYTES_MAX)
    return Item(entry, codec.digest(Entry.TAG, body), signed)
