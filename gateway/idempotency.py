"""Idempotency keys in the accounts database: one key, one request, one answer, one bill.

Owns: who generates the answer of a key, with which seed and route, and the answer once there is one; and what a request
that makes a thing (a user, a key) made. Does not own: generating an answer (``gateway/openai/keyed.py``), charging it
(``gateway/books.py``, in the same transaction as the answer).

Blocking calls, made in threads.

Invariants:
1. A key is held by at most one gateway. Whoever takes it over from a dead one first gives that one's reservations back,
   in the same transaction, so at most one of them can charge.
2. Seed and route are durable before the first token: whoever generates again gives the same text.
3. Bounded: :data:`KEYS_MAX` keys and :data:`ANSWER_BYTES_MAX` of answers per account, for :data:`KEPT_MS`.

Fails with ApiError: 422 for another body under the same key, 409 while another gateway answers it, 429 for too many.
"""

import hashlib
import secrets
import zlib
from dataclasses import dataclass

import sqlalchemy as sa

from gateway import books
from gateway.books import ABANDONED_MS
from gateway.db.models import idempotency, reservations
from gateway.db.session import Database
from gateway.db.stamps import now_ms
from gateway.errors import ApiError

KEPT_MS = 24 * 3600 * 1000
KEYS_MAX = 20_000
ANSWER_BYTES_MAX = 256 << 20
EXPIRED_AT_ONCE = 500
EXPIRED_ROUNDS_MAX = 20
RETRY_AFTER_MS = 2_000
HEADER = "idempotency-key"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request under a key. ``id`` names account and key, ``body_sha256`` what is asked."""

    id: str
    account_id: str
    body_sha256: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer that was given already."""

    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Begun:
    """What to do about a key: give the ``stored`` answer, or generate it as ``holder`` with this seed and, if it was
    begun before, by this route."""

    holder: str
    seed: int
    route: str
    stored: Stored | None = None


def wanted(account_id: str, key: str, endpoint: str, body: bytes, privacy: str) -> Wanted:
    """The request that a key stands for."""
    name = hashlib.sha256(f"{account_id}\0{key}".encode()).hexdigest()
    asked = hashlib.sha256(b"\0".join((endpoint.encode(), privacy.encode(), body))).digest()
    return Wanted(name, account_id, asked)


def begin(database: Database, asked: Wanted, instance: str, seed: int) -> Begun:
    """Hold a key, durably, or find its answer. A new one gets ``seed``. Raises ApiError, LocalError."""
    holder, now = f"{instance}:{secrets.token_hex(12)}", database.now_ms()
    with database.write() as connection:
        books.lock_account(connection, asked.account_id)  # first of all, as every booking does
        row = _current(connection, asked.id, instance, now)
        if row is None:
            _check_room(connection, asked.account_id, now)
            connection.execute(sa.insert(idempotency), _row(asked, holder, seed, now))
            return Begun(holder, seed, "")
        if row["body_sha256"] != asked.body_sha256:
            raise reused()
        if row["status"]:
            body = zlib.decompress(row["answer"] or b"")
            return Begun("", row["seed"], row["route"], Stored(row["status"], row["content_type"], body))
        if _is_alive(connection, row, instance, now):
            raise in_progress()
        books.give_back(connection, asked.id, now)
        taken = sa.update(idempotency).where(idempotency.c.id == asked.id).values(holder=holder, updated_at_ms=now)
        connection.execute(taken)
        return Begun(holder, row["seed"], row["route"])


def release(database: Database, name: str, holder: str) -> None:
    """The answer did not come about: let go of the key. It is forgotten if nothing of the answer can have been seen,
    else the next one goes on with the same seed and route."""
    mine = sa.and_(idempotency.c.id == name, idempotency.c.holder == holder)
    with database.write() as connection:
        connection.execute(sa.delete(idempotency).where(mine, idempotency.c.route == ""))
        connection.execute(sa.update(idempotency).where(mine).values(holder=""))


