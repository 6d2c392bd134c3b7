"""Access tokens: JWTs (RFC 7519, RFC 9068) signed with Ed25519, and the keys that all gateways of a database share.

Invariants:
1. A token is taken only with the one algorithm, the type, the issuer and the audience of this file, inside its time,
   and signed by a key from the database that its ``kid`` names. It says who and which session, not what they may do.
2. Keys are made by whoever signs first, replaced when they are ``ROTATE_MS`` old, and verify until no token of theirs
   can be valid any more. A revoked one is gone from every gateway ``FRESH_SECONDS`` later.
3. Private keys are sealed. A gateway with another key file signs with a key of its own, and all verify all.
"""

import base64
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
import trio

from gateway import audit
from gateway.audit import Actor
from gateway.db.identity import signing_keys
from gateway.db.session import Database
from gateway.db.stamps import new_id, now_ms
from gateway.identity.vault import Vault

AUDIENCE = "rios-gateway"
ALGORITHM = "EdDSA"
ROTATE_MS = 30 * 24 * 3600 * 1000
SECONDS_MAX = 3600
FRESH_SECONDS = 5.0
_TYPE = "at+jwt"
_LEEWAY_SECONDS = 5
_RETIRED_MS = ROTATE_MS + 2 * 1000 * SECONDS_MAX
_CHARACTERS_MAX = 4096
_REQUIRED = ("iss", "aud", "sub", "sid", "jti", "iat", "nbf", "exp")
_UNKNOWN_SECONDS = 1.0
"""Tokens of unknown keys make a gateway look for new keys at most this often."""


class Refused(Exception):
    """A token that is not taken; the text is for the security log."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a good token says."""

    user_id: str
    session_id: str
    expires_at_ms: int
    signer_id: str


@dataclass(frozen=True, slots=True)
class _Ring:
    """The keys as of ``read_at`` (trio's clock): public ones by id, and the one to sign with."""

    public: Mapping[str, Any] = field(default_factory=dict)
    signing_id: str = ""
    private: Any = None
    signing_until_ms: int = 0
    read_at: float = float("-inf")


class Tokens:
    """Issues and checks. ``in_thread`` runs blocking database calls."""

    def __init__(
        self, database: Database, vault: Vault, in_thread: Callable[..., Any], *, issuer: str, seconds: int
    ) -> None:
        assert seconds <= SECONDS_MAX
        self.seconds = seconds
        self._database = database
        self._vault = vault
        self._in_thread = in_thread
        self._issuer = issuer
        self._ring = _Ring()
        self._reading = trio.Lock()

    async def issue(self, user_id: str, session_id: str) -> str:
        """A token for a session."""
        import jwt  # noqa: PLC0415 - 9 MB with cryptography, when somebody signs in

        ring = await self._fresh(FRESH_SECONDS)
        if ring.private is None or ring.signing_until_ms <= now_ms():
            await self._in_thread(add_key, self._database, self._vault)
            ring = await self._fresh(0)
        now = int(time.time())
        claims = {
            "iss": self._issuer,
            "aud": AUDIENCE,
            "sub": user_id,
            "sid": session_id,
            "jti": secrets.token_hex(16),
            "iat": now,
            "nbf": now,
            "exp": now + self.seconds,
        }
        headers = {"kid": ring.signing_id, "typ": _TYPE}
        return jwt.encode(claims, ring.private, ALGORITHM, headers)

    async def check(self, token: str) -> Claims:
        """What a token says. Raises Refused, or LocalError if the keys cannot be read."""
        import jwt  # noqa: PLC0415

        if len(token) > _CHARACTERS_MAX:
            raise Refused("it is too long")
        try:
            header = jwt.get_unverified_header(token)
            key = await self._key(header)
            claims = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=self._issuer,
                leeway=_LEEWAY_SECONDS,
                options={"require": list(_REQUIRED), "strict_aud": True},
            )
        except (jwt.InvalidTokenError, ValueError, RecursionError) as error:
            raise Refused(f"{type(error).__name__}: {error}"[:200]) from error
        user_id, session_id = claims["sub"], claims["sid"]
        if not isinstance(user_id, str) or not isinstance(session_id, str):
            raise Refused("sub and sid are not texts")
        return Claims(user_id, session_id, 1000 * (int(claims["exp"]) + _LEEWAY_SECONDS), header["kid"])

    async def public_keys(self) -> list[dict[str, str]]:
        """The keys that verify now, as JSON Web Keys (RFC 8037)."""
        ring = await self._fresh(FRESH_SECONDS)
        return [_jwk(key_id, key.public_bytes_raw()) for key_id, key in ring.public.items()]

    async def _key(self, header: Mapping[str, Any]) -> Any:  # noqa: ANN401 - cryptography's own type, loaded late
        key_id = header.get("kid")
        if header.get("alg") != ALGORITHM or header.get("typ") != _TYPE or not isinstance(key_id, str):
            raise Refused(f"its header is {dict(header)!r:.120}")
        ring = await self._fresh(FRESH_SECONDS)
        if key_id not in ring.public:
            # Another gateway may have made it just now; who makes keys up waits, and costs no more reads than one.
            await trio.sleep_until(ring.read_at + _UNKNOWN_SECONDS)
            ring = await self._fresh(_UNKNOWN_SECONDS)
        if key_id not in ring.public:
            raise Refused(f"its key is {key_id!r:.60}, which is unknown")
        return ring.public[key_id]

    async def _fresh(self, seconds: float) -> _Ring:
        """The keys, read again if they are older than that."""
        async with self._reading:
            if trio.current_time() - self._ring.read_at >= seconds:
                asked = trio.current_time()
                public, (key_id, private, until_ms) = await self._in_thread(read_keys, self._database, self._vault)
                self._ring = _Ring(public, key_id, private, until_ms, asked)
            return self._ring


