"""What every shard in a cell has: its place there, its deadline, and whether it is still served.

Does not own: what a call means (``shard``, ``stage``), the cell (``cell``).
"""

from collections.abc import Callable

from dmoe.cells.cell import Cell
from dmoe.cells.content import Store
from dmoe.core.manifest import Manifest, Shard

CALL_SECONDS_MIN = 2.0
FLOPS_PER_SECOND_MIN = 1e9
"""A machine that computes more slowly than this on top of the minimum is stuck."""


def seconds_for(rows: int, flops_per_row: int) -> float:
    """A call's deadline, from its work."""
    return CALL_SECONDS_MIN + rows * flops_per_row / FLOPS_PER_SECOND_MIN


class HeldShard:
    """A shard in a cell."""

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
        self.cell = cell
        self._on_close = on_close
        self._hidden = manifest.architecture.hidden
        self.number = cell.load(manifest, shard, store)

    @property
    def withdrawn(self) -> str:
        """Why it is not served any more: it keeps ending its cell, or cannot be loaded again. Empty if it is."""
        return self.cell.withdrawn.get(self.number, "")

    def close(self) -> None:
        """Free it."""
        self.cell.drop(self.number)
        self._on_close()
