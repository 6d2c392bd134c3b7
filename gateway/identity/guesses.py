"""How often one may guess: counted per account and per client address, for all gateways of a database together.

The generic cell rate algorithm (ITU-T I.371): a subject's one number is the time at which all its attempts will have
been forgotten; each attempt moves it on by ``interval_ms``, and none is let through that would move it too far ahead.

Invariants: an attempt is counted before it is looked at, so attempts at the same time cannot outrun the count; who
does not exist is counted like who does; an attempt that succeeded is taken back, and takes no other back.
"""

import hashlib
from dataclasses import dataclass

import sqlalchemy as sa

from gateway.address import neighbourhood
from gateway.books import now_ms
from gateway.db.identity import guesses
from gateway.db.session import Database
from gateway.errors import ApiError


@dataclass(frozen=True, slots=True)
class Allowance:
    """``burst`` attempts at once, and one more each ``interval_ms``."""

    burst: int
    interval_ms: int


ACCOUNT = Allowance(burst=10, interval_ms=120_000)
ADDRESS = Allowance(burst=60, interval_ms=5_000)

# Both databases know this form.
_MEET = sa.text("INSERT INTO guesses (subject, busy_until_ms) VALUES (:subject, 0) ON CONFLICT (subject) DO NOTHING")
_NOW = sa.bindparam("now", type_=sa.BigInteger)
_BUSY = sa.case((guesses.c.busy_until_ms > _NOW, guesses.c.busy_until_ms), else_=_NOW)
_COUNT = (
    sa.update(guesses)
    .where(guesses.c.subject == sa.bindparam("name"), guesses.c.busy_until_ms <= sa.bindparam("latest"))
    .values(busy_until_ms=_BUSY + sa.bindparam("step", type_=sa.BigInteger))
)
_TAKE_BACK = (
    sa.update(guesses)
    .where(guesses.c.subject == sa.bindparam("name"))
    .values(busy_until_ms=guesses.c.busy_until_ms - sa.bindparam("step"))
)


def count(database: Database, address: str, account: str) -> None:
    """Count an attempt from an address at an account (any text that names it; empty: only the address).

    Raises ApiError ``rate_limited``; then nothing was counted.
    """
    now = now_ms()
    with database.write() as connection:
        # Addresses first, so that two gateways lock in the same order.
        for subject, allowance in _subjects(address, account):
            connection.execute(_MEET, {"subject": subject})
            latest = now + (allowance.burst - 1) * allowance.interval_ms
            values = {"name": subject, "latest": latest, "now": now, "step": allowance.interval_ms}
            if connection.execute(_COUNT, values).rowcount == 0:
                busy = sa.select(guesses.c.busy_until_ms).where(guesses.c.subject == subject)
                raise _too_many(connection.execute(busy).scalar_one() - latest)


def take_back(database: Database, address: str, account: str) -> None:
    """The attempt was no guess."""
    with database.write() as connection:
        for subject, allowance in _subjects(address, account):
            connection.execute(_TAKE_BACK, {"name": subject, "step": allowance.interval_ms})


def forget(database: Database) -> None:
    """Drop what says nothing any more."""
    with database.write() as connection:
        connection.execute(sa.delete(guesses).where(guesses.c.busy_until_ms < now_ms()))


def _subjects(address: str, account: str) -> list[tuple[str, Allowance]]:
    # Hashed: what is typed into an account's field is not always an account.
    named = [("address", neighbourhood(address), ADDRESS), ("account", account, ACCOUNT)]
    return [(f"{kind}:{_digest(text)}", allowance) for kind, text, allowance in named if text]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _too_many(wait_ms: int) -> ApiError:
    wait_ms = max(wait_ms, 1)
    hint = f"try again in {-(-wait_ms // 1000)} s"
    return ApiError("rate_limited", "there were too many attempts to sign in", hint, retry_after_ms=wait_ms)
