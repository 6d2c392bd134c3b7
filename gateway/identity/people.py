"""Who signs in: users with their password and their links to other providers.

Blocking calls. Invariants: a link is found by (issuer, subject) alone, never by an e-mail address, which may be
anybody's at another provider; setting a password ends the sessions that came before it, and the user's invites;
replacing one also ends the links, which somebody else may have made.
"""

import hashlib
import secrets
from dataclasses import dataclass

import sqlalchemy as sa

from config.errors import RequestError
from gateway import audit
from gateway.accounts import Accounts
from gateway.audit import Actor
from gateway.db.identity import external_identities, passwords, second_factors
from gateway.db.models import LOCAL_USER, users
from gateway.db.session import Database
from gateway.db.stamps import now_ms
from gateway.errors import ApiError
from gateway.identity import invites, sessions
from gateway.roles import Role

_NAME_TRIES = 3
_NAME_CHARACTERS_MAX = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """A user, and what they can prove themselves with."""

    id: str
    name: str
    email: str | None
    role: Role
    disabled: bool
    password_hash: str | None
    password_of_ms: int | None
    """When it was set."""
    has_second_factor: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An identity at another provider that a user signs in with."""

    issuer: str
    subject: str
    created_at_ms: int

    @property
    def id(self) -> str:
        """Names it in a path, which an issuer's address cannot."""
        return hashlib.sha256(f"{self.issuer} {self.subject}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


_PERSON = (
    sa.select(
        users.c.id,
        users.c.name,
        users.c.email,
        users.c.role,
        users.c.disabled,
        passwords.c.hash.label("password_hash"),
        passwords.c.changed_at_ms.label("password_of_ms"),
        second_factors.c.confirmed_at_ms.is_not(None).label("has_second_factor"),
    )
    .outerjoin(passwords, passwords.c.user_id == users.c.id)
    .outerjoin(second_factors, second_factors.c.user_id == users.c.id)
)


def by_email(database: Database, email: str) -> Person | None:
    """As stored: see :func:`gateway.accounts.normal_email`."""
    return _one(database, _PERSON.where(users.c.email == email))


def by_id(database: Database, user_id: str) -> Person:
    """Raises ApiError ``not_found``."""
    found = _one(database, _PERSON.where(users.c.id == user_id))
    if found is None:
        raise ApiError("not_found", "there is no such user", public_code="not_found")
    return found


def by_link(database: Database, issuer: str, subject: str) -> Person | None:
    """Whose identity at another provider this is."""
    linked = external_identities.c.issuer == issuer, external_identities.c.subject == subject
    query = _PERSON.join(external_identities, external_identities.c.user_id == users.c.id).where(*linked)
    return _one(database, query)


def _one(database: Database, query: sa.Select[tuple[object, ...]]) -> Person | None:
    with database.read() as connection:
        row = connection.execute(query).mappings().first()
    return None if row is None else Person(**row)


def link(database: Database, actor: Actor, user_id: str, issuer: str, subject: str) -> None:
    """Let a user sign in with another provider. Raises RequestError ``conflict`` if it is another user's."""
    try:
        with database.write() as connection:
            _put_link(connection, user_id, issuer, subject)
            audit.record(connection, actor, "identity.linked", user_id, owner_id=user_id, detail={"issuer": issuer})
    except sa.exc.IntegrityError as error:
        owner = by_link(database, issuer, subject)
        if owner is None or owner.id != user_id:
            raise RequestError("conflict", "this identity belongs to another user already") from error


def links_of(database: Database, user_id: str) -> list[Link]:
    """A user's identities at other providers, oldest first."""
    with database.read() as connection:
        return _links(connection, user_id)


def unlink(database: Database, actor: Actor, user_id: str, link_id: str, *, keep_session: str = "") -> bool:
    """Take an identity away from a user, and end their sessions by other providers; whether it was theirs.

    Raises RequestError ``conflict`` if a user would be left with nothing to sign in with by their own doing.
    """
    with database.write() as connection:
        # Locked, so that two at the same time do not both leave the other one. Sessions that begin do not wait for it:
        # they hold the link, which is deleted next.
        connection.execute(sa.select(users.c.id).where(users.c.id == user_id).with_for_update(key_share=True))
        links = _links(connection, user_id)
        found = next((link for link in links if link.id == link_id), None)
        if found is None:
            return False
        has_password = sa.select(passwords.c.user_id).where(passwords.c.user_id == user_id)
        if actor.user_id == user_id and len(links) == 1 and connection.execute(has_password).first() is None:
            raise RequestError("conflict", "nothing would be left to sign in with", "set a password first")
        theirs = external_identities.c.issuer == found.issuer, external_identities.c.subject == found.subject
        connection.execute(sa.delete(external_identities).where(*theirs))
        sessions.revoke_all(connection, actor, user_id, keep=keep_session, method="oidc")
        detail = {"issuer": found.issuer}
        audit.record(connection, actor, "identity.unlinked", user_id, owner_id=user_id, detail=detail)
        return True


def _links(connection: sa.Connection, user_id: str) -> list[Link]:
    columns = (external_identities.c[name] for name in Link.__dataclass_fields__)
    mine = sa.select(*columns).where(external_identities.c.user_id == user_id)
    order = external_identities.c.created_at_ms, external_identities.c.issuer, external_identities.c.subject
    return [Link(**row) for row in connection.execute(mine.order_by(*order)).mappings()]


def set_password(
    database: Database, actor: Actor, user_id: str, hashed: str, *, keep_session: str = "", invite: str = ""
) -> None:
    """Set a user's password; every other session of theirs ends, every invite, and every link to another provider: they
    stay only if somebody who is signed in (``keep_session``) sets a first password.

    Raises ApiError ``unauthenticated`` if the ``invite`` that it is set by does not work any more.
    """
    if user_id == LOCAL_USER:
        raise RequestError("invalid_request", "the built-in user 'local' cannot sign in", "make a user of your own")
    with database.write() as connection:
        # Locked, so that two at the same time come one after the other, whichever of the rows below there are.
        connection.execute(sa.select(users.c.id).where(users.c.id == user_id).with_for_update(key_share=True))
        if invite:
            invites.use(connection, invite)
        invites.drop(connection, user_id)
        replaced = put_password(connection, user_id, hashed)
        unlinked = 0
        if replaced or not keep_session:
            links = sa.delete(external_identities).where(external_identities.c.user_id == user_id)
            unlinked = connection.execute(links).rowcount
        sessions.revoke_all(connection, actor, user_id, keep=keep_session)
        detail = {"unlinked": unlinked} if unlinked else None
        audit.record(connection, actor, "password.changed", user_id, owner_id=user_id, detail=detail)


def put_password(connection: sa.Connection, user_id: str, hashed: str) -> bool:
    """A user's password, within the caller's transaction; whether it replaced one."""
    replaced = connection.execute(sa.delete(passwords).where(passwords.c.user_id == user_id)).rowcount == 1
    connection.execute(sa.insert(passwords), {"user_id": user_id, "hash": hashed, "changed_at_ms": now_ms()})
    return replaced


def renew_hash(database: Database, user_id: str, old: str, new: str) -> None:
    """The same password, hashed with today's parameters; nothing if it was changed meanwhile."""
    with database.write() as connection:
        same = sa.and_(passwords.c.user_id == user_id, passwords.c.hash == old)
        connection.execute(sa.update(passwords).where(same).values(hash=new))


def create_linked(accounts: Accounts, wanted_name: str, email: str | None, issuer: str, subject: str) -> str:
    """A new user for an identity at another provider, by the name wished for if it is free, else by one like it, and
    with the e-mail address if it is free; their id. If somebody was faster with this identity: the user they made."""
    wish = "".join(c for c in wanted_name if c.isprintable()).strip()[:_NAME_CHARACTERS_MAX] or "user"
    for attempt in range(_NAME_TRIES):
        name = f"{wish}-{secrets.token_hex(4)}" if attempt else wish
        free = email if email and by_email(accounts.database, email) is None else None
        try:
            with accounts.adding_user(name, free) as (connection, user):
                accounts.insert_user(connection, user)
                _put_link(connection, user.id, issuer, subject)
                actor = Actor(user.id, f"provider {issuer}")
                audit.record(connection, actor, "user.created", user.id, detail={"name": name, "role": user.role})
                return user.id
        except RequestError as error:
            if error.code != "conflict":
                raise
        known = by_link(accounts.database, issuer, subject)
        if known is not None:
            return known.id
    raise RequestError("conflict", f"there are too many users like {wish!r}", "try again")


def _put_link(connection: sa.Connection, user_id: str, issuer: str, subject: str) -> None:
    row = {"issuer": issuer, "subject": subject, "user_id": user_id, "created_at_ms": now_ms()}
    connection.execute(sa.insert(external_identities), row)
