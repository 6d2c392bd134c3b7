"""A stage in memory: its layers, the runs that wait for them, and how fast it is here.

Owns: what runs together. Does not own: who asked (``host``), tickets (``tickets``), arithmetic (the segment).

Whenever the layers are free, everything that waits runs at once, up to a row budget: sequences of all callers in one
pass. So batches grow with the load, without a timer. Runs of one sequence keep their order, and only one of them is in
a batch. A short run that finds nobody waiting runs on the event loop: thread hops per stage and token cost more than
the loop's few milliseconds.

Invariants:
1. A run is refused (busy, with a hint) before it is queued, never dropped after.
2. Before a part runs, its cache is cut to the part's position; a cache that is shorter fails its own run alone.
3. One batch at a time. Where one fails, each of its runs is computed alone, and only those that fail end.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import trio

from config.errors import BusyError, RemoteError, RequestError, RiosError
from dmoe.core.history import Added, History
from dmoe.core.manifest import Manifest
from dmoe.core.manifest import Shard as ManifestShard
from dmoe.core.wire import Dtype, FloatRows
from dmoe.kv import Cache
from dmoe.loaded import LOOP_SECONDS_LOST, Away
from dmoe.segment import Part
from dmoe.stages.segment import Segment

log = logging.getLogger(__name__)

INLINE_SECONDS_MAX = 0.01
"""Runs expected to take no longer may run on the event loop, when nobody waits."""
FASTER, SLOWER = 0.5, 0.1
"""Weights of a new measurement: a slow one is more often the machine's doing than the stage's."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What the manifest says about a loaded stage; ``index`` counts in the manifest's shard list."""

    model_id: str
    shard_id: str
    index: int
    layers: tuple[int, int]
    width: int
    context: int
    flops_per_row: int
    position_bytes: int
    """Of key/value cache per position."""
    dtype: Dtype


