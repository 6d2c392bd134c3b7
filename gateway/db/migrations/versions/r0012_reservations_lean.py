"""Reservations without the indexes that cost every request more than they save.

Revision 0012.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_ID = sa.String(64)
_NAME = sa.String(255)
_KEYED = "ix_reservations_idempotency_id"


def upgrade() -> None:
    """There are as many rows as running requests: a look at all of them is short, and each is written and deleted
    again for one answer. In SQLite the table is its own primary key from now on."""
    for index in ("ix_reservations_instance", "ix_reservations_updated_at_ms", _KEYED):
        op.drop_index(index, "reservations")
    if op.get_context().dialect.name == "sqlite":
        _make_again()
    keyed = sa.text("idempotency_id IS NOT NULL")
    op.create_index(_KEYED, "reservations", ["idempotency_id"], sqlite_where=keyed, postgresql_where=keyed)


def _make_again() -> None:
    op.rename_table("reservations", "reservations_before")
    columns: list[sa.Column[Any]] = [
        sa.Column("id", _ID, nullable=False),
        sa.Column("instance", _ID, nullable=False),
        sa.Column("account_id", _ID, nullable=False),
        sa.Column("user_id", _ID, nullable=False),
        sa.Column("key_id", _ID, nullable=True),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("endpoint", sa.String(32), nullable=False),
        sa.Column("model", _NAME, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("input_price", sa.BigInteger, nullable=False),
        sa.Column("output_price", sa.BigInteger, nullable=False),
        sa.Column("microcredits", sa.BigInteger, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.Column("idempotency_id", _ID, nullable=True),
    ]
    names = ", ".join(column.name for column in columns)
    op.create_table(
        "reservations",
        *columns,
        sa.PrimaryKeyConstraint("id", name="pk_reservations"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_reservations_account_id"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_reservations_user_id"),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name="fk_reservations_key_id"),
        sa.CheckConstraint("microcredits >= 0", name=op.f("ck_reservations_microcredits")),
        sqlite_with_rowid=False,
    )
    op.execute(f"INSERT INTO reservations ({names}) SELECT {names} FROM reservations_before")
    op.drop_table("reservations_before")
