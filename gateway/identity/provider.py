"""The other provider: what the settings say of it, what it publishes, and asking it (OpenID Connect Discovery).

Invariants: nothing is fetched over plain HTTP except from this machine, nothing is redirected, no answer is larger
than ``ANSWER_BYTES_MAX`` or slower than ``SECONDS_MAX``; what it publishes is read by one at a time and kept; a
provider that failed is left alone for a moment, so that it cannot hold up everybody who wants to sign in.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec
import trio

from config.errors import ConfigError
from gateway.errors import ApiError

ANSWER_BYTES_MAX = 1 << 20
SECONDS_MAX = 10.0
_FAILED_SECONDS = 3.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_security = logging.getLogger("rios.security")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """What the settings say. ``secret``: empty for a public client."""

    issuer: str
    client_id: str
    secret: str = field(repr=False)
    redirect_uri: str
    scopes: str


class Metadata(msgspec.Struct, frozen=True):
    """Of OpenID Connect Discovery, what is needed here."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    authorization_response_iss_parameter_supported: bool = False
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)


class Kept:
    """Something of the provider's: read by one at a time, kept, and not asked for again right after a failure."""

    def __init__(self) -> None:
        self._value: Any = None
        self._read_at = self._failed_at = float("-inf")
        self._reading = trio.Lock()

    async def get(self, seconds: float, read: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401
        """What ``read`` said at most ``seconds`` ago. Raises ApiError."""
        async with self._reading:
            now = trio.current_time()
            if now - self._read_at >= seconds:
                if now - self._failed_at < _FAILED_SECONDS:
                    raise _unavailable()
                try:
                    self._value, self._read_at = await read(), now
                except ApiError:
                    self._failed_at = trio.current_time()
                    raise
            return self._value


def check_provider(provider: Provider) -> Provider:
    """Raises ConfigError for settings that cannot be right."""
    if not provider.client_id:
        raise ConfigError("config", "gateway.oidc_issuer is set without gateway.oidc_client_id")
    if "openid" not in provider.scopes.split():
        raise ConfigError("config", "gateway.oidc_scopes lacks openid", 'e.g. "openid email profile"')
    if not is_trustworthy(provider.issuer):
        hint = "write it as the provider does, https://..."
        raise ConfigError("config", f"gateway.oidc_issuer {provider.issuer!r:.80} is not an https address", hint)
    return provider


def is_trustworthy(url: str) -> bool:
    """Whether nobody on the way can read or answer."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.scheme == "https" or _is_loopback(parts.scheme, parts.hostname))
    except ValueError:
        return False


def _is_loopback(scheme: str, host: str | None) -> bool:
    return scheme == "http" and host in _LOOPBACK


async def read_metadata(issuer: str) -> Metadata:
    """What it publishes of itself. Raises ApiError."""
    url = f"{issuer.rstrip('/')}/.well-known/openid-configuration"
    found: Metadata = decoded(await fetch(url), Metadata, url)
    if found.issuer != issuer:
        raise broken(f"{url} is of {found.issuer!r:.80}, not of gateway.oidc_issuer")
    for each in (found.authorization_endpoint, found.token_endpoint, found.jwks_uri):
        if not is_trustworthy(each):
            raise broken(f"{each:.80} is neither https nor on this machine")
    return found


async def read_keys(url: str) -> list[Any]:
    """Its public keys (jwt.PyJWK). Raises ApiError."""
    import jwt  # noqa: PLC0415

    try:
        return list(jwt.PyJWKSet.from_json((await fetch(url)).decode()).keys)
    except (jwt.PyJWTError, ValueError, AttributeError, TypeError) as error:
        raise broken("its keys cannot be read", error) from error


async def fetch(url: str, form: Mapping[str, str] | None = None, basic: tuple[str, str] | None = None) -> bytes:
    """An answer's body. Raises ApiError ``unavailable``, or ``forbidden`` if the provider refuses a form."""
    import httpx  # noqa: PLC0415 - only when somebody signs in

    body = b""
    try:
        with trio.fail_after(SECONDS_MAX):
            async with httpx.AsyncClient(timeout=SECONDS_MAX, follow_redirects=False) as http:
                method = "GET" if form is None else "POST"
                headers = {"accept": "application/json"}
                auth = None if basic is None else httpx.BasicAuth(*basic)
                async with http.stream(method, url, data=form, headers=headers, auth=auth) as answer:
                    async for part in answer.aiter_bytes():
                        body += part
                        if len(body) > ANSWER_BYTES_MAX:
                            raise broken(f"its answer is larger than {ANSWER_BYTES_MAX} bytes")
    except (httpx.HTTPError, httpx.InvalidURL, trio.TooSlowError) as error:
        raise broken(f"{url:.100} does not answer", error) from error
    if form is not None and 400 <= answer.status_code < 500:
        raise refused(
            f"the token endpoint answered {answer.status_code}: {body!r:.200}", "the provider took its word back"
        )
    if answer.status_code != 200:
        raise broken(f"{url:.100} answered {answer.status_code}")
    return body


def decoded(data: bytes, kind: type[Any], where: str) -> Any:  # noqa: ANN401
    """JSON as a struct. Raises ApiError."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise broken(f"{where} does not answer as OpenID Connect says", error) from error


def refused(why: str, message: str) -> ApiError:
    """Somebody is not let in; the reason is for the security log."""
    _security.warning("refused a sign-in by another provider: %s", why)
    return ApiError("forbidden", message, "begin again")


def broken(why: str, cause: Exception | None = None) -> ApiError:
    """The provider does not work."""
    _security.error("the provider of gateway.oidc_issuer: %s%s", why, f" ({cause})" if cause else "")
    return _unavailable()


def _unavailable() -> ApiError:
    return ApiError("unavailable", "the provider that signs you in does not work now", "try again later")
