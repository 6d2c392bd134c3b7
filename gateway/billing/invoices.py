"""Invoices: one per user and month that cost something, numbered without gaps, never changed once closed. Blocking.

Invariants:
1. Numbers are given under the lock of ``invoice_head``, in the transaction that stores the invoice. What it says is
   summed up before, which takes long and holds up nobody.
2. A month is closed ``GRACE_MS`` after its end: a charge is dated when its transaction begins, so none of that month
   comes later, unless the database's clock is wrong by that much (``rios billing reconcile`` would tell).
3. The lines add up to the charges of the month, to the microcredit. A charge is rounded down once per request, so a
   line may be less than its tokens times its prices.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from gateway import audit
from gateway.audit import Actor
from gateway.billing.budget import month_begins_ms, month_of, next_month
from gateway.billing.sheet import to_csv
from gateway.db.billing import invoice_head, invoices
from gateway.db.models import usages
from gateway.db.session import Database
from gateway.db.stamps import now_ms
from gateway.errors import ApiError

GRACE_MS = 3_600_000
LINE = ("model", "requests", "prompt_tokens", "completion_tokens", "input_price", "output_price", "microcredits")
"""A line's fields; prices are microcredits per million tokens."""
_SUMS = ("prompt_tokens", "completion_tokens", "microcredits")
_GROUP = (usages.c.model, usages.c.input_price, usages.c.output_price)


def close_months(database: Database, actor: Actor, now: int | None = None) -> int:
    """Make the invoices of every month that is over; how many."""
    over, made = month_of((database.now_ms() if now is None else now) - GRACE_MS), 0
    while True:
        with database.read() as connection:
            month = next_month_to_close(connection)
            if month is None or month >= over:
                return made
            database.take_time(connection)
            found = _lines(connection, month)
        made += _close(database, actor, month, found)


def _close(database: Database, actor: Actor, month: str, found: Mapping[str, Sequence[dict[str, Any]]]) -> int:
    """Number and store a month's invoices, unless somebody else did meanwhile; how many."""
    with database.write() as connection:
        head = connection.execute(sa.select(invoice_head).with_for_update()).mappings().one()
        if next_month_to_close(connection) != month:
            return 0
        first = int(head["number"]) + 1
        rows = [_invoice(number, *each, month) for number, each in enumerate(found.items(), first)]
        last = first + len(rows) - 1
        if rows:
            connection.execute(sa.insert(invoices), rows)
        connection.execute(sa.update(invoice_head).values(number=last, month=month))
        if rows:
            audit.record(connection, actor, "invoices.made", str(last), detail={"count": len(rows)})
    return len(rows)


def next_month_to_close(connection: sa.Connection) -> str | None:
    """The month after the last closed one, or that of the first usage; None if there is nothing yet."""
    last = str(connection.execute(sa.select(invoice_head.c.month)).scalar_one())
    if last:
        return next_month(last)
    first = connection.execute(sa.select(sa.func.min(usages.c.created_at_ms))).scalar()
    return None if first is None else month_of(int(first))


def list_invoices(connection: sa.Connection, *, owner: str | None, limit: int, after: str) -> Sequence[dict[str, Any]]:
    """Newest first."""
    query = sa.select(invoices).order_by(invoices.c.number.desc()).limit(limit)
    if owner is not None:
        query = query.where(invoices.c.user_id == owner)
    if after:
        query = query.where(invoices.c.number < int(after))
    return [_shown(row) for row in connection.execute(query).mappings()]


def get_invoice(connection: sa.Connection, number: int, owner: str | None) -> dict[str, Any]:
    """Raises ApiError ``not_found``, also for what is out of reach."""
    row = connection.execute(sa.select(invoices).where(invoices.c.number == number)).mappings().first()
    if row is None or owner not in (None, row["user_id"]):
        raise ApiError("not_found", f"there is no invoice {number}", public_code="not_found")
    return _shown(row)


def as_csv(invoice: Mapping[str, Any]) -> str:
    """Its lines, and their sum."""
    head = (invoice["number"], invoice["month"])
    rows = [(*head, *(line[name] for name in LINE)) for line in invoice["lines"]]
    return to_csv(("invoice", "month", *LINE), [*rows, (*head, "total", "", "", "", "", "", invoice["microcredits"])])


def lines_of(connection: sa.Connection, user_id: str, month: str) -> Sequence[dict[str, Any]]:
    """What a user's charged requests of a month come to, per model and price."""
    return _lines(connection, month, user_id).get(user_id, ())


def _lines(connection: sa.Connection, month: str, user_id: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """The same of everybody who was charged, by user."""
    who, sums = usages.c.user_id, [sa.func.sum(usages.c[name]).label(name) for name in _SUMS]
    query = sa.select(who, *_GROUP, sa.func.count().label("requests"), *sums)
    query = query.where(*_within(month), usages.c.microcredits > 0).group_by(who, *_GROUP).order_by(who, *_GROUP)
    if user_id is not None:
        query = query.where(who == user_id)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in connection.execute(query).mappings():
        found.setdefault(row["user_id"], []).append({n: row[n] if n == "model" else int(row[n]) for n in LINE})
    return found


def _within(month: str) -> "tuple[sa.ColumnElement[bool], ...]":
    begins, ends = month_begins_ms(month), month_begins_ms(next_month(month))
    return usages.c.created_at_ms >= begins, usages.c.created_at_ms < ends


def _invoice(number: int, user_id: str, lines: Sequence[dict[str, Any]], month: str) -> dict[str, Any]:
    return {
        "number": number,
        "user_id": user_id,
        "month": month,
        "microcredits": sum(line["microcredits"] for line in lines),
        "lines": json.dumps(lines),
        "closed_at_ms": now_ms(),
    }


def _shown(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {**row, "lines": json.loads(row["lines"])}
