"""Takes out of a damaged ledger file what can still be read, into a new file beside it.

Final objects are taken only with a certificate that verifies; they also come back from peers. Own things (chain, votes,
freezes, vouchers, ...) come from nowhere else. Where a table of them cannot be read to its end, or has a row that is
not what was written (``own_rows``; the node would not start with it), the new file has no history that any mark agrees
with, so that the witness stays silent for its epoch and the wallet asks before it signs (rule 9).

The damaged file is only moved, never changed. Fails as: LocalError if the new file cannot be written.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from config.errors import ConfigError, IntegrityError, LocalError, RiosError
from ledger.core.certificate import Verifier
from ledger.core.checkpoint import adopt_committees, is_of_committees
from ledger.core.committee import CommitteeChain
from ledger.core.genesis import Genesis
from ledger.core.objects import Certificate, Entry, Item, Signed, Vote, parse
from ledger.own_rows import Owner, is_sound
from ledger.records import Final
from ledger.schema import MIGRATIONS
from ledger.store import Store, unpack_proof

OWN_TABLES = (
    "wallet",
    "votes",
    "claim_votes",
    "freezes",
    "channels",
    "proofs",
    "witnesses",
    "handovers",
    "shown",
    "seats",
    "listed",
    "meta",
)
"""What only this node knows. ``votes`` name accounts by row, so that these are copied first; the wallet says whose
the vouchers are."""
LATER_TABLES = {"witnesses", "handovers", "shown", "seats", "listed", "checkpoints", "pages"}
HISTORY = "mark"
NO_HISTORY = bytes(16)
"""A lineage that no mark has: without any, a file whose mark is lost as well would look like a first start's."""
GROUP = 1000


@dataclass(slots=True)
class Salvaged:
    """What came of it. ``unreadable``: tables that end somewhere in the middle, or of whose own rows one is not what
    was written; ``refused``: objects that do not verify."""

    rows: dict[str, int] = field(default_factory=dict)
    entries: int = 0
    claims: int = 0
    refused: int = 0
    unreadable: list[str] = field(default_factory=list)

    @property
    def own_is_whole(self) -> bool:
        """Whether everything that only this node knew is there."""
        return not set(self.unreadable) & {*OWN_TABLES, "accounts"}


def salvage(damaged: Path, target: Path, genesis: Genesis) -> Salvaged:
    """Read ``damaged``, write ``target``, which must not exist."""
    if target.exists():
        raise LocalError("conflict", f"{target} exists already", "move it away")
    _check_version(damaged)
    found = Salvaged()
    store = Store(target, genesis.net)
    try:
        with closing(_open(damaged)) as source:
            _own(source, store, genesis.net, found)
            _finals(source, store, genesis, found)
    finally:
        store.close()
    return found


def _check_version(damaged: Path) -> None:
    with closing(_open(damaged)) as source:
        try:
            version = source.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error:
            return  # not even that can be read: there is nothing in it
        if version not in (0, len(MIGRATIONS)):
            raise ConfigError(
                "config",
                f"{damaged} has schema version {version}, this program reads {len(MIGRATIONS)}",
                "repair it with the rios that wrote it",
            )


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


def _rows(source: sqlite3.Connection, table: str, found: Salvaged) -> Iterator[tuple[Any, ...]]:
    """A table's rows: from its beginning to the damage, then from its end back to it."""
    seen = 0
    for order in ("ASC", "DESC"):
        try:
            for row in source.execute(f"SELECT * FROM {table} ORDER BY rowid {order}"):
                seen += 1
                yield row
            return
        except sqlite3.Error as error:
            if "no such table" in str(error) and seen == 0 and table in LATER_TABLES:
                return  # the file is of an earlier version
            if order == "ASC":
                found.unreadable.append(table)


def own_damage(path: Path, genesis: Genesis) -> list[str]:
    """The tables of a file of this version in which something that only this node knew cannot be read."""
    found = Salvaged()
    with closing(_open(path)) as source:
        _own_tables(source, genesis.net, found)
    return found.unreadable


def _own_tables(source: sqlite3.Connection, net: bytes, found: Salvaged) -> dict[str, list[tuple[Any, ...]]]:
    """The rows that are what was written."""
    tables: dict[str, list[tuple[Any, ...]]] = {}
    owner = Owner(net)
    for table in ("accounts", *OWN_TABLES):
        rows = list(dict.fromkeys(_rows(source, table, found)))
        tables[table] = [row for row in rows if is_sound(table, row, owner)]
        if len(tables[table]) < len(rows) and table not in found.unreadable:
            found.unreadable.append(table)
    return tables


def _own(source: sqlite3.Connection, store: Store, net: bytes, found: Salvaged) -> None:
    tables = _own_tables(source, net, found)
    found.rows = {table: len(rows) for table, rows in tables.items()}
    if not found.own_is_whole:
        tables["meta"] = [*(row for row in tables["meta"] if row[0] != HISTORY), (HISTORY, NO_HISTORY)]
    for table, rows in tables.items():
        for start in range(0, len(rows), GROUP):
            store.copy_rows(table, rows[start : start + GROUP])
    store.reload()


def _finals(source: sqlite3.Connection, store: Store, genesis: Genesis, found: Salvaged) -> None:
    """Final objects that verify. Committees first: what later epochs certified is checked against them."""
    headers = {row[0]: (row[1], row[2]) for row in _rows(source, "headers", found)}
    rows: list[tuple[Any, ...]] = [row[4:9] for row in _rows(source, "entries", found)]
    rows += [row[2:7] for row in _rows(source, "claims", found)]
    _salvage_pages(source, store, found)
    objects = [each for row in dict.fromkeys(rows) if (each := _final(headers, row)) is not None]
    found.refused = len(set(rows)) - len(objects)
    chain = CommitteeChain(genesis)
    verifier = Verifier(genesis, chain)
    good: list[Final] = []
    for final in sorted(objects, key=_committees_first):
        try:
            verifier.check(final.item, final.certificate)
            if _changes_committee(final.item, genesis):
                adopt_committees(chain, [final.item])
            good.append(final)
        except IntegrityError:
            found.refused += 1
    for start in range(0, len(good), GROUP):
        store.commit(good[start : start + GROUP])
    found.entries, found.claims = store.count("entries"), store.count("claims")


def _changes_committee(item: Item, genesis: Genesis) -> bool:
    body = item.object
    return isinstance(body, Entry) and body.account == genesis.root and is_of_committees(body)


def _committees_first(final: Final) -> tuple[bool, int]:
    body = final.item.object
    return not (isinstance(body, Entry) and is_of_committees(body)), body.seq


def _final(headers: dict[int, tuple[bytes, bytes]], row: tuple[Any, ...]) -> Final | None:
    """A row as an object; None if its bytes are not what they were."""
    body, signature, epoch, proof, seen_ms = row
    try:
        votes = []
        for header, index, path in unpack_proof(proof):
            steps = tuple(path[i : i + 32] for i in range(0, len(path), 32))
            votes.append(Vote(*headers[header], index, steps))
        item = parse(Signed(body, signature))
        return Final(item, Certificate(item.signed, epoch, tuple(votes)), seen_ms)
    except (RiosError, msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None


def _salvage_pages(source: sqlite3.Connection, store: Store, found: Salvaged) -> None:
    """Checkpoints, if they are whole: a part of one is of no use, and peers have them."""
    before = len(found.unreadable)
    tables = {table: list(dict.fromkeys(_rows(source, table, found))) for table in ("checkpoints", "pages")}
    if len(found.unreadable) == before:
        for table, rows in tables.items():
            store.copy_rows(table, rows)
