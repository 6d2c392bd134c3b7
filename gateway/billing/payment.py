"""Money that comes in: top-ups by an admin, and payments that another service reports, signed with a shared secret.

The header ``x-rios-signature: t=UNIX_SECONDS,v1=HEX`` carries HMAC-SHA256 of ``t``, a dot and the body. Several ``v1``
may stand in it while a secret is changed. A report is believed for ``TOLERANCE_S`` and counts once, by its id.
"""

import hashlib
import hmac
import os
import re
import stat
from pathlib import Path

import sqlalchemy as sa

from config.errors import ConfigError
from gateway import audit, books
from gateway.audit import Actor
from gateway.db import stamps
from gateway.db.models import accounts, postings, transactions
from gateway.db.session import Database
from gateway.errors import ApiError

HEADER = "x-rios-signature"
ENVIRONMENT = "RIOS_PAYMENT_SECRET"
TOLERANCE_S = 300
_SECRET_BYTES_MIN = 16
_HEADER_CHARACTERS_MAX = 1024
_PART = re.compile(r"(t|v1)=([0-9A-Fa-f]{1,64})")
_PROVIDER = Actor("", "payment webhook")


def sign(secret: bytes, timestamp: int, body: bytes) -> str:
    """The header's value, as the sender makes it."""
    return f"t={timestamp},v1={_digest(secret, str(timestamp), body)}"


def check(secret: bytes, header: str, body: bytes, now_s: int) -> None:
    """Raises ApiError ``unauthenticated`` for a signature that is wrong or too old."""
    parts = [_PART.fullmatch(each.strip()) for each in header[:_HEADER_CHARACTERS_MAX].split(",")]
    found = [(match[1], match[2]) for match in parts if match is not None]
    times = [value for name, value in found if name == "t" and value.isdecimal()]
    if len(times) != 1:
        raise ApiError("unauthenticated", f"{HEADER} must be t=SECONDS,v1=HMAC", "sign the report", status=401)
    wanted = _digest(secret, times[0], body)
    matches = [hmac.compare_digest(wanted, value.lower()) for name, value in found if name == "v1"]
    if not any(matches):
        raise ApiError("unauthenticated", "the signature is wrong", "compare the secrets of both sides", status=401)
    if abs(now_s - int(times[0])) > TOLERANCE_S:
        raise ApiError("unauthenticated", f"the signature is more than {TOLERANCE_S} s off", "sign it anew", status=401)


def read_secret(file: str) -> bytes:
    """The secret from the environment, or from a file that only its owner reads; empty: none, nothing is believed.

    Raises ConfigError."""
    text = os.environ.get(ENVIRONMENT, "").encode() or (_from_file(Path(file)) if file else b"")
    if text and len(text) < _SECRET_BYTES_MIN:
        hint = "make one: openssl rand -hex 32"
        raise ConfigError("config", f"the payment secret has less than {_SECRET_BYTES_MIN} bytes", hint)
    return text


def top_up(database: Database, actor: Actor, user_id: str, microcredits: int, reference: str) -> str:
    """Pay into a user's account; the transaction. A reference counts once (empty: a fresh one).

    Raises ApiError ``not_found``, ``conflict``.
    """
    reference = reference or stamps.new_id()
    try:
        with database.write() as connection:
            name = books.post_credit(connection, _account_of(connection, user_id), microcredits, reference)
            detail = {"microcredits": microcredits, "reference": reference}
            audit.record(connection, actor, "credit.booked", name, owner_id=user_id, detail=detail)
            return name
    except sa.exc.IntegrityError as error:
        hint = "use another reference for another top-up"
        raise ApiError("conflict", f"a credit with reference {reference!r:.80} was already booked", hint) from error


def book(database: Database, event_id: str, user_id: str, microcredits: int) -> tuple[str, bool]:
    """Pay into a user's account: the transaction, and whether it is new.

    Raises ApiError ``not_found``, or ``conflict`` if this id was booked for something else.
    """
    try:
        with database.write() as connection:
            account = _account_of(connection, user_id)
            name = books.post_credit(connection, account, microcredits, event_id, "payment")
            detail = {"microcredits": microcredits}
            audit.record(connection, _PROVIDER, "payment.booked", event_id, owner_id=user_id, detail=detail)
            return name, True
    except sa.exc.IntegrityError:
        return _booked(database, event_id, f"user:{user_id}", microcredits), False


def _account_of(connection: sa.Connection, user_id: str) -> str:
    account = connection.execute(sa.select(accounts.c.id).where(accounts.c.user_id == user_id)).scalar()
    if account is None:
        raise ApiError("not_found", f"there is no user {user_id!r:.80}", public_code="not_found")
    return str(account)


def _booked(database: Database, event_id: str, account_id: str, microcredits: int) -> str:
    query = (
        sa.select(transactions.c.id, postings.c.account_id, postings.c.amount)
        .join(postings, postings.c.transaction_id == transactions.c.id)
        .where(transactions.c.kind == "payment", transactions.c.reference == event_id, postings.c.amount > 0)
    )
    with database.read() as connection:
        row = connection.execute(query).one()
    if (row.account_id, row.amount) != (account_id, microcredits):
        hint = "give each payment an id of its own"
        raise ApiError("conflict", f"payment {event_id!r:.80} was booked with another user or amount", hint)
    return str(row.id)


def _digest(secret: bytes, timestamp: str, body: bytes) -> str:
    return hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def _from_file(path: Path) -> bytes:
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError("config", f"others can read {path}", f"chmod 600 {path}")
        return path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            "config", f"cannot read gateway.billing_payment_secret_file {path}: {error.strerror}"
        ) from error
