"""Which shard runs where: this node's own here, a stranger's in the cell of its publisher, or nowhere.

Owns: one cell per publisher (all on the CPU), the rule, what is told about it. Does not own: a cell's life (``cell``).

Invariants:
1. In mode ``auto`` a shard of another publisher runs in a cell; without one it is refused, unless the operator allowed
   it. In mode ``required`` that holds for every shard.
2. A cell holds shards of one publisher. It ends with the last of them.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from config.errors import LocalError
from dmoe.cells import gvisor, sandbox
from dmoe.cells.cell import Cell, Counters
from dmoe.cells.content import Store
from dmoe.cells.link import Options
from dmoe.cells.shard import CellShard
from dmoe.cells.stage import CellStage
from dmoe.core.manifest import Manifest, Shard
from dmoe.loaded import Shard as Loaded
from dmoe.stages.segment import Segment

log = logging.getLogger("rios.security.cells")

Mode = Literal["auto", "required", "off"]
Here = Callable[[Manifest, Shard], Loaded]
StageHere = Callable[[Manifest, Shard], Segment]
Opened = TypeVar("Opened", Loaded, Segment)


class Cells:
    """The cells of a node. Methods may be called from any thread."""

    def __init__(
        self,
        store: Store,
        here: Here,
        stage_here: StageHere,
        *,
        own: str,
        mode: Mode = "auto",
        allow_unsandboxed: bool = False,
        device: str = "auto",
        options: Options | None = None,
    ) -> None:
        """``here`` and ``stage_here`` open shards in this process; ``own`` is the peer id whose shards may run there;
        ``device`` is what experts should run on: a cell has the CPU only."""
        self.counters = Counters()
        self.mode = mode
        self._store = store
        self._here = here
        self._stage_here = stage_here
        self._own = own
        self._allow_unsandboxed = allow_unsandboxed
        self._device = device
        self._options = options or Options()
        self._cells: dict[str, Cell] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.on_withdrawn: Callable[[], None] = lambda: None
        """Called, in some thread, when a shard was withdrawn."""

    def needs_cell(self, publisher: str) -> bool:
        """Whether shards of this publisher must not run in this process."""
        return self.mode == "required" or (self.mode == "auto" and publisher != self._own)

    def refusal(self) -> str:
        """Why no shard can have a cell here; empty if it can."""
        if lacks := sandbox.missing():
            return lacks
        if self._options.gvisor and not gvisor.binary():
            return f"dmoe.gvisor is on, and there is no {gvisor.BINARY} in PATH"
        return "cells run on the CPU, and dmoe.device is cuda" if self._device == "cuda" else ""

    def load(self, manifest: Manifest, shard: Shard) -> Loaded:
        """Open an expert shard where it belongs; blocking. Raises LocalError if it belongs in a cell and none can be
        had, and what opening raises."""
        return self._opened(manifest, shard, self._here, CellShard)

    def load_stage(self, manifest: Manifest, shard: Shard) -> Segment:
        """The same for a stage."""
        return self._opened(manifest, shard, self._stage_here, CellStage)

    def _opened(
        self,
        manifest: Manifest,
        shard: Shard,
        here: Callable[[Manifest, Shard], Opened],
        there: Callable[[Cell, Manifest, Shard, Store, Callable[[], None]], Opened],
    ) -> Opened:
        if not self.needs_cell(manifest.publisher):
            return here(manifest, shard)
        if why := self.refusal():
            self._check_allowed(manifest, shard, why)
            return here(manifest, shard)
        cell = self._cell(manifest.publisher)
        try:
            cell.wait_up()
            return there(cell, manifest, shard, self._store, lambda: self._tidy(cell))
        except BaseException:
            self._tidy(cell)
            raise

    def fault(self, manifest: Manifest) -> LocalError | None:
        """Why this node may not answer with a model: it needs a cell, and none can be had."""
        if not self.needs_cell(manifest.publisher) or not (why := self.refusal()) or self._may_run_here():
            return None
        return LocalError("local", f"{manifest.name} of {manifest.publisher} needs a cell: {why}", _HINT)

    def holds(self, manifest: Manifest) -> bool:
        """Whether a model that this node answers with runs in a cell here. Raises LocalError if it may not run."""
        if (fault := self.fault(manifest)) is not None:
            raise fault
        return self.needs_cell(manifest.publisher) and not self.refusal()

    def _check_allowed(self, manifest: Manifest, shard: Shard, why: str) -> None:
        """Raise LocalError unless the operator wants it to run in this process, without a cell."""
        if not self._may_run_here():
            self.counters.refused += 1
            message = f"{shard.id} of {manifest.publisher} needs a cell, and none can be had: {why}"
            raise LocalError("local", message, _HINT)
        log.warning("%s of %s runs without a cell: %s", shard.id, manifest.publisher, why)

    def _may_run_here(self) -> bool:
        return self.mode == "auto" and self._allow_unsandboxed

    def _cell(self, publisher: str) -> Cell:
        """A publisher's cell, starting if it is new."""
        with self._lock:
            if self._closed:
                raise LocalError("local", "this node is shutting down")
            cell = self._cells.get(publisher)
            if cell is None:
                cell = self._cells[publisher] = Cell(
                    publisher, self._options, self.counters, lambda: self.on_withdrawn()
                )
                cell.start()
            cell.expected += 1
            return cell

    def _tidy(self, cell: Cell) -> None:
        """One shard less is in a cell, or on its way there."""
        with self._lock:
            cell.expected -= 1
            if not cell.expected and self._cells.get(cell.name) is cell:
                del self._cells[cell.name]
                cell.stop()

    def ram_bytes(self) -> int:
        """Memory that cells take beside their shards."""
        return sum(cell.ram_bytes for cell in list(self._cells.values()))

    def ram_bytes_for(self, publisher: str) -> int:
        """Memory that one more shard of this publisher takes beside its own: that of a cell, or none."""
        if publisher in self._cells or not self.needs_cell(publisher) or self.refusal():
            return 0
        return self.counters.ram_bytes or self._options.ram_bytes_guess

    def running(self) -> list[Cell]:
        """The cells that may be asked now."""
        return [cell for cell in list(self._cells.values()) if cell.is_up]

    def close(self) -> None:
        """End every cell; waits for that."""
        with self._lock:
            self._closed = True
            cells = list(self._cells.values())
            self._cells.clear()
        for cell in cells:
            cell.stop()
        for cell in cells:
            cell.close()

    def statistics(self) -> dict[str, Any]:
        """What is in force, and what happened, JSON-able."""
        cells = [cell.statistics() for cell in list(self._cells.values())]
        count = self.counters
        return {
            "mode": self.mode,
            "refusal": "" if self.mode == "off" else self.refusal(),
            "unsandboxed": self._may_run_here() and bool(self.refusal()),
            "walls": [{"name": w.name, "available": w.in_force, "why": w.why} for w in sandbox.available()],
            "running": sum(cell["running"] for cell in cells),
            "started": count.started,
            "restarts": count.restarted,
            "killed": count.killed,
            "died": count.died,
            "calls": count.calls,
            "refused": count.refused,
            "withdrawn": count.withdrawn,
            "ram_bytes": self.ram_bytes(),
            "cells": cells,
        }


_HINT = 'rios doctor says what is missing; dmoe.allow_unsandboxed = true, or sandbox = "off", runs it without'
