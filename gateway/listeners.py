"""Places for what lasts as long as a client likes: streams of events, open pages.

Invariants: at most ``most`` are held, and ``each_max`` by one user; the last :data:`FOR_ADMINS` are only for admins, so
that those who look after the gateway find one whoever else is here.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from config.errors import BusyError
from gateway.accounts import Principal
from gateway.errors import ApiError

EACH_MAX = 16
FOR_ADMINS = 16
_RETRY_MS = 5000


class Listeners:
    """Counts who holds how many. ``what`` names them in refusals."""

    def __init__(self, what: str, most: int, each_max: int = EACH_MAX) -> None:
        self._what = what
        self._most = most
        self._each_max = each_max
        self._held: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._held.total()

    def require(self, who: Principal) -> None:
        """Raises ApiError ``rate_limited`` if they hold as many as they may, BusyError if all are taken."""
        if self._held[who.user_id] >= self._each_max:
            message = f"this user has {self._each_max} {self._what} open, which is the most"
            raise ApiError("rate_limited", message, "close some", retry_after_ms=_RETRY_MS)
        if len(self) >= self._most - (0 if who.role == "admin" else FOR_ADMINS):
            raise BusyError(f"too many {self._what} are open", "try again later", retry_after_ms=_RETRY_MS)

    @contextmanager
    def held(self, who: Principal) -> Iterator[None]:
        """Hold one during the block. Raises as :meth:`require`."""
        self.require(who)
        self._held[who.user_id] += 1
        try:
            yield
        finally:
            self._held[who.user_id] -= 1
            self._held += Counter()  # forgets who holds none
