"""Whose request is next when the engine works at as many as it can: a bounded line, fair between users.

Owns the line and the count of turns taken. Invariants:

1. At most ``slots`` turns are taken; a request for several answers takes one for each, all at once, so that two such
   requests never wait for each other. (More than there are slots count as all of them.)
2. A free turn goes to the waiting user with the fewest running, and among equals to the one served longest ago; one
   user's requests keep their order. Nobody is passed over because something smaller would fit.
3. Interactive requests go before batch work, which waits as long as it takes: nobody waits for its answer. Work of a
   batch neither takes an interactive request's place in the line nor counts against its user there: a batch, however
   large, costs a request at most what one running line has left.
4. Both lines are bounded, as is each user's part of them, and an interactive request's wait.
5. A stream's turn lasts as long as its client takes to read. Where an interactive request waits, streams are ended
   whose clients have kept them from being written for :data:`BLOCKED_SECONDS_MAX` in all, the slowest first. Those who
   wait look, so it costs nothing where nobody does, and such a stream may go on there. Work of a batch ends nobody's.

Fails with ApiError ``rate_limited`` where a user's own part is full, with BusyError where the line is or the wait was
too long. ``slots`` 0: the engine has a line of its own, and everybody goes there.
"""

import math
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from config.errors import BusyError, RiosError
from gateway.errors import ApiError

_SECONDS_EXPECTED = 5.0
_SHARE_OF_NEWEST = 0.2
BLOCKED_SECONDS_MAX = 30.0
_LOOK_SECONDS = 1.0
"""How often an interactive request that waits looks for a stream to end, one each time."""


class Reader(Protocol):
    """Whoever reads an answer as it is made."""

    def blocked_seconds(self) -> float:
        """For how long in all its connection had no room for what was to be written."""

    def give_up(self) -> None:
        """Write no more to it, as if it had left."""


@dataclass(slots=True, eq=False)
class _Waiting:
    user: str
    weight: int
    called: trio.Event = field(default_factory=trio.Event)


class Turns:
    """The turns of one engine."""

    def __init__(
        self, *, slots: int, waiting_max: int = 256, per_user_max: int = 64, seconds_max: float = 60.0
    ) -> None:
        self._slots = slots
        self._free = slots
        self._waiting_max = waiting_max
        self._per_user_max = per_user_max
        self._seconds_max = seconds_max
        self._interactive, self._batch = _Line(), _Line()
        self._count = 0
        self._turn_seconds = _SECONDS_EXPECTED
        self._streams: set[Turn] = set()
        """Turns taken whose readers may be slow."""

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._interactive) + len(self._batch)

    @contextmanager
    def place(
        self, user: str, weight: int = 1, *, batch: bool = False, reader: Reader | None = None
    ) -> Iterator["Turn"]:
        """A request's turn: the block waits for it with :meth:`Turn.come`, and its end gives it back. ``reader``: of
        what is written meanwhile."""
        turn = Turn(self, user, min(weight, self._slots), batch=batch, reader=reader)
        try:
            yield turn
        finally:
            self._streams.discard(turn)
            if turn.came_at is not None:
                self._give_back(turn, trio.current_time() - turn.came_at)

    async def wait(self, user: str, weight: int, *, batch: bool) -> None:
        """Until the turn is taken. Raises RiosError."""
        line = self._line(batch=batch)
        if weight <= self._free and not len(self._interactive) and not len(line):
            self._take(line, user, weight)
            return
        self._require_room(line, user)
        waiting = _Waiting(user, weight)
        line.add(waiting)
        try:
            if batch:
                await waiting.called.wait()
            else:
                with trio.move_on_after(self._seconds_max):
                    await self._called(waiting)
        except BaseException:
            if waiting.called.is_set():  # called and cancelled in the same moment
                self._free += weight
                line.leave(user, weight)
            raise
        finally:
            if not waiting.called.is_set():
                line.remove(waiting)
                line.forget(user)
            self._call()
        if not waiting.called.is_set():
            raise self._busy(f"this request waited {self._seconds_max:g} s for its turn")

    async def _called(self, waiting: _Waiting) -> None:
        """An interactive request's turn has come; until then it looks for who keeps it waiting."""
        while not waiting.called.is_set():
            with trio.move_on_after(_LOOK_SECONDS):
                await waiting.called.wait()
                return
            self._end_slowest()

    def watch(self, turn: "Turn") -> None:
        """A turn with a reader began."""
        self._streams.add(turn)

    def _end_slowest(self) -> None:
        slowest = max(self._streams, key=Turn.blocked_seconds, default=None)
        if slowest is not None and slowest.blocked_seconds() > BLOCKED_SECONDS_MAX:
            self._streams.discard(slowest)
            slowest.give_up()

    def _require_room(self, line: "_Line", user: str) -> None:
        mine = line.count(user)
        if mine >= self._per_user_max:
            wait_ms = self._expected_ms(mine)
            message = f"{mine} requests of this user are waiting already"
            raise ApiError("rate_limited", message, "wait for some of them", retry_after_ms=wait_ms)
        if len(line) >= self._waiting_max:
            raise self._busy(f"{self._slots - self._free} answers are running and {len(line)} requests are waiting")

    def _call(self) -> None:
        """Give free turns to who is next."""
        while self._free:
            line = self._interactive if len(self._interactive) else self._batch
            user = line.next_user()
            if user is None or line.first(user).weight > self._free:
                return
            waiting = line.first(user)
            line.remove(waiting)
            self._take(line, user, waiting.weight)
            waiting.called.set()

    def _take(self, line: "_Line", user: str, weight: int) -> None:
        self._free -= weight
        self._count += 1
        line.take(user, weight, self._count)

    def _give_back(self, turn: "Turn", seconds: float) -> None:
        self._turn_seconds += _SHARE_OF_NEWEST * (seconds - self._turn_seconds)
        self._free += turn.weight
        self._line(batch=turn.batch).leave(turn.user, turn.weight)
        self._call()

    def _line(self, *, batch: bool) -> "_Line":
        return self._batch if batch else self._interactive

    def _expected_ms(self, before: int) -> int:
        return math.ceil(1000 * self._turn_seconds * (before + 1) / max(1, self._slots))

    def _busy(self, why: str) -> RiosError:
        return BusyError(why, "try again later", retry_after_ms=self._expected_ms(self.waiting))


