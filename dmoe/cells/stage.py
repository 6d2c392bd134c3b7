"""A stage that runs in a cell, its caches too: the same bits as :mod:`dmoe.stages.loading` has in this process.

Owns: how runs are laid out in a lane, which caches are still there. Does not own: the cell (``cell``), tickets and
queues (``dmoe/stages``).

Invariants:
1. A cache's length is counted here; every run says where its rows belong. So a run that failed has changed nothing.
2. Caches of a process that ended are empty: whoever runs at a later position is told so and sends what is missing.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import trio

from config.errors import RequestError
from dmoe.cells.cell import Cell
from dmoe.cells.content import Store
from dmoe.cells.held import CALL_SECONDS_MIN, HeldShard, seconds_for
from dmoe.cells.program import OPEN, RUN
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.wire import FloatRows
from dmoe.kv import Cache
from dmoe.segment import Part

_PLACE_BYTES = 24


class CellCache(Cache):
    """A sequence's cache in a cell. ``number`` names it there, never again another."""

    __slots__ = ("_counted", "_generation", "_stage", "number")

    def __init__(self, stage: "CellStage", number: int, capacity: int, length: int) -> None:
        self._stage: CellStage | None = stage
        self._generation = stage.generation
        self._counted = length
        self.number = number
        self.capacity = capacity

    @property
    def is_open(self) -> bool:
        """Whether it was not closed."""
        return self._stage is not None

    @property
    def is_there(self) -> bool:
        """Whether the process that made it still runs."""
        return self._stage is not None and self._generation == self._stage.generation

    @property
    def is_awaited(self) -> bool:
        """Whether the next run counts on positions in it, there or not."""
        return self._counted > 0

    @property
    def length(self) -> int:
        """Positions in it; none if its process has ended."""
        return self._counted if self.is_there else 0

    @length.setter
    def length(self, length: int) -> None:
        self._counted = length

    def made_again(self, number: int, generation: int) -> None:
        """There is an empty one in a new process."""
        self.number, self._generation, self._counted = number, generation, 0

    def close(self) -> None:
        """See :class:`dmoe.kv.Cache`."""
        stage, self._stage = self._stage, None
        if stage is not None:
            stage.forget(self.number)


class CellStage(HeldShard):
    """A stage in a cell (:class:`dmoe.stages.segment.Segment`)."""

    def __init__(
        self,
        cell: Cell,
        manifest: Manifest,
        shard: Shard,
        store: Store,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Load it; blocking. Raises what :meth:`Cell.load` does."""
        self._numbers = count(1)
        super().__init__(cell, manifest, shard, store, on_close)

    @property
    def generation(self) -> int:
        """Of the cell's processes."""
        return self.cell.generation

    async def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache:
        """See :class:`dmoe.segment.Segment`. Raises RemoteError ``unavailable`` if the cell is down."""
        assert like is None or isinstance(like, CellCache)
        context = self.manifest.architecture.context
        if not 1 <= capacity <= context:
            message = f"{capacity} tokens do not fit the model's context of {context}"
            raise RequestError("context_length_exceeded", message)
        return await trio.to_thread.run_sync(self._open, capacity, like, length)

    def _open(self, capacity: int, like: CellCache | None, length: int) -> CellCache:
        if like is not None and like.length < length:
            raise RequestError("conflict", f"the cache holds {like.length} positions, not {length}")
        cache = CellCache(self, next(self._numbers), capacity, length)
        numbers = (self.number, OPEN, cache.number, capacity, 0 if like is None else like.number, length)
        with self.cell.ask(numbers, (), CALL_SECONDS_MIN):
            return cache

    async def run(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows:
        """See :class:`dmoe.segment.Segment`."""
        return await trio.to_thread.run_sync(self.compute, x, parts)

    def compute(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows:
        """See :class:`dmoe.segment.Segment`. Raises RemoteError ``unavailable`` if the cell is down, ends, or does not
        answer in time."""
        for part in parts:
            self._make_again(part.cache)
        answers = [self._some(x[rows], places) for rows, places in self._pieces(parts)]
        for part in parts:
            part.cache.length += part.rows
        return answers[0] if len(answers) == 1 else np.concatenate(answers)

    def _make_again(self, cache: Cache) -> None:
        """A cache whose process has ended begins again, empty, for a run that begins at 0; the process may also have
        ended after the run's position was looked at."""
        assert isinstance(cache, CellCache)
        if cache.is_there:
            return
        if cache.is_awaited:
            raise RequestError(
                "conflict", "the cell ended, and the cache's positions with it", "run what is missing first"
            )
        number, generation = next(self._numbers), self.generation
        with self.cell.ask((self.number, OPEN, number, cache.capacity, 0, 0), (), CALL_SECONDS_MIN):
            cache.made_again(number, generation)

    def _pieces(self, parts: Sequence[Part]) -> Iterator[tuple[slice, list[tuple[int, int, int]]]]:
        """Rows that fit a lane, and for each part in them its cache, position and rows."""
        room = self.cell.options.asked_bytes
        first = size = start = 0
        places: list[tuple[int, int, int]] = []
        for part in parts:
            assert isinstance(part.cache, CellCache)
            done = 0
            while done < part.rows:
                fits = (room - size - _PLACE_BYTES) // (4 * self._hidden)
                if fits < 1:
                    yield slice(start, first), places
                    start, size, places = first, 0, []
                    continue
                rows = min(fits, part.rows - done)
                places.append((part.cache.number, part.cache.length + done, rows))
                size += _PLACE_BYTES + 4 * self._hidden * rows
                first, done = first + rows, done + rows
        yield slice(start, first), places

    def _some(self, x: FloatRows, places: list[tuple[int, int, int]]) -> FloatRows:
        rows = len(x)
        numbers = (self.number, RUN, len(places), rows, self._hidden)
        seconds = seconds_for(rows, self.shard.flops_per_row)
        with self.cell.ask(numbers, [np.array(places, np.int64), np.ascontiguousarray(x, np.float32)], seconds) as lane:
            return lane.rows(rows, self._hidden)

    def forget(self, number: int) -> None:
        """Free a cache, soon; does not block."""
        self.cell.say({"do": "forget", "number": self.number, "cache": number})
