"""Lets the database start from a checkpoint and deletes what lies below it, in one transaction.

Stays: entries that change committee or issuer, claims on channels that are open or came later, batch headers that some
certificate stands on, and the newest ones: they tell a witness from a backup what it has forgotten.
"""

import sqlite3
from collections.abc import Mapping

import msgspec

from ledger.core.objects import Claim, Signed, parse
from ledger.shelf import Rows

HEADERS_STAY = 4096

_unpack_proof = msgspec.msgpack.Decoder(list[tuple[int, int, bytes]]).decode


def prune(
    writer: sqlite3.Connection,
    base: Rows,
    cut: Mapping[int, int],
    spared: set[tuple[int, int]],
    open_channels: set[bytes],
    accounts: Mapping[bytes, int],
) -> None:
    """``base``: says which checkpoint it is; ``cut``: account row -> seq at it; ``spared``: (account row, seq);
    ``accounts``: key -> row."""
    writer.execute("BEGIN IMMEDIATE")
    try:
        writer.executemany(base.sql, base.params)
        _entries(writer, cut, spared)
        _claims(writer, cut, open_channels, accounts)
        _headers(writer)
        writer.execute("COMMIT")
    except BaseException:
        if writer.in_transaction:
            writer.execute("ROLLBACK")
        raise


def size_bytes(connection: sqlite3.Connection) -> int:
    """The database's pages, without its write-ahead log."""
    pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return int(pages * size)


def _entries(writer: sqlite3.Connection, cut: Mapping[int, int], spared: set[tuple[int, int]]) -> None:
    writer.execute("CREATE TEMP TABLE cut (account INTEGER PRIMARY KEY, seq INTEGER) STRICT")
    writer.execute("CREATE TEMP TABLE spared (account INTEGER, seq INTEGER) STRICT")
    writer.executemany("INSERT INTO cut VALUES (?, ?)", cut.items())
    writer.executemany("INSERT INTO spared VALUES (?, ?)", sorted(spared))
    writer.execute(
        "DELETE FROM entries WHERE seq <= (SELECT seq FROM cut WHERE cut.account = entries.account) "
        "AND (account, seq) NOT IN (SELECT account, seq FROM spared)"
    )
    writer.execute("DROP TABLE spared")
    writer.execute("DROP TABLE cut")


def _claims(
    writer: sqlite3.Connection, cut: Mapping[int, int], open_channels: set[bytes], accounts: Mapping[bytes, int]
) -> None:
    gone = []
    for channel, body, signature in writer.execute("SELECT channel, body, signature FROM claims").fetchall():
        claim = parse(Signed(body, signature)).object
        assert isinstance(claim, Claim)
        if channel not in open_channels and claim.seq <= cut.get(accounts.get(claim.account, 0), 0):
            gone.append((channel,))
    writer.executemany("DELETE FROM claims WHERE channel = ?", gone)


def _headers(writer: sqlite3.Connection) -> None:
    used: set[int] = set()
    for table in ("entries", "claims"):
        for (proof,) in writer.execute(f"SELECT proof FROM {table}"):
            used.update(row for row, _, _ in _unpack_proof(proof))
    writer.execute("CREATE TEMP TABLE used (id INTEGER PRIMARY KEY) STRICT")
    writer.executemany("INSERT INTO used VALUES (?)", ((row,) for row in used))
    writer.execute(
        "DELETE FROM headers WHERE id NOT IN (SELECT id FROM used) AND id <= (SELECT max(id) FROM headers) - ?",
        (HEADERS_STAY,),
    )
    writer.execute("DROP TABLE used")
