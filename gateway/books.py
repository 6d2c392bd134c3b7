"""The double-entry books in the accounts database: reserve, settle, recover, credit.

Blocking calls, made in threads. Owns every statement that changes a balance.

Invariants:
1. Every change of a balance is a transaction whose postings add up to 0, written in the same database transaction.
2. Account rows are locked in the order of their ids, and the revenue account last, so gateways cannot deadlock.
3. A reservation is settled once: whoever finds its row gone does nothing, unless another gateway took it for abandoned.
   What that one did not charge is charged then, once.
4. The answer to a request under an idempotency key is kept in the transaction that charges it, and only by its holder.
5. A budget changes only under the lock of its account, with the reservation or the charge that it counts.
6. Whether a gateway is alive is told by the database's clock alone, so that a host's wrong clock gives nothing away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from config.errors import LocalError, RequestError
from gateway.billing import costs
from gateway.billing.budget import Budget, month_of
from gateway.db import booking
from gateway.db.models import FUNDING, REVENUE, reservations
from gateway.db.session import Database, Kept
from gateway.db.stamps import new_id, now_ms
from gateway.money import Closing, Costs, Prices, Progress, Refused, Reservation, Settlement

ABANDONED_MS = 30_000
"""A reservation of another gateway that was not touched for this long belongs to nobody any more."""
_SWEEP_ROWS_MAX = 500
RECOVERED = "recovered"
_REST = "-rest"
"""Ends the id of the usage row of what was charged after a recovery."""
_UNPAID: dict[str, Any] = {"completion_tokens": 0, "outcome": RECOVERED}


@dataclass(slots=True)
class Batch:
    """Operations to write in one transaction, in this order: reserve, settle, close, costs, progress. ``costs`` None:
    nobody counts them here.

    ``again``: an earlier try failed, but its commit may have gone through all the same.
    """

    reserve: Sequence[Reservation] = ()
    settle: Sequence[Settlement] = ()
    close: Sequence[Closing] = ()
    progress: Sequence[Progress] = ()
    costs: Costs | None = None
    again: bool = False

    @property
    def synced(self) -> bool:
        """Whether a power cut must not undo it. Reservations alone of answers that are told when they are settled
        need not: nobody was told anything, and nothing is charged."""
        return bool(self.settle or self.close or self.progress) or any(each.synced for each in self.reserve)


@dataclass(slots=True)
class _Account:
    balance: int
    reserved: int
    budgets: list[Budget] = field(default_factory=list)
    changed: bool = False


@dataclass(slots=True)
class _Rows:
    """What a batch will insert."""

    reservations: list[dict[str, object]] = field(default_factory=list)
    usages: list[dict[str, object]] = field(default_factory=list)
    transactions: list[dict[str, object]] = field(default_factory=list)
    postings: list[dict[str, object]] = field(default_factory=list)
    routes: list[dict[str, object]] = field(default_factory=list)
    alerts: list[dict[str, object]] = field(default_factory=list)
    revenue: int = 0


def write_batch(
    database: Database, batch: Batch, kept: Kept | None = None, *, waits: bool = True
) -> dict[str, Refused]:
    """Write all of it, durably where it must be. Returns the reservations that were refused, by id; all others stand.
    ``kept`` and ``waits`` as in :meth:`Database.write`.

    Raises LocalError: ``unavailable`` and ``disk_full`` may pass, ``local`` will not.
    """
    try:
        with database.write(synced=batch.synced, kept=kept, waits=waits) as connection:
            return _apply(connection, batch, database.now_ms())
    except sa.exc.IntegrityError as error:
        raise LocalError("local", f"the accounts database refused a booking: {error.orig}") from error


def find_abandoned(database: Database, instance: str) -> list[Settlement]:
    """Reservations that may have nobody working on them: all of this gateway's own, and those that another gateway
    stopped touching; each as the settlement that bills its recorded progress."""
    own = reservations.c.instance == instance
    with database.read() as connection:
        database.set_clock(connection)
        stale = reservations.c.updated_at_ms < database.now_ms() - ABANDONED_MS
        query = sa.select(reservations).where(sa.or_(own, stale)).order_by(reservations.c.id).limit(_SWEEP_ROWS_MAX)
        return [_recovered(row) for row in connection.execute(query).mappings()]


def lock_account(connection: sa.Connection, account_id: str) -> None:
    """Make others wait who want to change this account."""
    booking.LOCK_ACCOUNTS.rows(connection, [account_id])


def give_back(connection: sa.Connection, idempotency_id: str, now: int) -> None:
    """Release, without a charge, whatever is still reserved for a request under this key. Its account is locked."""
    query = sa.select(reservations).where(reservations.c.idempotency_id == idempotency_id)
    left = [_recovered(row) for row in connection.execute(query).mappings()]
    if left:
        _apply(connection, Batch(settle=left), now)


def credit(database: Database, account_id: str, microcredits: int, reference: str) -> None:
    """Pay ``microcredits`` (more than 0) into an account. A reference counts once: a repetition raises ``conflict``."""
    try:
        with database.write() as connection:
            post_credit(connection, account_id, microcredits, reference)
    except sa.exc.IntegrityError as error:
        raise RequestError("conflict", f"a credit with reference {reference!r} was already booked") from error


def post_credit(
    connection: sa.Connection, account_id: str, microcredits: int, reference: str, kind: str = "credit"
) -> str:
    """:func:`credit` inside a transaction that is already open; the transaction's id."""
    if microcredits <= 0:
        raise RequestError("invalid_request", f"a credit must be more than 0, not {microcredits}")
    rows = _Rows()
    name = _post(rows, kind, reference, {FUNDING: -microcredits, account_id: microcredits}, now_ms())
    booking.ADD_TRANSACTIONS.run(connection, rows.transactions)
    booking.ADD_POSTINGS.run(connection, rows.postings)
    for account, amount in ((account_id, microcredits), (FUNDING, -microcredits)):
        booking.ADD_TO_ACCOUNT.run(connection, [{"name": account, "amount": amount}])
    return name


