"""Signing in with another provider: OpenID Connect, authorization code flow with PKCE (RFC 7636), one provider.

Owns the flow: what the browser carries meanwhile, sealed, and what is believed of what comes back. Invariants:
1. What comes back belongs to the browser that was sent away: ``state`` is in its sealed cookie, ``nonce`` in the ID
   token, and the code is of no use without the verifier.
2. An ID token counts only if this provider signed it with an asymmetric algorithm of ``ALGORITHMS`` and a key of its
   JWKS, for this client, now; ``iss`` of the answer (RFC 9207) must be the provider, too: none stands in for another.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec

from config.errors import RiosError
from gateway.db.stamps import now_ms
from gateway.identity.provider import Kept, Metadata, Provider, decoded, fetch, read_keys, read_metadata, refused
from gateway.identity.vault import Vault

ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA")
_KEPT_SECONDS = 3600.0
_UNKNOWN_SECONDS = 30.0
"""ID tokens of unknown keys make the gateway ask for new keys this often."""
_FLOW_MS = 600_000
_LEEWAY_SECONDS = 60
_PURPOSE, _HALFWAY = "oidc flow", "oidc second factor"


class Flow(msgspec.Struct, kw_only=True, frozen=True):
    """A sign-in under way. ``linker``: the session of who only wants to link the identity."""

    state: str
    nonce: str
    verifier: str
    path: str
    linker: str
    expires_at_ms: int


class Halfway(msgspec.Struct, kw_only=True, frozen=True):
    """A user whom the provider vouched for, and whose second factor is still to come: as long as they are linked."""

    user_id: str
    issuer: str
    subject: str
    path: str
    expires_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Whom the provider vouches for. ``email``: only if the provider says that it is verified."""

    issuer: str
    subject: str
    name: str
    email: str | None


class _Answer(msgspec.Struct, frozen=True):
    """Of a token endpoint's answer, what is needed here."""

    id_token: str


F = TypeVar("F", Flow, Halfway)


