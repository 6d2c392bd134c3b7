"""The tables of the ledger's database and their version.

Set up through sqlite-utils; the hot path in ``store`` speaks plain sqlite3. Tables are STRICT: others silently turn an
overflow into a float. Amounts stay under 2**62, so an INTEGER holds them.
"""

import sqlite3
from collections.abc import Callable
from typing import Any

from sqlite_utils import Database

from config.errors import ConfigError

_TABLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # table: (columns, options of sqlite_utils' create)
    "meta": ({"key": str, "value": bytes}, {"pk": "key"}),
    "accounts": ({"id": int, "key": bytes}, {"pk": "id"}),
    "headers": ({"id": int, "body": bytes, "signature": bytes}, {"pk": "id"}),
    "entries": (
        {
            "id": int,
            "account": int,
            "seq": int,
            "object_id": bytes,
            "body": bytes,
            "signature": bytes,
            "epoch": int,
            "proof": bytes,
            "seen_ms": int,
        },
        {"pk": "id"},
    ),
    "claims": (
        {
            "channel": bytes,
            "cumulative": int,
            "body": bytes,
            "signature": bytes,
            "epoch": int,
            "proof": bytes,
            "seen_ms": int,
        },
        {"pk": "channel"},
    ),
    "votes": (
        {"account": int, "seq": int, "object_id": bytes, "body": bytes, "signature": bytes},
        {"pk": ("account", "seq")},
    ),
    "claim_votes": ({"channel": bytes, "cumulative": int, "body": bytes, "signature": bytes}, {"pk": "channel"}),
    "freezes": ({"channel": bytes, "body": bytes, "signature": bytes}, {"pk": "channel"}),
    "proofs": (
        {
            "account": bytes,
            "seq": int,
            "body_a": bytes,
            "signature_a": bytes,
            "body_b": bytes,
            "signature_b": bytes,
        },
        {"pk": ("account", "seq")},
    ),
    "wallet": ({"seq": int, "body": bytes, "signature": bytes}, {"pk": "seq"}),
    "channels": (
        # one row per side and channel: the newest voucher and the counts it was made from
        {
            "side": str,
            "channel": bytes,
            "peer_id": str,
            "voucher": bytes,
            "signature": bytes,
            "receipt_n": int,
            "receipt_cumulative": int,
            "calls": int,
            "kflop": int,
            "kv_units": int,
            "microcredits": int,
            "nano": int,
            "stopped": str,
        },
        {"pk": ("side", "channel")},
    ),
}


def _create_first(db: Database) -> None:
    for name, (columns, options) in _TABLES.items():
        db.create_table(name, columns, not_null=set(columns) - {"id"}, strict=True, **options)
    db.table("accounts").create_index(["key"], unique=True)
    db.table("entries").create_index(["account", "seq"], unique=True)


_SECOND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "votes": (
        {"epoch": int, "account": int, "seq": int, "object_id": bytes, "body": bytes, "signature": bytes},
        {"pk": ("epoch", "account", "seq")},
    ),
    "freezes": ({"epoch": int, "channel": bytes, "body": bytes, "signature": bytes}, {"pk": ("epoch", "channel")}),
    # how far this node's witnesses are in their epochs' lives
    "witnesses": ({"epoch": int, "key": bytes, "phase": str, "restored": int}, {"pk": ("epoch", "key")}),
    "handovers": ({"epoch": int, "witness": bytes, "body": bytes, "signature": bytes}, {"pk": ("epoch", "witness")}),
    "shown": ({"channel": bytes, "cumulative": int, "body": bytes, "signature": bytes}, {"pk": "channel"}),
    "seats": ({"epoch": int, "witness": bytes, "body": bytes, "signature": bytes}, {"pk": ("epoch", "witness")}),
    "listed": ({"entry_id": bytes}, {"pk": "entry_id"}),
}


def _add_epochs(db: Database) -> None:
    """Votes and freezes belong to an epoch (all so far to the first); what a change of the committee needs."""
    for name in ("votes", "freezes"):
        db.execute(f"ALTER TABLE {name} RENAME TO {name}_1")
    for name, (columns, options) in _SECOND.items():
        db.create_table(name, columns, not_null=set(columns), strict=True, **options)
    for name in ("votes", "freezes"):
        db.execute(f"INSERT INTO {name} SELECT 0, * FROM {name}_1")
        db.execute(f"DROP TABLE {name}_1")


MIGRATIONS: tuple[Callable[[Database], None], ...] = (_create_first, _add_epochs)
"""``MIGRATIONS[i]`` brings version i to i + 1. Append only."""


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Bring the database to this program's version in one transaction.

    Raises :class:`ConfigError` if it is newer.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise ConfigError(
            "config",
            f"{path} has schema version {version}, this program knows {len(MIGRATIONS)}",
            "run the newer rios that wrote it, or restore a backup",
        )
    if version == len(MIGRATIONS):
        return
    db = Database(connection)
    connection.execute("BEGIN IMMEDIATE")
    for step in MIGRATIONS[version:]:
        step(db)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    connection.execute("COMMIT")
