"""Users and their API keys, for the gateway and for the operator's command line alike.

Blocking calls. Works on the database alone, so users and keys can be managed while no gateway runs.

Invariants: a key's secret is shown once and stored only as its sha256; revoking is final; every user has one account.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sqlalchemy as sa

from config.errors import RequestError
from config.settings import GatewaySettings
from gateway import books
from gateway.db import stamps
from gateway.db.billing import key_limits
from gateway.db.migrate import migrate
from gateway.db.models import LOCAL_USER, accounts, api_keys, usages, users
from gateway.db.session import Database, open_database
from gateway.money import EMBEDDED
from gateway.roles import PERMISSIONS, Role

_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
_EMAIL = re.compile(r"[^\s@\x00-\x1f\x7f]+@[^\s@\x00-\x1f\x7f]+")
_EMAIL_CHARACTERS_MAX = 254
_SECRET_BYTES = 32
_CLOCKS_APART_MS = 3_600_000
_KEY_LIMITS = [
    sa.func.coalesce(key_limits.c[name], 0).label(name) for name in ("requests_per_minute", "tokens_per_minute")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Somebody who uses the API."""

    id: str
    name: str
    disabled: bool
    created_at_ms: int
    role: Role = "developer"
    email: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key, without its secret. ``revoked_at_ms`` is None while it works."""

    id: str
    user_id: str
    name: str
    created_at_ms: int
    revoked_at_ms: int | None
    scopes: str = ""
    """Permissions between spaces; empty: all that the user's role has."""
    expires_at_ms: int | None = None
    cache: bool = False
    """What was answered before may answer its requests again, without their asking for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key just made. ``secret`` is what the client sends; it cannot be shown again."""

    key: ApiKey
    secret: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Microcredits: all, and what running requests hold back of it."""

    balance: int
    reserved: int

    @property
    def available(self) -> int:
        """What a new request may use."""
        return self.balance - self.reserved


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """One request, settled."""

    id: str
    request_id: str
    key_id: str | None
    endpoint: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    microcredits: int
    outcome: str
    created_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who a request belongs to. ``key_id`` is None for requests without a key."""

    user_id: str
    user_name: str
    account_id: str
    key_id: str | None
    disabled: bool = False
    role: Role = "developer"
    scopes: frozenset[str] = frozenset()
    """Narrow what the role allows; empty: not at all."""
    session_id: str = ""
    """Of a user who signed in; empty for keys."""
    signer_id: str = ""
    """The signing key of the access token that was shown; empty for keys and cookies."""
    token_ends_at_ms: int | None = None
    """When that access token ends."""
    requests_per_minute: int = 0
    """The key's own limit; 0: the gateway's."""
    tokens_per_minute: int = 0
    cache: bool = False
    """As the key's."""


LOCAL = Principal(user_id=LOCAL_USER, user_name=LOCAL_USER, account_id=f"user:{LOCAL_USER}", key_id=None)


