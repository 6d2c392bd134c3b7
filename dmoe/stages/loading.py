"""A stage's files as layers in this process: the same segments that the node that answers runs.

Dense models run as one graph; sparse ones layer by layer, with the roundings of route ``experts`` at their sum groups.
Therefore a sparse stage may run here with its experts elsewhere, and nobody can tell from the bits.
"""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from dmoe.bills import Bill
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.wire import FloatRows
from dmoe.kv import Cache
from dmoe.layers import LocalExperts
from dmoe.runner import Report
from dmoe.runtime import ExpertShard, RuntimeOptions, ShardFiles, open_files
from dmoe.segment import Experts, FusedSegment, Part, Pieces, PieceSegment, Segment
from dmoe.shardfile import Spool
from dmoe.tally import Meter, Tally


class Layers(Protocol):
    """What of a segment a stage needs."""

    async def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache: ...
    async def run(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows: ...
    def compute(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows: ...


_Inner = TypeVar("_Inner", bound=Layers)


class StageLayers(Generic[_Inner]):
    """A stage, loaded (:class:`dmoe.stages.segment.Segment`)."""

    def __init__(self, shard: Shard, segment: _Inner, experts: LocalExperts | None) -> None:
        self.ram_bytes = shard.ram_bytes
        self._segment: _Inner | None = segment
        self._experts = experts

    @property
    def opened(self) -> _Inner:
        """The layers."""
        assert self._segment is not None, "the stage is closed"
        return self._segment

    async def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache:
        """See :class:`dmoe.segment.Segment`."""
        return await self.opened.open(capacity, like, length)

    async def run(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows:
        """See :class:`dmoe.segment.Segment`."""
        return await self.opened.run(x, parts)

    def compute(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows | None:
        """See :class:`dmoe.segment.Segment`."""
        return self.opened.compute(x, parts)

    def close(self) -> None:
        """Free sessions, caches and threads."""
        self._segment = None
        if self._experts is not None:
            self._experts.close()
            self._experts = None


def load_stage(
    manifest: Manifest, shard: Shard, store: ShardFiles, options: RuntimeOptions, spool: Spool | None = None
) -> StageLayers[Segment]:
    """Open a stage; blocking. ``spool``: see :class:`dmoe.segment.FusedSegment`. Raises IntegrityError for altered
    files, LocalError if it cannot run here."""
    first, last = shard.layers
    files = open_files(manifest, store, [shard])
    if manifest.architecture.router.kind == "all":
        return StageLayers(shard, FusedSegment(manifest, files, options, first, last, spool), None)
    inside = [each for each in manifest.expert_shards() if first <= each.layers[0] and each.layers[1] <= last]
    shards = [ExpertShard(manifest, each, store, options) for each in inside]
    experts = LocalExperts(manifest, shards, threads=options.thread_count, layers=range(first, last + 1))
    return StageLayers(shard, PieceSegment(manifest, Pieces(manifest, files, options, first, last), experts), experts)


class MeteredExperts(Experts, Meter, Protocol):
    """Experts that know who computed what."""


class SpreadLayers(StageLayers[Layers]):
    """A stage whose attention runs here and whose experts are wherever they are: the same bits."""

    def __init__(self, manifest: Manifest, shard: Shard, segment: Layers, experts: MeteredExperts) -> None:
        super().__init__(shard, segment, None)
        self.ram_bytes = 0
        self._manifest = manifest
        self._elsewhere = experts
        self._tallies: WeakKeyDictionary[Cache, Tally] = WeakKeyDictionary()
        self._bills: WeakKeyDictionary[Cache, Bill | None] = WeakKeyDictionary()

    async def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache:
        """See :class:`dmoe.segment.Segment`."""
        await self._elsewhere.open()
        return await super().open(capacity, like, length)

    async def run(self, x: FloatRows, parts: Sequence[Part]) -> FloatRows:
        """See :class:`dmoe.segment.Segment`."""
        bills, counts = [self._bills.get(part.cache) for part in parts], [part.rows for part in parts]
        self._elsewhere.begin(bills, counts, "hosting")
        y = await super().run(x, parts)
        for part, share in zip(parts, self._elsewhere.take(counts), strict=True):
            self._tallies.setdefault(part.cache, Tally()).add(share)
        return y

    def compute(self, x: FloatRows, parts: Sequence[Part]) -> None:
        """See :class:`dmoe.segment.Segment`."""
        return None  # others are waited for

    def charge(self, cache: Cache, bill: Bill | None) -> None:
        """Who pays for the experts of a cache's sequence from now on; until then it is one of another node."""
        self._bills[cache] = bill

    def report(self, cache: Cache) -> Report:
        """Who computed the experts of a cache's sequence so far."""
        return self._tallies.get(cache, Tally()).report(self._manifest)


def load_spread(
    manifest: Manifest, shard: Shard, store: ShardFiles, options: RuntimeOptions, experts: MeteredExperts
) -> SpreadLayers:
    """Open a stage's attention; blocking. Errors as :func:`load_stage`."""
    pieces = Pieces(manifest, open_files(manifest, store, [manifest.trunk]), options, *shard.layers)
    return SpreadLayers(manifest, shard, PieceSegment(manifest, pieces, experts), experts)