class Turn:
    """One request's turn."""

    def __init__(self, turns: Turns, user: str, weight: int, *, batch: bool, reader: Reader | None = None) -> None:
        self.user = user
        self.weight = weight
        self.came_at: float | None = None
        self.batch = batch
        self._turns = turns
        self._reader = reader
        self._blocked_before = 0.0

    async def come(self) -> None:
        """Wait for it; once it came, at once. Raises RiosError."""
        if self.weight and self.came_at is None:
            await self._turns.wait(self.user, self.weight, batch=self.batch)
            self.came_at = trio.current_time()
            if self._reader is not None:
                self._blocked_before = self._reader.blocked_seconds()
                self._turns.watch(self)

    def blocked_seconds(self) -> float:
        """For how long in all its reader kept it from writing."""
        return self._reader.blocked_seconds() - self._blocked_before if self._reader is not None else 0.0

    def give_up(self) -> None:
        """End it, as far as its reader is concerned."""
        if self._reader is not None:
            self._reader.give_up()


class _Line:
    """Who waits, by user, in order; and who of them runs, and was served when."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.served: dict[str, int] = {}
        self._users: dict[str, deque[_Waiting]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def count(self, user: str) -> int:
        """How many of a user's wait here."""
        return len(self._users.get(user, ()))

    def add(self, waiting: _Waiting) -> None:
        """To the end of its user's."""
        self._users.setdefault(waiting.user, deque()).append(waiting)
        self._length += 1

    def remove(self, waiting: _Waiting) -> None:
        """From wherever it is."""
        mine = self._users[waiting.user]
        mine.remove(waiting)
        self._length -= 1
        if not mine:
            del self._users[waiting.user]

    def first(self, user: str) -> _Waiting:
        """The one of this user's that is next."""
        return self._users[user][0]

    def next_user(self) -> str | None:
        """Who is next; None: nobody waits."""
        return min(self._users, key=lambda user: (self.running[user], self.served.get(user, 0)), default=None)

    def take(self, user: str, weight: int, place: int) -> None:
        """A turn begins; ``place`` rises from one to the next."""
        self.running[user] += weight
        self.served[user] = place

    def leave(self, user: str, weight: int) -> None:
        """It ended."""
        self.running[user] -= weight
        if not self.running[user]:
            del self.running[user]
        self.forget(user)

    def forget(self, user: str) -> None:
        """Of who neither runs nor waits nothing is kept."""
        if user not in self.running and not self.count(user):
            self.served.pop(user, None)
