"""A shard in memory: what its manifest says of it, what waits for it, and how fast it is here.

Owns: the figures of one loaded shard and its queue. Does not own: when it runs (``batches``), who asked (``worker``).
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dmoe.core.calls import Indices, Weights
from dmoe.core.manifest import Manifest
from dmoe.core.manifest import Shard as ManifestShard
from dmoe.core.wire import Dtype, FloatRows

Partials = list[FloatRows] | NDArray[np.float32]
"""A matrix ``f32[N, H]`` per shard: several arrays, or one ``f32[shards, N, H]``."""

LATENCIES_KEPT = 512
LOOP_SECONDS_LOST = 0.05
"""A call that held up the event loop for so long was not the quick one that was expected."""
AWAY_SECONDS_FIRST, AWAY_SECONDS_MAX, FORGIVEN_AFTER = 2.0, 60.0, 10
"""For so long it is then run in threads only; doubled each time, until it was well so many times as long."""
FASTER, SLOWER = 0.5, 0.1
"""Weights of a new measurement: a slow one is more often the machine's doing than the shard's."""


class Away:
    """Whether something may run on the event loop: what was slow there, or failed, may not for a while. Some shards
    are other people's, and a row's time is learnt from what they choose to take."""

    __slots__ = ("_seconds", "_until")

    def __init__(self) -> None:
        self._until = 0.0
        self._seconds = AWAY_SECONDS_FIRST

    def is_over(self, now: float) -> bool:
        """Whether it may run on the loop."""
        return now >= self._until

    def begin(self, now: float) -> None:
        """It may not, from now on."""
        if now - self._until > FORGIVEN_AFTER * self._seconds:
            self._seconds = AWAY_SECONDS_FIRST
        self._until = now + self._seconds
        self._seconds = min(AWAY_SECONDS_MAX, 2 * self._seconds)


class Shard(Protocol):
    """What a worker needs of :class:`dmoe.runtime.ExpertShard`."""

    ram_bytes: int

    def partial(self, layer: int, h: FloatRows, experts: Indices | None, weights: Weights | None) -> FloatRows:
        """The unrounded partial sum ``f32[N, H]`` of this shard's group; thread-safe."""

    def close(self) -> None:
        """Free everything."""


@runtime_checkable
class Together(Shard, Protocol):
    """A shard that may be asked together with others of its ``place``: one way there and back instead of several."""

    place: object

    def partials(
        self,
        shards: Sequence["Together"],
        layer: int,
        h: FloatRows,
        experts: Indices | None,
        weights: Weights | None,
    ) -> Partials:
        """As :meth:`Shard.partial`, of each of these, all of the same place."""

    def tidy(self) -> None:
        """Free what its place kept for it alone, after it was closed; blocking."""


@runtime_checkable
class Withdrawable(Protocol):
    """What may turn out not to be fit to be served."""

    @property
    def withdrawn(self) -> str:
        """Why it is not served any more; empty if it is."""


def why_withdrawn(shard: object) -> str:
    """Why a shard or a stage is not served any more; empty if it is."""
    return shard.withdrawn if isinstance(shard, Withdrawable) else ""


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
    dtype: Dtype = "fp16"
    dense_layers: tuple[int, ...] = ()
    """Layers of the model that have no experts: nothing is served there."""


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
        dtype=manifest.wire_dtype,
        dense_layers=manifest.architecture.traits.dense_layers,
    )


