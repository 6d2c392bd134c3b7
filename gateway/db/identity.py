"""The tables of identity: what users prove themselves with, and what they were given for it.

Invariants: no column holds what somebody could sign in with (passwords are argon2id hashes, tokens and codes sha256,
TOTP secrets and private keys sealed with the gateway's key file); a refresh token belongs to one session, and a session
to one user, for ever.
"""

import sqlalchemy as sa

from gateway.db.models import metadata

_Id = sa.String(64)

passwords = sa.Table(
    "passwords",
    metadata,
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), primary_key=True),
    sa.Column("hash", sa.String(255), nullable=False),
    sa.Column("changed_at_ms", sa.BigInteger, nullable=False),
)

second_factors = sa.Table(
    "second_factors",
    metadata,
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), primary_key=True),
    sa.Column("secret", sa.LargeBinary, nullable=False),
    sa.Column("confirmed_at_ms", sa.BigInteger, nullable=True),
    sa.Column("last_step", sa.BigInteger, nullable=False),
)
"""``secret``: sealed. ``confirmed_at_ms``: NULL until a first code was right. ``last_step``: the newest one used."""

recovery_codes = sa.Table(
    "recovery_codes",
    metadata,
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), primary_key=True),
    sa.Column("code_sha256", sa.LargeBinary(32), primary_key=True),
)
"""Those left: a code that was used is deleted."""

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("method", sa.String(16), nullable=False),
    sa.Column("cookie_sha256", sa.LargeBinary(32), nullable=True),
    sa.Column("address", sa.String(64), nullable=False),
    sa.Column("agent", sa.String(200), nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("seen_at_ms", sa.BigInteger, nullable=False),
    sa.Column("expires_at_ms", sa.BigInteger, nullable=False, index=True),
    sa.Column("revoked_at_ms", sa.BigInteger, nullable=True),
)
"""``cookie_sha256``: NULL for a session of tokens."""

refresh_tokens = sa.Table(
    "refresh_tokens",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("session_id", _Id, sa.ForeignKey("sessions.id"), nullable=False, index=True),
    sa.Column("secret_sha256", sa.LargeBinary(32), nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("used_at_ms", sa.BigInteger, nullable=True),
)
"""Used ones stay as long as their session, so that a second use is seen."""

signing_keys = sa.Table(
    "signing_keys",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("public_key", sa.LargeBinary(32), nullable=False),
    sa.Column("private_key", sa.LargeBinary, nullable=False),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.Column("revoked_at_ms", sa.BigInteger, nullable=True),
)
"""Ed25519 keys that access tokens are signed with. ``private_key``: sealed."""

external_identities = sa.Table(
    "external_identities",
    metadata,
    sa.Column("issuer", sa.String(255), primary_key=True),
    sa.Column("subject", sa.String(255), primary_key=True),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
)

invites = sa.Table(
    "invites",
    metadata,
    sa.Column("id", _Id, primary_key=True),
    sa.Column("user_id", _Id, sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("secret_sha256", sa.LargeBinary(32), nullable=False),
    sa.Column("expires_at_ms", sa.BigInteger, nullable=False, index=True),
)
"""One-time permissions to set a password; deleted when used."""

guesses = sa.Table(
    "guesses",
    metadata,
    sa.Column("subject", sa.String(80), primary_key=True),
    sa.Column("busy_until_ms", sa.BigInteger, nullable=False, index=True),
)
"""Per account and address: when all its attempts will have been forgotten."""
