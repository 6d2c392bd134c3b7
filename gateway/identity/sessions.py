"""Sessions: who signed in, from where, until when; cookies and refresh tokens that belong to them.

Blocking calls. Invariants:
1. Every sign-in is a session of its own with a fresh id and secret: nothing a client brought along becomes one.
2. A refresh token is used once. Who shows a used one may be a thief, or be robbed: the session ends for both.
3. A session that ended never goes on; its user's role and state are read with it, each time.
"""

import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from gateway import audit
from gateway.accounts import Principal, digest_of
from gateway.audit import Actor, actor_of
from gateway.db.identity import external_identities, passwords, refresh_tokens, sessions
from gateway.db.models import accounts, users
from gateway.db.session import Database
from gateway.db.stamps import new_id, now_ms

_SECRET_BYTES = 32
_COOKIE = re.compile(r"([0-9a-f]{32})_([A-Za-z0-9_-]{43})")
_REFRESH = re.compile(r"rios_rt_([0-9a-f]{32})_([A-Za-z0-9_-]{43})")
_SEEN_EVERY_MS = 60_000
_AGENT_CHARACTERS_MAX = 200
_FORGET_MS = 30 * 24 * 3600 * 1000
"""Sessions that ended are listed for so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Where a request comes from."""

    address: str
    agent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A sign-in. ``method``: password or oidc."""

    id: str
    user_id: str
    method: str
    address: str
    agent: str
    created_at_ms: int
    seen_at_ms: int
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class Live:
    """A session that goes on, and who it is of."""

    principal: Principal
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class Rotated:
    """What came of a refresh token: the session goes on with ``token``, or was ended because it was used before."""

    session_id: str
    user_id: str
    token: str
    reused: bool = False


_LIVE = (
    sa.select(
        sessions.c.id,
        sessions.c.cookie_sha256,
        sessions.c.expires_at_ms,
        sessions.c.seen_at_ms,
        users.c.id.label("user_id"),
        users.c.name,
        users.c.role,
        users.c.disabled,
        accounts.c.id.label("account_id"),
    )
    .join(users, users.c.id == sessions.c.user_id)
    .join(accounts, accounts.c.user_id == users.c.id)
    .where(
        sessions.c.id == sa.bindparam("session_id"),
        sessions.c.revoked_at_ms.is_(None),
        sessions.c.expires_at_ms > sa.bindparam("now"),
    )
)
_USE = (
    sa.update(refresh_tokens)
    .where(refresh_tokens.c.id == sa.bindparam("token_id"), refresh_tokens.c.used_at_ms.is_(None))
    .values(used_at_ms=sa.bindparam("now"))
)


def start(
    database: Database,
    user_id: str,
    method: str,
    client: Client,
    *,
    seconds: int,
    cookie: bool,
    password_of_ms: int | None = None,
    link: tuple[str, str] | None = None,
) -> tuple[Session, str] | None:
    """A new session, and what carries it on: a cookie's value or a refresh token, shown once.

    None if what was shown is not the user's any more: the password set at ``password_of_ms``, or the ``link`` (issuer,
    subject) to another provider.
    """
    now, secret = now_ms(), secrets.token_urlsafe(_SECRET_BYTES)
    session = Session(
        id=secrets.token_hex(16),
        user_id=user_id,
        method=method,
        address=client.address[:64],
        agent=client.agent[:_AGENT_CHARACTERS_MAX],
        created_at_ms=now,
        seen_at_ms=now,
        expires_at_ms=now + 1000 * seconds,
    )
    with database.write() as connection:
        # The row stays locked: a change of the password, or the link's end, comes before this session, or ends it.
        shown = sa.select(passwords.c.changed_at_ms).where(passwords.c.user_id == user_id).with_for_update(read=True)
        if password_of_ms is not None and connection.execute(shown).scalar() != password_of_ms:
            return None
        if link is not None and _linked(connection, *link) != user_id:
            return None
        kept = digest_of(secret) if cookie else None
        connection.execute(sa.insert(sessions), {**asdict(session), "cookie_sha256": kept, "revoked_at_ms": None})
        carrier = f"{session.id}_{secret}" if cookie else _new_refresh_token(connection, session.id, now)
        actor = Actor(user_id, f"address {session.address}")
        audit.record(connection, actor, "session.started", session.id, detail={"method": method})
    return session, carrier


def _linked(connection: sa.Connection, issuer: str, subject: str) -> str | None:
    """Whose link it is; it stays locked."""
    theirs = external_identities.c.issuer == issuer, external_identities.c.subject == subject
    query = sa.select(external_identities.c.user_id).where(*theirs).with_for_update(read=True)
    found: str | None = connection.execute(query).scalar()
    return found


def by_id(database: Database, session_id: str) -> Live | None:
    """A session that goes on."""
    return _live(database, session_id, None)


def age_ms(database: Database, session_id: str) -> int:
    """How long ago somebody signed in."""
    query = sa.select(sessions.c.created_at_ms).where(sessions.c.id == session_id)
    with database.read() as connection:
        return now_ms() - int(connection.execute(query).scalar_one())


def by_cookie(database: Database, value: str) -> Live | None:
    """The session of a cookie that goes on."""
    match = _COOKIE.fullmatch(value)
    return None if match is None else _live(database, match[1], digest_of(match[2]))


def _live(database: Database, session_id: str, cookie_sha256: bytes | None) -> Live | None:
    now = now_ms()
    with database.read() as connection:
        row = connection.execute(_LIVE, {"session_id": session_id, "now": now}).first()
    if row is None or not hmac.compare_digest(row.cookie_sha256 or b"", cookie_sha256 or b""):
        return None
    if row.seen_at_ms < now - _SEEN_EVERY_MS:
        with database.write() as connection:
            connection.execute(sa.update(sessions).where(sessions.c.id == session_id).values(seen_at_ms=now))
    principal = Principal(
        user_id=row.user_id,
        user_name=row.name,
        disabled=row.disabled,
        account_id=row.account_id,
        key_id=None,
        role=row.role,
        session_id=row.id,
    )
    return Live(principal, row.expires_at_ms)


def rotate(database: Database, token: str) -> Rotated | None:
    """Use a refresh token up and get the next one; None: it is unknown, or its session ended."""
    match = _REFRESH.fullmatch(token)
    if match is None:
        return None
    now = now_ms()
    query = sa.select(refresh_tokens).where(refresh_tokens.c.id == match[1])
    with database.read() as connection:  # Who makes tokens up does not get as far as the lock of writers.
        row = connection.execute(query).first()
    if row is None or not hmac.compare_digest(row.secret_sha256, digest_of(match[2])):
        return None
    with database.write() as connection:
        live = connection.execute(_LIVE, {"session_id": row.session_id, "now": now}).first()
        if live is None or live.disabled:
            return None
        # The row's own condition decides, not what was read: two at the same time cannot both be first.
        if connection.execute(_USE, {"token_id": row.id, "now": now}).rowcount == 0:
            _end(connection, sessions.c.id == row.session_id)
            actor = Actor(live.user_id, "a refresh token used again")
            audit.record(connection, actor, "session.ended", row.session_id)
            return Rotated(row.session_id, live.user_id, "", reused=True)
        connection.execute(sa.update(sessions).where(sessions.c.id == row.session_id).values(seen_at_ms=now))
        return Rotated(row.session_id, live.user_id, _new_refresh_token(connection, row.session_id, now))


def of_user(database: Database, user_id: str) -> Sequence[Session]:
    """The sessions of a user that go on, newest first."""
    columns = (sessions.c[name] for name in Session.__dataclass_fields__)
    going_on = sessions.c.revoked_at_ms.is_(None), sessions.c.expires_at_ms > now_ms()
    query = sa.select(*columns).where(sessions.c.user_id == user_id, *going_on)
    with database.read() as connection:
        rows = connection.execute(query.order_by(sessions.c.created_at_ms.desc(), sessions.c.id).limit(1000))
        return [Session(**row) for row in rows.mappings()]


def revoke(database: Database, actor: Actor, user_id: str, session_id: str) -> bool:
    """End a user's session; whether it was going on."""
    with database.write() as connection:
        ended = _end(connection, sa.and_(sessions.c.id == session_id, sessions.c.user_id == user_id)) == 1
        if ended:
            audit.record(connection, actor, "session.ended", session_id, owner_id=user_id)
        return ended


