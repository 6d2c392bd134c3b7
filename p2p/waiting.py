"""A unary call of ours on its way, without a task or a cancel scope of its own: both would show in small calls.

Invariant: it is settled once, by an answer, an error, its deadline or the end of the link; who waits is woken once.
"""

from time import perf_counter_ns
from typing import TYPE_CHECKING

import trio

from config.errors import RemoteError, RiosError
from p2p.face import LeftError, Reply

if TYPE_CHECKING:
    from p2p.rpc import Connection

_current_task = trio.lowlevel.current_task
_wait = trio.lowlevel.wait_task_rescheduled
_reschedule = trio.lowlevel.reschedule
_SUCCEEDED = trio.lowlevel.Abort.SUCCEEDED


class NotSentError(RemoteError):
    """The link was gone, or about to go, before anything of the call was sent."""


class Waiter:
    """A unary call of ours on its way: :class:`p2p.face.Pending`."""

    __slots__ = ("answered_ns", "call_id", "connection", "method", "outcome", "over", "task")

    def __init__(self, connection: "Connection", call_id: int, method: str) -> None:
        self.connection = connection
        self.call_id = call_id
        self.method = method
        self.task: trio.lowlevel.Task | None = None
        self.outcome: Reply | RiosError | None = None
        self.over = False
        self.answered_ns = 0

    async def wait(self) -> Reply:
        """See :meth:`p2p.face.Pending.wait`."""
        if self.outcome is None:
            self.task = _current_task()
            try:
                await _wait(self._abort)
            except trio.Cancelled:
                self.connection.give_up(self.call_id)
                raise
        else:
            await trio.lowlevel.checkpoint()
        self.task = None
        if self.outcome is None:
            raise LeftError
        outcome, self.outcome = self.outcome, None  # the timer keeps the waiter for a while, not the answer
        if type(outcome) is Reply:
            return outcome
        assert isinstance(outcome, RiosError)
        raise outcome

    def leave(self) -> None:
        """See :meth:`p2p.face.Pending.leave`."""
        if self.task is not None and not self.over:
            task, self.task = self.task, None
            _reschedule(task)

    def cancel(self) -> None:
        """See :meth:`p2p.face.Pending.cancel`."""
        if not self.over:
            self.over = True
            self.connection.give_up(self.call_id)

    def settle(self, outcome: Reply | RiosError) -> None:
        """The call is over."""
        self.outcome, self.over, self.answered_ns = outcome, True, perf_counter_ns()
        if self.task is not None:
            _reschedule(self.task)

    def expire(self) -> None:
        """Its deadline came."""
        self.connection.give_up(self.call_id)
        self.settle(self.connection.late(self.method))
        self.connection.missed()

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        # trio is walking its tasks: whoever starts one here (an end of the link does) ends the walk, and who comes
        # after is never cancelled; so the peer is told by the task itself
        self.over = True
        self.task = None
        return _SUCCEEDED
