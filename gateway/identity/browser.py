"""Browsers: the session's cookie, the token that unsafe requests show with it, what other sites may not do. Pure.

A browser sends its cookies, and reaches a gateway that needs no key, on behalf of whatever page it shows. So:

1. The cookie is HttpOnly and SameSite=Lax; over TLS it is also Secure and bound to the host (``__Host-``).
2. With the cookie, every method but GET, HEAD and OPTIONS needs ``x-csrf-token``: an HMAC under the cookie's own
   secret, which pages of the gateway know and other sites cannot.
3. Unsafe requests that a browser says another site sent (``Sec-Fetch-Site``, else ``Origin``) are refused, and so are
   WebSockets, whose handshakes cannot carry a token.
4. Where no key is needed, requests must name the gateway by an address, or by a name that nobody else can point at it
   (DNS rebinding). All of them: a page reads its own site, as which it takes the gateway then, by requests that look
   like any program's.
"""

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import Response

CSRF_HEADER = "x-csrf-token"
_SESSION, _FLOW = "rios_session", "rios_oidc"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_FLOW_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a request shows of who sends it. ``method``: WEBSOCKET for a handshake. ``site``: ``Sec-Fetch-Site``."""

    authorization: str = ""
    session: str = ""
    csrf: str = ""
    method: str = "GET"
    host: str = ""
    origin: str = ""
    site: str = ""

    @property
    def is_safe(self) -> bool:
        """Whether it changes nothing, by its method."""
        return self.method in _SAFE


@dataclass(frozen=True, slots=True)
class Home:
    """The gateway's own address as browsers see it, if the settings name it (``https://gateway.example``)."""

    url: str = ""

    def is_secure(self, request: HTTPConnection) -> bool:
        """Whether browsers reach the gateway over TLS, its own or a proxy's."""
        return self.url.startswith("https:") or request.scope["scheme"] in ("https", "wss")

    def session_of(self, request: HTTPConnection) -> str:
        """The session cookie's value; empty for none."""
        return request.cookies.get(_cookie(_SESSION, self.is_secure(request)), "")

    def flow_of(self, request: HTTPConnection) -> str:
        """The value of the cookie of a sign-in elsewhere that is under way."""
        return request.cookies.get(_cookie(_FLOW, self.is_secure(request)), "")

    def set_session(self, request: HTTPConnection, response: Response, value: str, seconds: int) -> None:
        """Let the browser keep a session."""
        self._set(request, response, _SESSION, value, seconds)

    def set_flow(self, request: HTTPConnection, response: Response, value: str) -> None:
        """Let the browser keep what it needs when it comes back from another provider; empty: no longer."""
        self._set(request, response, _FLOW, value, _FLOW_SECONDS if value else 0)

    def drop_session(self, request: HTTPConnection, response: Response) -> None:
        """Let the browser forget its session."""
        self._set(request, response, _SESSION, "", 0)

    def _set(self, request: HTTPConnection, response: Response, name: str, value: str, seconds: int) -> None:
        secure = self.is_secure(request)
        name = _cookie(name, secure)
        response.set_cookie(name, value, max_age=seconds, path="/", secure=secure, httponly=True, samesite="lax")

    def credentials_of(self, request: HTTPConnection) -> Credentials:
        """What a request, or a WebSocket's handshake, shows."""
        # Every request comes by here: one pass over its headers; the first of a name counts.
        headers = dict(reversed(request.scope["headers"]))

        def header(name: bytes) -> str:
            value: bytes = headers.get(name, b"")
            return value.decode("latin-1")

        return Credentials(
            authorization=header(b"authorization"),
            session=self.session_of(request) if b"cookie" in headers else "",
            csrf=header(b"x-csrf-token"),
            method=request.scope.get("method", "WEBSOCKET"),
            host=header(b"host"),
            origin=header(b"origin"),
            site=header(b"sec-fetch-site"),
        )

    def is_foreign(self, shown: Credentials) -> bool:
        """Whether a browser says that another site is behind a request."""
        if shown.site:
            return shown.site not in ("same-origin", "none")
        theirs = _authority(shown.origin)
        ours = (shown.host.lower(), _authority(self.url))
        return bool(shown.origin) and (not theirs or theirs not in ours)

    def is_rebindable(self, shown: Credentials) -> bool:
        """Whether a request came by a name that may be anybody's who lets it resolve to this machine."""
        host = _host(f"//{shown.host}")
        ours = ("localhost", _host(self.url))
        return not host or not (_is_address(host) or host in ours or host.endswith(".localhost"))


def csrf_of(session_cookie: str) -> str:
    """The token that goes with a session cookie, the same on every gateway."""
    return hmac.new(session_cookie.encode("utf-8", "surrogatepass"), b"rios csrf", hashlib.sha256).hexdigest()


def has_csrf(shown: Credentials) -> bool:
    """Whether a request shows the token of its session cookie."""
    return hmac.compare_digest(csrf_of(shown.session).encode(), shown.csrf.encode("utf-8", "surrogatepass"))


def local_path(wanted: str) -> str:
    """Where to go after a sign-in: a path of this gateway, whatever was asked for."""
    plain = wanted.isascii() and wanted.isprintable() and "\\" not in wanted
    return wanted if plain and wanted.startswith("/") and not wanted.startswith("//") else "/"


def _cookie(name: str, secure: bool) -> str:
    return f"__Host-{name}" if secure else name


def _authority(url: str) -> str:
    """``host:port`` as the Host header has it; empty for an origin that has none (``null``)."""
    return url.partition("://")[2].partition("/")[0].lower()


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