def _apply(connection: sa.Connection, batch: Batch, now: int) -> dict[str, Refused]:
    refused: dict[str, Refused] = {}
    rows = _Rows()
    book = _lock_accounts(connection, batch, now)
    standing = _find_standing(connection, batch.reserve) if batch.again else frozenset()
    for reservation in batch.reserve:
        if reservation.id not in standing:
            _reserve(book, rows, refused, reservation, now)
    settlements = [*batch.settle, *_to_close(connection, batch.close)]
    open_amounts = _take_reservations(connection, settlements)
    gone: dict[str, Settlement] = {}
    for settlement in settlements:
        amount = open_amounts.pop(settlement.reservation.id, None)
        if amount is not None:
            _settle(book, rows, settlement, amount, now)
        elif settlement.microcredits and settlement.outcome != RECOVERED:
            gone[settlement.reservation.id] = settlement
    if gone:
        _settle_rests(connection, book, rows, gone, now)
    _store(connection, book, rows)
    _store_costs(connection, batch.costs, settlements, now)
    if batch.close:
        booking.KEEP_ANSWER.run(connection, [_answer(closing, now) for closing in batch.close])
    if batch.progress:
        _store_progress(connection, batch.progress, now)
    return refused


def settlements_of(batch: Batch) -> list[Settlement]:
    """All that a batch settles."""
    return [*batch.settle, *(settlement for closing in batch.close for settlement in closing.settlements)]


def _to_close(connection: sa.Connection, closings: Sequence[Closing]) -> list[Settlement]:
    """The settlements of answers under a key. Who does not hold the key any more charges nothing: another gateway took
    it over, and charges its own answer."""
    if not closings:
        return []
    names = sorted(closing.idempotency_id for closing in closings)
    holders = {name: holder for name, holder in booking.FIND_HOLDERS.rows(connection, names)}
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


def _lock_accounts(connection: sa.Connection, batch: Batch, now: int) -> dict[str, _Account]:
    names = {r.account_id for r in batch.reserve} | {s.reservation.account_id for s in settlements_of(batch)}
    if not names:
        return {}
    found = booking.LOCK_ACCOUNTS.rows(connection, sorted(names))
    book = {name: _Account(balance, reserved) for name, balance, reserved in found}
    for row in booking.FIND_BUDGETS.rows(connection, sorted(names)):
        found_budget = Budget.of(dict(zip(booking.BUDGET_COLUMNS, row, strict=True)), month_of(now))
        book[row[0]].budgets.append(found_budget)
    return book


def _reserve(
    book: dict[str, _Account], rows: _Rows, refused: dict[str, Refused], reservation: Reservation, now: int
) -> None:
    account, needed = book[reservation.account_id], reservation.microcredits
    available = account.balance - account.reserved
    if needed > available:
        refused[reservation.id] = Refused(available, needed)
        return
    limits = [budget for budget in account.budgets if budget.covers(reservation.key_id)]
    for budget in limits:
        if not budget.allows(needed):
            refused[reservation.id] = Refused(budget.room, needed, budget.subject)
            return
    for budget in limits:
        budget.hold(needed)
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
            "prompt_tokens": reservation.prompt_if_cut_off,
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
    return frozenset(name for (name,) in booking.FIND_RESERVATIONS.rows(connection, names))


def _take_reservations(connection: sa.Connection, settlements: Sequence[Settlement]) -> dict[str, int]:
    """Remove what is settled and return its amounts. The accounts are locked, so nobody else settles it meanwhile."""
    if not settlements:
        return {}
    names = [settlement.reservation.id for settlement in settlements]
    return {name: amount for name, amount in booking.TAKE_RESERVATIONS.rows(connection, names)}


