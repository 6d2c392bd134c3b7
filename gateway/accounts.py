"""Users and their API keys, for the gateway and for the operator's command line alike.

Blocking calls. Works on the database alone, so users and keys can be managed while no gateway runs.

Invariants: a key's secret is shown once and stored only as its sha256; revoking is final; every user has one account.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from config.errors import RequestError
from config.settings import GatewaySettings
from gateway import books
from gateway.db.migrate import migrate
from gateway.db.models import LOCAL_USER, accounts, api_keys, usages, users
from gateway.db.session import Database, open_database

_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Somebody who uses the API."""

    id: str
    name: str
    disabled: bool
    created_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key, without its secret. ``revoked_at_ms`` is None while it works."""

    id: str
    user_id: str
    name: str
    created_at_ms: int
    revoked_at_ms: int | None


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


LOCAL = Principal(user_id=LOCAL_USER, user_name=LOCAL_USER, account_id=f"user:{LOCAL_USER}", key_id=None)


class Accounts:
    """Users, keys and balances of one database."""

    def __init__(self, database: Database, *, starting_balance: int = 0) -> None:
        self.database = database
        self._starting_balance = starting_balance

    def create_user(self, name: str) -> User:
        """Add a user with the starting balance. Raises RequestError ``conflict`` if the name is taken."""
        _check_name("user", name)
        user = User(id=books.new_id(), name=name, disabled=False, created_at_ms=books.now_ms())
        account_id = f"user:{user.id}"
        try:
            with self.database.write() as connection:
                row = {"id": user.id, "name": name, "disabled": False, "created_at_ms": user.created_at_ms}
                connection.execute(sa.insert(users), row)
                account = {"id": account_id, "user_id": user.id, "balance": 0, "reserved": 0}
                connection.execute(sa.insert(accounts), account)
                if self._starting_balance:
                    books.post_credit(connection, account_id, self._starting_balance, f"start:{user.id}")
        except sa.exc.IntegrityError as error:
            raise RequestError("conflict", f"there is already a user {name!r}", "choose another name") from error
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

    def create_key(self, user: str, name: str = "") -> NewKey:
        """Make a key for a user (id or name)."""
        if name:
            _check_name("key", name)
        owner = self.find_user(user)
        key_id = secrets.token_hex(8)
        text = base64.urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).rstrip(b"=").decode("ascii")
        secret = f"rios_{key_id}_{text}"
        key = ApiKey(id=key_id, user_id=owner.id, name=name, created_at_ms=books.now_ms(), revoked_at_ms=None)
        row = {
            "id": key_id,
            "user_id": owner.id,
            "name": name,
            "secret_sha256": digest_of(secret),
            "created_at_ms": key.created_at_ms,
        }
        with self.database.write() as connection:
            connection.execute(sa.insert(api_keys), row)
        return NewKey(key=key, secret=secret)

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
            connection.execute(sa.update(api_keys).where(active).values(revoked_at_ms=books.now_ms()))
        if known is None:
            raise RequestError("not_found", f"there is no key {key_id!r}", "list the keys to see their ids")

    def authenticate(self, key_id: str, digest: bytes) -> Principal | None:
        """Whose key this is, or None if it is unknown, revoked or its secret is wrong."""
        query = (
            sa.select(api_keys.c.secret_sha256, users.c.id, users.c.name, users.c.disabled, accounts.c.id)
            .join(users, users.c.id == api_keys.c.user_id)
            .join(accounts, accounts.c.user_id == users.c.id)
            .where(api_keys.c.id == key_id, api_keys.c.revoked_at_ms.is_(None))
        )
        with self.database.read() as connection:
            row = connection.execute(query).first()
        if row is None or not hmac.compare_digest(row[0], digest):
            return None
        return Principal(user_id=row[1], user_name=row[2], disabled=row[3], account_id=row[4], key_id=key_id)

    def credit(self, user: str, microcredits: int, reference: str = "") -> Balance:
        """Pay into a user's account. ``reference`` (e.g. of a payment) counts once; empty: a fresh one."""
        owner = self.find_user(user)
        books.credit(self.database, f"user:{owner.id}", microcredits, reference or books.new_id())
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


def digest_of(secret: str) -> bytes:
    """What is stored of a key. It has 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _check_name(kind: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise RequestError("invalid_request", f"a {kind} name has 1 to 200 characters, none of them control characters")
