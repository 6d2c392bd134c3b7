"""What the loop of a runner (``dmoe/passes.py``) holds of each answer.

Invariant: a sequence is closed once, when nobody needs it any more and nobody is using it.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from config.generation import GenerationEvent, Route
from dmoe.bills import Bill
from dmoe.core.answer import FloatRows, Step, Taken
from dmoe.core.prefixes import tokens_of
from dmoe.core.speculate import NO_DRAFT, Lookup, Odds
from dmoe.outbox import Outbox
from dmoe.runner import Sequence as Cached


class Work(Protocol):
    """What an answer is to the loop (:class:`dmoe.core.answer.Answer`)."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def length(self) -> int: ...
    @property
    def cached(self) -> int: ...
    @property
    def said(self) -> int: ...
    @property
    def prompt_left(self) -> int: ...
    @property
    def drafts_max(self) -> int: ...
    def next(self, rows_max: int, drafts: Sequence[int] = ()) -> Step: ...
    def take(self, step: Step, outputs: FloatRows) -> Taken: ...


class Held:
    """A sequence and how many are using it now: it is closed when it was dropped and nobody does."""

    __slots__ = ("_dropped", "_users", "sequence")

    def __init__(self, sequence: Cached) -> None:
        self.sequence = sequence
        self._users = 0
        self._dropped = False

    def drop(self) -> None:
        """Not needed any more."""
        self._dropped = True
        self._close_unused()

    def pin(self) -> None:
        """It is in use until :meth:`unpin`."""
        self._users += 1

    def unpin(self) -> None:
        """One use is over."""
        self._users -= 1
        self._close_unused()

    def _close_unused(self) -> None:
        if self._dropped and not self._users:
            self.sequence.close()


class Slot:
    """One answer: what it is made of, and where it stands."""

    def __init__(
        self,
        *,
        prompt_tokens: tuple[int, ...],
        positions: int,
        user: str,
        route: Route,
        make: Callable[[int], Awaitable[Work]],
        outbox: Outbox[GenerationEvent],
        reuse: bool = True,
        trace: str = "",
        bill: Bill | None = None,
    ) -> None:
        """``positions``: room that the whole answer needs. ``make``: its work, beginning behind so many positions of
        the prompt. ``reuse``: it may begin with what another sequence computed. ``trace``: of the request.
        ``bill``: what is paid for it is put there."""
        self.prompt = tokens_of(prompt_tokens)
        self.positions = positions
        self.user = user
        self.route = route
        self.make = make
        self.outbox = outbox
        self.reuse = reuse
        self.trace = trace
        self.bill = bill
        self.work: Work | None = None
        self.held: Held | None = None
        self.over = False
        self.opening = trio.CancelScope()
        self.progress = trio.lowlevel.ParkingLot()
        self.started = self.prefilled = 0.0
        self.lookup: Lookup | None = None
        self.odds = Odds()
        self.draft = NO_DRAFT
