"""Pieces of one pass that follow each other through the parts of a way, so that its hosts work at the same time.

Owns: their order. Does not own: what a part is or does (``caller``).

Invariants:
1. No piece enters a part before the one in front of it has left that part.
2. A piece that fails ends those that are still under way; the error of the first that failed is raised.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable

import trio

from config.errors import RiosError
from dmoe.stages.chain import StageError

PIECES_AT_ONCE = 8
"""Pieces under way: bounds what waits at a host."""


class Turn:
    """One piece's: when it may enter which part of the way."""

    def __init__(self, front: "Turn | None") -> None:
        self._front = front
        self._left: defaultdict[int, trio.Event] = defaultdict(trio.Event)

    async def enter(self, part: int) -> None:
        """Wait until the piece in front has left this part."""
        if self._front is not None:
            await self._front._left[part].wait()

    def leave(self, part: int) -> None:
        """The next piece may enter this part; saying so twice does nothing."""
        self._left[part].set()


async def one_behind_the_other(count: int, through: Callable[[int, Turn], Awaitable[None]]) -> None:
    """Let ``through`` see each of ``count`` pieces through. Raises StageError, or RiosError of what happens here."""
    if count == 1:
        await through(0, Turn(None))
        return
    failures: list[StageError | RiosError] = []
    places = trio.Semaphore(PIECES_AT_ONCE)

    async def one(piece: int, turn: Turn) -> None:
        try:
            await through(piece, turn)
        except (StageError, RiosError) as error:
            failures.append(error)
            nursery.cancel_scope.cancel()
        finally:
            places.release()

    turn = None
    async with trio.open_nursery() as nursery:
        for piece in range(count):
            await places.acquire()  # here, not in the task: those in front must not wait for those behind
            turn = Turn(turn)
            nursery.start_soon(one, piece, turn)
    if failures:
        raise failures[0]
