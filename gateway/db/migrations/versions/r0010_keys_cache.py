"""Whether a key's requests may be answered with what was answered before.

Revision 0010.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """No key did, unless a request asked for it."""
    op.add_column("api_keys", sa.Column("cache", sa.Boolean, nullable=False, server_default=sa.false()))
