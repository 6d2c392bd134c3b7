"""The tables of what goes on without a connection: files, batches, events, webhooks."""

import sqlalchemy as sa

from gateway.db.models import metadata

_Id = sa.String(64)
_Place = sa.BigInteger().with_variant(sa.Integer, "sqlite")

files = sa.Table(
    "files",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("filename", sa.String(255), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("complete", sa.Boolean, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Index("ix_files_user_id_id", "user_id", "id"),
)
"""``complete``: false while it is being uploaded; what stays so is swept away. ``created_at_ms``: when its last piece
came."""

file_chunks = sa.Table(
    "file_chunks",
    metadata,
    sa.Column("file_id", _Id, sa.ForeignKey("files.id"), primary_key=True),
    sa.Column("place", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False),
    sa.Column("key_id", _Id, nullable=True),
    sa.Column("endpoint", sa.String(64), nullable=False),
    sa.Column("input_file_id", _Id, nullable=False),
    sa.Column("completion_window", sa.String(8), nullable=False),
    sa.Column("metadata", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("errors", sa.Text, nullable=False),
    sa.Column("output_file_id", _Id, nullable=True),
    sa.Column("error_file_id", _Id, nullable=True),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("completed", sa.Integer, nullable=False),
    sa.Column("failed", sa.Integer, nullable=False),
    sa.Column("holder", sa.String(64), nullable=False),
    sa.Column("held_until_ms", sa.BigInteger, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("expires_at_ms", sa.BigInteger, nullable=False),
    sa.Column("in_progress_at_ms", sa.BigInteger, nullable=True),
    sa.Column("finalizing_at_ms", sa.BigInteger, nullable=True),
    sa.Column("cancelling_at_ms", sa.BigInteger, nullable=True),
    sa.Column("ended_at_ms", sa.BigInteger, nullable=True),
    sa.Index("ix_batches_user_id_id", "user_id", "id"),
    sa.Index("ix_batches_status_held_until_ms", "status", "held_until_ms"),
)
"""``holder``: the gateway and its claim that work on it until ``held_until_ms``, which they move on while they do."""

batch_lines = sa.Table(
    "batch_lines",
    metadata,
    sa.Column("batch_id", _Id, sa.ForeignKey("batches.id"), primary_key=True),
    sa.Column("place", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("custom_id", sa.String(512), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("answer", sa.LargeBinary, nullable=True),
    sa.Index("ix_batch_lines_batch_id_status_place", "batch_id", "status", "place"),
)
"""``body``: the request, JSON. ``status``: 0 until it is answered, then the HTTP status of ``answer`` (JSON)."""

events = sa.Table(
    "events",
    metadata,
    sa.Column("place", _Place, primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("owner_id", _Id, nullable=True),
    sa.Column("data", sa.Text, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False, index=True),
    sa.Index("ix_events_owner_id_place", "owner_id", "place"),
    sqlite_autoincrement=True,
)
"""What happened, in one order for all gateways. ``owner_id`` None: everybody's."""

webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("url", sa.String(2048), nullable=False),
    sa.Column("kinds", sa.Text, nullable=False),
    sa.Column("secret", sa.LargeBinary, nullable=False),
    sa.Column("enabled", sa.Boolean, nullable=False),
    sa.Column("problem", sa.String(255), nullable=False),
    sa.Column("failing_since_ms", sa.BigInteger, nullable=True),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("key_id", _Id, nullable=True),
)
"""``kinds``: between spaces, empty for all. ``secret`` is sealed. ``problem``: why it was disabled, or failed last.
``key_id``: what it was made, or last changed, with; NULL for a session: it is the user's."""

deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("webhook_id", _Id, sa.ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due_at_ms", sa.BigInteger, nullable=False),
    sa.Column("answered", sa.Integer, nullable=False),
    sa.Column("problem", sa.String(255), nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False, index=True),
    sa.Column("holder", _Id, nullable=False),
    sa.Index("ix_webhook_deliveries_webhook_id_id", "webhook_id", "id"),
    sa.Index("ix_webhook_deliveries_status_due_at_ms", "status", "due_at_ms"),
)
"""``status``: pending, delivered or dead. While ``holder`` tries it, ``due_at_ms`` is the end of its lease."""

cursors = sa.Table(
    "event_cursors",
    metadata,
    sa.Column("name", _Id, primary_key=True),
    sa.Column("place", sa.BigInteger, nullable=False),
)
"""How far somebody has read the events."""