def read_keys(database: Database, vault: Vault) -> tuple[Mapping[str, Any], tuple[str, Any, int]]:
    """Public keys that verify now, and the newest key this vault can open: id, private key, until when it signs.

    Blocking.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

    good = signing_keys.c.revoked_at_ms.is_(None), signing_keys.c.created_at_ms > now_ms() - _RETIRED_MS
    query = sa.select(signing_keys).where(*good).order_by(signing_keys.c.created_at_ms, signing_keys.c.id)
    with database.read() as connection:
        rows = connection.execute(query).all()
    public = {row.id: Ed25519PublicKey.from_public_bytes(row.public_key) for row in rows}
    own = [row for row in rows if vault.has_sealed(row.private_key)]
    if not own:
        return public, ("", None, 0)
    newest = own[-1]
    private = Ed25519PrivateKey.from_private_bytes(vault.unseal(newest.private_key, _purpose(newest.id)))
    return public, (newest.id, private, newest.created_at_ms + ROTATE_MS)


def add_key(database: Database, vault: Vault) -> str:
    """Make a new key, which signs from now on; its id. Blocking."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    key, key_id = Ed25519PrivateKey.generate(), new_id()
    row = {
        "id": key_id,
        "public_key": key.public_key().public_bytes_raw(),
        "private_key": vault.seal(key.private_bytes_raw(), _purpose(key_id)),
        "created_at_ms": now_ms(),
        "revoked_at_ms": None,
    }
    with database.write() as connection:
        connection.execute(sa.insert(signing_keys), row)
    return key_id


def revoke_keys(database: Database, actor: Actor) -> int:
    """Revoke every key: all access tokens end within seconds; refreshing gives new ones. Blocking."""
    with database.write() as connection:
        valid = sa.update(signing_keys).where(signing_keys.c.revoked_at_ms.is_(None))
        revoked = connection.execute(valid.values(revoked_at_ms=now_ms())).rowcount
        audit.record(connection, actor, "signing_keys.revoked", "", detail={"count": revoked})
        return revoked


def has_others(database: Database, vault: Vault) -> bool:
    """Whether gateways with another key file sign for this database, too. Blocking."""
    query = sa.select(signing_keys.c.private_key).where(signing_keys.c.created_at_ms > now_ms() - _RETIRED_MS)
    with database.read() as connection:
        return not all(map(vault.has_sealed, connection.execute(query).scalars()))


def forget(database: Database) -> None:
    """Drop keys that verify nothing any more. Blocking."""
    with database.write() as connection:
        connection.execute(sa.delete(signing_keys).where(signing_keys.c.created_at_ms < now_ms() - _RETIRED_MS))


def _purpose(key_id: str) -> str:
    return f"signing-key:{key_id}"


def _jwk(key_id: str, raw: bytes) -> dict[str, str]:
    x = base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")
    return {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": key_id, "alg": ALGORITHM, "use": "sig"}
