"""What the swarm was paid for each request, and for what was no request.

Revision 0009.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table, and its sums to the usage rows."""
    op.create_table(
        "swarm_costs",
        sa.Column("bill", sa.String(64), nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("channel", sa.String(64), nullable=False),
        sa.Column("peer_id", sa.String(128), nullable=False),
        sa.Column("calls", sa.BigInteger, nullable=False),
        sa.Column("microcredits", sa.BigInteger, nullable=False),
        sa.Column("nano", sa.BigInteger, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("bill", "purpose", "channel", name="pk_swarm_costs"),
    )
    for name in ("swarm_microcredits", "swarm_nano"):
        op.add_column("usages", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
