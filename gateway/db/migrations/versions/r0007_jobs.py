"""Files, and batches of requests over them; events and webhooks.

Revision 0007.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_ID = sa.String(64)
_PLACE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Add the tables."""
    _files()
    _batches()
    _events()
    _webhooks()


def _need(name: str, kind: Any) -> "sa.Column[Any]":  # noqa: ANN401 - a type of SQLAlchemy
    return sa.Column(name, kind, nullable=False)


def _may(name: str, kind: Any) -> "sa.Column[Any]":  # noqa: ANN401 - a type of SQLAlchemy
    return sa.Column(name, kind, nullable=True)


def _files() -> None:
    op.create_table(
        "files",
        _need("id", _ID),
        _need("user_id", _ID),
        _need("purpose", sa.String(32)),
        _need("filename", sa.String(255)),
        _need("bytes", sa.BigInteger),
        _need("complete", sa.Boolean),
        _need("created_at_ms", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_files_user_id"),
    )
    op.create_index("ix_files_user_id_id", "files", ["user_id", "id"])
    op.create_table(
        "file_chunks",
        _need("file_id", _ID),
        sa.Column("place", sa.Integer, nullable=False, autoincrement=False),
        _need("data", sa.LargeBinary),
        sa.PrimaryKeyConstraint("file_id", "place", name="pk_file_chunks"),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name="fk_file_chunks_file_id"),
    )


def _batches() -> None:
    op.create_table(
        "batches",
        _need("id", _ID),
        _need("user_id", _ID),
        _may("key_id", _ID),
        _need("endpoint", sa.String(64)),
        _need("input_file_id", _ID),
        _need("completion_window", sa.String(8)),
        _need("metadata", sa.Text),
        _need("status", sa.String(16)),
        _need("errors", sa.Text),
        _may("output_file_id", _ID),
        _may("error_file_id", _ID),
        _need("total", sa.Integer),
        _need("completed", sa.Integer),
        _need("failed", sa.Integer),
        _need("holder", sa.String(64)),
        _need("held_until_ms", sa.BigInteger),
        _need("created_at_ms", sa.BigInteger),
        _need("expires_at_ms", sa.BigInteger),
        _may("in_progress_at_ms", sa.BigInteger),
        _may("finalizing_at_ms", sa.BigInteger),
        _may("cancelling_at_ms", sa.BigInteger),
        _may("ended_at_ms", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_batches_user_id"),
    )
    op.create_index("ix_batches_user_id_id", "batches", ["user_id", "id"])
    op.create_index("ix_batches_status_held_until_ms", "batches", ["status", "held_until_ms"])
    op.create_table(
        "batch_lines",
        _need("batch_id", _ID),
        sa.Column("place", sa.Integer, nullable=False, autoincrement=False),
        _need("custom_id", sa.String(512)),
        _need("body", sa.LargeBinary),
        _need("status", sa.Integer),
        _may("answer", sa.LargeBinary),
        sa.PrimaryKeyConstraint("batch_id", "place", name="pk_batch_lines"),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="fk_batch_lines_batch_id"),
    )
    op.create_index("ix_batch_lines_batch_id_status_place", "batch_lines", ["batch_id", "status", "place"])


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("place", _PLACE, primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("owner_id", _ID, nullable=True),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_created_at_ms", "events", ["created_at_ms"])
    op.create_index("ix_events_owner_id_place", "events", ["owner_id", "place"])
    op.create_table(
        "event_cursors",
        sa.Column("name", _ID, primary_key=True),
        sa.Column("place", sa.BigInteger, nullable=False),
    )


def _webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("user_id", _ID, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("kinds", sa.Text, nullable=False),
        sa.Column("secret", sa.LargeBinary, nullable=False),
        sa.Column("enabled", sa.Boolean, nullable=False),
        sa.Column("problem", sa.String(255), nullable=False),
        sa.Column("failing_since_ms", sa.BigInteger, nullable=True),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_webhooks_user_id", "webhooks", ["user_id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("webhook_id", _ID, sa.ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due_at_ms", sa.BigInteger, nullable=False),
        sa.Column("answered", sa.Integer, nullable=False),
        sa.Column("problem", sa.String(255), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("holder", _ID, nullable=False),
    )
    op.create_index("ix_webhook_deliveries_created_at_ms", "webhook_deliveries", ["created_at_ms"])
    op.create_index("ix_webhook_deliveries_webhook_id_id", "webhook_deliveries", ["webhook_id", "id"])
    op.create_index("ix_webhook_deliveries_status_due_at_ms", "webhook_deliveries", ["status", "due_at_ms"])