def stage_plan_of(manifest: Manifest, shard: ManifestShard) -> StagePlan:
    """What a host keeps of a manifest's stage."""
    architecture, (first, last) = manifest.architecture, shard.layers
    latent = architecture.traits.latent
    width = latent.width if latent else 2 * architecture.kv_heads * architecture.head_dim
    return StagePlan(
        model_id=manifest.model_id,
        shard_id=shard.id,
        index=manifest.shard_index(shard.id),
        layers=shard.layers,
        width=architecture.hidden,
        context=architecture.context,
        flops_per_row=shard.flops_per_row,
        position_bytes=4 * width * (last - first + 1),
        dtype=manifest.wire_dtype,
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of a run: where they belong."""

    ticket: "Numbered"
    position: int
    rows: int

    @property
    def cache(self) -> Cache:
        """The cache they belong to."""
        return self.ticket.cache


class Numbered(Protocol):
    """What is kept of a sequence here: its cache, the number of the last pass that ran on it, what came and went."""

    cache: Cache
    newest: int
    history: History | None


@dataclass(slots=True, eq=False)
class Job:
    """A run that waits. ``done`` is set once ``answer`` or ``error`` is."""

    number: int
    places: Sequence[Place]
    x: FloatRows
    queued: float
    started: float = 0.0
    ended: float = 0.0
    answer: FloatRows | None = None
    added: list[Added | None] = field(default_factory=list)
    """Of every place, once there is an answer."""
    error: BaseException | None = None
    done: trio.Event = field(default_factory=trio.Event)
    after: list[Callable[[], None]] = field(default_factory=list)
    """Called when it is done, by :meth:`finish`."""

    def finish(self) -> None:
        """It is done; nothing uses its caches any more."""
        self.done.set()
        for call in self.after:
            call()

    def answered(self, y: FloatRows, ended: float) -> None:
        """These rows came of it. In the order of the runs, whoever is woken first."""
        self.answer, self.ended, end = y, ended, 0
        for place in self.places:
            start, end = end, end + place.rows
            history, rows = place.ticket.history, slice(start, end)
            self.added.append(history.append(place.position, self.x[rows], y[rows]) if history else None)

    def prepare(self) -> None:
        """Cut the caches to their positions. Raises RequestError if one has less, or has not the room, or has been
        used by a later pass."""
        for place in self.places:
            if place.ticket.newest > self.number:
                raise RequestError("conflict", f"pass {self.number} was overtaken by pass {place.ticket.newest}")
            if place.cache.length < place.position:
                message = f"the cache holds {place.cache.length} positions, the run begins at {place.position}"
                raise RequestError("conflict", message, "run what is missing first")
            if place.position + place.rows > place.cache.capacity:
                message = f"{place.position + place.rows} positions do not fit a cache for {place.cache.capacity}"
                raise RequestError("context_length_exceeded", message)
        for place in self.places:
            place.ticket.newest = self.number
            place.cache.truncate(place.position)


class LoadedStage:
    """A stage with its queue and its figures."""

    def __init__(
        self, plan: StagePlan, segment: Segment, *, queue_rows_max: int = 4096, batch_rows_max: int = 512
    ) -> None:
        self.plan = plan
        self.segment = segment
        self.waiting: deque[Job] = deque()
        self.rows_waiting = 0
        self.row_seconds = plan.flops_per_row / 2e10
        self.idle = trio.Event()
        """Set whenever nothing runs and nothing waits."""
        self.idle.set()
        self.rows = self.runs = self.batches = self.batch_rows_max = self.refused = 0
        self._queue_rows_max = queue_rows_max
        self._batch_rows_max = batch_rows_max
        self.closed = False
        self._away = Away()
        self._driving = False
        self._batch: list[Job] = []
        """What runs."""
        self._passes = trio.Lock()

    async def open(
        self,
        capacity: int,
        like: Cache | None = None,
        length: int = 0,
        copied: Callable[[], None] = lambda: None,
    ) -> Cache:
        """A cache in these layers, as :meth:`Segment.open` makes it, between two batches. ``copied``: called before the
        next one. Raises RequestError if runs that came first have shortened ``like``."""
        async with self._passes:
            if like is not None and like.length < length:
                raise RequestError("conflict", f"{length} positions are wanted of a cache that holds {like.length}")
            cache = await self.segment.open(capacity, like, length)
            copied()
            return cache

    async def close(self) -> None:
        """Wait for the runs that are queued, then free the layers."""
        self.closed = True
        await self.idle.wait()
        async with self._passes:
            self.segment.close()

    async def run(
        self, number: int, places: Sequence[Place], x: FloatRows, deadline: float, nursery: trio.Nursery
    ) -> Job:
        """``f32[N, H]`` through the layers, with whatever else waits; ``nursery`` outlives the caller. Raises BusyError
        before it is queued, and what the run itself met."""
        self._check_room(len(x), deadline)
        job = Job(number, places, x, perf_counter())
        if self._now(job):
            return job
        self.waiting.append(job)
        self.rows_waiting += len(x)
        if not self._driving:
            self._driving = True
            self.idle = trio.Event()
            nursery.start_soon(self._drive)
        try:
            await job.done.wait()
        finally:
            if job in self.waiting:  # its caller has gone
                self.waiting.remove(job)
                self.rows_waiting -= len(x)
        if job.error is not None:
            raise job.error
        self.runs += 1
        return job

    def when_free(self, places: Sequence[Place], call: Callable[[], None]) -> None:
        """Call back once no batch uses these places: now, or when the batch is over that a caller who has gone left
        its run in."""
        for job in self._batch:
            if job.places is places and not job.done.is_set():
                job.after.append(call)
                return
        call()

    def _now(self, job: Job) -> bool:
        """Run it here and now if that is short and nobody waits; whether it was."""
        short = self.row_seconds * len(job.x) <= INLINE_SECONDS_MAX
        if not short or not self._away.is_over(perf_counter()) or self._driving or self._passes.locked():
            return False
        job.prepare()
        start = job.started = perf_counter()
        try:
            y = self.segment.compute(job.x, [Part(place.cache, place.rows) for place in job.places])
        except RiosError:  # in a thread it may take its time, and its error is told
            self._away.begin(perf_counter())
            return False
        if y is None:
            return False
        job.answered(y.copy(), perf_counter())
        if job.ended - start > INLINE_SECONDS_MAX + LOOP_SECONDS_LOST:
            self._away.begin(job.ended)
        self._ran(len(job.x), job.ended - start)
        self.runs += 1
        return True

    def _check_room(self, rows: int, deadline: float) -> None:
        if rows > self._queue_rows_max:
            raise RequestError("too_large", f"{rows} rows in one run, at most {self._queue_rows_max} fit")
        # who has nothing to do tries: after a stall it would refuse all prompts and never learn that it is quick again
        wait = self.row_seconds * (self.rows_waiting + rows) if self._driving else 0.0
        if self.rows_waiting + rows > self._queue_rows_max or trio.current_time() + wait > deadline:
            self.refused += 1
            raise BusyError(
                f"{self.rows_waiting} rows wait for {self.plan.shard_id}",
                "ask another replica",
                retry_after_ms=max(1, int(1000 * self.row_seconds * self.rows_waiting)),
            )

    async def _drive(self) -> None:
        """Run what waits until nothing does."""
        try:
            while self.waiting:
                self._batch = self._take()
                await self._run(self._batch)
        finally:
            self._driving = False
            for job in (*self._batch, *self.waiting):
                if not job.done.is_set():
                    job.error = RemoteError("unavailable", "this node is shutting down", "ask another replica")
                    job.finish()
            self._batch = []
            self.waiting.clear()
            self.rows_waiting = 0
            self.idle.set()

    def _take(self) -> list[Job]:
        """The first job and every other that fits the row budget, as long as no cache is in two of them."""
        taken: list[Job] = []
        left: deque[Job] = deque()
        seen: set[int] = set()
        rows = 0
        for job in self.waiting:
            caches = {id(place.cache) for place in job.places}
            fits = not taken or rows + len(job.x) <= self._batch_rows_max
            if fits and seen.isdisjoint(caches):
                taken.append(job)
                rows += len(job.x)
            else:
                left.append(job)
            seen |= caches  # also of those left behind: later runs of a sequence do not overtake earlier ones
        self.waiting = left
        self.rows_waiting -= rows
        return taken

    async def _run(self, batch: Sequence[Job]) -> None:
        start = perf_counter()
        ready = []
        for job in batch:
            job.started = start
            try:
                job.prepare()
                ready.append(job)
            except RiosError as error:
                job.error = error
        if ready and not await self._tried(ready, start) and len(ready) > 1:
            for job in ready:  # one caller's rows must not fail another's
                job.error = None
                await self._tried([job], perf_counter())
        for job in batch:
            job.finish()

    async def _tried(self, jobs: Sequence[Job], start: float) -> bool:
        """Compute them together; whether that went well. If not, no cache has changed, and each has the error."""
        try:
            await self._compute(jobs, start)
        except Exception as error:
            if not isinstance(error, RiosError):
                log.exception("running %s failed", self.plan.shard_id)
            for job in jobs:
                job.error = error
            return False
        return True

    async def _compute(self, jobs: Sequence[Job], start: float) -> None:
        x = jobs[0].x if len(jobs) == 1 else np.concatenate([job.x for job in jobs])
        parts = [Part(place.cache, place.rows) for job in jobs for place in job.places]
        async with self._passes:  # held until it is known what came of it: a cache is copied with its history
            y = (await self.segment.run(x, parts)).copy()
            end, first = perf_counter(), 0
            self._ran(len(x), end - start)
            for job in jobs:
                job.answered(y[first : first + len(job.x)], end)
                first += len(job.x)

    def _ran(self, rows: int, seconds: float) -> None:
        """Count a batch and learn from how long it took."""
        spent = seconds / rows
        self.row_seconds += (FASTER if spent < self.row_seconds else SLOWER) * (spent - self.row_seconds)
        self.batches += 1
        self.rows += rows
        self.batch_rows_max = max(self.batch_rows_max, rows)

    def statistics(self) -> dict[str, Any]:
        """Figures of this stage, JSON-able."""
        return {
            "runs": self.runs,
            "rows": self.rows,
            "rows_computed": self.rows,
            "batches": self.batches,
            "batch_rows_max": self.batch_rows_max,
            "rows_waiting": self.rows_waiting,
            "refused": self.refused,
            "row_us": round(self.row_seconds * 1e6, 1),
            "ram_bytes": self.segment.ram_bytes,
        }
