"""Who may answer, and what the next pass computes: slots, memory, and a fair share for every user. Pure.

Two plans. :class:`Admission` is the node's: which of the waiting answers start. :class:`PassPlan` is one runner's: how
many rows of the next pass each running answer gets. Neither runs anything (``dmoe/passes.py`` does).

Invariants:

1. At most ``slots_max`` answers run and their caches together hold at most ``positions_max`` positions; at most
   ``waiting_max`` wait, more are refused ``busy``. A place that is left is free at once.
2. Users take turns by deficit round robin (Shreedhar and Varghese, "Efficient Fair Queuing Using Deficit Round-Robin",
   1995), in positions for admission and in rows for prompts: between two users who both wait, what they got differs by
   less than the dearest request plus a quantum, however many requests one of them sends. One user's requests keep their
   order, and nobody is passed over because something smaller would fit.
3. In every pass each answer that is being said gets its row; drafts and prompts share what is left of the budget, and
   while a prompt waits it gets some rows in every pass.

Fails with BusyError where neither a slot nor a place in the line is free.
"""

import math
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from config.errors import BusyError

_Key = TypeVar("_Key", bound=Hashable)

ADMISSION_QUANTUM = 512
"""Positions that a user's turn is worth."""
PREFILL_QUANTUM = 32
"""Prompt rows that a user's turn is worth."""
PREFILL_ROWS_MIN = 32
"""Rows of every pass that a waiting prompt gets, however many answers are being said."""


@dataclass(slots=True)
class _Line(Generic[_Key]):
    """One user's requests, in order: (what it is, its cost)."""

    items: deque[tuple[_Key, int]] = field(default_factory=deque)
    deficit: int = 0


