"""Users and keys as people with rights manage them: each change and its row in the audit log in one transaction.

Blocking calls. What a caller may touch is decided before (``gateway/endpoint.py``); what nobody may do is refused here:

1. The last admin who can sign in, or has a key, is neither disabled nor given another role.
2. A key is never given more, nor for longer, than who makes it has.
3. The built-in local user is left alone.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa

from config.errors import RequestError
from gateway import audit, idempotency
from gateway.accounts import (
    Accounts,
    ApiKey,
    NewKey,
    Principal,
    User,
    check_name,
    insert_key,
    name_taken,
    new_key,
    normal_email,
    scopes_text,
)
from gateway.audit import Actor
from gateway.db.identity import sessions
from gateway.db.jobs import webhooks
from gateway.db.models import LOCAL_USER, api_keys, users
from gateway.db.stamps import now_ms
from gateway.errors import ApiError
from gateway.idempotency import Wanted
from gateway.listing import Page, window
from gateway.roles import PERMISSIONS, ROLES, Reach, Role, reach_of

KEYS_OF_USER_MAX = 1000
_NEVER_MS = (1 << 63) - 1
"""Behind every end that a key can have."""
_KEY_COLUMNS = tuple(column for column in api_keys.c if column.name != "secret_sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserChange:
    """What shall be different; None: stays."""

    name: str | None = None
    email: str | None = None
    role: Role | None = None
    disabled: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """What shall be different; None: stays."""

    name: str | None = None
    scopes: Collection[str] | None = None
    expires_at_ms: int | None = None
    cache: bool | None = None


# --- users


def list_users(accounts: Accounts, page: Page, *, owner: str | None) -> Sequence[User]:
    """Those of a page; only one if there is an owner."""
    query = sa.select(users).where(users.c.id != LOCAL_USER)
    if owner is not None:
        query = query.where(users.c.id == owner)
    query = window(query, page, (users.c.id,), lambda user_id: (user_id,))
    with accounts.database.read() as connection:
        return [User(**row) for row in connection.execute(query).mappings()]


def get_user(accounts: Accounts, user_id: str, owner: str | None) -> User:
    """Raises ApiError ``not_found``, also for users out of reach."""
    with accounts.database.read() as connection:
        return _user(connection, user_id, owner)


def add_user(
    accounts: Accounts, actor: Actor, name: str, email: str | None, role: Role, asked: Wanted | None = None
) -> tuple[User, bool]:
    """A new user, and whether they were made before: by the same request under an idempotency key.

    Raises RequestError ``conflict`` if name or e-mail is taken, ``invalid_request`` if they are none.
    """
    _check_role(role)
    with accounts.adding_user(name, email) as (connection, user):
        if asked and (before := idempotency.made_before(connection, asked)):
            return _user(connection, before, None), True
        user = accounts.insert_user(connection, replace(user, role=role))
        detail = {"name": name, "role": role}
        audit.record(connection, actor, "user.created", user.id, owner_id=user.id, detail=detail)
        if asked:
            idempotency.keep_made(connection, asked, user.id)
        return user, False


def change_user(accounts: Accounts, actor: Actor, user_id: str, owner: str | None, change: UserChange) -> User:
    """Raises ApiError ``not_found``, RequestError ``conflict`` or ``invalid_request``."""
    values = _user_values(change)
    try:
        with accounts.database.write() as connection:
            if change.disabled or change.role not in (None, "admin"):
                _keep_an_admin(connection, user_id)
            _user(connection, user_id, owner, lock=True)
            if values:
                connection.execute(sa.update(users).where(users.c.id == user_id).values(**values))
            if change.disabled:
                _end_all(connection, user_id)
            elif change.disabled is False:  # a new start: nothing failed while nothing was sent
                theirs = sa.update(webhooks).where(webhooks.c.user_id == user_id)
                connection.execute(theirs.values(failing_since_ms=None))
            audit.record(connection, actor, "user.changed", user_id, owner_id=user_id, detail=values)
            return _user(connection, user_id, owner)
    except sa.exc.IntegrityError as error:
        raise name_taken(change.name or "", change.email) from error


def _user_values(change: UserChange) -> dict[str, Any]:
    if change.name is not None:
        check_name("user", change.name)
    if change.role is not None:
        _check_role(change.role)
    email = change.email and normal_email(change.email)
    found = {"name": change.name, "email": email, "role": change.role, "disabled": change.disabled}
    return {name: value for name, value in found.items() if value is not None}


def _user(connection: sa.Connection, user_id: str, owner: str | None, *, lock: bool = False) -> User:
    query = sa.select(users).where(users.c.id == user_id, users.c.id != LOCAL_USER)
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None or owner not in (None, user_id):
        raise ApiError("not_found", f"there is no user {user_id!r:.80}", public_code="not_found")
    return User(**row)


def _keep_an_admin(connection: sa.Connection, leaving: str) -> None:
    """All admins are locked, before anything else and in one order: two of them cannot leave at the same time."""
    admins = sa.select(users.c.id).where(users.c.role == "admin", users.c.disabled.is_(sa.false()))
    found = connection.execute(admins.order_by(users.c.id).with_for_update()).scalars().all()
    if found == [leaving]:
        raise RequestError("conflict", "this is the last admin", "make another user an admin first")


def _end_all(connection: sa.Connection, user_id: str) -> None:
    now = now_ms()
    for table in (api_keys, sessions):
        open_ones = table.c.user_id == user_id, table.c.revoked_at_ms.is_(None)
        connection.execute(sa.update(table).where(*open_ones).values(revoked_at_ms=now))


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise RequestError("invalid_request", f"{role!r:.40} is no role", f"roles are {', '.join(ROLES)}", param="role")


# --- keys


def list_keys(accounts: Accounts, page: Page, *, owner: str | None, user: str = "") -> Sequence[ApiKey]:
    """Those of a page: the owner's, or all; of one user if ``user`` names one. Revoked ones included."""
    query = sa.select(*_KEY_COLUMNS)
    for only in filter(None, (owner, user)):
        query = query.where(api_keys.c.user_id == only)
    query = window(query, page, (api_keys.c.created_at_ms, api_keys.c.id), _key_edge)
    with accounts.database.read() as connection:
        return [ApiKey(**row) for row in connection.execute(query).mappings()]


