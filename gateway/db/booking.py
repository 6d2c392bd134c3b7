"""The statements of the books: what reserves, settles and credits asks of the database, and tells it.

Owns their texts alone; which are run, with what and in which order, says ``gateway.books``.
"""

import sqlalchemy as sa

from gateway.db.billing import budget_alerts, budgets
from gateway.db.models import accounts, idempotency, postings, reservations, transactions, usages
from gateway.db.prepared import Among, Prepared

LOCK_ACCOUNTS = Among(
    lambda names: (
        sa.select(accounts.c.id, accounts.c.balance, accounts.c.reserved)
        .where(accounts.c.id.in_(names))
        .order_by(accounts.c.id)
        .with_for_update()
    )
)
SET_ACCOUNT = Prepared(
    sa.update(accounts)
    .where(accounts.c.id == sa.bindparam("name"))
    .values(balance=sa.bindparam("new_balance"), reserved=sa.bindparam("new_reserved"))
)
ADD_TO_ACCOUNT = Prepared(
    sa.update(accounts)
    .where(accounts.c.id == sa.bindparam("name"))
    .values(balance=accounts.c.balance + sa.bindparam("amount"))
)
FIND_RESERVATIONS = Among(lambda names: sa.select(reservations.c.id).where(reservations.c.id.in_(names)))
TAKE_RESERVATIONS = Among(
    lambda names: (
        sa.delete(reservations)
        .where(reservations.c.id.in_(names))
        .returning(reservations.c.id, reservations.c.microcredits)
    )
)
SET_PROGRESS = Prepared(
    sa.update(reservations)
    .where(reservations.c.id == sa.bindparam("name"))
    .values(completion_tokens=sa.bindparam("tokens"), updated_at_ms=sa.bindparam("now"))
)
SET_ROUTE = Prepared(
    sa.update(idempotency)
    .where(idempotency.c.id == sa.bindparam("name"), idempotency.c.holder == sa.bindparam("whose"))
    .values(route=sa.bindparam("new_route"), updated_at_ms=sa.bindparam("now"))
)
KEEP_ANSWER = Prepared(
    sa.update(idempotency)
    .where(idempotency.c.id == sa.bindparam("name"), idempotency.c.holder == sa.bindparam("whose"))
    .values(
        holder=sa.literal_column("''"),
        status=sa.bindparam("new_status"),
        content_type=sa.bindparam("kind"),
        answer=sa.bindparam("data"),
        answer_bytes=sa.bindparam("size"),
        updated_at_ms=sa.bindparam("now"),
    )
)
FIND_HOLDERS = Among(lambda names: sa.select(idempotency.c.id, idempotency.c.holder).where(idempotency.c.id.in_(names)))
BUDGET_COLUMNS = ("account_id", "id", "subject", "key_id", "microcredits", "month", "spent", "reserved", "alerted")
FIND_BUDGETS = Among(
    lambda names: sa.select(*(budgets.c[name] for name in BUDGET_COLUMNS)).where(budgets.c.account_id.in_(names))
)
SET_BUDGET = Prepared(
    sa.update(budgets)
    .where(budgets.c.id == sa.bindparam("name"))
    .values(
        month=sa.bindparam("new_month"),
        spent=sa.bindparam("new_spent"),
        reserved=sa.bindparam("new_reserved"),
        alerted=sa.bindparam("new_alerted"),
    )
)
FIND_USAGES = Among(
    lambda names: sa.select(
        usages.c.id, usages.c.outcome, usages.c.prompt_tokens, usages.c.completion_tokens, usages.c.microcredits
    ).where(usages.c.id.in_(names))
)
ADD_ALERTS = Prepared(sa.insert(budget_alerts))
ADD_RESERVATIONS = Prepared(sa.insert(reservations))
ADD_USAGES = Prepared(sa.insert(usages))
ADD_TRANSACTIONS = Prepared(sa.insert(transactions))
ADD_POSTINGS = Prepared(sa.insert(postings))
