"""Slots and the line of those who wait for one.

Owns: who may run now and who is next. Does not own: what they run (``dmoe/engine.py``).

Invariants:

1. At most ``slots_max`` places have their turn, at most ``waiting_max`` wait for it.
2. First come, first served: places are taken and passed on at once, never by the order in which tasks happen to wake.

Fails with BusyError where neither a slot nor a place in the line is free.
"""

import math
from collections import deque

import trio

from config.errors import BusyError


class Place:
    """A place in the line; ``turn`` is set once it has become a slot."""

    __slots__ = ("turn",)

    def __init__(self) -> None:
        self.turn = trio.Event()


class Line:
    """A fixed number of slots and a bounded line before them."""

    def __init__(self, slots_max: int, waiting_max: int) -> None:
        assert slots_max >= 1
        assert waiting_max >= 0
        self._slots_max = slots_max
        self._waiting_max = waiting_max
        self._waiting: deque[Place] = deque()
        self.active = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def require_room(self, answer_seconds: float) -> None:
        """BusyError if neither slot nor place is free; its hint expects answers of ``answer_seconds``."""
        if self.active < self._slots_max or self.waiting < self._waiting_max:
            return
        expected_s = answer_seconds * (self.waiting + 1) / self._slots_max
        raise BusyError(
            f"{self.active} answers are running and {self.waiting} are waiting",
            "try again later",
            retry_after_ms=math.ceil(1000 * expected_s),
        )

    def join(self) -> Place:
        place = Place()
        if self.active < self._slots_max:
            self.active += 1
            place.turn.set()
        else:
            self._waiting.append(place)
        return place

    def leave(self, place: Place) -> None:
        """Give a place back; a slot goes to the first in the line."""
        if not place.turn.is_set():
            self._waiting.remove(place)
        elif self._waiting:
            self._waiting.popleft().turn.set()
        else:
            self.active -= 1