def _key_edge(key_id: str) -> Sequence[Any]:
    made = sa.select(api_keys.c.created_at_ms).where(api_keys.c.id == key_id).scalar_subquery()
    return made, key_id


def get_key(accounts: Accounts, key_id: str, owner: str | None) -> ApiKey:
    """Raises ApiError ``not_found``, also for keys out of reach."""
    with accounts.database.read() as connection:
        return _key(connection, key_id, owner)


def key_fields(key: ApiKey) -> dict[str, Any]:
    """A key as clients see it."""
    return {**asdict(key), "scopes": key.scopes.split()}


def add_key(
    accounts: Accounts,
    maker: Principal,
    user_id: str,
    name: str,
    scopes: Collection[str],
    expires_at_ms: int | None,
    *,
    owner: str | None,
    cache: bool = False,
    asked: Wanted | None = None,
) -> NewKey:
    """Make a key for a user within reach. Raises RequestError ``forbidden`` for more than its maker has.

    ``asked``: under an idempotency key. A second time raises ApiError ``conflict``, as the secret was shown.
    """
    scopes, expires_at_ms = _within(maker, scopes), _future(expires_at_ms)
    with accounts.database.write() as connection:
        made = new_key(user_id, name, scopes, _not_longer(connection, maker, expires_at_ms))
        made = replace(made, key=replace(made.key, cache=cache))
        if asked and (before := idempotency.made_before(connection, asked)):
            raise _shown_already(before)
        _user(connection, user_id, owner, lock=True)
        _put_key(connection, audit.actor_of(maker), made)
        if asked:
            idempotency.keep_made(connection, asked, made.key.id)
    return made


def issue_key(accounts: Accounts, actor: Actor, user: str, name: str) -> NewKey:
    """The operator makes a key for a user (id or name), with all that their role has. Raises RequestError."""
    made = new_key(accounts.find_user(user).id, name, (), None)
    with accounts.database.write() as connection:
        _put_key(connection, actor, made)
    return made


def _put_key(connection: sa.Connection, actor: Actor, made: NewKey) -> None:
    key = made.key
    count = sa.select(sa.func.count()).where(api_keys.c.user_id == key.user_id, api_keys.c.revoked_at_ms.is_(None))
    if connection.execute(count).scalar_one() >= KEYS_OF_USER_MAX:
        raise RequestError("conflict", f"a user has {KEYS_OF_USER_MAX} keys at most", "revoke some first")
    insert_key(connection, made)
    detail = {"name": key.name, "scopes": key.scopes} | ({"cache": True} if key.cache else {})
    audit.record(connection, actor, "key.created", key.id, owner_id=key.user_id, detail=detail)


