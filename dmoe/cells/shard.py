"""An expert shard that runs in a cell: the same answers as :class:`dmoe.runtime.ExpertShard`, bit for bit.

Owns: how a call on experts is laid out in a lane, its deadline. Does not own: the cell (``cell``).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmoe.cells.cell import Cell
from dmoe.cells.content import Store
from dmoe.core.calls import Indices, Weights
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.wire import FloatRows

CALL_SECONDS_MIN = 2.0
FLOPS_PER_SECOND_MIN = 1e9
"""A machine that computes more slowly than this on top of the minimum is stuck."""


class CellShard:
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
        self.manifest, self.shard = manifest, shard
        self.ram_bytes = shard.ram_bytes
        self._cell = cell
        self._on_close = on_close
        self._hidden = manifest.architecture.hidden
        self._top_k = 0 if manifest.architecture.router.kind == "all" else manifest.architecture.router.top_k
        self._rows_max = max(1, cell.options.asked_bytes // (4 * self._hidden + 8 * self._top_k))
        self._number = cell.load(manifest, shard, store)

    def partial(
        self, layer: int, h: FloatRows, experts: Indices | None = None, weights: Weights | None = None
    ) -> FloatRows:
        """See :meth:`dmoe.runtime.ExpertShard.partial`. Raises RemoteError ``unavailable`` if the cell is down, ends,
        or does not answer in time."""
        if len(h) <= self._rows_max:
            return self._some(layer, h, experts, weights)
        answers = []
        for start in range(0, len(h), self._rows_max):  # a row does not depend on those beside it
            rows = slice(start, start + self._rows_max)
            chosen = (None, None) if experts is None or weights is None else (experts[rows], weights[rows])
            answers.append(self._some(layer, h[rows], *chosen))
        return np.concatenate(answers)

    def _some(self, layer: int, h: FloatRows, experts: Indices | None, weights: Weights | None) -> FloatRows:
        rows, top_k = len(h), 0 if experts is None else experts.shape[1]
        numbers = (self._number, layer, rows, self._hidden, top_k)
        parts: list[NDArray[Any]] = [np.asarray(h, np.float32)]
        if experts is not None and weights is not None:
            parts += [np.asarray(experts, np.int32), np.asarray(weights, np.float32)]
        seconds = CALL_SECONDS_MIN + rows * self.shard.flops_per_row / FLOPS_PER_SECOND_MIN
        with self._cell.ask(numbers, parts, seconds) as lane:
            return lane.rows(rows, self._hidden)

    def close(self) -> None:
        """Free it."""
        self._cell.drop(self._number)
        self._on_close()