@dataclass(slots=True, eq=False)
class Job:
    """One call's rows at one shard. ``done`` runs on the event loop, once, after ``answer`` or ``error`` is set."""

    layer: int
    rows: FloatRows
    experts: Indices | None
    weights: Weights | None
    done: Callable[[], None]
    answer: FloatRows | None = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class LoadedShard:
    """A shard with its queue and its figures."""

    plan: ShardPlan
    shard: Shard
    waiting: deque[Job] = field(default_factory=deque)
    rows_waiting: int = 0
    running: int = 0
    passed_over: int = 0
    """Batches of other shards that ran while rows waited here."""
    row_seconds: float = 0.0002
    away: Away = field(default_factory=Away)
    rows: int = 0
    rows_computed: int = 0
    """For peers and for this node's own answers."""
    calls: int = 0
    calls_at_once: int = 0
    """Calls that ran at once, without a queue or a thread."""
    batches: int = 0
    batch_rows_max: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))
    together: Together | None = field(init=False)
    """The shard, if it may be asked together with others."""

    def __post_init__(self) -> None:
        self.together = self.shard if isinstance(self.shard, Together) else None

    @property
    def free(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.running and not self.waiting

    def ran(self, rows: int, seconds: float) -> None:
        """Count a batch and learn from how long it took."""
        spent = seconds / rows
        self.row_seconds += (FASTER if spent < self.row_seconds else SLOWER) * (spent - self.row_seconds)
        self.batches += 1
        self.rows_computed += rows
        self.batch_rows_max = max(self.batch_rows_max, rows)

    def finished(self, rows: int, seconds: float) -> None:
        """Count an answered call."""
        self.calls += 1
        self.rows += rows
        self.latencies.append(seconds)

    def put(self, job: Job) -> None:
        """Queue a job."""
        self.waiting.append(job)
        self.rows_waiting += len(job.rows)

    def forget(self, job: Job) -> None:
        """Take back a job whose caller has gone, if it still waits."""
        if job in self.waiting:
            self.waiting.remove(job)
            self.rows_waiting -= len(job.rows)

    def take(self, rows_max: int) -> list[Job]:
        """The first job and every other of its layer that fits the row budget, in order of arrival."""
        jobs, self.waiting = self._split(rows_max)
        self.rows_waiting -= sum(len(job.rows) for job in jobs)
        return jobs

    def asks_like(self, jobs: Sequence[Job], rows_max: int) -> bool:
        """Whether what it would take are the same calls' rows as those of ``jobs``, taken at another shard."""
        if len(self.waiting) < len(jobs) or self.waiting[0].rows is not jobs[0].rows:
            return False
        mine, _ = self._split(rows_max)
        return [id(job.rows) for job in mine] == [id(job.rows) for job in jobs]

    def _split(self, rows_max: int) -> tuple[list[Job], deque[Job]]:
        first, *others = self.waiting
        jobs, left, rows = [first], deque[Job](), len(first.rows)
        for job in others:
            if job.layer == first.layer and rows + len(job.rows) <= rows_max:
                jobs.append(job)
                rows += len(job.rows)
            else:
                left.append(job)
        return jobs, left

    def statistics(self) -> dict[str, Any]:
        """Figures of this shard, JSON-able."""
        p50, p99 = (np.percentile(self.latencies, (50, 99)) * 1000).round(3).tolist() if self.latencies else (0.0, 0.0)
        return {
            "calls": self.calls,
            "calls_at_once": self.calls_at_once,
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


class Several(tuple[LoadedShard, ...]):
    """Shards that a call asks, and which of them in one go: made once for all calls that ask the same."""

    bunches: tuple[tuple[tuple[LoadedShard, ...], tuple[Together, ...]], ...]
    """Shards of one place, and the same to be asked; the second is empty where a shard is asked by itself."""

    def __new__(cls, shards: Iterable[LoadedShard]) -> Self:
        """In their order."""
        made = super().__new__(cls, shards)
        bunches: list[tuple[tuple[LoadedShard, ...], tuple[Together, ...]]] = []
        for place, some in groupby(made, key=lambda loaded: loaded.together and loaded.together.place):
            if place is None:
                bunches += [((loaded,), ()) for loaded in some]
            else:
                mine = tuple(some)
                bunches.append((mine, tuple(loaded.together for loaded in mine if loaded.together is not None)))
        made.bunches = tuple(bunches)
        return made


def stacked(partials: Partials) -> FloatRows:
    """The matrices one below the other, ``f32[shards * N, H]``; without a copy where they are one array."""
    if isinstance(partials, np.ndarray):
        rows: FloatRows = partials.reshape(-1, partials.shape[-1])
        return rows
    return np.concatenate(partials) if len(partials) > 1 else partials[0]


def joined(jobs: Sequence[Job]) -> tuple[FloatRows, Indices | None, Weights | None]:
    """The rows of several jobs of one layer as one batch, with their routing if there is one."""
    first = jobs[0]
    if len(jobs) == 1:
        return first.rows, first.experts, first.weights
    rows = np.concatenate([job.rows for job in jobs])
    if first.experts is None:
        return rows, None, None
    experts = np.concatenate([job.experts for job in jobs if job.experts is not None])
    weights = np.concatenate([job.weights for job in jobs if job.weights is not None])
    return rows, experts, weights
