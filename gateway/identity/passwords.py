"""Passwords: which are good enough, how they are kept, and checking one at the same cost whoever it is for.

Invariants: only argon2id hashes are kept (RFC 9106, above the least that OWASP recommends); a user who does not exist,
or has no password, costs exactly one verification, like any other; at most ``HASHES_AT_ONCE`` are computed at the same
time, each in a thread, and ``WAITING_MAX`` wait, so guessing takes neither the loop nor the memory from others.
"""

import unicodedata
from functools import cache
from typing import TYPE_CHECKING

import trio

from config.errors import BusyError
from gateway.errors import ApiError

if TYPE_CHECKING:
    from argon2 import PasswordHasher

HASHES_AT_ONCE = 1
WAITING_MAX = 64
LENGTH_MIN = 10
BYTES_MAX = 1024
_MEMORY_KIB = 36 * 1024
"""More than glibc ever keeps of what was freed (32 MiB): a gateway is as small after a sign-in as before it."""
_PASSES = 2


class Passwords:
    """Hashes and checks, in threads of its own."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(HASHES_AT_ONCE)

    async def hashed(self, password: str) -> str:
        """What is stored of a password. Raises BusyError."""
        self._check_queue()
        return await trio.to_thread.run_sync(hash_password, password, limiter=self._limiter)

    async def matches(self, password: str, stored: str | None) -> bool:
        """Whether it is the one; ``stored`` None (nobody, or nobody with a password) takes as long to deny.

        Raises BusyError.
        """
        self._check_queue()
        return await trio.to_thread.run_sync(verify_password, password, stored, limiter=self._limiter)

    def _check_queue(self) -> None:
        if self._limiter.statistics().tasks_waiting >= WAITING_MAX:
            raise BusyError("too many people sign in at this moment", "try again", retry_after_ms=2000)


def check_password(password: str, *names: str, param: str = "password") -> None:
    """Raises ApiError for one that is too easy, or ``names`` what everybody knows of the user.

    Length is what counts (NIST SP 800-63B); there are no rules about kinds of characters.
    """
    shape = _normal(password)
    if len(shape.decode("utf-8", "surrogatepass")) < LENGTH_MIN:
        raise _too_easy(param, f"a password has at least {LENGTH_MIN} characters")
    if len(shape) > BYTES_MAX:
        raise _too_easy(param, f"a password has at most {BYTES_MAX} bytes")
    known = {_normal(name.casefold()) for name in names if name}
    if len(set(shape)) < 4 or _normal(password.casefold()) in known:
        raise _too_easy(param, "this password is easily guessed")


def hash_password(password: str) -> str:
    """Blocking: takes tens of milliseconds and 36 MiB."""
    return _hasher().hash(_normal(password))


def verify_password(password: str, stored: str | None) -> bool:
    """Blocking, as :func:`hash_password`. One verification, always."""
    from argon2.exceptions import InvalidHashError, VerificationError  # noqa: PLC0415

    try:
        return _hasher().verify(stored or _NOBODYS_HASH, _normal(password)) and stored is not None
    except (VerificationError, InvalidHashError):
        return False


def is_outdated(stored: str) -> bool:
    """Whether it was made with other parameters than today's."""
    return _hasher().check_needs_rehash(stored)


def _normal(password: str) -> bytes:
    """The same text typed on another system is the same password."""
    return unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")


@cache
def _hasher() -> "PasswordHasher":
    from argon2 import PasswordHasher  # noqa: PLC0415 - a gateway that nobody signs in to does not pay for it

    return PasswordHasher(time_cost=_PASSES, memory_cost=_MEMORY_KIB, parallelism=1)


_NOBODYS_HASH = f"$argon2id$v=19$m={_MEMORY_KIB},t={_PASSES},p=1${'A' * 22}${'A' * 43}"
"""To check against where there is no hash: as costly, and no known password has it."""


def _too_easy(param: str, why: str) -> ApiError:
    return ApiError("invalid_request", why, param=param, public_code="weak_password")
