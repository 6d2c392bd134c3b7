"""The audit log: who changed what, in rows that cannot be changed unnoticed. Blocking calls.

A row's hash is sha256 over the hash before it and the row as canonical JSON, so whoever changes, adds or removes a row
has to change all hashes after it; and the newest one is anchored elsewhere every day (``gateway/anchoring.py``).

Invariants:
1. A row is written in the transaction of what it tells, so neither is there without the other.
2. Rows are in one order on all gateways of a database: the head is locked while one is added. It is locked last, behind
   accounts and whatever else a transaction locks, so that gateways cannot deadlock.
3. No secret stands in a row.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from config.errors import IntegrityError
from gateway import events
from gateway.accounts import Principal
from gateway.db.audit import audit_head, audit_log
from gateway.db.session import Database
from gateway.db.stamps import now_ms
from gateway.errors import invalid
from gateway.listing import Page, window

_ROWS_AT_ONCE = 1000
_TARGET_CHARACTERS_MAX = 255
_DETAIL_CHARACTERS_MAX = 4096
_PLACE_DIGITS_MAX = 18
_TOLD = ("key.", "user.", "deployment.", "payment.")
"""Actions that are events too."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something. ``by``: with which key or session, or from where."""

    user_id: str
    by: str


OPERATOR = Actor("", "command line")
"""Who runs the node, on its own machine."""
GATEWAY = Actor("", "gateway")
"""A gateway by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that happened. ``detail`` is JSON text, ``hash`` hex digits."""

    place: int
    created_at_ms: int
    user_id: str
    by: str
    action: str
    target: str
    owner_id: str
    detail: str
    hash: str


def actor_of(principal: Principal) -> Actor:
    """The caller of a request."""
    by = f"key {principal.key_id}" if principal.key_id else ""
    session = getattr(principal, "session_id", "")
    return Actor(principal.user_id, by or (f"session {session}" if session else "no key"))


def record(
    connection: sa.Connection,
    actor: Actor,
    action: str,
    target: str,
    *,
    owner_id: str = "",
    detail: Mapping[str, object] | None = None,
) -> None:
    """Add a row in an open transaction, which locks nothing of others after it (invariant 2)."""
    head = sa.select(audit_head.c.place, audit_head.c.hash).where(audit_head.c.id == 1).with_for_update()
    place, before = connection.execute(head).one()
    row = {
        "place": place + 1,
        "created_at_ms": now_ms(),
        "user_id": actor.user_id,
        "by": actor.by[:96],
        "action": action,
        "target": target[:_TARGET_CHARACTERS_MAX],
        "owner_id": owner_id or actor.user_id,
        "detail": _canonical(detail or {})[:_DETAIL_CHARACTERS_MAX],
    }
    digest = hash_of(before, row)
    connection.execute(sa.insert(audit_log), {**row, "hash": digest})
    connection.execute(sa.update(audit_head).where(audit_head.c.id == 1).values(place=place + 1, hash=digest))
    if action.startswith(_TOLD):
        told = {"id": target, "by": actor.user_id, "detail": dict(detail or {})}
        events.record(connection, action, owner_id or actor.user_id or None, told)


def hash_of(before: bytes, row: Mapping[str, object]) -> bytes:
    """The hash of a row (without its own hash) behind the row with the hash ``before``."""
    return hashlib.sha256(before + _canonical({k: v for k, v in row.items() if k != "hash"}).encode()).digest()


def rows(database: Database, page: Page, *, owner: str | None) -> Sequence[Row]:
    """Those of a page: all, or what a user did and what was done to what is theirs. Raises ApiError."""
    for name, cursor in (("after", page.after), ("before", page.before)):
        if cursor and not (cursor.isascii() and cursor.isdecimal() and len(cursor) <= _PLACE_DIGITS_MAX):
            raise invalid(name, f"{name} must be the id of a row")
    query = sa.select(audit_log)
    if owner is not None:
        query = query.where(sa.or_(audit_log.c.user_id == owner, audit_log.c.owner_id == owner))
    query = window(query, page, (audit_log.c.place,), lambda place: (int(place),))
    with database.read() as connection:
        return [_shown(row) for row in connection.execute(query).mappings()]


def _shown(row: Mapping[Any, Any]) -> Row:
    return Row(**{**row, "hash": bytes(row["hash"]).hex()})


def head(database: Database) -> tuple[int, bytes]:
    """How many rows there are, and the hash of the newest."""
    with database.read() as connection:
        place, digest = connection.execute(sa.select(audit_head.c.place, audit_head.c.hash)).one()
    return int(place), bytes(digest)


def verify(database: Database, look: Callable[[Row], None] = lambda row: None) -> tuple[int, bytes]:
    """Check the whole chain; :func:`head` if it holds. Raises IntegrityError naming the first row that does not.

    ``look`` sees each row once it is known to be the one that was written.
    """
    before, place = bytes(32), 0
    with database.read() as connection:
        last = connection.execute(sa.select(audit_head.c.place, audit_head.c.hash)).one()
        query = sa.select(audit_log).where(audit_log.c.place <= last.place)
        query = query.order_by(audit_log.c.place).limit(_ROWS_AT_ONCE)
        while found := connection.execute(query.where(audit_log.c.place > place)).mappings().all():
            for row in found:
                place += 1
                if row["place"] != place:
                    raise IntegrityError("integrity", f"row {place} of the audit log is missing")
                if bytes(row["hash"]) != hash_of(before, dict(row)):
                    raise IntegrityError("integrity", f"row {place} of the audit log was changed: {row['action']}")
                before = bytes(row["hash"])
                look(_shown(row))
    if (last.place, bytes(last.hash)) != (place, before):
        raise IntegrityError("integrity", f"the audit log has {place} rows, and its head says {last.place}")
    return place, before


def _canonical(value: Mapping[str, object]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
