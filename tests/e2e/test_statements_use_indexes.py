"""No statement that serves requests reads a whole table that grows: every one is collected while it runs, then
explained by the database itself. (`rios billing reconcile` reads everything: that is what it is for.)"""

import re
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from gateway import audit, books, idempotency, managing
from gateway.accounts import Accounts
from gateway.billing import budgets, invoices, payment, statements
from gateway.books import Batch
from gateway.db import stamps
from gateway.db.migrate import migrate
from gateway.db.session import Database, open_database
from gateway.listing import Page
from gateway.money import Prices, Progress, Reservation, Settlement

GROWING = ("usages", "transactions", "postings", "invoices", "audit_log", "idempotency", "budget_alerts")
"""``reservations`` is not among them: it has a row per running request."""
MONTH_MS = 32 * 86_400_000


def reservation(user: str, key: str) -> Reservation:
    return Reservation(
        id=stamps.new_id(),
        instance="here",
        account_id=f"user:{user}",
        user_id=user,
        key_id=key,
        request_id="r",
        endpoint="chat.completions",
        model="tiny",
        prompt_tokens=1,
        max_tokens=9,
        prices=Prices(1_000_000, 1_000_000),
    )


def work(database: Database) -> None:
    """Everything that requests and upkeep ask of the accounts."""
    accounts = Accounts(database)
    user = accounts.create_user("ada").id
    key = accounts.create_key("ada", "k")
    accounts.credit("ada", 1000)
    payment.book(database, "pay", user, 100)
    payment.book(database, "pay", user, 100)
    for name in ("", key.key.id):
        wish = budgets.Wish(user_id=user, key_id=name, microcredits=30)
        budgets.set_budget(database, audit.OPERATOR, wish, None)
        budgets.set_budget(database, audit.OPERATOR, wish, None)
    budgets.set_key_limits(database, audit.OPERATOR, key.key.id, 5, 5)
    accounts.authenticate(key.key.id, b"")
    for _ in range(3):
        one = reservation(user, key.key.id)
        books.write_batch(database, Batch(reserve=[one], progress=[Progress(one.id, 1)]))
        books.write_batch(database, Batch(reserve=[one], again=True))
        done = Settlement(reservation=one, prompt_tokens=1, completion_tokens=8, outcome="stop")
        books.write_batch(database, Batch(settle=[done]))
    books.find_abandoned(database, "here")
    budgets.take_alerts(database)
    idempotency.expire(database)
    held = idempotency.wanted(f"user:{user}", "k", "chat", b"{}", "")
    idempotency.begin(database, held, "here", 1)
    invoices.close_months(database, audit.OPERATOR, stamps.now_ms() + MONTH_MS)
    accounts.usage("ada", before="z")
    accounts.balance("ada")
    for owner in (user, None):
        audit.rows(database, Page(5), owner=owner)
        managing.list_keys(accounts, Page(5, after=key.key.id), owner=owner)
        with database.read() as connection:
            for kinds in ((), ("credit", "payment")):
                statements.list_postings(connection, owner=owner, kinds=kinds, limit=5, after="")
                statements.list_postings(connection, owner=owner, kinds=kinds, limit=5, after="z:z")
            span = statements.Span(owner=owner, from_ms=0, to_ms=stamps.now_ms())
            statements.sum_usage(connection, span, statements.BYS)
            invoices.list_invoices(connection, owner=owner, limit=5, after="9")
            invoices.get_invoice(connection, 1, owner)
            budgets.list_budgets(connection, owner=owner, limit=5, after="")


def plan(database: Database, connection: sa.Connection, statement: str, parameters: Any) -> str:
    command = "EXPLAIN" if database.is_postgresql else "EXPLAIN QUERY PLAN"
    rows = connection.exec_driver_sql(f"{command} {statement}", parameters).all()
    return "\n".join(str(row[-1]) for row in rows)


def test_no_statement_reads_a_whole_growing_table(tmp_path: Path, database: str) -> None:
    opened = open_database(database, tmp_path)
    migrate(opened)
    seen: dict[str, Any] = {}

    def note(_c: Any, _k: Any, statement: str, parameters: Any, _x: Any, many: bool) -> None:
        if statement.lstrip().startswith(("SELECT", "UPDATE", "DELETE")):
            seen.setdefault(statement, parameters[0] if many else parameters)

    sa.event.listen(opened.engine, "before_cursor_execute", note)
    work(opened)
    sa.event.remove(opened.engine, "before_cursor_execute", note)
    assert len(seen) > 50
    names = "|".join(GROWING)
    # Of an ordered list of all, an index is read from its end and the limit stops it.
    whole = re.compile(rf"Seq Scan on ({names})\b|^SCAN ({names})(?! USING)|^SCAN ({names})$", re.MULTILINE)
    with opened.read() as connection:
        if opened.is_postgresql:
            connection.exec_driver_sql("SET enable_seqscan = off")  # tables of a test are too small to bother otherwise
        scans = [
            f"{statement}\n{found}"
            for statement, parameters in seen.items()
            if whole.search(found := plan(opened, connection, statement, parameters))
        ]
    opened.close()
    assert scans == []
