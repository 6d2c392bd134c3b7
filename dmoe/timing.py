"""A runner that tells how long its small passes take: what this machine really does with a model.

Invariant: it changes nothing about a pass. Only passes of few rows are told: of those the time per row is asked for.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from time import perf_counter

from dmoe.runner import Feed, FloatRows, Runner, Sequence

ROWS_TOLD_MAX = 4

Told = Callable[[int, float], None]
"""``(rows, microseconds)`` of one pass."""


class TimedRunner:
    """Another runner (:class:`dmoe.runner.Runner`), timed."""

    def __init__(self, runner: Runner, told: Told) -> None:
        self._runner = runner
        self._told = told

    async def open(self, capacity: int, *, like: Sequence | None = None, length: int = 0) -> Sequence:
        """See :class:`dmoe.runner.Runner`."""
        return await self._runner.open(capacity, like=like, length=length)

    async def forward(self, feeds: Items[Feed]) -> list[FloatRows]:
        """See :class:`dmoe.runner.Runner`."""
        started = perf_counter()
        outputs = await self._runner.forward(feeds)
        rows = sum(len(feed.tokens) for feed in feeds)
        if rows <= ROWS_TOLD_MAX:
            self._told(rows, 1e6 * (perf_counter() - started))
        return outputs
