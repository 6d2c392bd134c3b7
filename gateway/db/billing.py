"""The tables of budgets, invoices and the limits of keys. ``invoices`` is append-only (triggers)."""

import sqlalchemy as sa

from gateway.db.models import metadata

_Id = sa.String(64)

budgets = sa.Table(
    "budgets",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("subject", sa.String(80), nullable=False, unique=True),
    sa.Column("account_id", _Id, sa.ForeignKey("accounts.id"), nullable=False, index=True),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("key_id", _Id, sa.ForeignKey("api_keys.id"), nullable=True),
    sa.Column("microcredits", sa.BigInteger, nullable=False),
    sa.Column("month", sa.String(7), nullable=False),
    sa.Column("spent", sa.BigInteger, nullable=False),
    sa.Column("reserved", sa.BigInteger, nullable=False),
    sa.Column("alerted", sa.Integer, nullable=False),
    sa.Column("by_admin", sa.Boolean, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
)
"""What a user, or a key, may spend in a calendar month (UTC). ``subject``: ``user:ID`` or ``key:ID``. ``spent``: the
charges of ``month``; ``reserved``: what open reservations hold back; ``alerted``: the last percentage told of."""

budget_alerts = sa.Table(
    "budget_alerts",
    metadata,
    sa.Column("budget_id", _Id, sa.ForeignKey("budgets.id"), primary_key=True),
    sa.Column("month", sa.String(7), primary_key=True),
    sa.Column("percent", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("spent", sa.BigInteger, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("told", sa.Boolean, nullable=False, index=True),
)
"""A budget reached so much of its limit. ``told``: a gateway has published it."""

invoices = sa.Table(
    "invoices",
    metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False),
    sa.Column("month", sa.String(7), nullable=False),
    sa.Column("microcredits", sa.BigInteger, nullable=False),
    sa.Column("lines", sa.Text, nullable=False),
    sa.Column("closed_at_ms", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("user_id", "month"),
)
"""A user's closed month; ``lines`` as JSON."""

invoice_head = sa.Table(
    "invoice_head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("month", sa.String(7), nullable=False),
)
"""One row: the newest invoice's number, and the last month that was closed for everybody."""

key_limits = sa.Table(
    "key_limits",
    metadata,
    sa.Column("key_id", _Id, sa.ForeignKey("api_keys.id"), primary_key=True),
    sa.Column("requests_per_minute", sa.BigInteger, nullable=False),
    sa.Column("tokens_per_minute", sa.BigInteger, nullable=False),
)
"""Instead of the gateway's own limits; 0: the gateway's."""

swarm_costs = sa.Table(
    "swarm_costs",
    metadata,
    sa.Column("bill", _Id, primary_key=True),
    sa.Column("purpose", sa.String(16), primary_key=True),
    sa.Column("channel", _Id, primary_key=True),
    sa.Column("peer_id", sa.String(128), nullable=False),
    sa.Column("calls", sa.BigInteger, nullable=False),
    sa.Column("microcredits", sa.BigInteger, nullable=False),
    sa.Column("nano", sa.BigInteger, nullable=False),
    sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
)
"""What was paid on one of the node's channels, for one request or one other purpose. ``bill``: the usage row's id; else
that of the gateway's run. An amount is ``microcredits`` and ``nano`` (0 to 999,999,999) billionths of one."""
