"""How users prove who they are: passwords, second factors, sessions, tokens, keys, links to other providers.

Revision 0004.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_ID = sa.String(64)


def _column(name: str, kind: Any = sa.BigInteger, nullable: bool = False) -> "sa.Column[Any]":  # noqa: ANN401
    return sa.Column(name, kind, nullable=nullable)


def _table(name: str, key: tuple[str, ...], *columns: "sa.Column[Any]", owner: str = "users") -> None:
    """A table whose rows belong to a user, or to what ``owner`` names."""
    reference = f"{owner.removesuffix('s')}_id"
    op.create_table(
        name,
        *columns,
        sa.PrimaryKeyConstraint(*key, name=f"pk_{name}"),
        sa.ForeignKeyConstraint([reference], [f"{owner}.id"], name=f"fk_{name}_{reference}"),
    )


def upgrade() -> None:
    """Add the tables."""
    _proofs()
    _sessions()
    op.create_table(
        "signing_keys",
        _column("id", _ID),
        _column("public_key", sa.LargeBinary(32)),
        _column("private_key", sa.LargeBinary),
        _column("created_at_ms"),
        _column("revoked_at_ms", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_signing_keys"),
    )
    op.create_table(
        "guesses",
        _column("subject", sa.String(80)),
        _column("busy_until_ms"),
        sa.PrimaryKeyConstraint("subject", name="pk_guesses"),
    )
    op.create_index("ix_guesses_busy_until_ms", "guesses", ["busy_until_ms"])


def _proofs() -> None:
    _table(
        "passwords",
        ("user_id",),
        _column("user_id", _ID),
        _column("hash", sa.String(255)),
        _column("changed_at_ms"),
    )
    _table(
        "second_factors",
        ("user_id",),
        _column("user_id", _ID),
        _column("secret", sa.LargeBinary),
        _column("confirmed_at_ms", nullable=True),
        _column("last_step"),
    )
    _table(
        "recovery_codes",
        ("user_id", "code_sha256"),
        _column("user_id", _ID),
        _column("code_sha256", sa.LargeBinary(32)),
    )
    _table(
        "external_identities",
        ("issuer", "subject"),
        _column("issuer", sa.String(255)),
        _column("subject", sa.String(255)),
        _column("user_id", _ID),
        _column("created_at_ms"),
    )
    op.create_index("ix_external_identities_user_id", "external_identities", ["user_id"])
    _table(
        "invites",
        ("id",),
        _column("id", _ID),
        _column("user_id", _ID),
        _column("secret_sha256", sa.LargeBinary(32)),
        _column("expires_at_ms"),
    )
    op.create_index("ix_invites_user_id", "invites", ["user_id"])
    op.create_index("ix_invites_expires_at_ms", "invites", ["expires_at_ms"])


def _sessions() -> None:
    _table(
        "sessions",
        ("id",),
        _column("id", _ID),
        _column("user_id", _ID),
        _column("method", sa.String(16)),
        _column("cookie_sha256", sa.LargeBinary(32), nullable=True),
        _column("address", sa.String(64)),
        _column("agent", sa.String(200)),
        _column("created_at_ms"),
        _column("seen_at_ms"),
        _column("expires_at_ms"),
        _column("revoked_at_ms", nullable=True),
    )
    op.create_index("ix_sessions_user_id", "sessions", ["user_id"])
    op.create_index("ix_sessions_expires_at_ms", "sessions", ["expires_at_ms"])
    _table(
        "refresh_tokens",
        ("id",),
        _column("id", _ID),
        _column("session_id", _ID),
        _column("secret_sha256", sa.LargeBinary(32)),
        _column("created_at_ms"),
        _column("used_at_ms", nullable=True),
        owner="sessions",
    )
    op.create_index("ix_refresh_tokens_session_id", "refresh_tokens", ["session_id"])
