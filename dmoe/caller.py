"""Calls experts wherever their replicas are, local ones directly, others by ``expert.run``: what a node's generations
share, joined.

Owns: the wiring. Does not own: a generation's calls (``session``), who offers what (``replicas``), payment (``purse``).
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import trio

from dmoe.audit import Auditor
from dmoe.bills import Bills
from dmoe.core.dispatch import Dispatcher
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.routes import ModelMap, Table, map_of
from dmoe.hedging import Hedges
from dmoe.jobs import Shared
from dmoe.ports import Buyer
from dmoe.probing import Prober
from dmoe.purse import Purse
from dmoe.replicas import Replicas
from dmoe.session import CallerReport, CallerSession
from dmoe.sightings import Sightings
from dmoe.worker import Worker
from p2p.face import Network


class Caller:
    """Makes sessions. :meth:`run` keeps fresh what they know of the swarm."""

    def __init__(
        self,
        network: Network,
        *,
        worker: Worker | None = None,
        buyer: Buyer | None = None,
        call_timeout_ms: int = 10_000,
        renormalise: bool = False,
        random: Random | None = None,
        audits: Callable[[Purse, Replicas], Auditor] | None = None,
        bills: Bills | None = None,
    ) -> None:
        """``audits`` makes the auditor of the answers that come; None: nothing is audited. ``bills``: what is paid is
        put there."""
        self._replicas = Replicas(network, worker, random)
        purse = Purse(buyer, bills)
        self.hedges = Hedges(self._replicas)
        self.audit = audits(purse, self._replicas) if audits is not None else None
        self._prober: Prober | None = None
        if self.audit is not None:
            self._replicas.trust = self.audit.trust
            self.audit.trust.changed = self._replicas.refresh
            self._prober = Prober(self.audit, self._replicas, network.peer_id, random)
        self._shared = Shared(
            network, worker, purse, self._replicas, self.hedges, call_timeout_ms, self.audit, renormalise
        )
        self._maps: dict[str, ModelMap] = {}

    @property
    def dispatcher(self) -> Dispatcher:
        """What is known about the peers, and which of them rest."""
        return self._replicas.dispatcher

    @property
    def renormalises(self) -> bool:
        """Whether layers do without experts that nobody has, where that is possible."""
        return self._shared.renormalise

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the directory, ask others where calls are late, and audit, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.hedges.run)
            if self.audit is not None and self._prober is not None:
                await nursery.start(self.audit.run)
                await nursery.start(self._prober.run)
            await self._replicas.run(task_status)

    def session(self, manifest: Manifest, privacy: Privacy = OPEN) -> CallerSession:
        """The experts of one model for generations under one privacy rule."""
        return CallerSession(self._shared, self.map(manifest), privacy)

    def map(self, manifest: Manifest) -> ModelMap:
        """A model's sum groups and where they stand in its manifest."""
        model = self._maps.get(manifest.model_id)
        if model is None:
            model = self._maps[manifest.model_id] = map_of(manifest)
            if self.audit is not None:
                self.audit.know(manifest, model)
                self._replicas.refresh()
        return model

    @property
    def sightings(self) -> Sightings:
        """Who was seen to hold what."""
        return self._replicas.sightings

    def where_gone(self, manifest: Manifest, missing: Sequence[Shard]) -> str:
        """What is said of shards that nobody offers: when one of their replicas was last seen, and which."""
        return self._replicas.where_gone(self.map(manifest), [manifest.shard_index(shard.id) for shard in missing])

    def missing(self, manifest: Manifest, privacy: Privacy = OPEN) -> list[Shard]:
        """Expert shards without which no answer can be made now: nobody who may compute them offers them, and they
        cannot be done without."""
        model = self.map(manifest)
        _, table = self._replicas.table(model, privacy)
        lacking = {n for places in model.layers for place in places if (n := place.shard) not in table.offered}
        if self._shared.renormalise and model.top_k:
            # some row chooses only these sooner or later, but a layer without any expert fails every row
            empty = [places for places in model.layers if lacking.issuperset(place.shard for place in places)]
            lacking = {place.shard for places in empty for place in places} | (lacking & table.withheld)
        return [manifest.shards[index] for index in sorted(lacking)]

    def table(self, model: ModelMap) -> tuple[tuple[int, int], Table]:
        """The current table of a model's replicas and its version."""
        return self._replicas.table(model)

    def statistics(self) -> dict[str, Any]:
        """What is known about each peer, JSON-able."""
        ejected = self.dispatcher.ejected
        return {
            peer: {
                "calls": known.calls,
                "round_trip_us": round(known.round_trip_us),
                "row_us": round(known.row_us, 1),
                "in_flight": known.in_flight,
                "ejected": peer in ejected,
            }
            for peer, known in self.dispatcher.peers.items()
        }


__all__ = ["Caller", "CallerReport", "CallerSession"]
