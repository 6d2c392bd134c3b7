"""An expert shard that runs in a cell: the same answers as :class:`dmoe.runtime.ExpertShard`, bit for bit.

Owns: how a call on experts is laid out in a lane, its deadline. Does not own: the cell (``cell``).
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dmoe.cells.cell import Cell
from dmoe.cells.content import Store
from dmoe.cells.held import HeldShard, seconds_for
from dmoe.core.calls import Indices, Weights
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.wire import FloatRows
from dmoe.loaded import Partials, Together

TOGETHER_MAX = 8
"""Shards asked in one call: their numbers stand in a lane's head."""


class CellShard(HeldShard):
    """A shard in a cell (:class:`dmoe.loaded.Shard`); thread-safe."""

    def __init__(
        self,
        cell: Cell,
        manifest: Manifest,
        shard: Shard,
        store: Store,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Load it; blocking. Raises what :meth:`Cell.load` does."""
        top_k = 0 if manifest.architecture.router.kind == "all" else manifest.architecture.router.top_k
        self._rows_max = max(1, cell.options.asked_bytes // (4 * manifest.architecture.hidden + 8 * top_k))
        self._company: tuple[Sequence[CellShard], tuple[int, ...], int] = ((), (), 0)
        super().__init__(cell, manifest, shard, store, on_close)

    @property
    def place(self) -> object:
        """See :class:`dmoe.loaded.Together`: what is in the same cell is asked together."""
        return self.cell

    def partial(
        self, layer: int, h: FloatRows, experts: Indices | None = None, weights: Weights | None = None
    ) -> FloatRows:
        """See :meth:`dmoe.runtime.ExpertShard.partial`. Raises RemoteError ``unavailable`` if the cell is down, ends,
        or does not answer in time."""
        found: FloatRows = self._all((self,), layer, h, experts, weights)[0]
        return found

    def partials(
        self,
        shards: Sequence[Together],
        layer: int,
        h: FloatRows,
        experts: Indices | None = None,
        weights: Weights | None = None,
    ) -> Partials:
        """See :class:`dmoe.loaded.Together`. Raises as :meth:`partial`."""
        mine = cast("Sequence[CellShard]", shards)  # nothing else has a cell for its place
        if len(mine) <= TOGETHER_MAX:
            return self._all(mine, layer, h, experts, weights)
        found: list[FloatRows] = []
        for start in range(0, len(mine), TOGETHER_MAX):
            found += self._all(mine[start : start + TOGETHER_MAX], layer, h, experts, weights)
        return found

    def _all(
        self,
        shards: Sequence["CellShard"],
        layer: int,
        h: FloatRows,
        experts: Indices | None,
        weights: Weights | None,
    ) -> Partials:
        most = max(1, self._rows_max // len(shards))
        if len(h) <= most:
            return self._some(shards, layer, h, experts, weights)
        answers = []
        for start in range(0, len(h), most):  # a row does not depend on those beside it
            rows = slice(start, start + most)
            chosen = (None, None) if experts is None or weights is None else (experts[rows], weights[rows])
            answers.append(self._some(shards, layer, h[rows], *chosen))
        return [np.concatenate(parts) for parts in zip(*answers, strict=True)]

    def _some(
        self,
        shards: Sequence["CellShard"],
        layer: int,
        h: FloatRows,
        experts: Indices | None,
        weights: Weights | None,
    ) -> Partials:
        rows, top_k, count = len(h), 0 if experts is None else experts.shape[1], len(shards)
        tail, flops = self._known(shards)
        numbers = (shards[0].number, layer, rows, self._hidden, top_k, *tail)
        parts: list[NDArray[Any]] = [np.ascontiguousarray(h, np.float32)]
        if experts is not None and weights is not None:
            parts += [np.ascontiguousarray(experts, np.int32), np.ascontiguousarray(weights, np.float32)]
        with self.cell.ask(numbers, parts, seconds_for(rows, flops), tail[1:]) as lane:
            return lane.rows(count, rows, self._hidden)

    def _known(self, shards: Sequence["CellShard"]) -> tuple[tuple[int, ...], int]:
        """The end of a call's numbers, and what a row costs: worked out once for shards that are asked together."""
        if self._company[0] is not shards:
            others = [shard.number for shard in shards[1:]]
            flops = sum(shard.shard.flops_per_row for shard in shards)
            self._company = shards, (len(others), *others), flops
        return self._company[1:]

    def tidy(self) -> None:
        """See :class:`dmoe.loaded.Together`: the cell does it by itself."""