class RoundRobin(Generic[_Key]):
    """Deficit round robin over users' lines. An item is offered (:meth:`head`) until it is taken."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._lines: dict[str, _Line[_Key]] = {}
        self._turns: deque[str] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, user: str, key: _Key, cost: int) -> None:
        """Put an item at the end of its user's line."""
        line = self._lines.get(user)
        if line is None:
            line = self._lines[user] = _Line()
            self._turns.append(user)
        line.items.append((key, cost))
        self._count += 1

    def remove(self, user: str, key: _Key) -> None:
        """Take an item out, wherever in its line it is."""
        line = self._lines[user]
        line.items = deque(item for item in line.items if item[0] != key)
        self._count -= 1
        self._forget_empty(user)

    def head(self) -> tuple[_Key, int] | None:
        """The next item and its cost; None if there is none."""
        if not self._turns:
            return None
        if not self._affordable(self._turns[0]):
            self._pass_on()
        return self._lines[self._turns[0]].items[0]

    def pop(self) -> _Key:
        """Take what :meth:`head` offers."""
        offered = self.head()
        assert offered is not None
        key, cost = offered
        user = self._turns[0]
        line = self._lines[user]
        line.items.popleft()
        line.deficit -= cost
        self._count -= 1
        self._forget_empty(user)
        return key

    def _affordable(self, user: str) -> bool:
        line = self._lines[user]
        return line.items[0][1] <= line.deficit

    def _pass_on(self) -> None:
        """Give turns until somebody can afford the head of their line; rounds that nobody can are skipped at once."""
        lines = [self._lines[user] for user in self._turns]
        rounds = min(-(-(line.items[0][1] - line.deficit) // self._quantum) for line in lines) - 1
        for line in lines:
            line.deficit += max(0, rounds) * self._quantum
        for _ in range(2 * len(lines)):
            self._turns.rotate(-1)
            self._lines[self._turns[0]].deficit += self._quantum
            if self._affordable(self._turns[0]):
                return
        raise AssertionError("a round was worth less than it was computed to be")

    def _forget_empty(self, user: str) -> None:
        """Who has nothing waiting keeps no credit."""
        if not self._lines[user].items:
            del self._lines[user]
            self._turns.remove(user)


class Admission(Generic[_Key]):
    """Slots, positions and the line before them, for all runners of a node together."""

    def __init__(self, *, slots_max: int, positions_max: int, waiting_max: int) -> None:
        assert slots_max >= 1
        assert positions_max >= 1
        assert waiting_max >= 0
        self._slots_max = slots_max
        self._positions_max = positions_max
        self._waiting_max = waiting_max
        self._waiting: RoundRobin[_Key] = RoundRobin(ADMISSION_QUANTUM)
        self._users: dict[_Key, str] = {}
        self._running: dict[_Key, int] = {}
        self._positions = 0

    @property
    def active(self) -> int:
        """Answers that run."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot."""
        return len(self._waiting)

    @property
    def positions(self) -> int:
        """Positions that the running answers' caches hold."""
        return self._positions

    def require_room(self, answer_seconds: float) -> None:
        """BusyError if a further answer could neither run nor wait; its hint expects answers of ``answer_seconds``."""
        if self.waiting < self._waiting_max or (not self.waiting and self.active < self._slots_max):
            return
        expected_s = answer_seconds * (self.waiting + 1) / self._slots_max
        raise BusyError(
            f"{self.active} answers are running and {self.waiting} are waiting",
            "try again later",
            retry_after_ms=math.ceil(1000 * expected_s),
        )

    def join(self, key: _Key, user: str, positions: int) -> None:
        """Wait for a slot and ``positions`` positions of cache, at most ``positions_max``."""
        assert 1 <= positions <= self._positions_max
        self._users[key] = user
        self._waiting.add(user, key, positions)

    def admit(self) -> list[_Key]:
        """Who starts now, in order."""
        started = []
        while self.active < self._slots_max:
            offered = self._waiting.head()
            if offered is None or self._positions + offered[1] > self._positions_max:
                break
            key = self._waiting.pop()
            self._running[key] = offered[1]
            self._positions += offered[1]
            started.append(key)
        return started

    def leave(self, key: _Key) -> None:
        """Give back a slot or a place in the line."""
        user = self._users.pop(key)
        if key in self._running:
            self._positions -= self._running.pop(key)
        else:
            self._waiting.remove(user, key)


@dataclass(frozen=True, slots=True)
class Ready(Generic[_Key]):
    """An answer that could take part in the next pass. ``prompt_rows``: how much of its prompt is left; 0: it is being
    said, and could use ``drafts`` rows more than its one."""

    key: _Key
    user: str
    prompt_rows: int
    drafts: int = 0


class PassPlan(Generic[_Key]):
    """Shares of one runner's passes."""

    def __init__(self, rows_max: int) -> None:
        """``rows_max``: rows of a pass, unless more answers than that are being said."""
        self._rows_max = rows_max
        self._last_user = ""
        self._turn_left = 0

    def spare(self, ready: Sequence[Ready[_Key]]) -> tuple[int, int]:
        """Of a pass over these: rows it has without drafts, and how many rows drafts may add."""
        saying = sum(1 for each in ready if not each.prompt_rows)
        prompts = sum(each.prompt_rows for each in ready)
        reserved = min(prompts, max(PREFILL_ROWS_MIN, self._rows_max // 2)) if prompts else 0
        spare = max(0, self._rows_max - saying - reserved)
        return saying + min(prompts, max(0, self._rows_max - saying)), spare

    def plan(self, ready: Sequence[Ready[_Key]]) -> list[tuple[_Key, int]]:
        """(who, how many rows) of the next pass: those being said with their drafts, then shares of prompts."""
        shares = [(each.key, 1 + each.drafts) for each in ready if not each.prompt_rows]
        prompts = [each for each in ready if each.prompt_rows]
        if prompts:
            left = self._rows_max - sum(rows for _, rows in shares)
            shares += self._prefill(prompts, max(left, min(PREFILL_ROWS_MIN, self._rows_max)))
        return shares

    def _prefill(self, prompts: Sequence[Ready[_Key]], rows: int) -> list[tuple[_Key, int]]:
        """Split ``rows`` between users turn by turn, and within a user in order of arrival."""
        lines: dict[str, deque[int]] = {}
        for index, each in enumerate(prompts):
            lines.setdefault(each.user, deque()).append(index)
        given = [0] * len(prompts)
        turns = self._in_turn(lines)
        while rows and turns:
            user = turns.popleft()
            whole = self._turn_left if user == self._last_user and self._turn_left else PREFILL_QUANTUM
            line, turn = lines[user], min(rows, whole)
            self._last_user, self._turn_left = user, whole - turn  # a turn that a pass cuts off goes on in the next
            rows -= turn
            while turn and line:
                index = line[0]
                got = min(turn, prompts[index].prompt_rows - given[index])
                given[index] += got
                turn -= got
                if given[index] == prompts[index].prompt_rows:
                    line.popleft()
            rows += turn
            if line:
                turns.append(user)
        return [(each.key, got) for each, got in zip(prompts, given, strict=True) if got]

    def _in_turn(self, users: Iterable[str]) -> deque[str]:
        """Users, beginning behind the one who had the last turn of the pass before, or with them if it was cut off."""
        ordered = deque(sorted(users))
        last = self._last_user
        ordered.rotate(-sum(1 for user in ordered if user < last or (user == last and not self._turn_left)))
        return ordered
