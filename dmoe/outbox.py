"""The events of one answer between who makes them and who reads them.

Invariants:

1. ``put`` never waits. Its caller looks at ``full`` first and makes no more for an answer whose outbox is full, so a
   slow consumer slows its own answer only; ``on_room`` tells when there is room again.
2. What was put before the end comes out before it: the failure, if there is one, last.
"""

from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

import trio

_Event = TypeVar("_Event")


class Outbox(AsyncIterator[_Event], Generic[_Event]):
    """A bounded queue with one reader, its async iterator."""

    def __init__(self, events_max: int, on_room: Callable[[], None]) -> None:
        self._events: deque[_Event] = deque()
        self._events_max = events_max
        self._on_room = on_room
        self._reader = trio.lowlevel.ParkingLot()
        self._ended = False
        self._failure: Exception | None = None

    @property
    def full(self) -> bool:
        """The reader is behind."""
        return len(self._events) >= self._events_max

    def put(self, event: _Event) -> None:
        """Add an event."""
        assert not self._ended
        self._events.append(event)
        self._reader.unpark_all()

    def end(self, failure: Exception | None = None) -> None:
        """No more will come; ``failure`` is raised to the reader behind the events. A second end is not heard."""
        if not self._ended:
            self._ended, self._failure = True, failure
            self._reader.unpark_all()

    async def __anext__(self) -> _Event:
        if self._events:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._events:
            if self._ended:
                await trio.lowlevel.checkpoint()
                raise StopAsyncIteration if self._failure is None else self._failure
            await self._reader.park()
        was_full = self.full
        event = self._events.popleft()
        if was_full:
            self._on_room()
        return event
