"""How often one may guess: counted per client address, per account (tightly from one address, loosely from all), and
per session, for all gateways of a database together.

The generic cell rate algorithm (ITU-T I.371): a subject's one number is the time at which all its attempts will have
been forgotten; each attempt moves it on by ``interval_ms``, and none is let through that would move it too far ahead.

Invariants:
1. An attempt is counted before it is looked at, so attempts at the same time cannot outrun the count; an attempt that
   succeeded is taken back, and takes no other back.
2. Who does not exist is counted like who does, with the same statements.
3. Guesses from elsewhere shut out nobody who comes from where they signed in lately (:func:`know`), or is signed in
   already: those are counted apart.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from gateway.address import neighbourhood
from gateway.db.identity import guesses
from gateway.db.session import Database
from gateway.db.stamps import now_ms
from gateway.errors import ApiError


@dataclass(frozen=True, slots=True)
class Allowance:
    """``burst`` attempts at once, and one more each ``interval_ms``."""

    burst: int
    interval_ms: int


ADDRESS = Allowance(burst=60, interval_ms=5_000)
HERE = Allowance(burst=10, interval_ms=120_000)
"""At an account, from one address."""
ACCOUNT = Allowance(burst=100, interval_ms=120_000)
"""At an account, from all addresses together that are not known for it."""
SESSION = Allowance(burst=10, interval_ms=120_000)
KNOWN_MAX = 16
"""Addresses that are known for an account: the newest."""
KNOWN_MS = 30 * 24 * 3600 * 1000

Counted = Sequence[tuple[str, Allowance]]
"""What an attempt was counted at."""

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

# A known address stands in the same table, until it is forgotten.
_KNOW = sa.text(
    "INSERT INTO guesses (subject, busy_until_ms) VALUES (:subject, :until) "
    "ON CONFLICT (subject) DO UPDATE SET busy_until_ms = excluded.busy_until_ms"
)


def count(database: Database, address: str, account: str = "", session: str = "") -> Counted:
    """Count an attempt from an address, at an account (any text that names it) or in a session.

    Raises ApiError ``rate_limited``; then nothing was counted.
    """
    now = now_ms()
    with database.write() as connection:
        counted = _subjects(connection, neighbourhood(address), account, session)
        for subject, allowance in counted:
            connection.execute(_MEET, {"subject": subject})
            latest = now + (allowance.burst - 1) * allowance.interval_ms
            values = {"name": subject, "latest": latest, "now": now, "step": allowance.interval_ms}
            if connection.execute(_COUNT, values).rowcount == 0:
                busy = sa.select(guesses.c.busy_until_ms).where(guesses.c.subject == subject)
                raise _too_many(connection.execute(busy).scalar_one() - latest)
    return counted


def take_back(database: Database, counted: Counted) -> None:
    """The attempt was no guess."""
    with database.write() as connection:
        for subject, allowance in counted:
            connection.execute(_TAKE_BACK, {"name": subject, "step": allowance.interval_ms})


def know(database: Database, address: str, account: str) -> None:
    """Somebody signed in to an account from an address: guesses from elsewhere do not count against them there."""
    name = _known(neighbourhood(address), account)
    with database.write() as connection:
        connection.execute(_KNOW, {"subject": name, "until": now_ms() + KNOWN_MS})
        theirs = sa.select(guesses.c.subject).where(guesses.c.subject.startswith(name.rpartition(":")[0]))
        newest_first = theirs.order_by(guesses.c.busy_until_ms.desc(), guesses.c.subject)
        if old := connection.execute(newest_first.offset(KNOWN_MAX)).scalars().all():
            connection.execute(sa.delete(guesses).where(guesses.c.subject.in_(old)))


def forget(database: Database) -> None:
    """Drop what says nothing any more."""
    with database.write() as connection:
        connection.execute(sa.delete(guesses).where(guesses.c.busy_until_ms < now_ms()))


def _subjects(connection: sa.Connection, place: str, account: str, session: str) -> Counted:
    # One of each kind and always in this order, so that two gateways lock in the same one. Hashed: what is typed into
    # an account's field is not always an account.
    named = [("address", place, ADDRESS), ("session", session, SESSION)]
    if account:
        known = guesses.c.subject == _known(place, account), guesses.c.busy_until_ms > now_ms()
        here, is_known = f"{place} {account}", connection.execute(sa.select(guesses.c.subject).where(*known)).first()
        named += [("here", here, HERE), ("account", here if is_known else account, ACCOUNT)]
    return [(f"{kind}:{_digest(text)}", allowance) for kind, text, allowance in named if text]


def _known(place: str, account: str) -> str:
    return f"known:{_digest(account)[:32]}:{_digest(place)[:32]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _too_many(wait_ms: int) -> ApiError:
    wait_ms = max(wait_ms, 1)
    hint = f"try again in {-(-wait_ms // 1000)} s"
    return ApiError("rate_limited", "there were too many attempts to sign in", hint, retry_after_ms=wait_ms)
