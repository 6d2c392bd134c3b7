"""The double-entry books in the accounts database: reserve, settle, recover, credit.

Blocking calls, made in threads. Owns every statement that changes a balance.

Invariants:
1. Every change of a balance is a transaction whose postings add up to 0, written in the same database transaction.
2. Account rows are locked in the order of their ids, and the revenue account last, so gateways cannot deadlock.
3. A reservation is settled once: whoever finds its row gone does nothing.
4. The answer to a request under an idempotency key is kept in the transaction that charges it, and only by its holder.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from config.errors import LocalError, RequestError
from gateway.db.models import FUNDING, REVENUE, accounts, idempotency, postings, reservations, transactions, usages
from gateway.db.session import Database
from gateway.money import Closing, Prices, Progress, Refused, Reservation, Settlement

ABANDONED_MS = 30_000
"""A reservation of another gateway that was not touched for this long belongs to nobody any more."""
_SWEEP_ROWS_MAX = 500
_UNPAID: dict[str, Any] = {"completion_tokens": 0, "outcome": "recovered"}

# Building a statement costs more than running it, so each is built once.
_LOCK_ACCOUNTS = (
    sa.select(accounts.c.id, accounts.c.balance, accounts.c.reserved)
    .where(accounts.c.id.in_(sa.bindparam("names", expanding=True)))
    .order_by(accounts.c.id)
    .with_for_update()
)
_SET_ACCOUNT = (
    sa.update(accounts)
    .where(accounts.c.id == sa.bindparam("name"))
    .values(balance=sa.bindparam("new_balance"), reserved=sa.bindparam("new_reserved"))
)
_ADD_TO_ACCOUNT = (
    sa.update(accounts)
    .where(accounts.c.id == sa.bindparam("name"))
    .values(balance=accounts.c.balance + sa.bindparam("amount"))
)
_FIND_RESERVATIONS = sa.select(reservations.c.id).where(reservations.c.id.in_(sa.bindparam("names", expanding=True)))
_TAKE_RESERVATIONS = (
    sa.delete(reservations)
    .where(reservations.c.id.in_(sa.bindparam("names", expanding=True)))
    .returning(reservations.c.id, reservations.c.microcredits)
)
_SET_PROGRESS = (
    sa.update(reservations)
    .where(reservations.c.id == sa.bindparam("name"))
    .values(completion_tokens=sa.bindparam("tokens"), updated_at_ms=sa.bindparam("now"))
)
_SET_ROUTE = (
    sa.update(idempotency)
    .where(idempotency.c.id == sa.bindparam("name"), idempotency.c.holder == sa.bindparam("whose"))
    .values(route=sa.bindparam("new_route"), updated_at_ms=sa.bindparam("now"))
)
_KEEP_ANSWER = (
    sa.update(idempotency)
    .where(idempotency.c.id == sa.bindparam("name"), idempotency.c.holder == sa.bindparam("whose"))
    .values(
        holder="",
        status=sa.bindparam("new_status"),
        content_type=sa.bindparam("kind"),
        answer=sa.bindparam("data"),
        answer_bytes=sa.bindparam("size"),
        updated_at_ms=sa.bindparam("now"),
    )
)
_FIND_HOLDERS = sa.select(idempotency.c.id, idempotency.c.holder).where(
    idempotency.c.id.in_(sa.bindparam("names", expanding=True))
)
_ADD_RESERVATIONS = sa.insert(reservations)
_ADD_USAGES = sa.insert(usages)
_ADD_TRANSACTIONS = sa.insert(transactions)
_ADD_POSTINGS = sa.insert(postings)


@dataclass(slots=True)
class Batch:
    """Operations to write in one transaction, in this order: reserve, settle, close, progress.

    ``again``: an earlier try failed, but its commit may have gone through all the same.
    """

    reserve: Sequence[Reservation] = ()
    settle: Sequence[Settlement] = ()
    close: Sequence[Closing] = ()
    progress: Sequence[Progress] = ()
    again: bool = False


@dataclass(slots=True)
class _Account:
    balance: int
    reserved: int
    changed: bool = False


@dataclass(slots=True)
class _Rows:
    """What a batch will insert."""

    reservations: list[dict[str, object]] = field(default_factory=list)
    usages: list[dict[str, object]] = field(default_factory=list)
    transactions: list[dict[str, object]] = field(default_factory=list)
    postings: list[dict[str, object]] = field(default_factory=list)
    routes: list[dict[str, object]] = field(default_factory=list)
    revenue: int = 0


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    """A unique id that sorts by time: 32 hex digits."""
    return f"{now_ms():012x}{secrets.token_hex(10)}"


def write_batch(database: Database, batch: Batch) -> dict[str, Refused]:
    """Write all of it durably. Returns the reservations that were refused, by id; all others stand.

    Raises LocalError: ``unavailable`` and ``disk_full`` may pass, ``local`` will not.
    """
    try:
        with database.write() as connection:
            return _apply(connection, batch, now_ms())
    except sa.exc.IntegrityError as error:
        raise LocalError("local", f"the accounts database refused a booking: {error.orig}") from error


def find_abandoned(database: Database, instance: str) -> list[Settlement]:
    """Reservations that may have nobody working on them: all of this gateway's own, and those that another gateway
    stopped touching; each as the settlement that bills its recorded progress."""
    own = reservations.c.instance == instance
    stale = reservations.c.updated_at_ms < now_ms() - ABANDONED_MS
    query = sa.select(reservations).where(sa.or_(own, stale)).order_by(reservations.c.id).limit(_SWEEP_ROWS_MAX)
    with database.read() as connection:
        return [_recovered(row) for row in connection.execute(query).mappings()]


def lock_account(connection: sa.Connection, account_id: str) -> None:
    """Make others wait who want to change this account."""
    connection.execute(_LOCK_ACCOUNTS, {"names": [account_id]})


def give_back(connection: sa.Connection, idempotency_id: str) -> None:
    """Release, without a charge, whatever is still reserved for a request under this key. Its account is locked."""
    query = sa.select(reservations).where(reservations.c.idempotency_id == idempotency_id)
    left = [_recovered(row) for row in connection.execute(query).mappings()]
    if left:
        _apply(connection, Batch(settle=left), now_ms())


def credit(database: Database, account_id: str, microcredits: int, reference: str) -> None:
    """Pay ``microcredits`` (more than 0) into an account. A reference counts once: a repetition raises ``conflict``."""
    if microcredits <= 0:
        raise RequestError("invalid_request", f"a credit must be more than 0, not {microcredits}")
    try:
        with database.write() as connection:
            post_credit(connection, account_id, microcredits, reference)
    except sa.exc.IntegrityError as error:
        raise RequestError("conflict", f"a credit with reference {reference!r} was already booked") from error


def post_credit(connection: sa.Connection, account_id: str, microcredits: int, reference: str) -> None:
    """:func:`credit` inside a transaction that is already open."""
    rows = _Rows()
    _post(rows, "credit", reference, {FUNDING: -microcredits, account_id: microcredits}, now_ms())
    connection.execute(_ADD_TRANSACTIONS, rows.transactions)
    connection.execute(_ADD_POSTINGS, rows.postings)
    for name, amount in ((account_id, microcredits), (FUNDING, -microcredits)):
        connection.execute(_ADD_TO_ACCOUNT, {"name": name, "amount": amount})


def _apply(connection: sa.Connection, batch: Batch, now: int) -> dict[str, Refused]:
    refused: dict[str, Refused] = {}
    rows = _Rows()
    book = _lock_accounts(connection, batch)
    standing = _find_standing(connection, batch.reserve) if batch.again else frozenset()
    for reservation in batch.reserve:
        if reservation.id not in standing:
            _reserve(book, rows, refused, reservation, now)
    settlements = [*batch.settle, *_to_close(connection, batch.close)]
    open_amounts = _take_reservations(connection, settlements)
    for settlement in settlements:
        amount = open_amounts.pop(settlement.reservation.id, None)
        if amount is not None:
            _settle(book, rows, settlement, amount, now)
    _store(connection, book, rows)
    if batch.close:
        connection.execute(_KEEP_ANSWER, [_answer(closing, now) for closing in batch.close])
    if batch.progress:
        _store_progress(connection, batch.progress, now)
    return refused


def _settlements(batch: Batch) -> list[Settlement]:
    return [*batch.settle, *(settlement for closing in batch.close for settlement in closing.settlements)]


def _to_close(connection: sa.Connection, closings: Sequence[Closing]) -> list[Settlement]:
    """The settlements of answers under a key. Who does not hold the key any more charges nothing: another gateway took
    it over, and charges its own answer."""
    if not closings:
        return []
    names = sorted(closing.idempotency_id for closing in closings)
    holders = {name: holder for name, holder in connection.execute(_FIND_HOLDERS, {"names": names})}
    return [
        settlement if holders.get(closing.idempotency_id) == closing.holder else replace(settlement, **_UNPAID)
        for closing in closings
        for settlement in closing.settlements
    ]


def _answer(closing: Closing, now: int) -> dict[str, object]:
    return {
        "name": closing.idempotency_id,
        "whose": closing.holder,
        "new_status": closing.status,
        "kind": closing.content_type,
        "data": closing.answer,
        "size": len(closing.answer),
        "now": now,
    }


def _lock_accounts(connection: sa.Connection, batch: Batch) -> dict[str, _Account]:
    names = {r.account_id for r in batch.reserve} | {s.reservation.account_id for s in _settlements(batch)}
    if not names:
        return {}
    found = connection.execute(_LOCK_ACCOUNTS, {"names": sorted(names)})
    return {name: _Account(balance, reserved) for name, balance, reserved in found}


def _reserve(
    book: dict[str, _Account], rows: _Rows, refused: dict[str, Refused], reservation: Reservation, now: int
) -> None:
    account, needed = book[reservation.account_id], reservation.microcredits
    available = account.balance - account.reserved
    if needed > available:
        refused[reservation.id] = Refused(available, needed)
        return
    account.reserved += needed
    account.changed |= needed != 0
    rows.reservations.append(
        {
            "id": reservation.id,
            "instance": reservation.instance,
            "account_id": reservation.account_id,
            "user_id": reservation.user_id,
            "key_id": reservation.key_id,
            "request_id": reservation.request_id,
            "endpoint": reservation.endpoint,
            "model": reservation.model,
            "prompt_tokens": reservation.prompt_tokens,
            "completion_tokens": 0,
            "input_price": reservation.prices.input,
            "output_price": reservation.prices.output,
            "microcredits": needed,
            "created_at_ms": now,
            "updated_at_ms": now,
            "idempotency_id": reservation.idempotency_id or None,
        }
    )
    if reservation.idempotency_id:
        name, holder = reservation.idempotency_id, reservation.holder
        rows.routes.append({"name": name, "whose": holder, "new_route": reservation.route, "now": now})


def _find_standing(connection: sa.Connection, wanted: Sequence[Reservation]) -> frozenset[str]:
    names = [reservation.id for reservation in wanted]
    return frozenset(connection.execute(_FIND_RESERVATIONS, {"names": names}).scalars())


def _take_reservations(connection: sa.Connection, settlements: Sequence[Settlement]) -> dict[str, int]:
    """Remove what is settled and return its amounts. The accounts are locked, so nobody else settles it meanwhile."""
    if not settlements:
        return {}
    names = [settlement.reservation.id for settlement in settlements]
    return {name: amount for name, amount in connection.execute(_TAKE_RESERVATIONS, {"names": names})}


def _settle(book: dict[str, _Account], rows: _Rows, settlement: Settlement, amount: int, now: int) -> None:
    reservation, charge = settlement.reservation, min(settlement.microcredits, amount)
    account = book[reservation.account_id]
    account.reserved -= amount
    account.balance -= charge
    account.changed |= amount != 0
    if charge:
        rows.revenue += charge
        _post(rows, "charge", reservation.id, {reservation.account_id: -charge, REVENUE: charge}, now)
    rows.usages.append(
        {
            "id": reservation.id,
            "user_id": reservation.user_id,
            "key_id": reservation.key_id,
            "request_id": reservation.request_id,
            "endpoint": reservation.endpoint,
            "model": reservation.model,
            "prompt_tokens": settlement.prompt_tokens,
            "completion_tokens": settlement.completion_tokens,
            "microcredits": charge,
            "outcome": settlement.outcome,
            "created_at_ms": now,
        }
    )


def _post(rows: _Rows, kind: str, reference: str, amounts: Mapping[str, int], now: int) -> None:
    assert sum(amounts.values()) == 0
    name = new_id()
    rows.transactions.append({"id": name, "kind": kind, "reference": reference, "created_at_ms": now})
    rows.postings += [{"transaction_id": name, "account_id": a, "amount": n} for a, n in amounts.items()]


def _store(connection: sa.Connection, book: dict[str, _Account], rows: _Rows) -> None:
    if rows.reservations:
        connection.execute(_ADD_RESERVATIONS, rows.reservations)
    if rows.routes:
        connection.execute(_SET_ROUTE, rows.routes)
    if rows.usages:
        connection.execute(_ADD_USAGES, rows.usages)
    if rows.transactions:
        connection.execute(_ADD_TRANSACTIONS, rows.transactions)
        connection.execute(_ADD_POSTINGS, rows.postings)
    changed = [
        {"name": name, "new_balance": account.balance, "new_reserved": account.reserved}
        for name, account in book.items()
        if account.changed
    ]
    if changed:
        connection.execute(_SET_ACCOUNT, changed)
    if rows.revenue:
        connection.execute(_ADD_TO_ACCOUNT, {"name": REVENUE, "amount": rows.revenue})


def _store_progress(connection: sa.Connection, progress: Sequence[Progress], now: int) -> None:
    steps = sorted(progress, key=lambda step: step.reservation_id)
    rows = [{"name": step.reservation_id, "tokens": step.completion_tokens, "now": now} for step in steps]
    connection.execute(_SET_PROGRESS, rows)


def _recovered(row: sa.RowMapping) -> Settlement:
    prices = Prices(row["input_price"], row["output_price"])
    # Under an idempotency key the client's retry is what is charged.
    tokens = 0 if row["idempotency_id"] else row["completion_tokens"]
    reservation = Reservation(
        id=row["id"],
        instance=row["instance"],
        account_id=row["account_id"],
        user_id=row["user_id"],
        key_id=row["key_id"],
        request_id=row["request_id"],
        endpoint=row["endpoint"],
        model=row["model"],
        prompt_tokens=row["prompt_tokens"],
        # The row does not keep the limit; the amount reserved does, and _settle never charges more than it.
        max_tokens=tokens,
        prices=prices,
        idempotency_id=row["idempotency_id"] or "",
    )
    return Settlement(
        reservation=reservation,
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=tokens,
        outcome="recovered",
    )
