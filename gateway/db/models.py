"""The tables of the accounts database.

Owns their shape for queries; ``migrations`` makes them, and a test holds both equal. Times are unix milliseconds,
money is integer microcredits.

Invariants, the first four held by the database itself:
1. ``transactions`` and ``postings`` are append-only (triggers refuse UPDATE and DELETE).
2. A transaction reference is unique per kind, so no money event counts twice.
3. ``reserved`` is never negative, and a user's balance is never below what is reserved of it.
4. A usage row is unique per request; what is charged after a recovery (``gateway/books.py``) has a second one.
5. The postings of a transaction add up to 0, and an account's ``balance`` is the sum of its postings.
"""

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

REVENUE = "revenue"
"""The account that charges flow to."""
FUNDING = "funding"
"""The account that credits come from; its balance is minus all that was ever paid in."""

LOCAL_USER = "local"
"""The built-in user that requests without a key belong to where keys are not required. It pays nothing."""

_Id = sa.String(64)
_Name = sa.String(255)

users = sa.Table(
    "users",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("name", _Name, nullable=False, unique=True),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("role", sa.String(16), nullable=False, server_default="developer"),
    sa.Column("email", _Name, nullable=True, index=True, unique=True),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("name", _Name, nullable=False),
    sa.Column("secret_sha256", sa.LargeBinary(32), nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("revoked_at_ms", sa.BigInteger, nullable=True),
    sa.Column("scopes", sa.String(1024), nullable=False, server_default=""),
    sa.Column("expires_at_ms", sa.BigInteger, nullable=True),
    sa.Column("cache", sa.Boolean, nullable=False, server_default=sa.false()),
)

accounts = sa.Table(
    "accounts",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=True, unique=True),
    sa.Column("balance", sa.BigInteger, nullable=False),
    sa.Column("reserved", sa.BigInteger, nullable=False),
    sa.CheckConstraint("reserved >= 0", name="reserved"),
    sa.CheckConstraint("user_id IS NULL OR balance >= reserved", name="covered"),
)

transactions = sa.Table(
    "transactions",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("reference", _Name, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("kind", "reference"),
)

postings = sa.Table(
    "postings",
    metadata,
    sa.Column("transaction_id", _Id, sa.ForeignKey("transactions.id"), primary_key=True),
    sa.Column("account_id", _Id, sa.ForeignKey("accounts.id"), primary_key=True),
    sa.Column("amount", sa.BigInteger, nullable=False),
    sa.CheckConstraint("amount <> 0", name="amount"),
    sa.Index("ix_postings_account_id_transaction_id", "account_id", "transaction_id"),
)

reservations = sa.Table(
    "reservations",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("instance", _Id, nullable=False),
    sa.Column("account_id", _Id, sa.ForeignKey("accounts.id"), nullable=False),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False),
    sa.Column("key_id", _Id, sa.ForeignKey("api_keys.id"), nullable=True),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Column("endpoint", sa.String(32), nullable=False),
    sa.Column("model", _Name, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("input_price", sa.BigInteger, nullable=False),
    sa.Column("output_price", sa.BigInteger, nullable=False),
    sa.Column("microcredits", sa.BigInteger, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
    sa.Column("idempotency_id", _Id, nullable=True),
    sa.CheckConstraint("microcredits >= 0", name="microcredits"),
    sqlite_with_rowid=False,
)
"""One row for each running request, written and deleted again within its answer: an index costs more than it saves."""

_keyed = reservations.c.idempotency_id.is_not(None)
sa.Index("ix_reservations_idempotency_id", reservations.c.idempotency_id, sqlite_where=_keyed, postgresql_where=_keyed)

usages = sa.Table(
    "usages",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False),
    sa.Column("key_id", _Id, sa.ForeignKey("api_keys.id"), nullable=True),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Column("endpoint", sa.String(32), nullable=False),
    sa.Column("model", _Name, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("microcredits", sa.BigInteger, nullable=False),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False, index=True),
    sa.Column("input_price", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("output_price", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("swarm_microcredits", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("swarm_nano", sa.BigInteger, nullable=False, server_default="0"),
    sa.Index("ix_usages_user_id_created_at_ms", "user_id", "created_at_ms"),
    sa.Index("ix_usages_user_id_id", "user_id", "id"),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("account_id", _Id, sa.ForeignKey("accounts.id"), nullable=False),
    sa.Column("body_sha256", sa.LargeBinary(32), nullable=False),
    sa.Column("holder", sa.String(96), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("route", sa.String(16), nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("content_type", sa.String(64), nullable=False),
    sa.Column("answer", sa.LargeBinary, nullable=True),
    sa.Column("answer_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False, index=True),
    sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
    sa.Index("ix_idempotency_account_id_answer_bytes", "account_id", "answer_bytes"),
)
"""Requests under a key. ``holder``: which gateway generates the answer now, empty for none. ``route``: empty until its
generation was reserved for. ``status``: 0 until it is answered; ``answer`` is compressed."""
