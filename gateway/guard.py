"""Who may do what: the one place that turns a request's credentials into a principal, or refuses.

Owns the cache of authenticated keys. Invariants: secrets are kept and compared only as sha256; a revoked key or a
disabled user is shut out at most ``CACHE_SECONDS`` later; the cache is bounded.
"""

import hmac
import re
from collections import OrderedDict
from dataclasses import dataclass

import trio

from gateway.accounts import LOCAL, Accounts, Principal, digest_of
from gateway.errors import ApiError
from gateway.till import Till

CACHE_SECONDS = 5.0
_CACHE_KEYS_MAX = 10_000
_KEY = re.compile(r"rios_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class _Known:
    digest: bytes
    principal: Principal
    until: float


class Guard:
    """Authenticates requests."""

    def __init__(self, accounts: Accounts, till: Till, *, require_key: bool) -> None:
        self._accounts = accounts
        self._till = till
        self._require_key = require_key
        self._cache: OrderedDict[str, _Known] = OrderedDict()

    async def authenticate(self, authorization: str) -> Principal:
        """The principal behind an ``Authorization`` header ("" if there was none).

        Raises ApiError ``unauthenticated`` or ``forbidden``, LocalError if the database is needed and down.
        """
        if not authorization and not self._require_key:
            return LOCAL
        match = _KEY.fullmatch(_bearer(authorization))
        if match is None:
            if not self._require_key:
                # Clients insist on sending some key; where none is needed, one that is not RiOS's claims nothing.
                return LOCAL
            raise _unauthenticated("this is not an API key of RiOS")
        key_id, digest = match[1], digest_of(match[0])
        known = self._cache.get(key_id)
        if known is not None and known.until > trio.current_time():
            if not hmac.compare_digest(known.digest, digest):
                raise _unauthenticated("this API key is not valid")
            return _allowed(known.principal)
        principal = await self._till.in_thread(self._accounts.authenticate, key_id, digest)
        if principal is None:
            self._cache.pop(key_id, None)
            raise _unauthenticated("this API key is not valid")
        self._remember(key_id, digest, principal)
        return _allowed(principal)

    def _remember(self, key_id: str, digest: bytes, principal: Principal) -> None:
        self._cache[key_id] = _Known(digest, principal, trio.current_time() + CACHE_SECONDS)
        self._cache.move_to_end(key_id)
        if len(self._cache) > _CACHE_KEYS_MAX:
            self._cache.popitem(last=False)


def _allowed(principal: Principal) -> Principal:
    if principal.disabled:
        raise ApiError("forbidden", f"the user {principal.user_name!r} is disabled", "ask the operator")
    return principal


def _bearer(authorization: str) -> str:
    scheme, _, secret = authorization.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise _unauthenticated("this server needs an API key")
    return secret.strip()


def _unauthenticated(message: str) -> ApiError:
    return ApiError("unauthenticated", message, "send 'Authorization: Bearer rios_...'")
