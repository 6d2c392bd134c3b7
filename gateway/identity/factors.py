"""The second factor: time-based one-time passwords (RFC 6238) and recovery codes.

Blocking calls. Invariants: a time step is used once, and none before it afterwards; a recovery code works once; a
factor counts from its first right code on, so nobody locks themselves out; secrets are stored sealed, codes as sha256.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from config.errors import RequestError
from gateway import audit
from gateway.audit import Actor
from gateway.db.identity import recovery_codes, second_factors
from gateway.db.session import Database
from gateway.db.stamps import now_ms
from gateway.identity.vault import Vault

STEP_SECONDS = 30
_STEPS_OFF = 1
"""Clocks may be wrong by so many steps either way."""
_RECOVERY_CODES = 10
_RECOVERY_BYTES = 10
_ISSUER = "RiOS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """What an authenticator needs; shown once."""

    secret: str
    uri: str


def enrol(database: Database, vault: Vault, user_id: str, label: str) -> Enrolment:
    """Begin (or begin anew) to set a factor up. Raises RequestError ``conflict`` if one works already."""
    import pyotp  # noqa: PLC0415 - few requests need it

    secret = pyotp.random_base32()
    row = {
        "user_id": user_id,
        "secret": vault.seal(secret.encode("ascii"), _purpose(user_id)),
        "confirmed_at_ms": None,
        "last_step": 0,
    }
    with database.write() as connection:
        pending = sa.and_(second_factors.c.user_id == user_id, second_factors.c.confirmed_at_ms.is_(None))
        connection.execute(sa.delete(second_factors).where(pending))
        known = sa.select(second_factors.c.user_id).where(second_factors.c.user_id == user_id)
        if connection.execute(known).first() is not None:
            raise RequestError("conflict", "there is a second factor already", "disable it first")
        connection.execute(sa.insert(second_factors), row)
    return Enrolment(secret=secret, uri=pyotp.TOTP(secret).provisioning_uri(name=label, issuer_name=_ISSUER))


def confirm(database: Database, vault: Vault, actor: Actor, user_id: str, code: str) -> Sequence[str] | None:
    """Switch the factor on with its first code, which is used up by that. The recovery codes, or None: a wrong code.

    Raises RequestError ``conflict`` if there is nothing to confirm.
    """
    seen, step = _step_of(database, vault, user_id, code)
    if seen is None or seen.confirmed_at_ms is not None:
        raise RequestError("conflict", "there is no second factor to confirm", "enrol one first")
    if step is None:
        return None
    codes = [_recovery_code() for _ in range(_RECOVERY_CODES)]
    pending = sa.and_(_same(user_id, seen), second_factors.c.confirmed_at_ms.is_(None))
    with database.write() as connection:
        switched = sa.update(second_factors).where(pending).values(confirmed_at_ms=now_ms(), last_step=step)
        if connection.execute(switched).rowcount == 0:
            raise RequestError("conflict", "the second factor was confirmed, or enrolled anew, meanwhile")
        connection.execute(sa.delete(recovery_codes).where(recovery_codes.c.user_id == user_id))
        rows = [{"user_id": user_id, "code_sha256": _digest(user_id, each)} for each in codes]
        connection.execute(sa.insert(recovery_codes), rows)
        audit.record(connection, actor, "second_factor.enabled", user_id, owner_id=user_id)
    return codes


def use(database: Database, vault: Vault, user_id: str, code: str) -> bool:
    """Whether it is a code of the factor, or a recovery code; either is used up by that."""
    if not _is_totp(code):
        mine = recovery_codes.c.user_id == user_id, recovery_codes.c.code_sha256 == _digest(user_id, code)
        with database.write() as connection:
            return connection.execute(sa.delete(recovery_codes).where(*mine)).rowcount == 1
    seen, step = _step_of(database, vault, user_id, code)
    if seen is None or step is None or seen.confirmed_at_ms is None:
        return False
    fresh = sa.and_(_same(user_id, seen), second_factors.c.last_step < step)
    with database.write() as connection:
        return connection.execute(sa.update(second_factors).where(fresh).values(last_step=step)).rowcount == 1


def remove(database: Database, actor: Actor, user_id: str) -> bool:
    """Switch the second factor off; whether there was one."""
    with database.write() as connection:
        connection.execute(sa.delete(recovery_codes).where(recovery_codes.c.user_id == user_id))
        mine = second_factors.c.user_id == user_id
        removed = connection.execute(sa.delete(second_factors).where(mine)).rowcount == 1
        if removed:
            audit.record(connection, actor, "second_factor.disabled", user_id, owner_id=user_id)
        return removed


def _same(user_id: str, seen: sa.Row[Any, Any]) -> sa.ColumnElement[bool]:
    """Still the factor that a code was compared with: another one, enrolled meanwhile, has another secret."""
    return sa.and_(second_factors.c.user_id == user_id, second_factors.c.secret == seen.secret)


def _step_of(database: Database, vault: Vault, user_id: str, code: str) -> tuple[sa.Row[Any, Any] | None, int | None]:
    """The factor (None: there is none), and the time step that a code is of (None: of none near now)."""
    import pyotp  # noqa: PLC0415

    query = sa.select(second_factors.c.secret, second_factors.c.confirmed_at_ms)
    with database.read() as connection:
        row = connection.execute(query.where(second_factors.c.user_id == user_id)).first()
    if row is None:
        return None, None
    totp = pyotp.TOTP(vault.unseal(row.secret, _purpose(user_id)).decode("ascii"))
    now, found = now_ms() // (1000 * STEP_SECONDS), None
    for step in range(now - _STEPS_OFF, now + _STEPS_OFF + 1):
        if _is_totp(code) and hmac.compare_digest(totp.generate_otp(step), code):
            found = step
    return row, found


def _is_totp(code: str) -> bool:
    return len(code) == 6 and code.isascii() and code.isdecimal()


def _purpose(user_id: str) -> str:
    return f"totp:{user_id}"


def _recovery_code() -> str:
    text = base64.b32encode(secrets.token_bytes(_RECOVERY_BYTES)).decode("ascii").lower()
    return "-".join(text[start : start + 4] for start in range(0, len(text), 4))


def _digest(user_id: str, code: str) -> bytes:
    """It has 80 random bits, so a plain hash is enough."""
    typed = "".join(code.split()).replace("-", "").lower()
    return hashlib.sha256(f"{user_id}:{typed}".encode("utf-8", "surrogatepass")).digest()
