"""Invites: an admin lets somebody set a user's password, once. Also the way back for who forgot theirs.

Blocking calls. Invariants: a user has one invite at most, the newest; it works once, until it expires, and only its
sha256 is stored.
"""

import hmac
import re
import secrets
from dataclasses import dataclass, field

import sqlalchemy as sa

from gateway import audit
from gateway.accounts import digest_of
from gateway.audit import Actor
from gateway.db.identity import invites
from gateway.db.session import Database
from gateway.db.stamps import new_id, now_ms
from gateway.errors import ApiError

VALID_MS = 3 * 24 * 3600 * 1000
GONE = "unauthenticated", "this invite does not work (any more)", "ask for a new one"
"""The error's code, message and hint."""
_TOKEN = re.compile(r"rios_invite_([0-9a-f]{32})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """``token`` is what the invited send; it cannot be shown again."""

    token: str = field(repr=False)
    user_id: str
    expires_at_ms: int


def create(database: Database, actor: Actor, user_id: str) -> Invite:
    """A new invite; earlier ones of the user stop working."""
    name, secret, expires = new_id(), secrets.token_urlsafe(32), now_ms() + VALID_MS
    row = {"id": name, "user_id": user_id, "secret_sha256": digest_of(secret), "expires_at_ms": expires}
    with database.write() as connection:
        drop(connection, user_id)
        connection.execute(sa.insert(invites), row)
        audit.record(connection, actor, "invite.created", user_id, owner_id=user_id)
    return Invite(token=f"rios_invite_{name}_{secret}", user_id=user_id, expires_at_ms=expires)


def find(database: Database, token: str) -> str | None:
    """Whose invite it is, if it works. Setting the password uses it up: :func:`use`."""
    match = _TOKEN.fullmatch(token)
    if match is None:
        return None
    query = sa.select(invites).where(invites.c.id == match[1], invites.c.expires_at_ms > now_ms())
    with database.read() as connection:
        row = connection.execute(query).first()
    if row is None or not hmac.compare_digest(row.secret_sha256, digest_of(match[2])):
        return None
    return str(row.user_id)


def use(connection: sa.Connection, token: str) -> None:
    """Use one up, within the transaction of what it is used for: of two at the same time only one does, and what
    :func:`find` said may be old by now. Raises ApiError ``unauthenticated`` if it does not work (any more)."""
    match = _TOKEN.fullmatch(token)
    if match is not None:
        secret = invites.c.secret_sha256 == digest_of(match[2])
        works = sa.and_(invites.c.id == match[1], secret, invites.c.expires_at_ms > now_ms())
        if connection.execute(sa.delete(invites).where(works)).rowcount == 1:
            return
    raise ApiError(*GONE)


def drop(connection: sa.Connection, user_id: str) -> None:
    """A user's invite stops working, within the caller's transaction."""
    connection.execute(sa.delete(invites).where(invites.c.user_id == user_id))


def forget(database: Database) -> None:
    """Drop those that expired."""
    with database.write() as connection:
        connection.execute(sa.delete(invites).where(invites.c.expires_at_ms < now_ms()))
