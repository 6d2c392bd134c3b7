"""Holds this node's part of the deployed models: takes, advertises and drops shards as placement says.

Owns: the loop from deployments and adverts to what is served, the own advert's offers, the operator's view. Does not
own: the choice (``core.placement``), a shard's way here (``taking``), how deployments spread (``deployments``), models
that this node answers with itself (``bringing``).

Invariants:
1. A shard is advertised only while it can be called (the trunk: while it is on disk); one that keeps ending its cell
   is withdrawn for a while.
2. A surplus shard is dropped only after the hold time, and only when enough others proved that they have it; its files
   stay with its publisher and with pinned models.
3. After a restart, what was served before is served again without asking anybody.
4. While the node is paused (``Worker.paused``) it takes and drops nothing: it keeps its place, also in placement.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, get_args

import msgspec
import trio

from config.errors import LocalError, RequestError
from config.vocabulary import PeerId
from dmoe.bringing import Bringer
from dmoe.core.demand import ASKED_MAX
from dmoe.core.deployment import DEFAULT_MODE, REPLICAS_MAX, Deployment, Mode
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.placement import Candidate, Holding, Patience, Wanted, assign, decide, quantised, rank
from dmoe.deployments import Deployments
from dmoe.fetching import Fetcher, Models
from dmoe.helping import Helping
from dmoe.stages.host import StageHost
from dmoe.taking import Cells, Loader, NoCells, Progress, StageLoader, Taker
from dmoe.worker import Worker
from p2p.core.advert import Advert, ModelOffer, bitmap
from p2p.core.heartbeat import LOAD_STEP_MIN, is_worth_sending
from p2p.face import Network

log = logging.getLogger(__name__)

PATIENCE_BYTES_PER_MS = 4096
"""A node is given so much longer for a larger shard before another one steps in (4 MB/s)."""
DROPS_AT_ONCE = 8
HOLDERS_ASKED_MAX = 64
LOAD_SECONDS = 0.5
MODELS_MAX = 64
"""Models in one advert."""


class Hosting:
    """Everything a node does to hold its part of the deployed models. :meth:`run` must be running."""

    def __init__(
        self,
        network: Network,
        store: Models,
        worker: Worker,
        *,
        load: Loader,
        state_file: Path,
        publishers: frozenset[str],
        disk_bytes_max: int,
        ram_bytes_max: int,
        serve: bool = True,
        hold_seconds: float = 60.0,
        patience_seconds: float = 60.0,
        settle_seconds: float = 3.0,
        check_seconds: float = 5.0,
        long_seconds: float = 15.0,
        idle_seconds: float = 180.0,
        sample_seconds: float = 0.5,
        random: Random | None = None,
        stages: StageHost | None = None,
        load_stage: StageLoader | None = None,
        keeps: Callable[[Manifest, Shard], bool] = lambda manifest, shard: False,
        cells: Cells | None = None,
    ) -> None:
        """``publishers``: peer ids whose models and deployments are taken ("*": anybody), this node's own always.
        ``load`` and ``load_stage`` open a shard (called in a thread); without ``stages`` none of those is taken.
        ``settle_seconds``: after the start, adverts are collected so long before anything is fetched. ``keeps``: shards
        that this node needs beside the trunk to answer with a model. ``cells``: where ``load`` may put a shard."""
        self._network = network
        self._store = store
        self._worker = worker
        self._disk_bytes_max = disk_bytes_max
        self._ram_bytes_max = ram_bytes_max if serve else 0
        self._settle_seconds = settle_seconds
        self._check_seconds = check_seconds
        self._wake = trio.Event()
        self._holding = Holding(int(hold_seconds * 1000))
        self._patience = Patience(network.peer_id)
        self._patience_ms = int(patience_seconds * 1000)
        self._manifests: dict[str, Progress] = {}
        self._settled_at = float("inf")
        self._full = False
        self._nursery: trio.Nursery | None = None
        self.fetcher = Fetcher(network, store, publishers)
        self.deployments = Deployments(
            network, allowed=publishers, state_file=state_file, on_change=self.wake, random=random
        )
        self._taker = Taker(
            store,
            worker,
            self.fetcher,
            load=load,
            disk_bytes_max=disk_bytes_max,
            ram_bytes_max=self._ram_bytes_max,
            deployers=self.deployments.book.deployers,
            on_change=self.wake,
            stages=stages,
            load_stage=load_stage,
            cells=cells,
        )
        self.bringer = Bringer(store, self.fetcher, self.deployments, self._taker, keeps)
        self._cells = cells or NoCells()
        self._stages = stages
        self.helping = Helping(
            network,
            worker,
            stages,
            self,
            long_seconds=long_seconds,
            idle_seconds=idle_seconds,
            sample_seconds=sample_seconds,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow deployments and adverts until cancelled. Shards that were served before the restart come first."""
        try:
            async with trio.open_nursery() as self._nursery:
                await self._nursery.start(self.deployments.run)
                self._cells.on_withdrawn = partial(self._wake_from_afar, trio.lowlevel.current_trio_token())
                await self._taker.measure_disk()
                self._resume()
                self._advertise()
                self._settled_at = trio.current_time() + self._settle_seconds
                self._nursery.start_soon(self._watch_directory)
                self._nursery.start_soon(self._watch_load)
                self._nursery.start_soon(self.helping.run)
                task_status.started()
                while True:
                    self._wake = trio.Event()
                    await self._reconcile()
                    with trio.move_on_after(self._check_seconds):
                        await self._wake.wait()
                        await trio.sleep(0.05)  # changes come in bunches
        finally:
            self._nursery = None
            self._cells.on_withdrawn = _nothing

    def wake(self) -> None:
        """Look again soon."""
        self._wake.set()

    def _wake_from_afar(self, token: trio.lowlevel.TrioToken) -> None:
        try:
            token.run_sync_soon(self.wake)
        except trio.RunFinishedError:
            return  # the node has ended

    # --- what the operator says and sees

    async def deploy(self, model_id: str, replicas: int, mode: str = DEFAULT_MODE) -> None:
        """Ask all nodes that take this node's deployments to serve a model. Raises RequestError for a bad count or
        mode, or what :meth:`Fetcher.manifest` raises if the model is not known here."""
        if not 1 <= replicas <= REPLICAS_MAX:
            raise RequestError("invalid_request", f"replicas must be 1 to {REPLICAS_MAX}, not {replicas}")
        manifest = await self.fetcher.manifest(model_id, self.deployments.book.deployers(model_id))
        if mode not in get_args(Mode):
            raise RequestError("invalid_request", f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
        if mode != "experts" and not manifest.stages:
            raise RequestError("invalid_request", f"{manifest.name} has no stages", "import the model again")
        await self.deployments.announce(manifest, replicas, mode)

    async def scale(self, model_id: str, replicas: int) -> Deployment:
        """Change the replicas of this node's deployment of a model; its mode stays. Raises RequestError ``not_found``
        if there is none, or as :meth:`deploy`."""
        own = self._own_deployment(model_id)
        await self.deploy(model_id, replicas, own.mode)
        return self._own_deployment(model_id)

    def _own_deployment(self, model_id: str) -> Deployment:
        own = self.deployments.book.own(model_id)
        if own is None or not own.replicas:
            raise RequestError(
                "not_found", f"this node did not deploy model {model_id[:12]}", "rios model deploy MODEL does"
            )
        return own

    async def undeploy(self, model_id: str) -> None:
        """Take this node's deployment of a model back. Raises RequestError ``not_found`` if there is none."""
        self._own_deployment(model_id)
        await self.deployments.announce(await self.fetcher.manifest(model_id, ()), 0)

    def status(self) -> dict[str, Any]:
        """What is deployed and how far it is here, JSON-able."""
        candidates = self._candidates_by_model()
        return {
            "deployments": [
                self._model_status(model_id, replicas, candidates)
                for model_id, replicas in sorted(self.deployments.book.replicas().items())
            ],
            "ram_bytes": self._taker.ram_used(),
            "ram_bytes_cells": self._cells.ram_bytes(),
            "ram_bytes_max": self._ram_bytes_max,
            "disk_bytes": self._taker.disk_bytes,
            "disk_bytes_max": self._disk_bytes_max,
            "full": self._full,
            "withdrawn": self._withdrawn(),
        }

    def manifest_error(self, model_id: str) -> str:
        """Why the manifest of a deployed model could not be had so far; empty if nothing has failed."""
        missing = self._manifests.get(model_id)
        return missing.error if missing else ""

    def problems(self, model_id: str) -> dict[str, str]:
        """Shard id -> why this node cannot get it, or does not serve it any more."""
        manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
        if manifest is None:
            return {}
        found = {
            manifest.shards[index].id: progress.error
            for (model, index), progress in self._taker.progress.items()
            if model == model_id and progress.error
        }
        return found | {row["shard"]: row["why"] for row in self._withdrawn() if row["model_id"] == model_id}

    def _withdrawn(self) -> list[dict[str, Any]]:
        """Shards that are not served because they keep ending their cell."""
        now, rows = trio.current_time(), []
        for (model_id, index), found in sorted(self._taker.withdrawn.items()):
            manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
            if manifest is not None and self._taker.rests(model_id, index):
                row = {"model_id": model_id, "name": manifest.name, "shard": manifest.shards[index].id}
                rows.append({**row, "times": found.times, "again_s": round(found.until - now, 1), "why": found.why})
        return rows

    def _model_status(self, model_id: str, replicas: int, adverts: dict[PeerId, Advert]) -> dict[str, Any]:
        manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
        missing = self._manifests.get(model_id)
        shards = []
        for index, shard in enumerate(manifest.shards if manifest else ()):
            concerned = not replicas or self.deployments.book.wanted(model_id, shard.kind)
            if not concerned and (model_id, index) not in self._taker.progress:
                continue
            here = self._taker.progress.get((model_id, index), Progress())
            ready = sum(1 for a in adverts.values() if (offer := a.offer(model_id)) and offer.holds(index))
            shards.append(
                {
                    "id": shard.id,
                    "kind": shard.kind,
                    "replicas": ready,
                    "state": here.state if (model_id, index) in self._taker.progress else "elsewhere",
                    "bytes_done": here.bytes_done,
                    "bytes_total": here.bytes_total,
                    "error": here.error,
                }
            )
        return {
            "model_id": model_id,
            "name": manifest.name if manifest else "",
            "replicas": replicas,
            "deployers": [str(peer) for peer in self.deployments.book.deployers(model_id)],
            "error": missing.error if missing and not manifest else "",
            "shards": shards,
        }

    # --- the loop

    async def _watch_directory(self) -> None:
        while True:
            await self._network.directory.wait_change()
            self.wake()

    async def _watch_load(self) -> None:
        """Keep the own advert's load near the rows that wait, smoothed over about a second; small changes stay here."""
        load = 0.0
        while True:
            await trio.sleep(LOAD_SECONDS)
            waiting = self._worker.rows_waiting() + (self._stages.rows_waiting() if self._stages else 0)
            load += (waiting - load) / 2
            own = self._network.directory.own()
            now = msgspec.structs.replace(own, load=round(load))
            if is_worth_sending(own, now):
                self._network.directory.update(partial(_loaded, load=now.load))

    def _resume(self) -> None:
        """Load again what was served before the restart, without waiting for anybody."""
        assert self._nursery is not None
        for model_id, shard_ids in self.deployments.hosted.items():
            manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
            for index, shard in enumerate(manifest.shards if manifest else ()):
                if shard.id in shard_ids:
                    self._taker.start(self._nursery, manifest, index)

    async def _reconcile(self) -> None:
        await self._taker.measure_disk()
        await self._taker.withdraw(self._store.manifests())
        adverts = self._candidates_by_model()
        for model_id, replicas in sorted(self.deployments.book.replicas().items()):
            manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
            if manifest is not None:
                await self._reconcile_model(manifest, adverts)
            elif replicas:
                self._start_manifest(model_id)
        self._update_full()
        self._advertise()
        await self._remember()

    async def _reconcile_model(self, manifest: Manifest, adverts: dict[PeerId, Advert]) -> None:
        model_id = manifest.model_id
        mine = self._taker.ready(manifest)
        wanted = [
            Wanted(index, shard.id, self.deployments.book.wanted(model_id, shard.kind))
            for index, shard in enumerate(manifest.shards)
        ]
        candidates = self._candidates(manifest, adverts)
        now_ms = int(trio.current_time() * 1000)
        assigned = assign(model_id, wanted, candidates, self._patience.late(model_id))
        patience_ms = {
            index: self._patience_ms + shard.size_bytes // PATIENCE_BYTES_PER_MS
            for index, shard in enumerate(manifest.shards)
        }
        if self._patience.observe(model_id, assigned, candidates, patience_ms, now_ms):
            assigned = assign(model_id, wanted, candidates, self._patience.late(model_id))
        decision = decide(self._network.peer_id, model_id, wanted, candidates, mine, assigned)
        settled = trio.current_time() >= self._settled_at and not self._worker.paused
        assert self._nursery is not None
        for index in decision.fetch if settled else ():
            self._taker.start(self._nursery, manifest, index)
        surplus = [] if self._worker.paused else self.helping.may_go(model_id, decision.surplus)
        for index in self._holding.ripe(model_id, surplus, now_ms)[:DROPS_AT_ONCE]:
            holders = [c.peer_id for c in candidates if index in c.ready and c.peer_id != self._network.peer_id]
            if await self._is_proved(
                manifest.shards[index], holders, min(wanted[index].replicas, len(assigned[index]))
            ):
                await self._drop(manifest, index)
            else:
                self._holding.postpone(model_id, index, now_ms)
        # what was wanted, failed, and fell to somebody else meanwhile
        for key in [k for k, p in self._taker.progress.items() if k[0] == model_id and p.ended is None]:
            if key[1] not in mine and key[1] not in decision.fetch and model_id not in self.bringer.pinned:
                del self._taker.progress[key]
        self.helping.extras.intersection_update(self._taker.progress)

    def _candidates(self, manifest: Manifest, adverts: dict[PeerId, Advert]) -> list[Candidate]:
        candidates, paused = [], self._worker.paused
        for peer, advert in adverts.items():
            if peer == self._network.peer_id:
                mine = self._taker.ready(manifest)
                candidates.append(Candidate(peer, self._offered(), self._full or paused, mine))
            else:
                full = advert.full or advert.paused
                candidates.append(Candidate(peer, advert.offered_bytes, full, _held(advert, manifest)))
        return candidates

    # --- by demand (see ``helping``)

    def helper(self, model_id: str, index: int) -> PeerId | None:
        """The next in rank for a shard that has room, does not hold it and has no long queues itself."""
        manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
        adverts = self._candidates_by_model()
        if manifest is None or self._has_enough(manifest, index, adverts):
            return None
        late = self._patience.late(model_id)
        for candidate in rank(model_id, manifest.shards[index].id, self._candidates(manifest, adverts)):
            peer = candidate.peer_id
            calm = peer != self._network.peer_id and adverts[peer].load < LOAD_STEP_MIN
            if calm and not (candidate.full or index in candidate.ready or (index, peer) in late):
                return peer
        return None

    def take_in(self, peer: PeerId, model_id: str, index: int) -> str:
        """Begin to take a shard because a holder's queue stays long; why not, or nothing."""
        manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
        if manifest is None or not 0 <= index < len(manifest.shards):
            return "does not know the model"
        adverts, shard = self._candidates_by_model(), manifest.shards[index]
        if peer not in adverts or index not in _held(adverts[peer], manifest):
            return "sees no such shard at who asks"
        if shard.kind == "trunk" or self._has_enough(manifest, index, adverts):
            return "counts enough replicas"
        if index in self._taker.ready(manifest):
            return "has it already"
        if self._taker.rests(model_id, index):
            return "has withdrawn it for a while"
        if self._worker.paused or not self._taker.has_room(self._taker.needs(manifest, shard)) or self._nursery is None:
            return "has no room"
        self._taker.start(self._nursery, manifest, index)
        return ""

    def _has_enough(self, manifest: Manifest, index: int, adverts: dict[PeerId, Advert]) -> bool:
        wanted = self.deployments.book.wanted(manifest.model_id, manifest.shards[index].kind)
        return sum(index in _held(advert, manifest) for advert in adverts.values()) >= ASKED_MAX * wanted

    async def _is_proved(self, shard: Shard, holders: Sequence[PeerId], needed: int) -> bool:
        """Whether so many of those who say that they have a shard do have it. A dropped shard may be the last one."""
        proved: list[PeerId] = []

        async def ask(peer: PeerId) -> None:
            if await self.fetcher.proves(peer, shard):
                proved.append(peer)

        async with trio.open_nursery() as nursery:
            for peer in holders[:HOLDERS_ASKED_MAX] if needed else ():
                nursery.start_soon(ask, peer)
        if len(proved) < needed:
            log.warning("shard %s is kept: %d of %d holders proved that they have it", shard.id, len(proved), needed)
        return len(proved) >= needed

    def _start_manifest(self, model_id: str) -> None:
        progress = self._manifests.setdefault(model_id, Progress())
        if progress.ended is not None or trio.current_time() < progress.retry_at:
            return
        progress.begin()
        assert self._nursery is not None
        self._nursery.start_soon(
            self._taker.attempt, progress, f"the manifest of {model_id[:12]}", self._learn, model_id
        )

    async def _learn(self, model_id: str) -> None:
        await self.fetcher.manifest(model_id, self.deployments.book.deployers(model_id))

    async def _drop(self, manifest: Manifest, index: int) -> None:
        """Stop serving a surplus shard; its files go too, unless this node publishes the model or needs it itself."""
        shard, model_id = manifest.shards[index], manifest.model_id
        keep_files = manifest.publisher == self._network.peer_id or model_id in self.bringer.pinned
        if shard.kind == "trunk" and keep_files:
            return
        self._taker.progress.pop((model_id, index), None)
        self._advertise(without=(model_id, index))
        await self._taker.drop(manifest, shard)
        if not keep_files:
            needed = self._taker.ready(manifest) | {i for m, i in self._taker.progress if m == model_id}
            others = frozenset(manifest.shards[i].id for i in needed - {index})
            try:
                await trio.to_thread.run_sync(self._store.remove_shard, model_id, shard.id, others)
            except LocalError as error:  # its files stay
                log.warning("%s: shard %s: %s", manifest.name, shard.id, error.message)
            await self._taker.measure_disk()
        log.info("%s: shard %s is dropped: enough others have it", manifest.name, shard.id)
        await self._remember()

    # --- what others see

    def _offered(self) -> int:
        return quantised(self._ram_bytes_max)

    def _candidates_by_model(self) -> dict[PeerId, Advert]:
        return dict(self._network.directory.adverts())

    def _update_full(self) -> None:
        """Full means: the largest shard deployed anywhere would not fit. It depends on nothing but that and on what
        is here, so it does not flap with the placement."""
        largest, book = 0, self.deployments.book
        for model_id, replicas in self.deployments.book.replicas().items():
            manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
            if manifest is not None and replicas:
                placed = [s for s in manifest.shards if s.kind != "trunk" and book.wanted(model_id, s.kind)]
                largest = max(
                    [largest, *(self._taker.needs(manifest, shard) for shard in placed)]
                )  # perhaps none: a model without stages
        self._full = not self._taker.has_room(largest)

    def _advertise(self, without: tuple[str, int] | None = None) -> None:
        """Bring the own advert up to date if anything about it changed."""
        quote = self._worker.quote
        offers = []
        for model_id, manifest in sorted(self._store.manifests().items()):
            ready = self._taker.ready(manifest)
            if without is not None and without[0] == model_id:
                ready -= {without[1]}
            if ready:
                prices = (quote.number, quote.microcredits_per_tflop, quote.microcredits_per_kv_unit)
                offers.append(ModelOffer(model_id, bitmap(ready), *prices))
        changes = {
            "models": tuple(offers[:MODELS_MAX]),
            "full": self._full,
            "offered_bytes": self._offered(),
            "disk_bytes": self._disk_bytes_max,
        }
        own = self._network.directory.own()
        if any(getattr(own, name) != value for name, value in changes.items()):
            self._network.directory.update(lambda advert: msgspec.structs.replace(advert, **changes))

    async def _remember(self) -> None:
        """Keep on disk what is served or on its way, for the next start."""
        hosted: dict[str, list[str]] = {}
        for model_id, manifest in self._store.manifests().items():
            coming = {i for (m, i), p in self._taker.progress.items() if m == model_id and p.ended is not None}
            if indices := sorted(self._taker.ready(manifest) | coming):
                hosted[model_id] = [manifest.shards[index].id for index in indices]
        if hosted != self.deployments.hosted:
            self.deployments.hosted = hosted
            await self.deployments.save()


def _held(advert: Advert, manifest: Manifest) -> frozenset[int]:
    offer = advert.offer(manifest.model_id)
    if offer is None:
        return frozenset()
    return frozenset(index for index in range(len(manifest.shards)) if offer.holds(index))


def _nothing() -> None:
    pass


def _loaded(advert: Advert, load: int) -> Advert:
    return msgspec.structs.replace(advert, load=load)
