"""Connections whose request is not all there yet: how many of them one address may have, and which makes room.

Owns: the count by address. Does not own: sockets, deadlines. Time comes in.

A client that says what it wants is here for a moment. One that drips its request, or says nothing, costs a wake-up for
every byte and a place for as long as it likes. So an address has :data:`ARRIVING_MAX` of them; a newcomer takes the
place of the one that is furthest behind :data:`STEADY_BYTES_PER_SECOND`, if that is :data:`GRACE_SECONDS` or more, and
is refused otherwise. A steady upload is never cut off by that, however long it takes.

Invariant: what entered is in one address' table until it leaves or makes room, whichever is first.
"""

from typing import Protocol

ARRIVING_MAX = 64
GRACE_SECONDS = 2.0
STEADY_BYTES_PER_SECOND = 512


class Guest(Protocol):
    """A connection."""

    def oust(self) -> None:
        """Another one needs its place: end it."""


class Arrivals:
    """Of one server."""

    def __init__(self) -> None:
        self._by_address: dict[str, dict[Guest, float]] = {}
        """With the time until which they brought enough."""

    def enter(self, address: str, guest: Guest, now: float, *, known: bool = False) -> bool:
        """One more; whether there is room. ``known``: it was served before, and is not refused."""
        table = self._by_address.setdefault(address, {})
        if guest in table:
            return True
        if len(table) >= ARRIVING_MAX:
            idlest = min(table, key=table.__getitem__)
            if now - table[idlest] >= GRACE_SECONDS:
                del table[idlest]
                idlest.oust()
            elif not known:
                return False
        table[guest] = now
        return True

    def brought(self, address: str, guest: Guest, size: int, now: float) -> None:
        """So many bytes of its request came."""
        table = self._by_address.get(address, {})
        if guest in table:
            table[guest] = min(now + GRACE_SECONDS, table[guest] + size / STEADY_BYTES_PER_SECOND)

    def leave(self, address: str, guest: Guest) -> None:
        """Its request is here, or it is gone. May be called twice."""
        table = self._by_address.get(address)
        if table is not None:
            table.pop(guest, None)
            if not table:
                del self._by_address[address]