def _shown_already(key_id: str) -> ApiError:
    text = f"this request made the key {key_id} already, and its secret was shown then"
    hint = "if it did not arrive, revoke that key and ask with a new idempotency key"
    return ApiError("conflict", text, hint, param=idempotency.HEADER, public_code="idempotency_key_used")


def change_key(accounts: Accounts, maker: Principal, key_id: str, owner: str | None, change: KeyChange) -> ApiKey:
    """Raises ApiError ``not_found``; RequestError ``forbidden``, ``conflict`` (revoked) or ``invalid_request``."""
    values: dict[str, Any] = {}
    if change.name is not None:
        check_name("key", change.name)
        values["name"] = change.name
    if change.scopes is not None:
        values["scopes"] = scopes_text(_within(maker, change.scopes))
    if change.expires_at_ms is not None:
        values["expires_at_ms"] = _future(change.expires_at_ms)
    if change.cache is not None:
        values["cache"] = change.cache
    with accounts.database.write() as connection:
        key = _key(connection, key_id, owner)
        if key.revoked_at_ms is not None:
            raise RequestError("conflict", f"the key {key_id} is revoked", "make another one")
        if "expires_at_ms" in values:
            _not_longer(connection, maker, values["expires_at_ms"])
        elif _widens(key, values):
            _not_longer(connection, maker, key.expires_at_ms or _NEVER_MS)
        if values:
            connection.execute(sa.update(api_keys).where(api_keys.c.id == key_id).values(**values))
        actor = audit.actor_of(maker)
        audit.record(connection, actor, "key.changed", key_id, owner_id=key.user_id, detail=values)
        return _key(connection, key_id, owner)


def end_key(accounts: Accounts, actor: Actor, key_id: str, owner: str | None) -> ApiKey:
    """Revoke a key; again changes nothing. Raises ApiError ``not_found``."""
    with accounts.database.write() as connection:
        key = _key(connection, key_id, owner)
        if key.revoked_at_ms is None:
            query = sa.update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at_ms.is_(None))
            connection.execute(query.values(revoked_at_ms=now_ms()))
            audit.record(connection, actor, "key.revoked", key_id, owner_id=key.user_id)
        return _key(connection, key_id, owner)


def _key(connection: sa.Connection, key_id: str, owner: str | None) -> ApiKey:
    row = connection.execute(sa.select(*_KEY_COLUMNS).where(api_keys.c.id == key_id)).mappings().first()
    if row is None or owner not in (None, row["user_id"]):
        raise ApiError("not_found", f"there is no key {key_id!r:.80}", public_code="not_found")
    return ApiKey(**row)


def _within(maker: Principal, scopes: Collection[str]) -> Collection[str]:
    """The scopes of a key that its maker may make. Without scopes a key has all of its maker's."""
    allowed: Mapping[str, bool] = {
        each: reach_of(maker.role, each, maker.scopes) is not Reach.NONE for each in PERMISSIONS
    }
    for scope in scopes:
        if not allowed.get(scope, True):
            raise ApiError("forbidden", f"a key cannot have {scope}, which who makes it has not", "ask an admin")
    return scopes or maker.scopes


def _not_longer(connection: sa.Connection, maker: Principal, expires_at_ms: int | None) -> int | None:
    """When a key ends that is made, or changed, with a key: not after that one. Raises RequestError ``forbidden``."""
    if maker.key_id is None:
        return expires_at_ms
    query = sa.select(api_keys.c.expires_at_ms).where(api_keys.c.id == maker.key_id)
    latest: int | None = connection.execute(query).scalar()
    if latest is None:
        return expires_at_ms
    if expires_at_ms is not None and expires_at_ms > latest:
        raise ApiError("forbidden", "a key cannot live longer than the one it is made with", param="expires_at_ms")
    return latest if expires_at_ms is None else expires_at_ms


def _widens(key: ApiKey, values: Mapping[str, Any]) -> bool:
    """Whether a change gives a key scopes that it had not. A key without any has all of its user's role."""
    before, after = set(key.scopes.split()), set(values.get("scopes", key.scopes).split())
    return bool(before) and not (after and after <= before)


def _future(expires_at_ms: int | None) -> int | None:
    if expires_at_ms is not None and expires_at_ms <= now_ms():
        hint = "give unix milliseconds"
        raise RequestError("invalid_request", "expires_at_ms is over already", hint, param="expires_at_ms")
    return expires_at_ms
