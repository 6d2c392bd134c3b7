"""One timer for many short waits: a cancel scope with a deadline for each would cost more than the rest of the wait.

Invariants:
1. :meth:`Deadlines.run` calls ``expire`` of a waiter at its deadline unless it was ``over`` before.
2. Entries of finished waits are at most as many as those of running ones, plus :data:`SLACK`.
"""

import heapq
import math
from collections.abc import Callable
from typing import Protocol

import trio

SLACK = 1024


class Waiter(Protocol):
    """Something that waits."""

    over: bool

    def expire(self) -> None:
        """The deadline has come."""


class Alarm:
    """Calls somebody at its deadline, once."""

    __slots__ = ("_call", "over")

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self.over = False

    def expire(self) -> None:
        """The deadline has come."""
        self.over = True
        self._call()


class Deadlines:
    """The timer. ``run`` must be running."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Waiter]] = []
        self._count = 0
        self._limit = SLACK
        self._scope: trio.CancelScope | None = None
        self._next = math.inf

    def add(self, deadline: float, waiter: Waiter) -> None:
        """Expire ``waiter`` at this trio time."""
        self._count += 1
        heapq.heappush(self._heap, (deadline, self._count, waiter))
        if deadline < self._next:
            self._next = deadline
            if self._scope is not None:
                self._scope.deadline = deadline
        if len(self._heap) > self._limit:
            self._heap = [entry for entry in self._heap if not entry[2].over]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + SLACK

    async def run(self) -> None:
        """Expire what is due, for ever."""
        while True:
            now = trio.current_time()
            while self._heap and (self._heap[0][0] <= now or self._heap[0][2].over):
                waiter = heapq.heappop(self._heap)[2]
                if not waiter.over:
                    waiter.expire()
            self._next = self._heap[0][0] if self._heap else math.inf
            with trio.CancelScope(deadline=self._next) as self._scope:
                await trio.sleep_forever()
