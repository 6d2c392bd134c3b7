"""Budgets, invoices, limits of keys; the unit prices of each usage; the indexes that statements need.

Revision 0006.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_ID = sa.String(64)
_MONTH = sa.String(7)


def _column(name: str, kind: Any = sa.BigInteger, nullable: bool = False) -> "sa.Column[Any]":  # noqa: ANN401
    return sa.Column(name, kind, nullable=nullable)


def _to(table: str, name: str, other: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([name], [f"{other}.id"], name=f"fk_{table}_{name}")


def upgrade() -> None:
    """Add tables, columns and indexes."""
    _budgets()
    _invoices()
    op.create_table(
        "key_limits",
        _column("key_id", _ID),
        _column("requests_per_minute"),
        _column("tokens_per_minute"),
        sa.PrimaryKeyConstraint("key_id", name="pk_key_limits"),
        _to("key_limits", "key_id", "api_keys"),
    )
    for name in ("input_price", "output_price"):
        op.add_column("usages", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.create_index("ix_usages_user_id_id", "usages", ["user_id", "id"])
    op.create_index("ix_usages_created_at_ms", "usages", ["created_at_ms"])
    op.drop_index("ix_postings_account_id", "postings")
    op.create_index("ix_postings_account_id_transaction_id", "postings", ["account_id", "transaction_id"])


def _budgets() -> None:
    op.create_table(
        "budgets",
        _column("id", _ID),
        _column("subject", sa.String(80)),
        _column("account_id", _ID),
        _column("user_id", _ID),
        _column("key_id", _ID, nullable=True),
        _column("microcredits"),
        _column("month", _MONTH),
        _column("spent"),
        _column("reserved"),
        _column("alerted", sa.Integer),
        _column("by_admin", sa.Boolean),
        _column("created_at_ms"),
        _column("updated_at_ms"),
        sa.PrimaryKeyConstraint("id", name="pk_budgets"),
        sa.UniqueConstraint("subject", name="uq_budgets_subject"),
        _to("budgets", "account_id", "accounts"),
        _to("budgets", "user_id", "users"),
        _to("budgets", "key_id", "api_keys"),
    )
    op.create_index("ix_budgets_account_id", "budgets", ["account_id"])
    op.create_index("ix_budgets_user_id", "budgets", ["user_id"])
    op.create_table(
        "budget_alerts",
        _column("budget_id", _ID),
        _column("month", _MONTH),
        sa.Column("percent", sa.Integer, nullable=False, autoincrement=False),
        _column("spent"),
        _column("created_at_ms"),
        _column("told", sa.Boolean),
        sa.PrimaryKeyConstraint("budget_id", "month", "percent", name="pk_budget_alerts"),
        _to("budget_alerts", "budget_id", "budgets"),
    )
    op.create_index("ix_budget_alerts_told", "budget_alerts", ["told"])


def _invoices() -> None:
    op.create_table(
        "invoices",
        sa.Column("number", sa.BigInteger, nullable=False, autoincrement=False),
        _column("user_id", _ID),
        _column("month", _MONTH),
        _column("microcredits"),
        _column("lines", sa.Text),
        _column("closed_at_ms"),
        sa.PrimaryKeyConstraint("number", name="pk_invoices"),
        sa.UniqueConstraint("user_id", "month", name="uq_invoices_user_id_month"),
        _to("invoices", "user_id", "users"),
    )
    op.create_table(
        "invoice_head",
        sa.Column("id", sa.Integer, nullable=False, autoincrement=False),
        _column("number"),
        _column("month", _MONTH),
        sa.PrimaryKeyConstraint("id", name="pk_invoice_head"),
    )
    head = sa.table("invoice_head", sa.column("id"), sa.column("number"), sa.column("month"))
    op.execute(sa.insert(head).values(id=1, number=0, month=""))
    _protect()


def _protect() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_change_invoices() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'invoices is append-only'; END $$"
        )
        op.execute(
            "CREATE TRIGGER invoices_append_only BEFORE UPDATE OR DELETE ON invoices "
            "FOR EACH ROW EXECUTE FUNCTION refuse_change_invoices()"
        )
        return
    for action in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER invoices_no_{action.lower()} BEFORE {action} ON invoices "
            "BEGIN SELECT RAISE(ABORT, 'invoices is append-only'); END"
        )
