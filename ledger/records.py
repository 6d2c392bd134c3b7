"""What can be written to a ledger's file: one record for each thing that must be durable before anybody hears of it."""

from dataclasses import dataclass

import msgspec

from ledger.core.objects import Certificate, Item, Signed
from ledger.promises import Handed, Kept, Listed, Seated, Standing
from ledger.shelf import Rows


class Final(msgspec.Struct, frozen=True, gc=False):
    """A final object and its certificate."""

    item: Item
    certificate: Certificate
    seen_ms: int


@dataclass(frozen=True, slots=True)
class Voted:
    """A witness's vote for an entry or a claim."""

    item: Item
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Frozen:
    """A witness's freeze."""

    channel: bytes
    signed: Signed
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Proof:
    """Two entries an account signed for one slot."""

    account: bytes
    seq: int
    a: Signed
    b: Signed


@dataclass(frozen=True, slots=True)
class Own:
    """An entry of the own chain, before it is sent."""

    seq: int
    signed: Signed


@dataclass(frozen=True, slots=True)
class Meta:
    """A named value."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRow:
    """The newest voucher of a channel (``side`` is ``sell`` or ``buy``) and the counts it was made from."""

    side: str
    channel: bytes
    peer_id: str
    voucher: bytes
    signature: bytes
    receipt_n: int
    receipt_cumulative: int
    calls: int
    kflop: int
    kv_units: int
    microcredits: int
    nano: int
    stopped: str


Record = Final | Voted | Frozen | Proof | Own | Meta | ChannelRow | Standing | Handed | Kept | Seated | Listed | Rows
