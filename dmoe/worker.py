"""Serves experts: runs what peers ask of the shards loaded here, in batches, and meters it.

Owns: the loaded shards, one bounded queue per shard, admission and statistics. Does not own: which shards are here
(``hosting``), what a shard computes (``runtime``), what work costs (the ledger, behind :class:`dmoe.ports.Seller`).

A small call that finds nobody waiting runs at once on the event loop: a thread hop costs as much as a row, and a
token needs a call per layer in sequence. Everything else queues per shard; whoever runs takes all that waits for one
layer, up to a row budget, runs it once and splits the result: batches grow with the load, without a timer.

Invariants:
1. A call is refused (busy, with a hint) before it is queued, never dropped after.
2. A row's answer does not depend on the batch it ran in (the shard's promise) nor on who else waited.
3. What is answered is counted once, with the same kFLOP and leaf as at the caller.
4. A shard is closed only after the last call on it has ended.
5. While :attr:`Worker.paused`, peers are refused by name and this node's own answers are computed as ever.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import trio

from config.errors import BusyError, RemoteError, RequestError
from config.vocabulary import PeerId
from dmoe.core import calls, wire
from dmoe.core.calls import ExpertCall, Indices, Weights
from dmoe.core.manifest import Manifest
from dmoe.core.manifest import Shard as ManifestShard
from dmoe.core.wire import FloatRows
from dmoe.ports import Quote, Seller
from p2p.face import Call, Network, Reply

log = logging.getLogger(__name__)

INLINE_SECONDS_MAX = 0.002
"""Work expected to take no longer runs on the event loop."""
CROWD_SECONDS = 0.0001
"""A call that starts so soon after the last one ended has waited for it: calls are crowding, so they queue."""
LATENCIES_KEPT = 512
ANSWER_BYTES_MAX = 32 << 20


class Shard(Protocol):
    """What the worker needs of :class:`dmoe.runtime.ExpertShard`."""

    ram_bytes: int

    def partial(self, layer: int, h: FloatRows, experts: Indices | None, weights: Weights | None) -> FloatRows:
        """The unrounded partial sum ``f32[N, H]`` of this shard's group; thread-safe."""

    def close(self) -> None:
        """Free everything."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What the manifest says about a loaded shard; ``index`` counts in the manifest's shard list."""

    model_id: str
    shard_id: str
    index: int
    layers: tuple[int, int]
    group: int
    experts: tuple[int, ...]
    width: int
    top_k: int
    flops_per_row: int


def plan_of(manifest: Manifest, shard: ManifestShard) -> ShardPlan:
    """What the worker keeps of a manifest's expert shard."""
    router = manifest.architecture.router
    return ShardPlan(
        model_id=manifest.model_id,
        shard_id=shard.id,
        index=manifest.shard_index(shard.id),
        layers=shard.layers,
        group=shard.group,
        experts=shard.experts,
        width=manifest.architecture.hidden,
        top_k=0 if router.kind == "all" else router.top_k,
        flops_per_row=shard.flops_per_row,
    )


@dataclass(slots=True, eq=False)
class _Job:
    layer: int
    rows: FloatRows
    experts: Indices | None
    weights: Weights | None
    done: trio.Event = field(default_factory=trio.Event)
    answer: FloatRows | None = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class LoadedShard:
    """A shard in memory with its queue and its figures."""

    plan: ShardPlan
    shard: Shard
    waiting: deque[_Job] = field(default_factory=deque)
    rows_waiting: int = 0
    running: int = 0
    draining: bool = False
    row_seconds: float = 0.0002
    rows: int = 0
    rows_computed: int = 0
    """For peers and for this node's own answers."""
    calls: int = 0
    batches: int = 0
    batch_rows_max: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))

    def run(self, layer: int, rows: FloatRows, experts: Indices | None, weights: Weights | None) -> FloatRows:
        """Run the shard once and learn from how long it took."""
        start = perf_counter()
        answer = self.shard.partial(layer, rows, experts, weights)
        spent = (perf_counter() - start) / len(rows)
        self.row_seconds += (0.5 if spent < self.row_seconds else 0.1) * (spent - self.row_seconds)
        self.batches += 1
        self.rows_computed += len(rows)
        self.batch_rows_max = max(self.batch_rows_max, len(rows))
        return answer

    def finished(self, rows: int, seconds: float) -> None:
        """Count an answered call."""
        self.calls += 1
        self.rows += rows
        self.latencies.append(seconds)

    def statistics(self) -> dict[str, Any]:
        """Figures of this shard, JSON-able."""
        p50, p99 = (np.percentile(self.latencies, (50, 99)) * 1000).round(3).tolist() if self.latencies else (0.0, 0.0)
        return {
            "calls": self.calls,
            "rows": self.rows,
            "rows_computed": self.rows_computed,
            "p50_ms": p50,
            "p99_ms": p99,
            "rows_waiting": self.rows_waiting,
            "batches": self.batches,
            "batch_rows_max": self.batch_rows_max,
            "row_us": round(self.row_seconds * 1e6, 1),
            "ram_bytes": self.shard.ram_bytes,
        }