class Oidc:
    """Sign-ins by one provider."""

    def __init__(self, provider: Provider, vault: Vault) -> None:
        self._provider = provider
        self._vault = vault
        self._metadata, self._keys = Kept(), Kept()

    async def begin(self, path: str, linker: str = "") -> tuple[str, str]:
        """Where to send the browser, and the cookie it shall bring back. Raises ApiError ``unavailable``."""
        metadata = await self._discover()
        flow = Flow(
            state=secrets.token_urlsafe(32),
            nonce=secrets.token_urlsafe(32),
            verifier=secrets.token_urlsafe(48),
            path=path,
            linker=linker,
            expires_at_ms=now_ms() + _FLOW_MS,
        )
        digest = hashlib.sha256(flow.verifier.encode("ascii")).digest()
        query = {
            "response_type": "code",
            "client_id": self._provider.client_id,
            "redirect_uri": self._provider.redirect_uri,
            "scope": self._provider.scopes,
            "state": flow.state,
            "nonce": flow.nonce,
            "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii"),
            "code_challenge_method": "S256",
        }
        joint = "&" if urlsplit(metadata.authorization_endpoint).query else "?"
        return f"{metadata.authorization_endpoint}{joint}{urlencode(query)}", self._sealed(flow, _PURPOSE)

    async def finish(self, answer: Mapping[str, str], cookie: str) -> tuple[Flow, Visitor]:
        """Who came back, given the query that the provider sent them with. Raises ApiError."""
        flow = self._flow(cookie)
        if flow is None or not hmac.compare_digest(flow.state.encode(), answer.get("state", "").encode()):
            raise refused("its state is not this browser's", "this is not the sign-in that this browser began")
        metadata = await self._discover()
        named = answer.get("iss")
        if (named is None and metadata.authorization_response_iss_parameter_supported) or (
            named is not None and named != self._provider.issuer
        ):
            raise refused(f"the answer's iss is {named!r:.80}", "this answer is not from the provider that was asked")
        if "error" in answer or "code" not in answer:
            why = answer.get("error", "no code")
            raise refused(f"the provider answered {why!r:.80}", "the provider did not let you in")
        id_token = await self._exchange(metadata, answer["code"], flow.verifier)
        return flow, _visitor(await self._claims(id_token, flow.nonce))

    def halfway(self, user_id: str, visitor: Visitor, path: str) -> str:
        """The cookie of who has only the second factor to show."""
        halfway = Halfway(
            user_id=user_id,
            issuer=visitor.issuer,
            subject=visitor.subject,
            path=path,
            expires_at_ms=now_ms() + _FLOW_MS,
        )
        return self._sealed(halfway, _HALFWAY)

    def halfway_of(self, cookie: str) -> Halfway:
        """Who brought it. Raises ApiError ``forbidden``."""
        found = self._unsealed(cookie, Halfway, _HALFWAY)
        if found is None:
            raise refused("no sign-in waits for a code", "no sign-in of this browser waits for a code")
        return found

    def _flow(self, cookie: str) -> Flow | None:
        return self._unsealed(cookie, Flow, _PURPOSE)

    def _sealed(self, value: Flow | Halfway, purpose: str) -> str:
        return base64.urlsafe_b64encode(self._vault.seal(msgspec.json.encode(value), purpose)).decode()

    def _unsealed(self, cookie: str, kind: type[F], purpose: str) -> F | None:
        try:
            data = self._vault.unseal(base64.urlsafe_b64decode(cookie.encode("ascii")), purpose)
            found = msgspec.json.decode(data, type=kind)
        except (RiosError, msgspec.MsgspecError, binascii.Error, ValueError):
            return None
        return found if found.expires_at_ms > now_ms() else None

    async def _exchange(self, metadata: Metadata, code: str, verifier: str) -> str:
        """The ID token for a code (RFC 6749, section 4.1.3)."""
        provider = self._provider
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": provider.redirect_uri,
            "client_id": provider.client_id,
            "code_verifier": verifier,
        }
        basic = None
        if provider.secret and "client_secret_basic" in metadata.token_endpoint_auth_methods_supported:
            basic = (provider.client_id, provider.secret)
        elif provider.secret:
            form["client_secret"] = provider.secret
        data = await fetch(metadata.token_endpoint, form, basic)
        answer: _Answer = decoded(data, _Answer, "its token endpoint")
        return answer.id_token

    async def _claims(self, id_token: str, nonce: str) -> Mapping[str, Any]:
        """What an ID token says (OpenID Connect Core, section 3.1.3.7)."""
        import jwt  # noqa: PLC0415 - only when somebody signs in

        try:
            header = jwt.get_unverified_header(id_token)
            if header.get("alg") not in ALGORITHMS:
                raise jwt.InvalidAlgorithmError(f"algorithm {header.get('alg')!r:.20}")
            key = await self._key(header.get("kid"), header["alg"])
            claims: Mapping[str, Any] = jwt.decode(
                id_token,
                key,
                algorithms=[header["alg"]],
                audience=self._provider.client_id,
                issuer=self._provider.issuer,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["iss", "aud", "sub", "iat", "exp", "nonce"]},
            )
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise refused(
                f"ID token: {type(error).__name__}: {error}", "the provider's ID token is not valid"
            ) from error
        audience = claims["aud"]
        several = isinstance(audience, list) and len(audience) > 1
        if claims.get("azp", self._provider.client_id) != self._provider.client_id or (several and "azp" not in claims):
            raise refused(f"ID token for {audience!r:.80}", "the provider's ID token is for somebody else")
        if not hmac.compare_digest(str(claims["nonce"]).encode("utf-8", "surrogatepass"), nonce.encode()):
            raise refused("ID token with another nonce", "the provider's ID token is not of this sign-in")
        return claims

    async def _key(self, key_id: object, algorithm: str) -> Any:  # noqa: ANN401 - jwt.PyJWK, loaded late
        found = _pick(await self._key_set(_KEPT_SECONDS), key_id, algorithm)
        found = found or _pick(await self._key_set(_UNKNOWN_SECONDS), key_id, algorithm)
        if found is None:
            raise refused(f"ID token of the unknown key {key_id!r:.60}", "the provider's ID token is not valid")
        return found

    async def _key_set(self, seconds: float) -> list[Any]:
        metadata = await self._discover()
        keys: list[Any] = await self._keys.get(seconds, partial(read_keys, metadata.jwks_uri))
        return keys

    async def _discover(self) -> Metadata:
        metadata: Metadata = await self._metadata.get(_KEPT_SECONDS, partial(read_metadata, self._provider.issuer))
        return metadata


def _pick(keys: list[Any], key_id: object, algorithm: str) -> Any:  # noqa: ANN401 - a jwt.PyJWK
    """The key an ID token names, or the only one that fits if it names none."""
    fitting = [key for key in keys if key.algorithm_name == algorithm and key.public_key_use in (None, "sig")]
    if key_id is not None:
        fitting = [key for key in fitting if key.key_id == key_id]
    return fitting[0] if len(fitting) == 1 else None


def _visitor(claims: Mapping[str, Any]) -> Visitor:
    subject, email = claims["sub"], claims.get("email")
    if not isinstance(subject, str) or not 0 < len(subject) <= 255:
        raise refused("ID token without a usable sub", "the provider's ID token is not valid")
    verified = isinstance(email, str) and claims.get("email_verified") is True
    names = (claims.get(name) for name in ("preferred_username", "name", "email"))
    name = next((text for text in names if isinstance(text, str) and text), subject)
    return Visitor(issuer=claims["iss"], subject=subject, name=name, email=email if verified else None)
