"""The first schema: users, keys, double-entry money, reservations, usage.

Revision 0001. Written out in full, so that later changes of ``models`` do not change history.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.String(64)
_NAME = sa.String(255)


def upgrade() -> None:
    """Create everything, with the built-in accounts and the local user."""
    _create_people()
    _create_money()
    _create_requests()
    _protect("transactions")
    _protect("postings")
    op.execute("INSERT INTO accounts (id, user_id, balance, reserved) VALUES ('revenue', NULL, 0, 0)")
    op.execute("INSERT INTO accounts (id, user_id, balance, reserved) VALUES ('funding', NULL, 0, 0)")
    op.execute("INSERT INTO users (id, name, disabled, created_at_ms) VALUES ('local', 'local', FALSE, 0)")
    op.execute("INSERT INTO accounts (id, user_id, balance, reserved) VALUES ('user:local', 'local', 0, 0)")


def _create_people() -> None:
    op.create_table(
        "users",
        sa.Column("id", _ID, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("disabled", sa.Boolean, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", _ID, nullable=False),
        sa.Column("user_id", _ID, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("secret_sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("revoked_at_ms", sa.BigInteger, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_api_keys_user_id"),
    )
    op.create_index("ix_api_keys_user_id", "api_keys", ["user_id"])


def _create_money() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", _ID, nullable=False),
        sa.Column("user_id", _ID, nullable=True),
        sa.Column("balance", sa.BigInteger, nullable=False),
        sa.Column("reserved", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_accounts"),
        sa.UniqueConstraint("user_id", name="uq_accounts_user_id"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_accounts_user_id"),
        sa.CheckConstraint("reserved >= 0", name=op.f("ck_accounts_reserved")),
        sa.CheckConstraint("user_id IS NULL OR balance >= reserved", name=op.f("ck_accounts_covered")),
    )
    op.create_table(
        "transactions",
        sa.Column("id", _ID, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("reference", _NAME, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_transactions"),
        sa.UniqueConstraint("kind", "reference", name="uq_transactions_kind_reference"),
    )
    op.create_table(
        "postings",
        sa.Column("transaction_id", _ID, nullable=False),
        sa.Column("account_id", _ID, nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("transaction_id", "account_id", name="pk_postings"),
        sa.ForeignKeyConstraint(["transaction_id"], ["transactions.id"], name="fk_postings_transaction_id"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_postings_account_id"),
        sa.CheckConstraint("amount <> 0", name=op.f("ck_postings_amount")),
    )
    op.create_index("ix_postings_account_id", "postings", ["account_id"])


def _create_requests() -> None:
    op.create_table(
        "reservations",
        sa.Column("id", _ID, nullable=False),
        sa.Column("instance", _ID, nullable=False),
        sa.Column("account_id", _ID, nullable=False),
        sa.Column("user_id", _ID, nullable=False),
        sa.Column("key_id", _ID, nullable=True),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("endpoint", sa.String(32), nullable=False),
        sa.Column("model", _NAME, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("input_price", sa.BigInteger, nullable=False),
        sa.Column("output_price", sa.BigInteger, nullable=False),
        sa.Column("microcredits", sa.BigInteger, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_reservations"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_reservations_account_id"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_reservations_user_id"),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name="fk_reservations_key_id"),
        sa.CheckConstraint("microcredits >= 0", name=op.f("ck_reservations_microcredits")),
    )
    op.create_index("ix_reservations_instance", "reservations", ["instance"])
    op.create_index("ix_reservations_updated_at_ms", "reservations", ["updated_at_ms"])
    op.create_table(
        "usages",
        sa.Column("id", _ID, nullable=False),
        sa.Column("user_id", _ID, nullable=False),
        sa.Column("key_id", _ID, nullable=True),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("endpoint", sa.String(32), nullable=False),
        sa.Column("model", _NAME, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("microcredits", sa.BigInteger, nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_usages"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_usages_user_id"),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name="fk_usages_key_id"),
    )
    op.create_index("ix_usages_user_id_created_at_ms", "usages", ["user_id", "created_at_ms"])


def _protect(table: str) -> None:
    """Make a table append-only."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            f"CREATE FUNCTION refuse_change_{table}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{table} is append-only'; END $$"
        )
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table} "
            f"FOR EACH ROW EXECUTE FUNCTION refuse_change_{table}()"
        )
        return
    for action in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER {table}_no_{action.lower()} BEFORE {action} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )
