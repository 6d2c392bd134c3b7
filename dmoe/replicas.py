"""Who can answer for what right now, as all generations of a node see it, kept fresh from the directory.

Owns: a table per model (``core.routes``), the estimates and holds (``core.dispatch``), when a shard was last offered.
Does not own: the adverts (``p2p``), the calls.
"""

from collections.abc import Callable
from random import Random

import trio

from dmoe.core.dispatch import Dispatcher
from dmoe.core.routes import ModelMap, Place, Table, paused_with, row_us_of, table_of
from dmoe.worker import Worker
from p2p.face import Network


class Replicas:
    """Tables of replicas. :meth:`run` must be running for them to change with the directory."""

    def __init__(self, network: Network, worker: Worker | None, random: Random | None) -> None:
        self.dispatcher = Dispatcher(network.peer_id)
        self.dice: Callable[[], float] = (random or Random()).random
        self.changed = trio.Event()
        """Set at the next change of the directory."""
        self._network = network
        self._worker = worker
        self._version = 0
        self._tables: dict[str, tuple[tuple[int, int], Table]] = {}
        self._last_seen: dict[tuple[str, int], float] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the directory until cancelled."""
        task_status.started()
        while True:
            await self._network.directory.wait_change()
            self._version += 1
            self.changed.set()
            self.changed = trio.Event()

    def table(self, model: ModelMap) -> tuple[tuple[int, int], Table]:
        """The current table of a model and its version."""
        version = (self._version, self._worker.changes if self._worker else 0)
        known = self._tables.get(model.model_id)
        if known is not None and known[0] == version:
            return known
        now = trio.current_time()
        if known is not None:  # what the old table offered was there until now
            self._last_seen.update({(model.model_id, shard): now for shard in known[1].offered})
        adverts = self._network.directory.adverts()
        local = self._worker.indices(model.model_id) if self._worker else frozenset()
        own_price = self._worker.quote.microcredits_per_tflop if self._worker else 0
        table = table_of(model, adverts, self._network.peer_id, local, own_price)
        self.dispatcher.forget(adverts)
        for peer in table.quotes:
            row_us = row_us_of(model.layers, adverts[peer].hardware.expert_kflop_per_s)
            if row_us is not None:
                self.dispatcher.prior(peer, row_us)
        self._tables[model.model_id] = (version, table)
        return version, table

    def why_missing(self, model: ModelMap, place: Place) -> str:
        """Where the replicas of a sum group have gone, for the error that says so."""
        if place.shard in self.table(model)[1].offered:
            return "it is offered, but every call to it failed"
        seen = self._last_seen.get((model.model_id, place.shard))
        when = f"last seen {trio.current_time() - seen:.0f} s ago" if seen is not None else "it was never seen"
        if paused := paused_with(model.model_id, place.shard, self._network.directory.adverts()):
            when += f"; {paused} that hold it are paused by their operators"
        return when
