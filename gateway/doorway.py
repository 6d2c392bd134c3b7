"""Which connections a gateway serves: what one address may have, lately and at the same time.

Owns: the rate by address, ``gateway/arrivals``, ``gateway/places`` and the listener's sieve; why a connection is
refused, and the log of it. Does not own: the connections.

An address makes so many connections a second, where one that was refused what it asked counts :data:`SOUR` more times;
it has a limited number of requests that are still coming, and a share of all places; whoever goes on connecting
although it is refused is not listened to for a while (``p2p/sieve``).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Protocol, TypeVar

import trio

from gateway.address import neighbourhood
from gateway.arrivals import Arrivals
from gateway.places import Places
from p2p.core.buckets import Bucket
from p2p.sieve import Sieve, unfiltered

_security = logging.getLogger("rios.security.gateway")

CONNECTIONS_MAX = 1000
_SHARES = 4
"""So many addresses can fill all places, if all that they have is busy."""
_KEPT = 16
"""Places that are for this machine's own clients alone."""
_CLOSING_MAX = 256
"""Connections that made room and are not closed yet."""
_ADDRESSES_MAX = 4096
_TOLD_SECONDS = 60.0
SOUR = 4
"""How many connections more one counts that only asked what it was refused."""
_OWN = frozenset(("127.0.0.1", "::1"))
"""This machine, with its monitoring, and a reverse proxy that nobody told of: only its rate of connections is limited.
"""


class Guest(Protocol):
    """A connection. ``address``: whom it counts for; empty: nobody."""

    address: str

    def oust(self) -> None:
        """Another one needs its place: end it."""

    @property
    def is_sour(self) -> bool:
        """Whether it was refused all that it asked."""


G = TypeVar("G", bound=Guest)


class Doorway:
    """Of one server. ``on_refused`` is told why, of each connection that is not served."""

    def __init__(self, *, per_second: int, proxies: Collection[str], on_refused: Callable[[str], None]) -> None:
        self._per_second = per_second
        self._proxies = proxies
        self._on_refused = on_refused
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._open = 0
        self._told_at: dict[str, float] = {}
        self.sieve = Sieve()
        self.arrivals = Arrivals()
        self.places = Places(CONNECTIONS_MAX, share_max=CONNECTIONS_MAX // _SHARES, kept_count=_KEPT)

    def enter(self, socket: trio.socket.SocketType, make: Callable[[str], G]) -> G | None:
        """A client's connection, made for its address, if that may have one more; it is to :meth:`leave`."""
        try:
            host = str(socket.getpeername()[0])
        except OSError:
            return None  # it is gone already
        if self.sieve.times:
            unfiltered(socket)
        if self._open >= CONNECTIONS_MAX + _CLOSING_MAX:
            self._on_refused("full")
            return None
        guest = self._admitted(host, make)
        if guest is not None:
            self._open += 1
        return guest

    def _admitted(self, host: str, make: Callable[[str], G]) -> G | None:
        if host in self._proxies or not self._per_second:
            return self._placed(make(""))
        address, now = neighbourhood(host), trio.current_time()
        may_enter = self._may_enter(address, now)
        if not may_enter:
            self._on_refused("rate")
        if host in _OWN:
            return self._placed(make(""), own=True) if may_enter else None
        if may_enter:
            guest = make(address)
            if self.arrivals.enter(address, guest, now):
                return self._placed(guest, host)
            self._on_refused("arriving")
        self._shun(host)
        return None

    def _placed(self, guest: G, host: str = "", *, own: bool = False) -> G | None:
        why = self.places.enter(guest, guest.address, own=own)
        if not why:
            return guest
        self.arrivals.leave(guest.address, guest)
        self._on_refused(why)
        if why == "share":
            text = "%s has as many connections as one may have, all of them busy: more are closed"
            self._tell(why, text, guest.address)
            self._shun(host)
        else:
            self._tell(why, "all %d connections are busy: more are closed", CONNECTIONS_MAX)
        return None

    def leave(self, guest: Guest) -> None:
        """It is over."""
        self._open -= 1
        self.places.leave(guest)
        self.arrivals.leave(guest.address, guest)
        bucket, now = self._buckets.get(guest.address), trio.current_time()
        if guest.is_sour and bucket is not None and not bucket.wait_s(now):
            bucket.spend(SOUR, now)  # no debts: many that end at once would shut their neighbours out for long

    def _shun(self, host: str) -> None:
        if self.sieve.refuse(host):
            self._on_refused("shunned")

    def _may_enter(self, address: str, now: float) -> bool:
        """Whether an address has not made too many connections lately: each costs more than its client pays."""
        bucket = self._buckets.get(address)
        if bucket is None:
            bucket = self._buckets[address] = Bucket(self._per_second, 2 * self._per_second)
            if len(self._buckets) > _ADDRESSES_MAX:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(address)
        if bucket.take(1, now):
            return True
        text = (
            "%s makes more than %d connections a second, where one that was refused what it asked counts as %d: those "
            "above are closed"
        )
        self._tell("rate", text, address, self._per_second, 1 + SOUR)
        return False

    def _tell(self, why: str, text: str, *values: object) -> None:
        """The security log hears of each kind once a minute: floods must not fill the disk."""
        now = trio.current_time()
        if now - self._told_at.get(why, -_TOLD_SECONDS) >= _TOLD_SECONDS:
            self._told_at[why] = now
            _security.warning(text, *values)
