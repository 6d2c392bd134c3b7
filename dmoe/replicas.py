"""Who can answer for what right now, as all generations of a node see it, kept fresh from the directory.

Owns: a table per model (``core.routes``), the estimates and holds (``core.dispatch``), who offered a shard and when
last. Does not own: the adverts (``p2p``), the calls.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random
from time import perf_counter_ns

import trio

from config.vocabulary import PeerId
from dmoe.core.dispatch import Dispatcher, Replica
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.routes import ModelMap, Place, Table, paused_with, row_us_of, table_of
from dmoe.sightings import KNOWN_MAX, Sightings, answered_ago
from dmoe.trust import Trust
from dmoe.worker import Worker
from p2p.face import Network

WRONG_ANSWERS = "those who offer it gave wrong answers (rios audit ls)"


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
        self._tables: dict[tuple[str, Privacy], tuple[tuple[int, int], Table]] = {}
        self.sightings = Sightings()
        self.trust: Trust | None = None
        """Whom this node trusts; None: everybody."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the directory until cancelled."""
        directory = self._network.directory
        self.sightings.present(directory.adverts(), trio.current_time())
        task_status.started()
        while True:
            await directory.wait_change()
            self.sightings.present(directory.adverts(), trio.current_time())
            self.refresh()

    def refresh(self) -> None:
        """Tables are made anew. Also from a thread that the event loop waits for."""
        self._version += 1
        if trio.lowlevel.in_trio_run():
            self._tell()
        else:
            trio.from_thread.run_sync(self._tell)

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def table(self, model: ModelMap, privacy: Privacy = OPEN) -> tuple[tuple[int, int], Table]:
        """The current table of a model under a privacy rule, and its version."""
        version = (self._version, self._worker.changes if self._worker else 0)
        known = self._tables.get((model.model_id, privacy))
        if known is not None and known[0] == version:
            return known
        now = trio.current_time()
        if known is not None:  # what the old table offered was there until now
            self._remember(model, known[1], now)
        adverts = self._network.directory.adverts()
        local = self._worker.indices(model.model_id) if self._worker else frozenset()
        own_price = self._worker.quote.microcredits_per_tflop if self._worker else 0
        choose = self._chosen(model)
        table = table_of(model, adverts, self._network.peer_id, local, own_price, privacy, choose)
        self.dispatcher.forget(adverts)
        for peer in table.quotes:
            row_us = row_us_of(model.layers, adverts[peer].hardware.expert_kflop_per_s)
            if row_us is not None:
                self.dispatcher.prior(peer, row_us)
        self._tables[model.model_id, privacy] = (version, table)
        return version, table

    def every(self, model: ModelMap) -> Mapping[int, Sequence[Replica]]:
        """All replicas by shard, also those that are not used."""
        return self.table(model)[1].every

    def _chosen(self, model: ModelMap) -> Callable[[int, Sequence[Replica]], Sequence[Replica]]:
        trust = self.trust
        if trust is None:
            return lambda shard, found: found
        return lambda shard, found: trust.choose(self._network.peer_id, model.model_id, shard, found)

    def _remember(self, model: ModelMap, table: Table, now: float) -> None:
        """Who offers what at this moment."""
        for shard, peers in {need.shard: need.replicas for needs in table.needs for need in needs}.items():
            self.sightings.saw(model.model_id, shard, [replica.peer_id for replica in peers[:KNOWN_MAX]], now)

    def why_missing(self, model: ModelMap, layer: int, place: Place, privacy: Privacy = OPEN) -> str:
        """Where the replicas of a sum group have gone, for the error that says so: when each of those that are known
        was last seen, and when it last answered a call of this node."""
        table, now = self.table(model, privacy)[1], trio.current_time()
        if place.shard in table.withheld and not table.needs[layer][place.group].replicas:
            return f"others offer it, but {privacy.why(layer, layer, len(model.layers))}"
        offered = place.shard in table.offered
        if offered:
            self._remember(model, table, now)
        if offered:
            each = self.sightings.each(model.model_id, (place.shard,), now, self._answered)
            return f"it is offered, but every call to it failed; replicas: {each}"
        if self.trust is not None and self.every(model).get(place.shard):
            return WRONG_ANSWERS
        when = self.sightings.gone(model.model_id, (place.shard,), now, self._answered)
        if paused := paused_with(model.model_id, place.shard, self._network.directory.adverts()):
            when += f"; {paused} that hold it are paused by their operators"
        return when

    def where_gone(self, model: ModelMap, shards: Collection[int]) -> str:
        """What is said of shards that nobody offers: when one of their replicas was last seen, and which."""
        if self.trust is not None and any(self.every(model).get(shard) for shard in shards):
            return WRONG_ANSWERS
        return self.sightings.gone(model.model_id, shards, trio.current_time(), self._answered)

    def _answered(self, peer: PeerId) -> str:
        return answered_ago(self.dispatcher.answered_at_us(peer), now_us())


def now_us() -> int:
    """The dispatcher's clock."""
    return perf_counter_ns() // 1000