def _settle(book: dict[str, _Account], rows: _Rows, settlement: Settlement, amount: int, now: int) -> None:
    reservation, charge = settlement.reservation, min(settlement.microcredits, amount)
    account = book[reservation.account_id]
    account.reserved -= amount
    account.balance -= charge
    account.changed |= amount != 0
    for budget in account.budgets:
        if budget.covers(reservation.key_id):
            rows.alerts += [_alert(budget, percent, now) for percent in budget.settle(amount, charge)]
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
            "input_price": reservation.prices.input,
            "output_price": reservation.prices.output,
            "microcredits": charge,
            "outcome": settlement.outcome,
            "created_at_ms": now,
            "swarm_microcredits": 0,  # see _store_costs
            "swarm_nano": 0,
        }
    )


def _settle_rests(
    connection: sa.Connection, book: dict[str, _Account], rows: _Rows, gone: Mapping[str, Settlement], now: int
) -> None:
    """Charge what a recovery left unpaid of answers whose gateway was alive after all. Each in a row of its own, dated
    now: the month of the recovery may be closed. What was held back for it is free again, so it takes no more than the
    balance has left; a budget it may pass, as the answer was begun within it."""
    known = {row[0]: row[1:] for row in booking.FIND_USAGES.rows(connection, [*gone, *(name + _REST for name in gone)])}
    for name, settlement in gone.items():
        outcome, prompt_tokens, completion_tokens, charged = known.get(name, ("", 0, 0, 0))
        left = settlement.microcredits - charged
        if outcome != RECOVERED or name + _REST in known or left <= 0:
            continue  # an earlier try settled it, or nothing is left
        reservation = settlement.reservation
        account = book[reservation.account_id]
        amount = min(left, account.balance - account.reserved)
        account.reserved += amount
        for budget in account.budgets:
            if budget.covers(reservation.key_id):
                budget.hold(amount)
        paid_prompt = prompt_tokens if completion_tokens else 0  # nothing delivered, nothing paid
        rest = replace(
            settlement,
            reservation=replace(reservation, id=name + _REST),
            prompt_tokens=max(settlement.prompt_tokens - paid_prompt, 0),
            completion_tokens=settlement.completion_tokens - completion_tokens,
        )
        _settle(book, rows, rest, amount, now)


def _alert(budget: Budget, percent: int, now: int) -> dict[str, object]:
    return {
        "budget_id": budget.id,
        "month": budget.month,
        "percent": percent,
        "spent": budget.spent,
        "created_at_ms": now,
        "told": False,
    }


def _post(rows: _Rows, kind: str, reference: str, amounts: Mapping[str, int], now: int) -> str:
    assert sum(amounts.values()) == 0
    name = new_id()
    rows.transactions.append({"id": name, "kind": kind, "reference": reference, "created_at_ms": now})
    rows.postings += [{"transaction_id": name, "account_id": a, "amount": n} for a, n in amounts.items()]
    return name


def _store(connection: sa.Connection, book: dict[str, _Account], rows: _Rows) -> None:
    if rows.reservations:
        booking.ADD_RESERVATIONS.run(connection, rows.reservations)
    if rows.routes:
        booking.SET_ROUTE.run(connection, rows.routes)
    if rows.usages:
        booking.ADD_USAGES.run(connection, rows.usages)
    if rows.transactions:
        booking.ADD_TRANSACTIONS.run(connection, rows.transactions)
        booking.ADD_POSTINGS.run(connection, rows.postings)
    changed = [
        {"name": name, "new_balance": account.balance, "new_reserved": account.reserved}
        for name, account in book.items()
        if account.changed
    ]
    if changed:
        booking.SET_ACCOUNT.run(connection, changed)
    _store_budgets(connection, book, rows)
    if rows.revenue:
        booking.ADD_TO_ACCOUNT.run(connection, [{"name": REVENUE, "amount": rows.revenue}])


def _store_budgets(connection: sa.Connection, book: dict[str, _Account], rows: _Rows) -> None:
    changed = [
        {
            "name": budget.id,
            "new_month": budget.month,
            "new_spent": budget.spent,
            "new_reserved": budget.reserved,
            "new_alerted": budget.alerted,
        }
        for account in book.values()
        for budget in account.budgets
        if budget.changed
    ]
    if changed:
        booking.SET_BUDGET.run(connection, changed)
    if rows.alerts:
        booking.ADD_ALERTS.run(connection, rows.alerts)


def _store_costs(connection: sa.Connection, found: Costs | None, settlements: Sequence[Settlement], now: int) -> None:
    """What the swarm was paid, and its sums in the usage rows. Of what a crash left behind, some was written before."""
    names = {each.reservation.id for each in settlements if found is not None or each.outcome == RECOVERED}
    if found is not None:
        names |= costs.write(connection, found, now)
    if names:
        costs.add_up(connection, sorted(names))


def _store_progress(connection: sa.Connection, progress: Sequence[Progress], now: int) -> None:
    steps = sorted(progress, key=lambda step: step.reservation_id)
    rows = [{"name": step.reservation_id, "tokens": step.completion_tokens, "now": now} for step in steps]
    booking.SET_PROGRESS.run(connection, rows)


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
        outcome=RECOVERED,
    )
