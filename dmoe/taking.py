"""One shard's way into this node: wanted -> fetching -> verifying -> loading -> serving.

Owns: the steps, their progress, the limits of disk and memory, what happens after a failure. Does not own: which shards
are wanted and when they go (``hosting``), how files travel (``fetching``). The trunk's way ends at ``stored``: it is
kept on disk for nodes that answer requests.

Invariants:
1. Never more than ``disk_bytes_max`` on disk nor ``ram_bytes_max`` in memory, what is on its way included.
2. A failure is kept under the shard's name and tried again later, ever less often; it never ends the node. So is a
   shard that was served and is not fit for it: one that keeps ending its cell.
3. One task at a time works on a shard, and on a file: shards of two kinds may list the same.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import trio

from config.errors import IntegrityError, LocalError, RiosError
from config.vocabulary import ModelId, PeerId
from dmoe.core.manifest import Manifest, ModelFile, Shard
from dmoe.fetching import Fetcher, Models
from dmoe.pages import use_huge_pages
from dmoe.stages.host import StageHost
from dmoe.stages.loaded import stage_plan_of
from dmoe.stages.segment import Segment
from dmoe.worker import Shard as LoadedShard
from dmoe.worker import Worker, plan_of

log = logging.getLogger(__name__)
security = logging.getLogger("rios.security.cells")

State = Literal["wanted", "fetching", "verifying", "loading", "serving", "stored", "no_room", "failed", "withdrawn"]
Loader = Callable[[Manifest, Shard], LoadedShard]
StageLoader = Callable[[Manifest, Shard], Segment]

RETRY_FIRST_SECONDS = 2.0
RETRY_MAX_SECONDS = 300.0
FETCHES_AT_ONCE = 2
WITHDRAWN_SECONDS_FIRST, WITHDRAWN_SECONDS_MAX = 60.0, 3600.0
"""For so long a shard that was withdrawn is not tried again; doubled each time."""
WITHDRAWN_FORGIVEN_AFTER = 10
"""It was well for so many times as long: the next pause is the first one again."""


class Cells(Protocol):
    """What is to be known of cells: :class:`dmoe.cells.cells.Cells`."""

    on_withdrawn: Callable[[], None]

    def ram_bytes(self) -> int:
        """Memory that they take beside their shards."""

    def ram_bytes_for(self, publisher: str) -> int:
        """Memory that one more shard of this publisher takes beside its own."""


class NoCells:
    """Every shard runs in this process."""

    on_withdrawn: Callable[[], None] = staticmethod(lambda: None)

    def ram_bytes(self) -> int:
        """See :class:`Cells`."""
        return 0

    def ram_bytes_for(self, publisher: str) -> int:
        """See :class:`Cells`."""
        return 0


@dataclass(slots=True)
class Withdrawal:
    """A shard that was served and is not for a while: how often, until when, and why."""

    times: int = 0
    until: float = 0.0
    why: str = ""

    def again(self, why: str, now: float) -> float:
        """Once more: for how many seconds."""
        if now - self.until > WITHDRAWN_FORGIVEN_AFTER * self._seconds:
            self.times = 0
        self.times, self.why = self.times + 1, why
        self.until = now + self._seconds
        return self._seconds

    @property
    def _seconds(self) -> float:
        doubled = min(max(0, self.times - 1), 10)
        return min(WITHDRAWN_SECONDS_MAX, WITHDRAWN_SECONDS_FIRST * (1 << doubled))


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


class Taker:
    """Brings shards here and keeps count of them. ``on_change`` is called after every end of an attempt;
    ``deployers`` tells whom to ask for a model's files besides its publisher."""

    def __init__(
        self,
        store: Models,
        worker: Worker,
        fetcher: Fetcher,
        *,
        load: Loader,
        disk_bytes_max: int,
        ram_bytes_max: int,
        deployers: Callable[[str], list[PeerId]],
        on_change: Callable[[], None],
        stages: StageHost | None = None,
        load_stage: StageLoader | None = None,
        cells: Cells | None = None,
    ) -> None:
        self.progress: dict[tuple[str, int], Progress] = {}
        """(model id, shard index) -> how far it is; shards that were never wanted here are missing."""
        self.withdrawn: dict[tuple[str, int], Withdrawal] = {}
        """Shards that were withdrawn from being served, also those that are served again."""
        self.disk_bytes = 0
        self._cells = cells or NoCells()
        self._store = store
        self._worker = worker
        self._fetcher = fetcher
        self._load = load
        self._stages = stages
        self._load_stage = load_stage
        self._disk_bytes_max = disk_bytes_max
        self._ram_bytes_max = ram_bytes_max
        self._deployers = deployers
        self._on_change = on_change
        self._fetch_limit = trio.CapacityLimiter(FETCHES_AT_ONCE)
        self._load_limit = trio.CapacityLimiter(1)
        self._files: dict[tuple[str, str], trio.Lock] = {}
        self._ram_reserved = 0
        self._disk_reserved = 0

    def has_room(self, ram_bytes: int) -> bool:
        """Whether so much still fits into memory (see :meth:`needs`)."""
        return self.ram_used() + self._ram_reserved + ram_bytes <= self._ram_bytes_max

    def needs(self, manifest: Manifest, shard: Shard) -> int:
        """Memory that a shard takes here, with a cell if it would be the first of its publisher's."""
        return 0 if shard.kind == "trunk" else shard.ram_bytes + self._cells.ram_bytes_for(manifest.publisher)

    def ram_used(self) -> int:
        """What is loaded, caches of stages and cells included."""
        stages = self._stages.ram_bytes() if self._stages is not None else 0
        return self._worker.ram_bytes() + stages + self._cells.ram_bytes()

    def rests(self, model_id: str, index: int) -> bool:
        """Whether a shard was withdrawn and is not to be tried again yet."""
        found = self.withdrawn.get((model_id, index))
        return found is not None and trio.current_time() < found.until

    async def withdraw(self, manifests: Mapping[ModelId, Manifest]) -> None:
        """Stop serving what is not fit for it, and try it again later, ever less often."""
        failing = self._worker.withdrawn() | (self._stages.withdrawn() if self._stages is not None else {})
        for (model_id, index), why in failing.items():
            manifest = manifests.get(ModelId(model_id))
            if manifest is None:
                continue
            shard = manifest.shards[index]
            pause = self.withdrawn.setdefault((model_id, index), Withdrawal()).again(why, trio.current_time())
            security.error("%s: %s is not served for %.0f s: %s", manifest.name, shard.id, pause, why)
            if progress := self.progress.get((model_id, index)):
                progress.state, progress.error = "withdrawn", why
            await self.drop(manifest, shard)

    def ready(self, manifest: Manifest) -> frozenset[int]:
        """Shards ready here: loaded experts and stages, and a trunk on disk."""
        index = manifest.shard_index(manifest.trunk.id)
        progress = self.progress.get((manifest.model_id, index))
        stored = {index} if progress is not None and progress.state == "stored" else set()
        staged = self._stages.indices(manifest.model_id) if self._stages is not None else frozenset()
        return self._worker.indices(manifest.model_id) | staged | stored

    def start(self, nursery: trio.Nursery, manifest: Manifest, index: int) -> None:
        """Begin to take a shard, unless it is on its way or rests after a failure."""
        shard = manifest.shards[index]
        progress = self.progress.setdefault((manifest.model_id, index), Progress(bytes_total=shard.size_bytes))
        if (
            progress.ended is not None
            or trio.current_time() < progress.retry_at
            or progress.state in ("serving", "stored")
            or self.rests(manifest.model_id, index)
        ):
            return
        progress.begin()
        name = f"{manifest.name}, shard {shard.id}"
        nursery.start_soon(self.attempt, progress, name, self._take, manifest, index, progress)

    async def attempt(self, progress: Progress, name: str, work: Callable[..., Any], *arguments: object) -> None:
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
            self._on_change()

    async def _take(self, manifest: Manifest, index: int, progress: Progress) -> None:
        """One shard's way from wherever it is to being served (the trunk: to the disk)."""
        shard = manifest.shards[index]
        ram = self.needs(manifest, shard)
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
                    await self._load_and_serve(manifest, shard)
                progress.state = "serving"
        finally:
            self._ram_reserved -= ram
        log.info("%s: shard %s is %s", manifest.name, shard.id, progress.state)

    async def _load_and_serve(self, manifest: Manifest, shard: Shard) -> None:
        if shard.kind == "expert":
            loaded = await trio.to_thread.run_sync(self._load, manifest, shard)
            await trio.to_thread.run_sync(use_huge_pages)
            self._worker.load(plan_of(manifest, shard), loaded)
            return
        if self._stages is None or self._load_stage is None:
            raise LocalError("unavailable", f"{shard.id}: this node serves no stages")
        segment = await trio.to_thread.run_sync(self._load_stage, manifest, shard)
        await trio.to_thread.run_sync(use_huge_pages)
        self._stages.load(stage_plan_of(manifest, shard), segment)

    async def drop(self, manifest: Manifest, shard: Shard) -> None:
        """Stop serving a shard, and free it after the last call on it."""
        if shard.kind == "stage" and self._stages is not None:
            await self._stages.unload(manifest.model_id, shard.id)
        else:
            await self._worker.unload(manifest.model_id, shard.id)

    async def _bring(self, manifest: Manifest, shard: Shard, progress: Progress) -> None:
        """Make the shard's files whole on disk; the trunk's with the tokenizer."""
        model_id = manifest.model_id
        files = (*shard.files, manifest.tokenizer) if shard.kind == "trunk" else shard.files
        progress.bytes_total = sum(file.size_bytes for file in files)
        progress.state = "verifying"
        async with AsyncExitStack() as stack:
            for path in sorted(file.path for file in files):  # always in one order: nobody waits in a circle
                await stack.enter_async_context(self._files.setdefault((model_id, path), trio.Lock()))
            await self._bring_files(manifest, shard, files, progress)

    async def _bring_files(
        self, manifest: Manifest, shard: Shard, files: Sequence[ModelFile], progress: Progress
    ) -> None:
        model_id = manifest.model_id
        missing = []
        for file in files:
            if not await trio.to_thread.run_sync(self._is_whole, model_id, file):
                missing.append(file)
        size = sum(file.size_bytes for file in missing)
        progress.bytes_done = progress.bytes_total - size
        if not missing:
            return
        if self.disk_bytes + self._disk_reserved + size > self._disk_bytes_max:
            progress.state = "no_room"
            message = f"shard {shard.id} needs {size} bytes; models here take {self.disk_bytes} already"
            raise LocalError("disk_full", message, f"raise dmoe.disk_bytes_max ({self._disk_bytes_max})")
        progress.state = "fetching"
        self._disk_reserved += size

        def count(done: int) -> None:
            progress.bytes_done = min(progress.bytes_total, progress.bytes_done + done)

        try:
            likely = [manifest.publisher, *self._deployers(model_id)]
            await self._fetcher.files(manifest, missing, shard, likely, count)
        finally:
            self._disk_reserved -= size
            await self.measure_disk()
        progress.state = "verifying"
        for file in missing:
            await trio.to_thread.run_sync(self._store.verify_file, model_id, file)

    def _is_whole(self, model_id: str, file: ModelFile) -> bool:
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
        if ram and not self.has_room(ram):
            used = self.ram_used() + self._ram_reserved
            progress.state = "no_room"
            message = f"shard {shard.id} needs {ram} bytes of memory; {used} of {self._ram_bytes_max} are taken"
            raise LocalError("local", message, "raise dmoe.ram_bytes_max")

    async def store_only(self, manifest: Manifest, index: int) -> None:
        """Bring a shard's files here without serving it. Raises what went wrong."""
        shard = manifest.shards[index]
        progress = self.progress.setdefault((manifest.model_id, index), Progress(bytes_total=shard.size_bytes))
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
        if shard.kind != "trunk":
            del self.progress[manifest.model_id, index]  # on disk, not served: placement decides about that
        self._on_change()

    async def measure_disk(self) -> None:
        try:
            self.disk_bytes = await trio.to_thread.run_sync(self._store.disk_bytes)
        except OSError as error:  # a file vanished while it was counted
            log.debug("counting the models' bytes: %s", error)