def revoke_all(connection: sa.Connection, actor: Actor, user_id: str, *, keep: str = "", method: str = "") -> int:
    """End all sessions of a user but one (or those of one method), within the caller's transaction."""
    which = sa.and_(sessions.c.user_id == user_id, sessions.c.id != keep)
    ended = _end(connection, sa.and_(which, sessions.c.method == method) if method else which)
    if ended:
        audit.record(connection, actor, "sessions.ended", user_id, owner_id=user_id, detail={"count": ended})
    return ended


def revoke_cookie(database: Database, value: str) -> str:
    """End the session of a cookie; whose it was, empty if there is none."""
    live = by_cookie(database, value)
    if live is None:
        return ""
    revoke(database, actor_of(live.principal), live.principal.user_id, live.principal.session_id)
    return live.principal.user_id


def forget(database: Database) -> None:
    """Drop sessions that ended long ago, and the refresh tokens of all that ended."""
    now = now_ms()
    over = sa.or_(sessions.c.expires_at_ms < now, sessions.c.revoked_at_ms.is_not(None))
    old = sa.or_(sessions.c.expires_at_ms < now - _FORGET_MS, sessions.c.revoked_at_ms < now - _FORGET_MS)
    with database.write() as connection:
        ended = sa.select(sessions.c.id).where(over)
        connection.execute(sa.delete(refresh_tokens).where(refresh_tokens.c.session_id.in_(ended)))
        connection.execute(sa.delete(sessions).where(old))


def _end(connection: sa.Connection, which: sa.ColumnElement[bool]) -> int:
    ended = sa.update(sessions).where(which, sessions.c.revoked_at_ms.is_(None)).values(revoked_at_ms=now_ms())
    return connection.execute(ended).rowcount


def _new_refresh_token(connection: sa.Connection, session_id: str, now: int) -> str:
    token_id, secret = new_id(), secrets.token_urlsafe(_SECRET_BYTES)
    row = {"id": token_id, "session_id": session_id, "secret_sha256": digest_of(secret), "created_at_ms": now}
    connection.execute(sa.insert(refresh_tokens), {**row, "used_at_ms": None})
    return f"rios_rt_{token_id}_{secret}"
