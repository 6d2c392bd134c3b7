"""Takes, fetches, loads, advertises and drops shards, as placement says and this machine's limits allow.

Owns: the loop from deployments and adverts to loaded shards, its progress and its errors. Does not own: the choice
(``core.placement``), how deployments spread (``deployments``), how files travel (``fetching``).

A shard's way: wanted -> fetching -> verifying -> loading -> serving; the trunk's ends at ``stored``: it is kept on disk
for nodes that answer requests. Whatever fails is reported under the shard's name and tried again later.

Invariants:
1. Never more than ``disk_bytes_max`` on disk nor ``ram_bytes_max`` in memory through hosting.
2. A shard is advertised only while it can be called; a surplus one is dropped only after the hold time.
3. No fault of a file, a peer or the disk ends the node.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import msgspec
import trio

from config.errors import IntegrityError, LocalError, RequestError, RiosError
from config.vocabulary import PeerId
from dmoe.core.deployment import REPLICAS_MAX
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.placement import Candidate, Holding, Patience, Wanted, assign, decide, quantised
from dmoe.deployments import Deployments
from dmoe.fetching import Fetcher, Models
from dmoe.worker import Shard as LoadedShard
from dmoe.worker import Worker, plan_of
from p2p.core.advert import Advert, ModelOffer, bitmap
from p2p.face import Network

log = logging.getLogger(__name__)

State = Literal["wanted", "fetching", "verifying", "loading", "serving", "stored", "no_room", "failed"]
Loader = Callable[[Manifest, Shard], LoadedShard]

RETRY_FIRST_SECONDS = 2.0
RETRY_MAX_SECONDS = 300.0
FETCHES_AT_ONCE = 2
PATIENCE_BYTES_PER_MS = 4096
"""A node is given so much longer for a larger shard before another one steps in (4 MB/s)."""
MODELS_MAX = 64
"""Models in one advert."""


@dataclass(slots=True)
class Progress:
    """How far one shard is here."""

    state: State = "wanted"
    bytes_done: int = 0
    bytes_total: int = 0
    error: str = ""
    failures: int = 0
    retry_at: float = 0.0
    ended: trio.Event | None = None
    """There while somebody works on it."""

    def begin(self) -> None:
        """Somebody works on it now."""
        self.ended = trio.Event()

    def end(self) -> None:
        """Nobody does any more."""
        if self.ended is not None:
            self.ended.set()
        self.ended = None


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
        random: Random | None = None,
    ) -> None:
        """``publishers``: peer ids whose models and deployments are taken ("*": anybody), this node's own always.
        ``load`` opens a shard (called in a thread). ``settle_seconds``: after the start, adverts are collected so long
        before anything is fetched."""
        self._network = network
        self._store = store
        self._worker = worker
        self._load = load
        self._disk_bytes_max = disk_bytes_max
        self._ram_bytes_max = ram_bytes_max if serve else 0
        self._settle_seconds = settle_seconds
        self._check_seconds = check_seconds
        self._wake = trio.Event()
        self._fetch_limit = trio.CapacityLimiter(FETCHES_AT_ONCE)
        self._load_limit = trio.CapacityLimiter(1)
        self._holding = Holding(int(hold_seconds * 1000))
        self._patience = Patience(network.peer_id)
        self._patience_ms = int(patience_seconds * 1000)
        self._progress: dict[tuple[str, int], Progress] = {}
        self._manifests: dict[str, Progress] = {}
        self._pinned: set[str] = set()
        self._settled_at = float("inf")
        self._full = False
        self._ram_reserved = 0
        self._disk_reserved = 0
        self._disk_bytes = 0
        self._nursery: trio.Nursery | None = None
        self.fetcher = Fetcher(network, store, publishers)
        self.deployments = Deployments(
            network, allowed=publishers, state_file=state_file, on_change=self.wake, random=random
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow deployments and adverts until cancelled. Shards that were served before the restart come first."""
        try:
            async with trio.open_nursery() as self._nursery:
                await self._nursery.start(self.deployments.run)
                await self._measure_disk()
                self._resume()
                self._advertise()
                self._settled_at = trio.current_time() + self._settle_seconds
                self._nursery.start_soon(self._watch_directory)
                task_status.started()
                while True:
                    self._wake = trio.Event()
                    await self._reconcile()
                    with trio.move_on_after(self._check_seconds):
                        await self._wake.wait()
                        await trio.sleep(0.05)  # changes come in bunches
        finally:
            self._nursery = None

    def wake(self) -> None:
        """Look again soon."""
        self._wake.set()

    # --- what the operator says and sees

    async def deploy(self, model_id: str, replicas: int) -> None:
        """Ask all nodes that take this node's deployments to serve a model. Raises RequestError for a bad count, or
        what :meth:`Fetcher.manifest` raises if the model is not known here."""
        if not 1 <= replicas <= REPLICAS_MAX:
            raise RequestError("invalid_request", f"replicas must be 1 to {REPLICAS_MAX}, not {replicas}")
        manifest = await self.fetcher.manifest(model_id, self.deployments.book.deployers(model_id))
        await self.deployments.announce(manifest, replicas)

    async def undeploy(self, model_id: str) -> None:
        """Take this node's deployment of a model back. Raises RequestError ``not_found`` if there is none."""
        own = self.deployments.book.own(model_id)
        if own is None or not own.replicas:
            raise RequestError("not_found", f"this node did not deploy model {model_id[:12]}")
        await self.deployments.announce(await self.fetcher.manifest(model_id, ()), 0)

    async def ensure_trunk(self, name_or_id: str) -> Manifest:
        """Bring here what a node needs to answer requests with a model: its trunk and its tokenizer, by id or by name.
        Tries until it succeeds (bound it with a cancel scope); raises only if the publisher is not allowed."""
        return await self._ensure(name_or_id, whole=False)

    async def ensure_whole(self, name_or_id: str) -> Manifest:
        """The same with every shard, for a node that runs the whole model alone."""
        return await self._ensure(name_or_id, whole=True)

    def status(self) -> dict[str, Any]:
        """What is deployed and how far it is here, JSON-able."""
        candidates = self._candidates_by_model()
        return {
            "deployments": [
                self._model_status(model_id, replicas, candidates)
                for model_id, replicas in sorted(self.deployments.book.replicas().items())
            ],
            "ram_bytes": self._worker.ram_bytes(),
            "ram_bytes_max": self._ram_bytes_max,
            "disk_bytes": self._disk_bytes,
            "disk_bytes_max": self._disk_bytes_max,
            "full": self._full,
        }

    def _model_status(self, model_id: str, replicas: int, adverts: dict[PeerId, Advert]) -> dict[str, Any]:
        manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
        missing = self._manifests.get(model_id)
        shards = []
        for index, shard in enumerate(manifest.shards if manifest else ()):
            here = self._progress.get((model_id, index), Progress())
            ready = sum(1 for a in adverts.values() if (offer := a.offer(model_id)) and offer.holds(index))
            shards.append(
                {
                    "id": shard.id,
                    "kind": shard.kind,
                    "replicas": ready,
                    "state": here.state if (model_id, index) in self._progress else "elsewhere",
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

    def _resume(self) -> None:
        """Load again what was served before the restart, without waiting for anybody."""
        for model_id, shard_ids in self.deployments.hosted.items():
            manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
            for index, shard in enumerate(manifest.shards if manifest else ()):
                if shard.id in shard_ids:
                    self._start(manifest, index)

    async def _reconcile(self) -> None:
        await self._measure_disk()
        adverts = self._candidates_by_model()
        for model_id, replicas in sorted(self.deployments.book.replicas().items()):
            manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
            if manifest is not None:
                await self._reconcile_model(manifest, replicas, adverts)
            elif replicas:
                self._start_manifest(model_id)
        self._update_full()
        self._advertise()

    async def _reconcile_model(self, manifest: Manifest, replicas: int, adverts: dict[PeerId, Advert]) -> None:
        model_id = manifest.model_id
        mine = self._mine(manifest)
        wanted = [Wanted(index, shard.id, replicas) for index, shard in enumerate(manifest.shards)]
        candidates = []
        for peer, advert in adverts.items():
            if peer == self._network.peer_id:
                candidates.append(Candidate(peer, self._offered(), self._full, mine))
            else:
                candidates.append(Candidate(peer, advert.offered_bytes, advert.full, _held(advert, manifest)))
        now_ms = int(trio.current_time() * 1000)
        assigned = assign(model_id, wanted, candidates, self._patience.late(model_id))
        patience_ms = {
            index: self._patience_ms + shard.size_bytes // PATIENCE_BYTES_PER_MS
            for index, shard in enumerate(manifest.shards)
        }
        if self._patience.observe(model_id, assigned, candidates, patience_ms, now_ms):
            assigned = assign(model_id, wanted, candidates, self._patience.late(model_id))
        decision = decide(self._network.peer_id, model_id, wanted, candidates, mine, assigned)
        settled = trio.current_time() >= self._settled_at
        for index in decision.fetch if settled else ():
            self._start(manifest, index)
        for index in self._holding.ripe(model_id, decision.surplus, now_ms):
            await self._drop(manifest, index)
        # what was wanted, failed, and fell to somebody else meanwhile
        for key in [k for k, p in self._progress.items() if k[0] == model_id and p.ended is None]:
            if key[1] not in mine and key[1] not in decision.fetch and model_id not in self._pinned:
                del self._progress[key]

    def _mine(self, manifest: Manifest) -> frozenset[int]:
        """Shards ready here: loaded experts, and a trunk on disk."""
        index = manifest.shard_index(manifest.trunk.id)
        progress = self._progress.get((manifest.model_id, index))
        stored = {index} if progress is not None and progress.state == "stored" else set()
        return self._worker.indices(manifest.model_id) | stored

    def _start_manifest(self, model_id: str) -> None:
        progress = self._manifests.setdefault(model_id, Progress())
        if progress.ended is not None or trio.current_time() < progress.retry_at:
            return
        progress.begin()
        assert self._nursery is not None
        self._nursery.start_soon(self._attempt, progress, f"the manifest of {model_id[:12]}", self._learn, model_id)

    async def _learn(self, model_id: str) -> None:
        await self.fetcher.manifest(model_id, self.deployments.book.deployers(model_id))

    def _start(self, manifest: Manifest, index: int) -> None:
        """Begin to take a shard, unless it is on its way or rests after a failure."""
        shard = manifest.shards[index]
        progress = self._progress.setdefault((manifest.model_id, index), Progress(bytes_total=shard.size_bytes))
        if (
            progress.ended is not None
            or trio.current_time() < progress.retry_at
            or progress.state in ("serving", "stored")
        ):
            return
        progress.begin()
        assert self._nursery is not None
        name = f"{manifest.name}, shard {shard.id}"
        self._nursery.start_soon(self._attempt, progress, name, self._take, manifest, index, progress)

    async def _attempt(self, progress: Progress, name: str, work: Callable[..., Any], *arguments: object) -> None:
        """Do ``work``; a failure is reported in ``progress`` and tried again later, ever less often."""
        try:
            await work(*arguments)
            progress.error, progress.failures = "", 0
        except Exception as error:
            progress.failures += 1
            pause = min(RETRY_MAX_SECONDS, RETRY_FIRST_SECONDS * 2 ** min(progress.failures - 1, 10))
            progress.retry_at = trio.current_time() + pause
            progress.error = str(error) or type(error).__name__
            if progress.state != "no_room":
                progress.state = "failed"
            if isinstance(error, RiosError):
                log.warning("%s: %s; next try in %d s", name, error, pause)
            else:
                log.exception("%s failed; next try in %d s", name, pause)
        finally:
            progress.end()
            self.wake()

    async def _take(self, manifest: Manifest, index: int, progress: Progress) -> None:
        """One shard's way from wherever it is to being served (the trunk: to the disk)."""
        shard = manifest.shards[index]
        ram = shard.ram_bytes if shard.kind == "expert" else 0
        self._check_ram(shard, ram, progress)
        self._ram_reserved += ram
        try:
            async with self._fetch_limit:
                await self._bring(manifest, shard, progress)
            if shard.kind == "trunk":
                progress.state = "stored"
            else:
                async with self._load_limit:
                    progress.state = "loading"
                    loaded = await trio.to_thread.run_sync(self._load, manifest, shard)
                self._worker.load(plan_of(manifest, shard), loaded)
                progress.state = "serving"
        finally:
            self._ram_reserved -= ram
        log.info("%s: shard %s is %s", manifest.name, shard.id, progress.state)
        self._advertise()
        await self._remember()

    async def _bring(self, manifest: Manifest, shard: Shard, progress: Progress) -> None:
        """Make the shard's files whole on disk; the trunk's with the tokenizer."""
        model_id = manifest.model_id
        files = (*shard.files, manifest.tokenizer) if shard.kind == "trunk" else shard.files
        progress.bytes_total = sum(file.size_bytes for file in files)
        progress.state = "verifying"
        missing = []
        for file in files:
            if not await trio.to_thread.run_sync(self._is_whole, model_id, file):
                missing.append(file)
        size = sum(file.size_bytes for file in missing)
        progress.bytes_done = progress.bytes_total - size
        if not missing:
            return
        if self._disk_bytes + self._disk_reserved + size > self._disk_bytes_max:
            progress.state = "no_room"
            message = f"shard {shard.id} needs {size} bytes; models here take {self._disk_bytes} already"
            raise LocalError("disk_full", message, f"raise dmoe.disk_bytes_max ({self._disk_bytes_max})")
        progress.state = "fetching"
        self._disk_reserved += size

        def count(done: int) -> None:
            progress.bytes_done = min(progress.bytes_total, progress.bytes_done + done)

        try:
            likely = [manifest.publisher, *self.deployments.book.deployers(model_id)]
            await self.fetcher.files(manifest, missing, shard, likely, count)
        finally:
            self._disk_reserved -= size
            await self._measure_disk()
        progress.state = "verifying"
        for file in missing:
            await trio.to_thread.run_sync(self._store.verify_file, model_id, file)

    def _is_whole(self, model_id: str, file: Any) -> bool:  # noqa: ANN401 - a ModelFile
        """Whether a file is here and unaltered; a damaged one is named in the log and removed, to be fetched again."""
        path = self._store.path(model_id, file)
        if not path.exists():
            return False
        try:
            self._store.verify_file(model_id, file)
        except IntegrityError as error:
            log.warning("%s; it is fetched again", error)
            path.unlink(missing_ok=True)
            return False
        return True

    def _check_ram(self, shard: Shard, ram: int, progress: Progress) -> None:
        used = self._worker.ram_bytes() + self._ram_reserved
        if ram and used + ram > self._ram_bytes_max:
            progress.state = "no_room"
            message = f"shard {shard.id} needs {ram} bytes of memory; {used} of {self._ram_bytes_max} are taken"
            raise LocalError("local", message, "raise dmoe.ram_bytes_max")

    async def _drop(self, manifest: Manifest, index: int) -> None:
        """Stop serving a surplus shard; its files go too, unless this node publishes the model or needs it itself."""
        shard, model_id = manifest.shards[index], manifest.model_id
        keep_files = manifest.publisher == self._network.peer_id or model_id in self._pinned
        if shard.kind == "trunk" and keep_files:
            return
        self._progress.pop((model_id, index), None)
        self._advertise(without=(model_id, index))
        await self._worker.unload(model_id, shard.id)
        if not keep_files:
            await trio.to_thread.run_sync(self._store.remove_shard, model_id, shard.id)
            await self._measure_disk()
        log.info("%s: shard %s is dropped: enough others have it", manifest.name, shard.id)
        await self._remember()

    async def _ensure(self, name_or_id: str, *, whole: bool) -> Manifest:
        pause = RETRY_FIRST_SECONDS / 4
        while True:
            try:
                manifest = await self._find(name_or_id)
                if manifest is not None:
                    self._pinned.add(manifest.model_id)
                    for index, shard in enumerate(manifest.shards):
                        if whole or shard.kind == "trunk":
                            await self._ensure_files(manifest, index)
                    return manifest
            except RiosError as error:
                if error.code == "forbidden":
                    raise
                log.warning("%s is not here yet: %s; next try in %.0f s", name_or_id, error, pause)
            await trio.sleep(pause)
            pause = min(2 * pause, 30.0)

    async def _ensure_files(self, manifest: Manifest, index: int) -> None:
        shard = manifest.shards[index]
        progress = self._progress.setdefault((manifest.model_id, index), Progress(bytes_total=shard.size_bytes))
        while progress.ended is not None:
            await progress.ended.wait()
        if progress.state in ("serving", "stored"):
            return
        progress.begin()
        try:
            await self._bring(manifest, shard, progress)
            progress.state, progress.error = "stored", ""
        except RiosError as error:
            progress.state, progress.error = "failed", str(error)
            raise
        finally:
            progress.end()
        if shard.kind == "expert":
            del self._progress[manifest.model_id, index]  # on disk, not served: placement decides about that
        self._advertise()

    async def _find(self, name_or_id: str) -> Manifest | None:
        """A manifest by id or name, from disk, from peers, or by way of the deployments known."""
        for manifest in self._store.manifests().values():
            if name_or_id in (manifest.model_id, manifest.name):
                return manifest
        deployed = list(self.deployments.book.replicas())
        if len(name_or_id) == 64:
            if name_or_id not in deployed:
                await self.deployments.look_up(name_or_id)
            return await self.fetcher.manifest(name_or_id, self.deployments.book.deployers(name_or_id))
        for model_id in deployed:
            manifest = await self.fetcher.manifest(model_id, self.deployments.book.deployers(model_id))
            if manifest.name == name_or_id:
                return manifest
        return None

    # --- what others see

    def _offered(self) -> int:
        return quantised(self._ram_bytes_max)

    def _candidates_by_model(self) -> dict[PeerId, Advert]:
        return dict(self._network.directory.adverts())

    def _update_full(self) -> None:
        """Full means: the largest shard deployed anywhere would not fit. It depends on nothing but that and on what
        is here, so it does not flap with the placement."""
        largest = 0
        for model_id, replicas in self.deployments.book.replicas().items():
            manifest = self._store.manifests().get(model_id)  # type: ignore[call-overload]
            if manifest is not None and replicas:
                largest = max(largest, *(shard.ram_bytes for shard in manifest.expert_shards()))
        self._full = self._worker.ram_bytes() + self._ram_reserved + largest > self._ram_bytes_max

    def _advertise(self, without: tuple[str, int] | None = None) -> None:
        """Bring the own advert up to date if anything about it changed."""
        quote = self._worker.quote
        offers = []
        for model_id, manifest in sorted(self._store.manifests().items()):
            ready = self._mine(manifest)
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
            changes["load"] = self._worker.rows_waiting()
            self._network.directory.update(lambda advert: msgspec.structs.replace(advert, **changes))

    async def _remember(self) -> None:
        """Keep on disk what is served, for the next start."""
        hosted: dict[str, list[str]] = {}
        for model_id, manifest in self._store.manifests().items():
            ready = sorted(self._mine(manifest))
            if ready:
                hosted[model_id] = [manifest.shards[index].id for index in ready]
        self.deployments.hosted = hosted
        await self.deployments.save()

    async def _measure_disk(self) -> None:
        try:
            self._disk_bytes = await trio.to_thread.run_sync(self._store.disk_bytes)
        except OSError as error:  # a file vanished while it was counted
            log.debug("counting the models' bytes: %s", error)


def _held(advert: Advert, manifest: Manifest) -> frozenset[int]:
    offer = advert.offer(manifest.model_id)
    if offer is None:
        return frozenset()
    return frozenset(index for index in range(len(manifest.shards)) if offer.holds(index))