class Accounts:
    """Users, keys and balances of one database."""

    def __init__(self, database: Database, *, starting_balance: int = 0) -> None:
        self.database = database
        self._starting_balance = starting_balance

    def create_user(self, name: str, *, role: Role = "developer", email: str | None = None) -> User:
        """Add a user with the starting balance. Raises RequestError ``conflict`` if name or e-mail is taken."""
        with self.adding_user(name, email) as (connection, user):
            return self.insert_user(connection, replace(user, role=role))

    @contextmanager
    def adding_user(self, name: str, email: str | None) -> Iterator[tuple[sa.Connection, User]]:
        """A transaction, and a user of that name to :meth:`insert_user` in it. Raises as :meth:`create_user`."""
        check_name("user", name)
        email = None if email is None else normal_email(email)
        try:
            with self.database.write() as connection:
                user = User(id=stamps.new_id(), name=name, disabled=False, created_at_ms=stamps.now_ms(), email=email)
                yield connection, user
        except sa.exc.IntegrityError as error:
            raise name_taken(name, email) from error

    def insert_user(self, connection: sa.Connection, user: User) -> User:
        """A user with an account and the starting balance, in an open transaction."""
        account_id = f"user:{user.id}"
        connection.execute(sa.insert(users), asdict(user))
        connection.execute(sa.insert(accounts), {"id": account_id, "user_id": user.id, "balance": 0, "reserved": 0})
        if self._starting_balance:
            books.post_credit(connection, account_id, self._starting_balance, f"start:{user.id}")
        return user

    def list_users(self) -> Sequence[User]:
        """All users, oldest first, the built-in local user included."""
        with self.database.read() as connection:
            rows = connection.execute(sa.select(users).order_by(users.c.created_at_ms, users.c.id)).mappings()
            return [User(**row) for row in rows]

    def set_disabled(self, user: str, disabled: bool) -> None:
        """Shut a user out, or let them in again. Running gateways follow within seconds."""
        found = self.find_user(user)
        with self.database.write() as connection:
            connection.execute(sa.update(users).where(users.c.id == found.id).values(disabled=disabled))

    def find_user(self, user: str) -> User:
        """By id or name. Raises RequestError ``not_found``."""
        query = sa.select(users).where(sa.or_(users.c.id == user, users.c.name == user))
        with self.database.read() as connection:
            rows = connection.execute(query).mappings().all()
        # A name may look like another user's id; the id wins.
        for row in sorted(rows, key=lambda row: row["id"] != user):
            return User(**row)
        raise RequestError("not_found", f"there is no user {user!r}", "list the users to see their names")

    def create_key(
        self, user: str, name: str = "", *, scopes: Collection[str] = (), expires_at_ms: int | None = None
    ) -> NewKey:
        """Make a key for a user (id or name). Raises RequestError for a scope that is no permission."""
        made = new_key(self.find_user(user).id, name, scopes, expires_at_ms)
        with self.database.write() as connection:
            insert_key(connection, made)
        return made

    def list_keys(self, user: str | None = None) -> Sequence[ApiKey]:
        """The keys of a user (id or name), or all; revoked ones included."""
        columns = (c for c in api_keys.c if c.name != "secret_sha256")
        query = sa.select(*columns).order_by(api_keys.c.created_at_ms, api_keys.c.id)
        if user is not None:
            query = query.where(api_keys.c.user_id == self.find_user(user).id)
        with self.database.read() as connection:
            return [ApiKey(**row) for row in connection.execute(query).mappings()]

    def revoke_key(self, key_id: str) -> None:
        """End a key; running gateways follow within seconds. Revoking again changes nothing.

        Raises RequestError ``not_found``.
        """
        active = sa.and_(api_keys.c.id == key_id, api_keys.c.revoked_at_ms.is_(None))
        with self.database.write() as connection:
            known = connection.execute(sa.select(api_keys.c.id).where(api_keys.c.id == key_id)).first()
            connection.execute(sa.update(api_keys).where(active).values(revoked_at_ms=stamps.now_ms()))
        if known is None:
            raise RequestError("not_found", f"there is no key {key_id!r}", "list the keys to see their ids")

    def authenticate(self, key_id: str, digest: bytes) -> Principal | None:
        """Whose key this is, or None if it is unknown, revoked, expired or its secret is wrong."""
        query = (
            sa.select(
                api_keys.c.secret_sha256,
                api_keys.c.scopes,
                api_keys.c.expires_at_ms,
                api_keys.c.cache,
                users.c.id,
                users.c.name,
                users.c.role,
                users.c.disabled,
                accounts.c.id.label("account_id"),
                *_KEY_LIMITS,
            )
            .join(users, users.c.id == api_keys.c.user_id)
            .join(accounts, accounts.c.user_id == users.c.id)
            .outerjoin(key_limits, key_limits.c.key_id == api_keys.c.id)
            .where(api_keys.c.id == key_id, api_keys.c.revoked_at_ms.is_(None))
        )
        with self.database.read() as connection:
            row = connection.execute(query).first()
        if row is None or not hmac.compare_digest(row.secret_sha256, digest):
            return None
        if row.expires_at_ms is not None and row.expires_at_ms <= stamps.now_ms():
            return None
        return Principal(
            user_id=row.id,
            user_name=row.name,
            disabled=row.disabled,
            account_id=row.account_id,
            key_id=key_id,
            role=row.role,
            scopes=frozenset(row.scopes.split()),
            requests_per_minute=row.requests_per_minute,
            tokens_per_minute=row.tokens_per_minute,
            cache=row.cache,
        )

    def principal_of(self, user_id: str, key_id: str | None) -> Principal | None:
        """A user as who something runs that they began, with the rights of their key; None if that key has ended."""
        query = (
            sa.select(users.c.id, users.c.name, users.c.role, users.c.disabled, accounts.c.id.label("account_id"))
            .join(accounts, accounts.c.user_id == users.c.id)
            .where(users.c.id == user_id)
        )
        live = sa.or_(api_keys.c.expires_at_ms.is_(None), api_keys.c.expires_at_ms > stamps.now_ms())
        of_key = (
            sa.select(api_keys.c.scopes, *_KEY_LIMITS)
            .outerjoin(key_limits, key_limits.c.key_id == api_keys.c.id)
            .where(api_keys.c.id == key_id, api_keys.c.revoked_at_ms.is_(None), live)
        )
        with self.database.read() as connection:
            row = connection.execute(query).first()
            key = ("", 0, 0) if key_id is None else connection.execute(of_key).first()
        if row is None or key is None:
            return None
        scopes, requests_per_minute, tokens_per_minute = key
        return Principal(
            user_id=row.id,
            user_name=row.name,
            disabled=row.disabled,
            account_id=row.account_id,
            key_id=key_id,
            role=row.role,
            scopes=frozenset(scopes.split()),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )

    def has_usage(self, user_id: str, request_id: str, since_ms: int) -> bool:
        """Whether a request for vectors of this user was settled under this id. ``since_ms`` is of some host's clock,
        and usage has the database's."""
        mine = usages.c.user_id == user_id, usages.c.created_at_ms >= since_ms - _CLOCKS_APART_MS
        paid = *mine, usages.c.request_id == request_id, usages.c.outcome == EMBEDDED
        with self.database.read() as connection:
            return connection.execute(sa.select(usages.c.id).where(*paid).limit(1)).first() is not None

    def credit(self, user: str, microcredits: int, reference: str = "") -> Balance:
        """Pay into a user's account. ``reference`` (e.g. of a payment) counts once; empty: a fresh one."""
        owner = self.find_user(user)
        books.credit(self.database, f"user:{owner.id}", microcredits, reference or stamps.new_id())
        return self.balance(owner.id)

    def balance(self, user: str) -> Balance:
        """A user's money (id or name)."""
        owner = self.find_user(user)
        query = sa.select(accounts.c.balance, accounts.c.reserved).where(accounts.c.user_id == owner.id)
        with self.database.read() as connection:
            balance, reserved = connection.execute(query).one()
        return Balance(balance=balance, reserved=reserved)

    def usage(self, user: str, *, limit: int = 100, before: str = "") -> Sequence[Usage]:
        """A user's settled requests, newest first; ``before`` (a usage id) goes on from an earlier page."""
        names = [field.name for field in Usage.__dataclass_fields__.values()]
        query = sa.select(*(usages.c[name] for name in names)).where(usages.c.user_id == self.find_user(user).id)
        if before:
            query = query.where(usages.c.id < before)
        with self.database.read() as connection:
            rows = connection.execute(query.order_by(usages.c.id.desc()).limit(limit)).mappings()
            return [Usage(**row) for row in rows]


