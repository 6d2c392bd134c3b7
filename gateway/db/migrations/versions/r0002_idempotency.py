"""Idempotency keys: which request an answer belongs to, and which reservations were made for it.

Revision 0002.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ID = sa.String(64)


def upgrade() -> None:
    """Add the table, and the column that names a reservation's key."""
    op.create_table(
        "idempotency",
        sa.Column("id", _ID, nullable=False),
        sa.Column("account_id", _ID, nullable=False),
        sa.Column("body_sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("holder", sa.String(96), nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("route", sa.String(16), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("content_type", sa.String(64), nullable=False),
        sa.Column("answer", sa.LargeBinary, nullable=True),
        sa.Column("answer_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_idempotency"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_idempotency_account_id"),
    )
    op.create_index("ix_idempotency_account_id_answer_bytes", "idempotency", ["account_id", "answer_bytes"])
    op.create_index("ix_idempotency_created_at_ms", "idempotency", ["created_at_ms"])
    op.add_column("reservations", sa.Column("idempotency_id", _ID, nullable=True))
    op.create_index("ix_reservations_idempotency_id", "reservations", ["idempotency_id"])
