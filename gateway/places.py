"""Who may be served at the same time: how many connections of all, and which idle one makes room for a newcomer.

Owns: the counts by address, and the order in which idle connections make room. Does not own: sockets, deadlines.

A connection that waits for its client's next request costs only its place. Where no place is left, the address with the
most such connections gives up the one that has waited longest; an address that has its share gives up one of its own.
What is under way is never ended. Guests without an address (this machine's, reverse proxies') have no share, and
make room after all others.

Invariants: every step takes the same time however many there are; of what is idle all and nothing else is in its
address' table; each address' rank is the length of its table.
"""

from typing import Protocol


class Guest(Protocol):
    """A connection."""

    def oust(self) -> None:
        """Another one needs its place: end it."""


class Places:
    """Of one server. ``kept_count``: places that are for this machine alone."""

    def __init__(self, count_max: int, *, share_max: int, kept_count: int) -> None:
        self._count_max = count_max
        self._share_max = share_max
        self._kept_count = kept_count
        self._address_of: dict[Guest, str] = {}
        self._counts: dict[str, int] = {}
        self._idle: dict[str, dict[Guest, None]] = {}
        """By address; who has waited longest is first."""
        self._ranks: dict[int, dict[str, None]] = {}
        """Addresses by how many idle connections they have."""
        self._rank_max = 0

    def enter(self, guest: Guest, address: str, *, own: bool = False) -> str:
        """Give a place to an idle newcomer. Returns why there is none: ``share`` or ``full``; empty: there is."""
        if address and self._counts.get(address, 0) >= self._share_max and not self._oust_one_of(address):
            return "share"
        places = self._count_max if own else self._count_max - self._kept_count
        if len(self._address_of) >= places and not self._oust_one():
            return "full"
        self._address_of[guest] = address
        self._counts[address] = self._counts.get(address, 0) + 1
        self.rest(guest)
        return ""

    def rest(self, guest: Guest) -> None:
        """It waits for its client."""
        address = self._address_of.get(guest)
        if address is None:
            return  # it made room already
        table = self._idle.setdefault(address, {})
        if guest not in table:
            table[guest] = None
            self._rank(address, len(table) - 1, len(table))

    def work(self, guest: Guest) -> None:
        """It has a request to answer."""
        address = self._address_of.get(guest, "")
        table = self._idle.get(address, {})
        if guest in table:
            del table[guest]
            if not table:
                del self._idle[address]
            self._rank(address, len(table) + 1, len(table))

    def leave(self, guest: Guest) -> None:
        """It is gone. May be called twice."""
        self.work(guest)
        address = self._address_of.pop(guest, None)
        if address is None:
            return
        self._counts[address] -= 1
        if not self._counts[address]:
            del self._counts[address]

    def _oust_one(self) -> bool:
        if self._rank_max:
            return self._oust_one_of(next(iter(self._ranks[self._rank_max])))
        return self._oust_one_of("")

    def _oust_one_of(self, address: str) -> bool:
        table = self._idle.get(address)
        if not table:
            return False
        guest = next(iter(table))
        self.leave(guest)
        guest.oust()
        return True

    def _rank(self, address: str, before: int, now: int) -> None:
        if not address:
            return
        if before:
            del self._ranks[before][address]
            if not self._ranks[before]:
                del self._ranks[before]
        if now:
            self._ranks.setdefault(now, {})[address] = None
        if now > self._rank_max or self._rank_max not in self._ranks:
            self._rank_max = now