def expire(database: Database) -> int:
    """Forget what is older than :data:`KEPT_MS`, some at a time; how many."""
    cutoff, count = database.now_ms() - KEPT_MS, 0
    old = sa.or_(
        sa.and_(idempotency.c.created_at_ms < cutoff, idempotency.c.holder == ""),
        idempotency.c.created_at_ms < cutoff - KEPT_MS,  # held by somebody who died and was never asked again
    )
    some = sa.select(idempotency.c.id).where(old).limit(EXPIRED_AT_ONCE).with_for_update(skip_locked=True)
    for _ in range(EXPIRED_ROUNDS_MAX):
        with database.write() as connection:
            names = list(connection.execute(some).scalars())
            if names:
                connection.execute(sa.delete(idempotency).where(idempotency.c.id.in_(names)))
        count += len(names)
        if len(names) < EXPIRED_AT_ONCE:
            break
    return count


def made_before(connection: sa.Connection, asked: Wanted) -> str:
    """The id of the thing that this request made already, in the transaction that would make it; empty: make it now.

    Raises ApiError for another request under the key.
    """
    books.lock_account(connection, asked.account_id)
    row = _current(connection, asked.id, "", now_ms())
    if row is None:
        return ""
    if row["body_sha256"] != asked.body_sha256:
        raise reused()
    return bytes(row["answer"]).decode()


def keep_made(connection: sa.Connection, asked: Wanted, thing_id: str) -> None:
    """Remember what was made, in the transaction of :func:`made_before`. Only its id: answers may hold secrets."""
    now = now_ms()
    _check_room(connection, asked.account_id, now)
    made = {"status": 201, "answer": thing_id.encode(), "answer_bytes": len(thing_id)}
    connection.execute(sa.insert(idempotency), {**_row(asked, "", 0, now), **made})


def reused() -> ApiError:
    """Another request under a key that stands for one already."""
    return ApiError(
        "conflict",
        "this idempotency key was used for another request",
        "use a new key for a new request; a retry sends the same body to the same path",
        param=HEADER,
        public_code="idempotency_key_reused",
        status=422,
    )


def in_progress() -> ApiError:
    """Another gateway answers it now."""
    return ApiError(
        "conflict",
        "a request with this idempotency key is being answered by another gateway",
        f"try again in {RETRY_AFTER_MS} ms",
        param=HEADER,
        public_code="idempotency_key_in_use",
        retry_after_ms=RETRY_AFTER_MS,
    )


def _current(connection: sa.Connection, name: str, instance: str, now: int) -> sa.RowMapping | None:
    """The key's row, unless its time is over and nobody works on it."""
    row = connection.execute(sa.select(idempotency).where(idempotency.c.id == name)).mappings().first()
    if row is None or row["created_at_ms"] > now - KEPT_MS or _is_alive(connection, row, instance, now):
        return row
    books.give_back(connection, name, now)
    connection.execute(sa.delete(idempotency).where(idempotency.c.id == name))
    return None


def _is_alive(connection: sa.Connection, row: sa.RowMapping, instance: str, now: int) -> bool:
    """Whether another gateway holds the key and was seen lately. What this one works on it knows without the row."""
    if not row["holder"] or row["holder"].startswith(f"{instance}:"):
        return False
    query = sa.select(sa.func.max(reservations.c.updated_at_ms)).where(reservations.c.idempotency_id == row["id"])
    seen = connection.execute(query).scalar() or 0
    return max(int(seen), int(row["updated_at_ms"])) >= now - ABANDONED_MS


def _check_room(connection: sa.Connection, account_id: str, now: int) -> None:
    mine = idempotency.c.account_id == account_id
    query = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(idempotency.c.answer_bytes), 0)).where(mine)
    count, size = connection.execute(query).one()
    if count < KEYS_MAX and size < ANSWER_BYTES_MAX:
        return
    oldest = connection.execute(sa.select(sa.func.min(idempotency.c.created_at_ms)).where(mine)).scalar() or now
    raise ApiError(
        "rate_limited",
        f"this account has {count} idempotency keys of the last 24 hours with {int(size) >> 20} MiB of answers, and "
        f"{KEYS_MAX} with {ANSWER_BYTES_MAX >> 20} MiB are kept",
        "leave the header out, or try again later",
        param=HEADER,
        retry_after_ms=max(1000, int(oldest) + KEPT_MS - now),
    )


def _row(asked: Wanted, holder: str, seed: int, now: int) -> dict[str, object]:
    return {
        "id": asked.id,
        "account_id": asked.account_id,
        "body_sha256": asked.body_sha256,
        "holder": holder,
        "seed": seed,
        "route": "",
        "status": 0,
        "content_type": "",
        "answer": None,
        "answer_bytes": 0,
        "created_at_ms": now,
        "updated_at_ms": now,
    }
