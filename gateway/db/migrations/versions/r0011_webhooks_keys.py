"""With which key a webhook was made: it goes on as long as that key.

Revision 0011.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nobody noted it of those that there are: they stay their users'."""
    op.add_column("webhooks", sa.Column("key_id", sa.String(64), nullable=True))
