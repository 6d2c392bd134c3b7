"""The ledger as one node reads it: what crosses the line between the node and whoever shows it (the gateway).

Plain values. Accounts are peer ids as text, ids are hex, amounts microcredits, times unix milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from config.generation import Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerBalance:
    """An account: what is free, and what is locked in its channels."""

    account: str
    balance: int
    locked: int
    seq: int
    """Entries on its chain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSummary:
    """The whole of it."""

    net: str
    account: str
    """This node's own."""
    entries: int
    accounts: int
    channels: int
    supply: int
    """All that was ever granted."""
    waiting: int
    """Objects that wait for others."""
    epoch: int
    tolerance: str
    pending: bool
    """An entry of this node has no certificate yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementLine:
    """What moved an account's free balance. ``amount`` is negative where it took from it; ``place`` counts from 1."""

    place: int
    seen_ms: int
    kind: str
    amount: int
    peer_id: str
    """The other side."""
    reference: str
    """The id of the entry or claim."""
    balance: int
    """Free after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One final entry. ``place`` orders entries by when they became known here."""

    place: int
    id: str
    account: str
    seq: int
    seen_ms: int
    epoch: int
    votes: int
    """In its certificate."""
    ops: Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerWitness:
    """A member of the committee in office."""

    key: str
    node: str
    """The peer that holds the key, empty if nobody has said so."""
    is_self: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerCommittee:
    """The witnesses of one epoch; ``quorum`` of their signatures make a certificate."""

    epoch: int
    f: int
    quorum: int
    tolerance: str
    witnesses: Sequence[LedgerWitness]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerChannel:
    """Credits locked by a payer for a payee."""

    channel: str
    side: str
    """buy: this account pays; sell: it is paid."""
    payer: str
    payee: str
    lock: int
    promised: int
    """By vouchers that this node holds."""
    paid: int
    """Put on the ledger."""
    calls: int
    closed: bool
    expiry_ms: int
    stopped: str
    """Why nothing more is paid or worked for, empty if nothing is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a purpose cost since this node started, on the channels that it used lately. ``bill``: the request's, if the
    purpose is ``request``."""

    bill: str
    purpose: str
    costs: tuple[Cost, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaidChannel:
    """A channel on which this node pays, as it counts there. ``nano``: 1e-9 microcredits; ``promised``: microcredits of
    the newest voucher; ``ahead``, ``behind``: by how many microcredits that may be more, or less, than the count."""

    channel: str
    peer_id: str
    calls: int
    nano: int
    promised: int
    ahead: int
    behind: int
