"""The tables of the audit log. ``audit_log`` is append-only (triggers); ``audit_head`` has one row, its newest hash."""

import sqlalchemy as sa

from gateway.db.models import metadata

audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("user_id", sa.String(64), nullable=False),
    sa.Column("by", sa.String(96), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("target", sa.String(255), nullable=False),
    sa.Column("owner_id", sa.String(64), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("hash", sa.LargeBinary(32), nullable=False),
    sa.Index("ix_audit_log_owner_id_place", "owner_id", "place"),
    sa.Index("ix_audit_log_user_id_place", "user_id", "place"),
)
"""``user_id``: who did it; ``owner_id``: whose thing it was done to. ``hash``: see ``gateway/audit.py``."""

audit_head = sa.Table(
    "audit_head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("place", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.LargeBinary(32), nullable=False),
)
