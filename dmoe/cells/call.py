"""One call of a cell, from its question to its answer.

Owns: a lane while it is asked and answered, who waits how long and where. Does not own: which lane, what it means for
the cell that it is late or lost (``cell``).
"""

from collections.abc import Sequence
from time import monotonic
from typing import Any, Protocol

import trio
from numpy.typing import NDArray

from config.errors import RemoteError
from dmoe.cells.lanes import ANSWERED, LaneLost, ParentLane
from dmoe.cells.link import Link

LOOP_SECONDS = 0.25
"""For so long a call may hold up the event loop."""


class Late(Exception):
    """The event loop waits no longer; the call goes on."""


class Answer:
    """A lane with an answer in it; it is given back at the end of the ``with`` block."""

    __slots__ = ("_link", "lane")

    def __init__(self, lane: ParentLane, link: Link) -> None:
        self.lane = lane
        self._link = link

    def __enter__(self) -> ParentLane:
        return self.lane

    def __exit__(self, *_: object) -> None:
        self._link.free.append(self.lane)


class Asked(Protocol):
    """Whose call it is: :class:`dmoe.cells.cell.Cell`."""

    name: str

    def lost(self, link: Link, lost: LaneLost) -> None:
        """The process cannot be asked any more."""

    def wake(self) -> None:
        """There is one more call that nobody waits for."""


class Call:
    """A question that was asked; somebody waits for it until it is answered, lost or given up."""

    __slots__ = ("_cell", "_due", "_lane", "_link")

    def __init__(self, cell: Asked, link: Link, lane: ParentLane, due: float) -> None:
        self._cell, self._link, self._lane, self._due = cell, link, lane, due

    def ask(self, numbers: Sequence[int], parts: Sequence[NDArray[Any]]) -> None:
        """See :meth:`ParentLane.ask`. Raises RemoteError ``unavailable`` if the cell is lost."""
        try:
            self._lane.ask(numbers, parts)
        except LaneLost as lost:
            self._cell.lost(self._link, lost)
            raise self._unavailable(lost) from lost
        except BaseException:
            del self._link.asked[self._lane]
            self._link.free.append(self._lane)
            raise

    def wait(self) -> Answer:
        """The answer. Raises RemoteError ``unavailable`` if the cell ends or is late, or what it says of its failure;
        on the event loop :class:`Late` after :data:`LOOP_SECONDS`, for somebody who waits again or gives it up."""
        on_loop = trio.lowlevel.in_trio_run()
        seconds = max(0.0, self._due - monotonic())
        try:
            self._lane.wait(min(LOOP_SECONDS, seconds) if on_loop else seconds)
        except LaneLost as lost:
            if lost.late and on_loop:
                self._link.away.begin(monotonic())
                raise Late(str(lost)) from lost
            self._cell.lost(self._link, lost)
            raise self._unavailable(lost) from lost
        self._link.answered(self._lane)
        answer = Answer(self._lane, self._link)
        status, size = self._lane.outcome()
        if status != ANSWERED:
            with answer:
                raise RemoteError("unavailable", f"in the cell of {self._cell.name}: {self._lane.error_text(size)}")
        return answer

    async def answer(self) -> Answer:
        """As :meth:`wait`, on the event loop as long as that may be held up, then in a thread."""
        try:
            return self.wait()
        except Late:
            try:
                return await trio.to_thread.run_sync(self.wait)
            except trio.Cancelled:  # before a thread began
                self.give_up()
                raise

    def give_up(self) -> None:
        """Nobody waits any more; the cell may have the rest of its time."""
        self._link.late[self._lane] = self._due
        self._cell.wake()

    def _unavailable(self, lost: LaneLost) -> RemoteError:
        return RemoteError("unavailable", f"the cell of {self._cell.name}: {lost}", "ask another replica")
