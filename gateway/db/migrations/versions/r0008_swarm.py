"""Whose deployments are.

Revision 0008.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "deployments",
        sa.Column("model_id", sa.String(64), nullable=False),
        sa.Column("user_id", sa.String(64), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("model_id", name="pk_deployments"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_deployments_user_id"),
    )
    op.create_index("ix_deployments_user_id", "deployments", ["user_id"])
