"""What happens, told to whoever wants to know: a bounded table in the database, and a bus over it.

All events go through the table, so all gateways of a database see the same ones in the same order, and who lost the
connection goes on where they stopped. Things that are in the database themselves record their events in their own
transaction (:func:`record`); what happens in memory is handed to :meth:`Bus.publish`.

Invariants:
1. Places rise in the order of the commits: who has read up to one has missed none before it.
2. Everything is bounded: a subscriber that does not keep up loses the oldest, and is told how many; so does what waits
   to be written, also while the database is away; the table keeps :data:`KEPT_MS` and :data:`ROWS_MAX`.
3. An event reaches the subscribers of every gateway within a second.
"""

import logging
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa
import trio

from config.errors import RiosError
from gateway.db.jobs import events
from gateway.db.prepared import Prepared
from gateway.db.session import Database
from gateway.db.stamps import now_ms
from gateway.listeners import Listeners
from gateway.money import Settlement

if TYPE_CHECKING:
    from gateway.till import Till

_logger = logging.getLogger("rios.gateway")

KEPT_MS = 7 * 24 * 3600 * 1000
ROWS_MAX = 200_000
QUEUE_MAX = 256
SUBSCRIBERS_MAX = 512
_BUFFER_MAX = 4096
_FLUSH_SECONDS = 0.15
_POLL_SECONDS = 0.3
_PAGE = 500
_SWEEP_SECONDS = 60.0
_ORDER_LOCK = 0x52694556
"""Key of the PostgreSQL advisory lock that puts the places into the order of the commits."""
MISSED = "events.missed"
_ADD = Prepared(sa.insert(events).values(kind="", owner_id="", data="", created_at_ms=0))
"""With a row's own values; its place is the database's."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. ``owner_id`` None: it concerns everybody; ``data`` is JSON text."""

    place: int
    kind: str
    owner_id: str | None
    data: str
    created_at_ms: int

    def for_whom(self, owner: str | None) -> bool:
        """Whether somebody may see it who sees what ``owner`` owns (None: everything)."""
        return owner is None or self.owner_id is None or self.owner_id == owner


def matches(kind: str, patterns: Collection[str]) -> bool:
    """Whether a kind is one of them: ``key.created``, or all of ``batch.*``. None at all: every kind."""
    return not patterns or kind in patterns or f"{kind.partition('.')[0]}.*" in patterns


def record(connection: sa.Connection, kind: str, owner_id: str | None, data: Mapping[str, Any]) -> None:
    """Tell of something in the transaction that does it. Call it last: from here on other events wait for its end."""
    _insert(connection, [_row(kind, owner_id, data, now_ms())])


def since(
    database: Database, place: int, owner: str | None, *, limit: int = _PAGE, before: int | None = None
) -> list[Event]:
    """Events after a place, oldest first."""
    with database.read() as connection:
        return after(connection, place, owner, limit=limit, before=before)


def after(
    connection: sa.Connection, place: int, owner: str | None = None, *, limit: int, before: int | None = None
) -> list[Event]:
    """:func:`since` in an open transaction."""
    query = sa.select(*events.c).where(events.c.place > place).order_by(events.c.place).limit(limit)
    if owner is not None:
        query = query.where(sa.or_(events.c.owner_id == owner, events.c.owner_id.is_(None)))
    if before is not None:
        query = query.where(events.c.place <= before)
    return [Event(**row) for row in connection.execute(query).mappings()]


def bounds(database: Database) -> tuple[int, int]:
    """The places of the oldest and the newest event there are; zeros for none."""
    with database.read() as connection:
        oldest, newest = connection.execute(sa.select(sa.func.min(events.c.place), sa.func.max(events.c.place))).one()
    return int(oldest or 0), int(newest or 0)


def sweep(database: Database) -> None:
    """Forget what is old, or too much."""
    newest = sa.select(sa.func.max(events.c.place)).scalar_subquery()
    old = sa.or_(events.c.created_at_ms < now_ms() - KEPT_MS, events.c.place <= newest - ROWS_MAX)
    some = sa.select(events.c.place).where(old).order_by(events.c.place).limit(10 * _PAGE)
    with database.write() as connection:
        connection.execute(sa.delete(events).where(events.c.place.in_(some)))


_Told = tuple[str, str | None, Mapping[str, Any] | Settlement, int]
"""Kind, owner, data and time, before it becomes a row."""


def _row(kind: str, owner_id: str | None, data: Mapping[str, Any] | Settlement, when_ms: int) -> dict[str, Any]:
    if isinstance(data, Settlement):
        data = _data_of(data)
    return {"kind": kind, "owner_id": owner_id, "data": msgspec.json.encode(data).decode(), "created_at_ms": when_ms}


def _data_of(settlement: Settlement) -> dict[str, Any]:
    asked = settlement.reservation
    return {
        "request_id": asked.request_id,
        "endpoint": asked.endpoint,
        "model": asked.model,
        "key_id": asked.key_id,
        "prompt_tokens": settlement.prompt_tokens,
        "completion_tokens": settlement.completion_tokens,
        "microcredits": settlement.microcredits,
        "outcome": settlement.outcome,
    }


