"""Who may do what: the one place that turns a request's credentials into a principal, or refuses.

Three kinds of credentials: API keys and access tokens as ``Authorization: Bearer``, and the session cookie of browsers.
Owns the cache of what was authenticated. Invariants: secrets are kept and compared only as sha256; a revoked key or
session, a disabled user or another role is seen at most ``CACHE_SECONDS`` later, and ends what runs already
(``standing``); the cache is bounded; a cookie changes nothing without its CSRF token, and a gateway that needs no key
changes nothing for other sites, and tells them nothing.
"""

import hmac
import logging
import re
from collections import OrderedDict
from dataclasses import dataclass, replace

import trio

from gateway.accounts import LOCAL, Accounts, Principal, digest_of
from gateway.db.stamps import now_ms
from gateway.errors import ApiError
from gateway.identity import sessions
from gateway.identity.browser import CSRF_HEADER, Credentials, Home, has_csrf
from gateway.identity.tokens import Refused, Tokens
from gateway.standing import Standing
from gateway.till import Till

CACHE_SECONDS = 5.0
_CACHE_KEYS_MAX = 10_000
_KEY = re.compile(r"rios_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_TOKEN = re.compile(r"eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*")

_security = logging.getLogger("rios.security")


@dataclass(frozen=True, slots=True)
class _Known:
    digest: bytes
    principal: Principal
    until: float


class Guard:
    """Authenticates requests."""

    def __init__(self, accounts: Accounts, till: Till, tokens: Tokens, home: Home, *, require_key: bool) -> None:
        self._accounts = accounts
        self._till = till
        self._tokens = tokens
        self._home = home
        self._require_key = require_key
        self.standing = Standing(till)
        self._cache: OrderedDict[str, _Known] = OrderedDict()

    async def authenticate(self, shown: Credentials) -> Principal:
        """The principal behind a request.

        Raises ApiError ``unauthenticated`` or ``forbidden``, LocalError if the database is needed and down.
        """
        if shown.authorization:
            return await self._by_bearer(shown)
        if shown.session:
            principal = await self._by_cookie(shown)
            if principal is not None:
                return _allowed(principal)
        if not self._require_key:
            return self._local(shown)
        if shown.session:
            raise _unauthenticated("this session has ended", "sign in again")
        raise _unauthenticated("this server needs an API key")

    def forget(self, user_id: str) -> None:
        """Something of this user ended here: what is known of them is looked up again at once."""
        for name in [name for name, known in self._cache.items() if known.principal.user_id == user_id]:
            del self._cache[name]
        self.standing.look_soon()

    def refuse_foreign(self, shown: Credentials) -> None:
        """What another site made a browser send does not get in here. Raises ApiError ``forbidden``."""
        if self._home.is_foreign(shown):
            _security.warning("refused a request that another site (%.80r) made a browser send", shown.origin)
            raise ApiError("forbidden", "another site sent this request", "use this gateway's own pages, or an API key")

    async def _by_bearer(self, shown: Credentials) -> Principal:
        text = _bearer(shown.authorization)
        match = _KEY.fullmatch(text)
        if match is not None:
            return _allowed(await self._by_key(match[1], digest_of(text)))
        if _TOKEN.fullmatch(text):
            return _allowed(await self._by_token(text))
        if self._require_key:
            raise _unauthenticated("this is not an API key of RiOS")
        # Clients insist on sending some key; where none is needed, one that is not RiOS's claims nothing.
        return self._local(shown)

    async def _by_key(self, key_id: str, digest: bytes) -> Principal:
        known = self._recall(key_id)
        if known is not None:
            if not hmac.compare_digest(known.digest, digest):
                raise _unauthenticated("this API key is not valid")
            return known.principal
        principal = await self._till.in_thread(self._accounts.authenticate, key_id, digest)
        if principal is None:
            self._cache.pop(key_id, None)
            _security.info("refused the API key %s: unknown, revoked, expired or its secret is wrong", key_id)
            raise _unauthenticated("this API key is not valid")
        return self._remember(key_id, digest, principal)

    async def _by_token(self, token: str) -> Principal:
        digest = digest_of(token)
        known = self._recall(digest.hex())
        if known is not None:
            return known.principal
        try:
            claims = await self._tokens.check(token)
        except Refused as why:
            _security.info("refused an access token: %s", why)
            raise _unauthenticated("this access token is not valid", "refresh it, or sign in again") from why
        live = await self._till.in_thread(sessions.by_id, self._accounts.database, claims.session_id)
        if live is None or live.principal.user_id != claims.user_id:
            raise _unauthenticated("the session of this access token has ended", "sign in again")
        principal = replace(live.principal, signer_id=claims.signer_id, token_ends_at_ms=claims.expires_at_ms)
        return self._remember(digest.hex(), digest, principal, min(live.expires_at_ms, claims.expires_at_ms))

    async def _by_cookie(self, shown: Credentials) -> Principal | None:
        """The principal of a session that goes on. Raises ApiError ``forbidden`` for what a page may not have sent."""
        principal = await self._session(shown.session)
        if principal is not None and not shown.is_safe:
            self.refuse_foreign(shown)
            if shown.method != "WEBSOCKET" and not has_csrf(shown):
                _security.warning("refused a request of user %s without a CSRF token", principal.user_id)
                raise ApiError("forbidden", f"this needs the header {CSRF_HEADER}", "/v1/auth/me tells its value")
        return principal

    async def _session(self, cookie: str) -> Principal | None:
        digest = digest_of(cookie)
        known = self._recall(digest.hex())
        if known is not None:
            return known.principal
        live = await self._till.in_thread(sessions.by_cookie, self._accounts.database, cookie)
        if live is None:
            return None
        return self._remember(digest.hex(), digest, live.principal, live.expires_at_ms)

    def _local(self, shown: Credentials) -> Principal:
        """The user of requests without a key; pages of other sites neither change nor read anything."""
        if not shown.is_safe:
            self.refuse_foreign(shown)
        if self._home.is_rebindable(shown):
            hint = "use its address or localhost, name this host in gateway.identity_public_url, or send an API key"
            raise ApiError("forbidden", f"nobody may use this gateway without a key as {shown.host!r:.80}", hint)
        return LOCAL

    def _recall(self, name: str) -> _Known | None:
        known = self._cache.get(name)
        return known if known is not None and known.until > trio.current_time() else None

    def _remember(self, name: str, digest: bytes, principal: Principal, expires_at_ms: int | None = None) -> Principal:
        seconds = CACHE_SECONDS
        if expires_at_ms is not None:
            seconds = min(seconds, (expires_at_ms - now_ms()) / 1000)
        self._cache[name] = _Known(digest, principal, trio.current_time() + seconds)
        self._cache.move_to_end(name)
        if len(self._cache) > _CACHE_KEYS_MAX:
            self._cache.popitem(last=False)
        return principal


def _allowed(principal: Principal) -> Principal:
    if principal.disabled:
        raise ApiError("forbidden", f"the user {principal.user_name!r} is disabled", "ask the operator")
    return principal


def _bearer(authorization: str) -> str:
    scheme, _, secret = authorization.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise _unauthenticated("this server needs an API key")
    return secret.strip()


def _unauthenticated(message: str, hint: str = "send 'Authorization: Bearer rios_...'") -> ApiError:
    return ApiError("unauthenticated", message, hint)
