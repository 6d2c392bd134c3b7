"""Tickets: whose key/value caches lie here, how much room they take, and when they go.

Owns: the table of tickets and its bounds. Does not own: the caches' memory (a segment's), who may pay (``host``).

Invariants:
1. Never more than ``sequences_max`` tickets, nor ``kv_bytes_max`` bytes of caches (a cache counts at its capacity).
2. A ticket that nobody used for ``idle_seconds`` is closed; sooner where room is needed, but within
   ``SETTLED_SECONDS`` of its last use only for an owner who holds less than the one who holds most.
3. A cache is freed at once when its ticket is closed, or when the run that still uses it ends.
"""

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from config.errors import BusyError, RequestError
from config.vocabulary import PeerId
from dmoe.core.history import History
from dmoe.core.stagecalls import TICKET_BYTES
from dmoe.kv import Cache
from dmoe.ports import Quote
from dmoe.stages.loaded import LoadedStage

SETTLED_SECONDS = 30.0
"""So long after its last use a ticket may be given up for another one."""
RETRY_MS = 500


@dataclass(slots=True, eq=False)
class Ticket:
    """One sequence's cache at one stage. ``channel`` is empty where nothing is paid."""

    owner: PeerId
    stage: LoadedStage
    cache: Cache
    kv_bytes: int
    channel: bytes
    quote: Quote
    used_at: float
    token: bytes = field(default_factory=lambda: secrets.token_bytes(TICKET_BYTES))
    history: History | None = None
    """What it has gone through; None: a cache of this node's own, which nobody signs for."""
    newest: int = 0
    """The number of the last pass that ran on it."""
    users: int = 0
    closed: bool = False
    rested: trio.Event = field(default_factory=trio.Event)
    """Set, and replaced, whenever a run on it is over."""


class Tickets:
    """All tickets of a host. Times are seconds of one clock, given by the caller."""

    def __init__(self, *, sequences_max: int, kv_bytes_max: int, idle_seconds: float) -> None:
        self.kv_bytes = 0
        self.opening = 0
        """Tickets that room was made for, and whose caches are still waited for."""
        self._sequences_max = sequences_max
        self._kv_bytes_max = kv_bytes_max
        self._idle_seconds = idle_seconds
        self._tickets: dict[bytes, Ticket] = {}
        """In the order of their last use."""

    def __len__(self) -> int:
        return len(self._tickets)

    def make_room(self, owner: PeerId, kv_bytes: int, now: float) -> None:
        """Room for one more cache of ``owner``; the longest unused go first. Raises RequestError for one that can never
        fit, BusyError if there is no room now."""
        if kv_bytes > self._kv_bytes_max:
            limit = f"this node gives {self._kv_bytes_max} to all"
            raise RequestError("too_large", f"a cache of {kv_bytes} bytes does not fit: {limit}")
        self.expire(now)
        while len(self._tickets) + self.opening >= self._sequences_max or self.kv_bytes + kv_bytes > self._kv_bytes_max:
            oldest = next((ticket for ticket in self._tickets.values() if not ticket.users), None)
            if oldest is not None and now - oldest.used_at < SETTLED_SECONDS:
                oldest = self._of_the_greediest(owner, kv_bytes)
            if oldest is None:
                message = f"{len(self._tickets)} sequences with {self.kv_bytes} bytes of caches are here"
                raise BusyError(message, "ask another replica", retry_after_ms=RETRY_MS)
            self.close(oldest)

    def _of_the_greediest(self, owner: PeerId, kv_bytes: int) -> Ticket | None:
        """The longest unused ticket of who holds most, if that stays more than ``owner`` comes to: one peer cannot keep
        all others out by touching its tickets now and then."""
        counts, sizes = Counter[PeerId](), Counter[PeerId]()
        for ticket in self._tickets.values():
            counts[ticket.owner] += 1
            sizes[ticket.owner] += ticket.kv_bytes
        held = sizes if self.kv_bytes + kv_bytes > self._kv_bytes_max else counts
        own = held[owner] + (kv_bytes if held is sizes else 1)
        for ticket in self._tickets.values():
            if not ticket.users and held[ticket.owner] == max(held.values()):
                part = ticket.kv_bytes if held is sizes else 1
                return ticket if held[ticket.owner] - part >= own else None
        return None

    def add(self, ticket: Ticket) -> None:
        """Keep a ticket that room was made for."""
        self._tickets[ticket.token] = ticket
        self.kv_bytes += ticket.kv_bytes

    def find(self, token: bytes) -> Ticket:
        """Raises RequestError ``not_found``."""
        ticket = self._tickets.get(token)
        if ticket is None:
            raise RequestError("not_found", "there is no such ticket here (any more)", "open another one")
        return ticket

    def begin(self, tickets: Sequence[Ticket]) -> None:
        """A run uses these."""
        for ticket in tickets:
            ticket.users += 1

    def end(self, tickets: Sequence[Ticket], now: float) -> None:
        """It is over."""
        for ticket in tickets:
            ticket.users -= 1
            ticket.used_at = now
            ticket.rested.set()
            ticket.rested = trio.Event()
            if ticket.closed:
                self._free(ticket)
            else:
                self._tickets[ticket.token] = self._tickets.pop(ticket.token)

    def close(self, ticket: Ticket) -> None:
        """Forget a ticket; once only."""
        if not ticket.closed:
            ticket.closed = True
            del self._tickets[ticket.token]
            self._free(ticket)

    def close_all(self, stage: LoadedStage | None = None) -> None:
        """Forget every ticket, or every one of a stage."""
        for ticket in [t for t in self._tickets.values() if stage in (None, t.stage)]:
            self.close(ticket)

    def expire(self, now: float) -> None:
        """Close what was idle for too long."""
        for ticket in list(self._tickets.values()):
            if not ticket.users and now - ticket.used_at > self._idle_seconds:
                self.close(ticket)

    def _free(self, ticket: Ticket) -> None:
        if not ticket.users:
            ticket.cache.close()
            self.kv_bytes -= ticket.kv_bytes
