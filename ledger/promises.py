"""What a witness keeps on disk: stops, handovers, vouchers shown, seats, listed changes, proofs.

Owns the records of these tables, how they are written (``store`` commits them) and read, and how a witness is brought
back after a restart. Votes and freezes are rows of ``store`` itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ledger.core.objects import Claim, Entry, Equivocation, Item, Shown, Signed, Voucher
from ledger.core.witness import HANDED_OVER, Witness
from p2p.core import codec

CHAIN = "witness_chain"
Rows = dict[str, list[tuple[Any, ...]]]
Query = Callable[..., list[tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class Standing:
    """How far the witness with ``key`` is in its epoch's life."""

    epoch: int
    key: bytes
    phase: str
    restored: bool


@dataclass(frozen=True, slots=True)
class Handed:
    """A handover, own or received."""

    epoch: int
    witness: bytes
    signed: Signed


@dataclass(frozen=True, slots=True)
class Kept:
    """A voucher that was shown to this witness and enters its freezes."""

    shown: Shown


@dataclass(frozen=True, slots=True)
class Seated:
    """Where a witness is found."""

    epoch: int
    witness: bytes
    signed: Signed


@dataclass(frozen=True, slots=True)
class Listed:
    """A change of the committee or the issuer that the operator agreed to."""

    entry_id: bytes


Promise = Standing | Handed | Kept | Seated | Listed

_KEPT = "INSERT INTO shown VALUES (?, ?, ?, ?) ON CONFLICT (channel) DO UPDATE SET cumulative = excluded.cumulative, "
_KEPT += "body = excluded.body, signature = excluded.signature WHERE excluded.cumulative > shown.cumulative"


def chain_key(epoch: int) -> str:
    """The name under which the end of a witness's chain of batches is kept."""
    return f"{CHAIN}/{epoch}" if epoch else CHAIN


def add_row(record: Promise, rows: Rows) -> None:
    """The statement that writes a record."""
    if type(record) is Standing:
        rows["INSERT OR REPLACE INTO witnesses VALUES (?, ?, ?, ?)"].append(
            (record.epoch, record.key, record.phase, int(record.restored))
        )
    elif type(record) is Handed:
        rows["INSERT OR IGNORE INTO handovers VALUES (?, ?, ?, ?)"].append(
            (record.epoch, record.witness, record.signed.body, record.signed.signature)
        )
    elif type(record) is Kept:
        voucher, signature = record.shown.voucher, record.shown.signature
        rows[_KEPT].append((voucher.channel, voucher.cumulative, codec.encode(voucher), signature))
    elif type(record) is Seated:
        rows["INSERT OR REPLACE INTO seats VALUES (?, ?, ?, ?)"].append(
            (record.epoch, record.witness, record.signed.body, record.signed.signature)
        )
    else:
        assert type(record) is Listed
        rows["INSERT OR IGNORE INTO listed VALUES (?)"].append((record.entry_id,))


class Promises:
    """The reading side; ``query`` is the store's."""

    def __init__(self, query: Query) -> None:
        self._query = query

    def standing(self, epoch: int, key: bytes) -> Standing | None:
        """How far a witness was."""
        rows = self._query(
            "SELECT epoch, key, phase, restored FROM witnesses WHERE epoch = ? AND key = ?", (epoch, key)
        )
        return Standing(rows[0][0], rows[0][1], rows[0][2], bool(rows[0][3])) if rows else None

    def handovers(self, epoch: int) -> dict[bytes, Signed]:
        """Handovers of an epoch by witness."""
        rows = self._query("SELECT witness, body, signature FROM handovers WHERE epoch = ?", (epoch,))
        return {witness: Signed(body, signature) for witness, body, signature in rows}

    def handover(self, epoch: int, witness: bytes) -> Signed | None:
        """One of them."""
        rows = self._query("SELECT body, signature FROM handovers WHERE epoch = ? AND witness = ?", (epoch, witness))
        return Signed(*rows[0]) if rows else None

    def shown(self) -> list[Shown]:
        """Vouchers shown to this witness."""
        rows = self._query("SELECT body, signature FROM shown")
        return [Shown(codec.decode(Voucher, body, bytes_max=len(body)), signature) for body, signature in rows]

    def seats(self) -> list[Signed]:
        """Every seat known."""
        return [Signed(*row) for row in self._query("SELECT body, signature FROM seats")]

    def listed(self) -> set[bytes]:
        """Ids the operator listed."""
        return {row[0] for row in self._query("SELECT entry_id FROM listed")}

    def proofs(self) -> list[tuple[bytes, int, Equivocation]]:
        """Equivocations: account, seq, the two entries."""
        rows = self._query("SELECT account, seq, body_a, signature_a, body_b, signature_b FROM proofs")
        return [(r[0], r[1], Equivocation(Signed(r[2], r[3]), Signed(r[4], r[5]))) for r in rows]

    def votes(self, epoch: int) -> list[Signed]:
        """Entries and claims that this node voted for in an epoch."""
        rows = self._query("SELECT body, signature FROM votes WHERE epoch = ?", (epoch,))
        rows += self._query("SELECT body, signature FROM claim_votes")
        return [Signed(*row) for row in rows]

    def freezes(self, epoch: int) -> list[Signed]:
        """Freezes that this node gave in an epoch."""
        return [Signed(*row) for row in self._query("SELECT body, signature FROM freezes WHERE epoch = ?", (epoch,))]

    def chain(self, epoch: int) -> tuple[int, bytes] | None:
        """The number and hash of the last batch of an epoch."""
        rows = self._query("SELECT value FROM meta WHERE key = ?", (chain_key(epoch),))
        return (int.from_bytes(rows[0][0][:8], "big"), rows[0][0][8:]) if rows else None


def recall(promises: Promises, witness: Witness, voted: list[Item], final: list[Item]) -> None:
    """Give a new :class:`Witness` everything its earlier self made durable: ``voted`` are the items of
    :meth:`Promises.votes`, ``final`` every final claim (whose vouchers count for freezes)."""
    for item in voted:
        if isinstance(item.object, Entry):
            witness.restore_entry_vote(item)
    for item in (*voted, *final):
        if isinstance(item.object, Claim):
            witness.saw_voucher(item.object.voucher, item.object.voucher_signature)
    for shown in promises.shown():
        witness.saw_voucher(shown.voucher, shown.signature)
    for signed in promises.freezes(witness.epoch):
        witness.restore_freeze(signed)
    chain = promises.chain(witness.epoch)
    if chain is not None:
        witness.restore_chain(*chain)
    for signed in promises.handovers(witness.epoch - 1).values():
        witness.receive(signed)
    witness.listed |= promises.listed()
    standing = promises.standing(witness.epoch, witness.key)
    if standing is not None:
        own = promises.handover(witness.epoch, witness.key) if standing.phase == HANDED_OVER else None
        witness.restore_phase(standing.phase, restored=standing.restored, handover=own)
    witness.forget_final()
