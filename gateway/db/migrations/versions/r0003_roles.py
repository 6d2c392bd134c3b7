"""Roles and e-mail addresses of users; scopes and expiry of keys.

Revision 0003.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Users were developers and keys had all that their users had."""
    op.add_column("users", sa.Column("role", sa.String(16), nullable=False, server_default="developer"))
    op.add_column("users", sa.Column("email", sa.String(255), nullable=True))
    op.create_index("ix_users_email", "users", ["email"], unique=True)
    op.add_column("api_keys", sa.Column("scopes", sa.String(1024), nullable=False, server_default=""))
    op.add_column("api_keys", sa.Column("expires_at_ms", sa.BigInteger, nullable=True))