def _insert(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ORDER_LOCK)))
    _ADD.run(connection, rows)


class Subscription:
    """What one subscriber has not read yet."""

    def __init__(self, owner: str | None, kinds: Collection[str], start: int) -> None:
        self.owner = owner
        self.start = start
        self.missed = 0
        self._kinds = kinds
        self._queue: deque[Event] = deque()
        self._news = trio.Event()

    def put(self, event: Event) -> None:
        """Something happened; the oldest goes if there is no room."""
        if not (event.for_whom(self.owner) and matches(event.kind, self._kinds)):
            return
        if len(self._queue) >= QUEUE_MAX:
            self._queue.popleft()
            self.missed += 1
        self._queue.append(event)
        self._news.set()

    async def take(self) -> tuple[int, list[Event]]:
        """Wait for news: how many were lost before these, and these."""
        while not self._queue:
            self._news = trio.Event()
            await self._news.wait()
        missed, self.missed = self.missed, 0
        found = list(self._queue)
        self._queue.clear()
        return missed, found


class Bus:
    """Brings events into the table, and from there to the subscribers of this gateway."""

    def __init__(self, till: "Till") -> None:
        self._till = till
        self._buffer: deque[_Told] = deque(maxlen=_BUFFER_MAX)
        self._lost = 0
        self._subscriptions: set[Subscription] = set()
        self.places = Listeners("streams of events", SUBSCRIBERS_MAX)
        self._place = -1
        self._wanted = trio.Event()

    def publish(self, kind: str, owner_id: str | None, data: Mapping[str, Any]) -> None:
        """Tell of something; it is written a moment later. Never waits, never fails."""
        self._tell((kind, owner_id, data, now_ms()))

    def settled(self, settlement: Settlement) -> None:
        """A request was charged."""
        self._tell(("request.finished", settlement.reservation.user_id, settlement, now_ms()))

    def _tell(self, told: "_Told") -> None:
        if len(self._buffer) >= _BUFFER_MAX:
            self._lost += 1
        self._buffer.append(told)
        self._wanted.set()

    @asynccontextmanager
    async def subscribe(self, owner: str | None, kinds: Collection[str] = ()) -> AsyncIterator[Subscription]:
        """What happens after the subscription's ``start``. ``owner`` None: everything. Whoever listens for a client
        holds one of ``places`` meanwhile."""
        if self._place < 0:
            newest = (await self._till.in_thread(bounds, self._till.database))[1]
            self._place = max(self._place, newest)
        subscription = Subscription(owner, kinds, self._place)
        self._subscriptions.add(subscription)
        self._wanted.set()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    async def run(self) -> None:
        """Until cancelled. A database that fails is asked again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep)
            while True:
                if not self._subscriptions:
                    self._place = -1  # nobody has missed anything
                    await self._wanted.wait()
                self._wanted = trio.Event()
                try:
                    await self._flush()
                    await self._poll()
                except RiosError as error:
                    _logger.error("events: %s", error)
                    await trio.sleep(1)
                # what comes meanwhile is written together
                with trio.move_on_after(_POLL_SECONDS):
                    await self._wanted.wait()
                    await trio.sleep(_FLUSH_SECONDS)

    async def flush(self) -> None:
        """Write what is left, at the end."""
        try:
            await self._flush()
        except RiosError as error:
            _logger.error("the last events are not written: %s", error)

    async def _flush(self) -> None:
        told, lost = list(self._buffer), self._lost
        self._buffer.clear()
        self._lost = 0
        if not told and not lost:
            return

        def write() -> None:
            rows, bad = [], 0
            for each in told:
                try:
                    rows.append(_row(*each))
                except (TypeError, ValueError):  # it goes, not all of them
                    bad += 1
                    _logger.exception("an event cannot be written: %s", each[0])
            if lost or bad:
                rows.append(_row(MISSED, None, {"count": lost + bad}, now_ms()))
            # what buffered events tell of is durable by itself, and nobody's request waits behind a sync for them
            with self._till.database.write(synced=False) as connection:
                _insert(connection, rows)

        try:
            await self._till.in_thread(write)
        except RiosError:
            self._put_back(told, lost)
            raise

    def _put_back(self, told: list["_Told"], lost: int) -> None:
        """They could not be written: they are tried again, before what came meanwhile."""
        kept = told[max(len(told) + len(self._buffer) - _BUFFER_MAX, 0) :]
        self._buffer.extendleft(reversed(kept))
        self._lost += lost + len(told) - len(kept)
        self._wanted.set()

    async def _poll(self) -> None:
        if not self._subscriptions:
            return
        while True:
            found = await self._till.in_thread(since, self._till.database, self._place, None)
            for event in found:
                self._place = event.place
                for subscription in self._subscriptions:
                    subscription.put(event)
            if len(found) < _PAGE:
                return

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(_SWEEP_SECONDS)
            try:
                await self._till.in_thread(sweep, self._till.database)
            except RiosError as error:
                _logger.error("old events are not forgotten yet: %s", error)