@contextmanager
def open_accounts(settings: GatewaySettings, data_dir: Path) -> Iterator[Accounts]:
    """The accounts of a data folder (or of the settings' PostgreSQL), schema brought up to date. Blocking."""
    database = open_database(settings.database, data_dir)
    try:
        migrate(database)
        yield Accounts(database, starting_balance=settings.starting_balance)
    finally:
        database.close()


def new_key(user_id: str, name: str, scopes: Collection[str], expires_at_ms: int | None) -> NewKey:
    """A key that is not in the database yet. Raises RequestError for a bad name or scope."""
    if name:
        check_name("key", name)
    key_id = secrets.token_hex(8)
    text = base64.urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).rstrip(b"=").decode("ascii")
    key = ApiKey(
        id=key_id,
        user_id=user_id,
        name=name,
        created_at_ms=stamps.now_ms(),
        revoked_at_ms=None,
        scopes=scopes_text(scopes),
        expires_at_ms=expires_at_ms,
    )
    return NewKey(key=key, secret=f"rios_{key_id}_{text}")


def insert_key(connection: sa.Connection, made: NewKey) -> None:
    """Put a new key into the database, in an open transaction."""
    connection.execute(sa.insert(api_keys), {**asdict(made.key), "secret_sha256": digest_of(made.secret)})


def name_taken(name: str, email: str | None) -> RequestError:
    """What to say to who wants a name or an e-mail address that another user has."""
    taken = f"there is already a user {name!r}" + (f", or one with the e-mail {email!r}" if email else "")
    return RequestError("conflict", taken, "choose another name")


def digest_of(secret: str) -> bytes:
    """What is stored of a key. It has 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def normal_email(email: str) -> str:
    """An e-mail address in the one form that is stored and looked for. Raises RequestError ``invalid_request``."""
    text = email.strip().casefold()
    if len(text) > _EMAIL_CHARACTERS_MAX or not _EMAIL.fullmatch(text):
        raise RequestError("invalid_request", f"{email!r:.80} is not an e-mail address", param="email")
    return text


def scopes_text(scopes: Collection[str]) -> str:
    """Scopes as they are stored. Raises RequestError for one that is no permission."""
    for scope in scopes:
        if scope not in PERMISSIONS:
            raise RequestError("invalid_request", f"{scope!r:.60} is no scope", f"scopes are {', '.join(PERMISSIONS)}")
    return " ".join(sorted(set(scopes)))


def check_name(kind: str, name: str) -> None:
    """Raises RequestError for a name that is none."""
    if not _NAME.fullmatch(name):
        raise RequestError("invalid_request", f"a {kind} name has 1 to 200 characters, none of them control characters")