class Worker:
    """Loaded shards and the RPC ``expert.run``. :meth:`run` must be running for calls that queue."""

    def __init__(
        self,
        network: Network,
        *,
        quote: Quote,
        seller: Seller | None = None,
        threads: int = 1,
        queue_rows_max: int = 4096,
        batch_rows_max: int = 512,
    ) -> None:
        self.quote = quote
        self.changes = 0
        """Counts loads and unloads, so that callers can cache what is local."""
        self.paused = False
        """No new calls of peers, for as long as the operator wants."""
        self._network = network
        self._seller = seller
        self._queue_rows_max = queue_rows_max
        self._batch_rows_max = batch_rows_max
        self._limiter = trio.CapacityLimiter(threads)
        self._shards: dict[tuple[str, str], LoadedShard] = {}
        self._places: dict[tuple[str, int, int], LoadedShard] = {}
        self._calls = 0
        self._refused = 0
        self._active = 0
        self._idle = trio.Event()
        self._last_end = 0.0
        self._nursery: trio.Nursery | None = None
        self._stopping = False
        self._uncounted: deque[tuple[Call, ExpertCall, list[LoadedShard], memoryview]] = deque()
        self._to_count = trio.Event()
        network.serve(calls.METHOD, self._serve)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled (call :meth:`drain` first to finish what is in flight), then free every shard."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._count_behind)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            self._count_all()
            for loaded in self._shards.values():
                loaded.shard.close()
            self._shards.clear()
            self._places.clear()

    async def drain(self) -> None:
        """Take no new calls and wait until those in flight are answered."""
        self._stopping = True
        await self.drained()

    async def drained(self) -> None:
        """Wait until no call of a peer is in flight."""
        while self._active:
            self._idle = trio.Event()
            await self._idle.wait()

    # --- shards

    def load(self, plan: ShardPlan, shard: Shard) -> None:
        """Serve a shard from now on."""
        key = (plan.model_id, plan.shard_id)
        assert key not in self._shards, f"{plan.shard_id} is loaded already"
        loaded = self._shards[key] = LoadedShard(plan, shard)
        for layer in range(plan.layers[0], plan.layers[1] + 1):
            self._places[plan.model_id, layer, plan.group] = loaded
        self.changes += 1

    async def unload(self, model_id: str, shard_id: str) -> None:
        """Stop serving a shard, wait for the calls on it, and free it. Unknown shards are ignored."""
        loaded = self._shards.pop((model_id, shard_id), None)
        if loaded is None:
            return
        self._places = {place: other for place, other in self._places.items() if other is not loaded}
        self.changes += 1
        while loaded.running or loaded.waiting:
            self._idle = trio.Event()
            await self._idle.wait()
        loaded.shard.close()

    def local(self, model_id: str, layer: int, group: int) -> LoadedShard | None:
        """The loaded shard that holds this sum group, if any."""
        return self._places.get((model_id, layer, group))

    def indices(self, model_id: str) -> frozenset[int]:
        """Manifest indices of the loaded shards of a model."""
        return frozenset(s.plan.index for (model, _), s in self._shards.items() if model == model_id)

    def ram_bytes(self) -> int:
        """Memory the loaded shards take."""
        return sum(loaded.shard.ram_bytes for loaded in self._shards.values())

    def rows_waiting(self) -> int:
        """Rows in all queues (the advert's load)."""
        return sum(loaded.rows_waiting for loaded in self._shards.values())

    def statistics(self) -> dict[str, Any]:
        """Figures of the moment, JSON-able: totals and per model and shard."""
        shards: dict[str, dict[str, Any]] = {}
        for (model_id, shard_id), loaded in self._shards.items():
            shards.setdefault(model_id, {})[shard_id] = loaded.statistics()
        return {"calls": self._calls, "refused": self._refused, "active": self._active, "shards": shards}

    # --- calls

    async def _serve(self, call: Call) -> Reply:
        if self._stopping:
            raise RemoteError("unavailable", "this node is shutting down", "ask another replica")
        if self.paused:
            self._refused += 1
            raise RemoteError("unavailable", "this node is paused by its operator", "ask another replica")
        start = perf_counter()
        self._active += 1
        try:
            asked = calls.parse(call.header, call.buffers)
            shards = self._places_of(asked)
            paid = self._admit(call.peer_id, asked)
            partials = await self.compute(shards, asked.layer, asked.rows, asked.experts, asked.weights, call.deadline)
            header, buffer = wire.encode(np.concatenate(partials) if len(partials) > 1 else partials[0])
            if paid:
                self._uncounted.append((call, asked, shards, buffer))
                self._to_count.set()
                if self._nursery is None:
                    self._count_all()
        finally:
            self._active -= 1
            self._last_end = perf_counter()
            self._idle.set()
        self._calls += 1
        spent = self._last_end - start
        for loaded in shards:
            loaded.finished(len(asked.rows), spent)
        header["service_us"] = int(spent * 1e6)
        return Reply(header, (buffer,))

    def _places_of(self, asked: ExpertCall) -> list[LoadedShard]:
        shards = []
        for group in asked.groups:
            loaded = self._places.get((asked.model_id, asked.layer, group))
            if loaded is None:
                what = f"layer {asked.layer}, group {group} of model {asked.model_id[:12]}"
                raise RequestError("not_found", f"{what} is not served here", "read this node's advert again")
            shards.append(loaded)
        plan, rows = shards[0].plan, asked.rows
        if rows.shape[1] != plan.width:
            raise RequestError("invalid_request", f"rows are {rows.shape[1]} wide, the model needs {plan.width}")
        if len(rows) > self._queue_rows_max:
            raise RequestError("too_large", f"{len(rows)} rows in one call, at most {self._queue_rows_max} fit")
        if 2 * len(shards) * rows.size > ANSWER_BYTES_MAX:
            raise RequestError("too_large", f"the answer would exceed {ANSWER_BYTES_MAX} bytes", "ask with fewer rows")
        if (0 if asked.experts is None else asked.experts.shape[1]) != plan.top_k:
            raise RequestError("invalid_request", f"the model's router picks {plan.top_k} experts per row (0: all)")
        return shards

    def _admit(self, payer: PeerId, asked: ExpertCall) -> bool:
        """Whether the call is metered. Work that is free here needs no channel."""
        if self._seller is None or (not self.quote.microcredits_per_tflop and not asked.channel):
            return False
        if asked.quote != self.quote.number:
            message = f"quote {asked.quote} is not valid here any more; it is {self.quote.number} now"
            raise RequestError("conflict", message, "read this node's advert again")
        self._seller.admit(payer, asked.channel, self.quote)
        return True

    def _count_all(self) -> None:
        """Meter what was answered. A call is counted right after its answer left, not on its way."""
        while self._uncounted:
            self._count(*self._uncounted.popleft())

    async def _count_behind(self) -> None:
        while True:
            await self._to_count.wait()
            self._to_count = trio.Event()
            self._count_all()

    def _count(self, call: Call, asked: ExpertCall, shards: Sequence[LoadedShard], answer: memoryview) -> None:
        assert self._seller is not None
        members, costs = [s.plan.experts for s in shards], [s.plan.flops_per_row for s in shards]
        work = calls.kflop(members, costs, len(asked.rows), asked.experts)
        leaf = calls.leaf(asked.model_id, asked.layer, asked.groups, call.buffers, answer)
        self._seller.served(call.peer_id, asked.channel, self.quote, work, leaf)

    async def compute(
        self,
        shards: Sequence[LoadedShard],
        layer: int,
        rows: FloatRows,
        experts: Indices | None,
        weights: Weights | None,
        deadline: float,
    ) -> list[FloatRows]:
        """The unrounded partial sums of one layer, a matrix per shard, in order. ``deadline`` is a trio time.

        Raises BusyError if a queue is full or the work would not be done in time.
        """
        expected = sum(loaded.row_seconds for loaded in shards) * len(rows)
        crowded = perf_counter() - self._last_end < CROWD_SECONDS
        if expected <= INLINE_SECONDS_MAX and not crowded and not any(s.waiting or s.running for s in shards):
            return [loaded.run(layer, rows, experts, weights) for loaded in shards]
        self._check_room(shards, len(rows), deadline)
        jobs = [_Job(layer, rows, experts, weights) for _ in shards]
        for loaded, job in zip(shards, jobs, strict=True):
            self._enqueue(loaded, job)
        try:
            for job in jobs:
                await job.done.wait()
        finally:
            for loaded, job in zip(shards, jobs, strict=True):
                self._forget(loaded, job)
        for job in jobs:
            if job.error is not None:
                raise job.error
        return [job.answer for job in jobs if job.answer is not None]

    def _check_room(self, shards: Sequence[LoadedShard], rows: int, deadline: float) -> None:
        time_left = deadline - trio.current_time()
        for loaded in shards:
            wait = (loaded.rows_waiting + rows) * loaded.row_seconds
            if loaded.rows_waiting and (loaded.rows_waiting + rows > self._queue_rows_max or wait > time_left):
                self._refused += 1
                message = f"{loaded.plan.shard_id}: {loaded.rows_waiting} rows wait already"
                raise BusyError(message, "ask another replica", retry_after_ms=max(1, int(wait * 1000)))

    def _enqueue(self, loaded: LoadedShard, job: _Job) -> None:
        assert self._nursery is not None, "the worker is not running"
        loaded.waiting.append(job)
        loaded.rows_waiting += len(job.rows)
        if not loaded.draining:
            loaded.draining = True
            self._nursery.start_soon(self._run_queue, loaded)

    def _forget(self, loaded: LoadedShard, job: _Job) -> None:
        """Take back a job whose caller has gone."""
        if not job.done.is_set() and job in loaded.waiting:
            loaded.waiting.remove(job)
            loaded.rows_waiting -= len(job.rows)

    async def _run_queue(self, loaded: LoadedShard) -> None:
        """Run what waits for one shard until nothing does."""
        try:
            while loaded.waiting:
                jobs = self._take(loaded)
                loaded.running += 1
                try:
                    await self._run_batch(loaded, jobs)
                finally:
                    loaded.running -= 1
                    for job in jobs:
                        job.done.set()
        finally:
            loaded.draining = False
            self._idle.set()

    def _take(self, loaded: LoadedShard) -> list[_Job]:
        """The first job and every other of its layer that fits the row budget, in order of arrival."""
        first = loaded.waiting.popleft()
        jobs, left, rows = [first], deque[_Job](), len(first.rows)
        for job in loaded.waiting:
            if job.layer == first.layer and rows + len(job.rows) <= self._batch_rows_max:
                jobs.append(job)
                rows += len(job.rows)
            else:
                left.append(job)
        loaded.waiting = left
        loaded.rows_waiting -= rows
        return jobs

    async def _run_batch(self, loaded: LoadedShard, jobs: Sequence[_Job]) -> None:
        first = jobs[0]
        if len(jobs) == 1:
            rows, experts, weights = first.rows, first.experts, first.weights
        else:
            rows = np.concatenate([job.rows for job in jobs])
            experts = (
                np.concatenate([j.experts for j in jobs if j.experts is not None])
                if first.experts is not None
                else None
            )
            weights = (
                np.concatenate([j.weights for j in jobs if j.weights is not None])
                if first.experts is not None
                else None
            )
        try:
            if loaded.row_seconds * len(rows) <= INLINE_SECONDS_MAX:
                answer = loaded.run(first.layer, rows, experts, weights)
                await trio.lowlevel.checkpoint()
            else:
                answer = await trio.to_thread.run_sync(
                    loaded.run, first.layer, rows, experts, weights, limiter=self._limiter
                )
        except Exception as error:
            log.exception("running %s failed", loaded.plan.shard_id)
            for job in jobs:
                job.error = error
            return
        start = 0
        for job in jobs:
            job.answer = answer[start : start + len(job.rows)]
            start += len(job.rows)
