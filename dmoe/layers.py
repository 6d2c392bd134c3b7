"""A model by one route: embedding, segments of layers, head, over the rows of several sequences at once.

Owns: passes from tokens to outputs, sequences, experts that stay in this process. Does not own: the layer loop
(``dmoe/segment``), caches (``dmoe/kv``), sessions (``dmoe/runtime``), remote experts (``dmoe/session``).

Exactness, held by tests for fp32, int8 and the source's int4, on 1 and 2 threads:
1. Decoding one by one, in chunks, in one prefill, beside other sequences, in another slot, or after rebuilding the
   cache gives the same bits.
2. Each sum group's partial sum is rounded once to the wire dtype and added in group order, so neither placement nor
   fail-over changes a bit, and route ``local`` equals route ``experts``.
3. The fused model has no wire roundings: its own, faster class. Stages round the stream where they meet: a third.
"""

from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import trio
from numpy.typing import NDArray

from config.errors import LocalError, RemoteError, RequestError
from config.vocabulary import ShardId
from dmoe.bills import Bill
from dmoe.core import linear, wire
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.routing import ALL_EXPERTS as ALL_EXPERTS
from dmoe.core.routing import Routing
from dmoe.graphs import head_graph
from dmoe.kv import Cache
from dmoe.runner import Feed, FloatRows, Report, Want
from dmoe.runner import Sequence as AnySequence
from dmoe.runtime import (
    Binding,
    ExpertShard,
    IntRows,
    RuntimeOptions,
    ShardFiles,
    head_weights,
    merged,
    open_files,
    open_session,
    release,
)
from dmoe.segment import INLINE_FLOPS_MAX, SHORT_ROWS_MAX, FusedSegment, Part, Pieces, PieceSegment
from dmoe.shardfile import ShardFile
from dmoe.stages.segment import Ends as StageEnds
from dmoe.tally import Meter, OwnMeter, Tally
from dmoe.threads import here_or_aside

CHUNK_ROWS = 256
"""Rows of one sequence that go through the model at once: bounds the memory of attention and the length of a step."""
_HEAD_SPIN_US = 50


class Ends:
    """What stands before and behind the layers: embedding, last norm, head."""

    def __init__(self, manifest: Manifest, files: Items[ShardFile], options: RuntimeOptions) -> None:
        arch = manifest.architecture
        tensors = merged(files)
        self.widths: dict[Want, int] = {"logits": arch.vocab, "hidden": arch.hidden}
        self.embedding = linear.find(tensors, "embed", arch.vocab, arch.hidden)
        norm, head = head_weights(arch, tensors)
        self._head = open_session(head_graph(arch, norm, head), threads=options.thread_count, spin_us=_HEAD_SPIN_US)
        self._flops_per_row = 2 * arch.vocab * arch.hidden
        release(files)

    def outputs(self, rows: FloatRows, want: Want) -> FloatRows:
        """``f32[N, V or H]`` of rows of the residual stream."""
        out = np.empty((len(rows), self.widths[want]), np.float32)
        if len(rows):
            Binding(self._head, {"x": rows}, {want: out}).run()
        return out

    def is_quick(self, rows: int) -> bool:
        """Whether so many rows may go through the head on the event loop."""
        return rows * self._flops_per_row <= INLINE_FLOPS_MAX


class AnyEnds(StageEnds, Protocol):
    """:class:`Ends`, here or in a cell."""

    widths: dict[Want, int]


class AnySegment(Protocol):
    """:class:`dmoe.segment.Segment`, here or in a cell."""

    is_here: bool

    async def open(self, capacity: int, like: Cache | None = None, length: int = 0) -> Cache: ...
    async def run(self, x: FloatRows, parts: Items[Part]) -> FloatRows: ...
    def compute(self, x: FloatRows, parts: Items[Part]) -> FloatRows: ...


class _Pass:
    """Rows of several sequences that go through the model together, and where the wanted ones among them are."""

    __slots__ = ("chunks", "feeds", "sequences", "wanted")

    def __init__(self, feeds: Items[Feed], indices: Items[int], start: int) -> None:
        """The rows from ``start`` on of those feeds that have any."""
        self.feeds = [index for index in indices if start < len(feeds[index].tokens)]
        self.sequences = [_own(feeds[index]) for index in self.feeds]
        self.chunks = [feeds[index].tokens[start : start + CHUNK_ROWS] for index in self.feeds]
        self.wanted: list[slice] = []
        first = 0
        for index, chunk in zip(self.feeds, self.chunks, strict=True):
            without = len(feeds[index].tokens) - feeds[index].outputs - start
            self.wanted.append(slice(first + min(len(chunk), max(0, without)), first + len(chunk)))
            first += len(chunk)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        return np.array([token for chunk in self.chunks for token in chunk], np.int64)

    def parts(self, segment: int) -> list[Part]:
        """What goes through a segment."""
        pairs = zip(self.sequences, self.chunks, strict=True)
        return [Part(sequence.caches[segment], len(chunk)) for sequence, chunk in pairs]


class _Wanted:
    """The rows of the stream behind the last layer that outputs are wanted of."""

    def __init__(self, feeds: Items[Feed]) -> None:
        self._feeds = feeds
        self._rows: list[list[FloatRows]] = [[] for _ in feeds]

    def take(self, one: _Pass, stream: FloatRows) -> None:
        """Keep them: the next pass overwrites the stream."""
        for index, rows in zip(one.feeds, one.wanted, strict=True):
            if rows.start < rows.stop:
                self._rows[index].append(stream[rows].copy())

    def through(self, ends: AnyEnds) -> list[FloatRows]:
        """The outputs, per feed."""
        found: dict[int, FloatRows] = {}
        for want, width in ends.widths.items():
            mine = [index for index, feed in enumerate(self._feeds) if feed.want == want]
            rows = [part for index in mine for part in self._rows[index]]
            out = ends.outputs(np.concatenate(rows), want) if rows else np.empty((0, width), np.float32)
            first = 0
            for index in mine:
                found[index] = out[first : first + self._feeds[index].outputs]
                first += self._feeds[index].outputs
        return [found[index] for index in range(len(self._feeds))]

    @property
    def count(self) -> int:
        return sum(feed.outputs for feed in self._feeds)


class ModelSequence:
    """One sequence by one route (:class:`dmoe.runner.Sequence`): a cache per segment."""

    def __init__(self, manifest: Manifest, caches: Items[Cache]) -> None:
        self._manifest = manifest
        self.caches = caches
        self.capacity = caches[0].capacity
        self.tokens: list[int] = []
        """What is in the caches, to fill them again where they were lost."""
        self.tally = Tally()
        self.bill: Bill | None = None

    @property
    def length(self) -> int:
        """Positions in the cache; where a cell ended, what will be in it once it is filled again."""
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        """See :class:`dmoe.runner.Sequence`."""
        assert 0 <= length <= self.length
        del self.tokens[length:]
        for cache in self.caches:
            if not cache.is_lost:
                cache.truncate(min(length, cache.length))

    @property
    def is_lost(self) -> bool:
        """Whether the caches lack what they should hold: a cell ended, maybe while they were filled again."""
        return any(cache.is_lost or cache.length != len(self.tokens) for cache in self.caches)

    def begin_again(self) -> None:
        """Empty, where it can be used again. Blocking."""
        self.tokens.clear()
        for cache in self.caches:
            if cache.is_lost:
                cache.begin_again()
            cache.truncate(0)

    def report(self) -> Report:
        """See :class:`dmoe.runner.Sequence`."""
        return self.tally.report(self._manifest)

    def close(self) -> None:
        """See :class:`dmoe.runner.Sequence`."""
        for cache in self.caches:
            cache.close()


class ModelRunner:
    """A model by one route (:class:`dmoe.runner.Runner`). ``boundary``: what the residual stream is rounded to before
    each segment and behind the last, as between hosts; None: not at all."""

    def __init__(
        self,
        manifest: Manifest,
        ends: AnyEnds,
        segments: Items[AnySegment],
        meter: Meter,
        boundary: wire.Dtype | None = None,
    ) -> None:
        self.manifest = manifest
        self._ends = ends
        self._segments = segments
        self._meter = meter
        self._boundary = boundary
        self._is_here = all(segment.is_here for segment in segments)
        self._lock = trio.Lock()

    async def open(self, capacity: int, *, like: AnySequence | None = None, length: int = 0) -> ModelSequence:
        """See :class:`dmoe.runner.Runner`."""
        assert like is None or isinstance(like, ModelSequence)
        await self._meter.open()
        caches: list[Cache] = []
        async with self._lock:
            if like is not None:
                await self._restore(like)
            try:
                for index, segment in enumerate(self._segments):
                    caches.append(await segment.open(capacity, like.caches[index] if like else None, length))
            except BaseException:
                for cache in caches:
                    cache.close()
                raise
        sequence = ModelSequence(self.manifest, caches)
        sequence.tokens = like.tokens[:length] if like else []
        return sequence

    async def forward(self, feeds: Items[Feed]) -> list[FloatRows]:
        """See :class:`dmoe.runner.Runner`."""
        async with self._lock:
            try:
                return await self._fed(feeds)
            except RemoteError:
                if not any(_own(feed).is_lost for feed in feeds):
                    raise
            return await self._fed(feeds)  # a cell ended in the middle of it: once more, in the next one

    async def _fed(self, feeds: Items[Feed]) -> list[FloatRows]:
        """A pass, all or nothing."""
        for feed in feeds:
            await self._restore(_own(feed))
        before = [(_own(feed), feed.sequence.length) for feed in feeds]
        for feed in feeds:
            self._check(feed)
        try:
            found = await self._forward(feeds)
        except BaseException:
            for sequence, length in before:
                sequence.truncate(length)
            raise
        for feed in feeds:
            _own(feed).tokens += feed.tokens
        return found

    async def _restore(self, sequence: ModelSequence) -> None:
        """Feed again what a sequence held whose cell has ended: its caches get the same bits."""
        if not sequence.is_lost:
            return
        tokens = tuple(sequence.tokens)
        try:
            await trio.to_thread.run_sync(sequence.begin_again)
            if tokens:
                await self._forward([Feed(sequence=sequence, tokens=tokens, outputs=0)])
        finally:
            sequence.tokens = list(tokens)  # also if this failed: the next who comes tries again

    def _check(self, feed: Feed) -> None:
        vocab, sequence = self.manifest.architecture.vocab, feed.sequence
        if not feed.tokens or min(feed.tokens) < 0 or max(feed.tokens) >= vocab:
            raise RequestError("invalid_request", f"token ids must be one or more numbers within 0..{vocab - 1}")
        total = sequence.length + len(feed.tokens)
        if total > sequence.capacity:
            raise RequestError(
                "context_length_exceeded", f"{total} tokens do not fit the sequence's {sequence.capacity} positions"
            )
        assert 0 <= feed.outputs <= len(feed.tokens)

    async def _forward(self, feeds: Items[Feed]) -> list[FloatRows]:
        # short ones first: they share a run of attention
        order = sorted(range(len(feeds)), key=lambda index: len(feeds[index].tokens) > SHORT_ROWS_MAX)
        longest = max(len(feed.tokens) for feed in feeds)
        passes = [_Pass(feeds, order, start) for start in range(0, longest, CHUNK_ROWS)]
        wanted = _Wanted(feeds)
        if self._is_here:
            return await trio.to_thread.run_sync(self._run_here, passes, wanted)
        for one in passes:
            x: FloatRows = await here_or_aside(partial(self._ends.embedding.gather, one.token_ids))
            self._meter.begin([sequence.bill for sequence in one.sequences], [len(chunk) for chunk in one.chunks])
            for index, segment in enumerate(self._segments):
                x = await segment.run(self._rounded(x), one.parts(index))
            self._taken(one, wanted, x)
        if self._ends.is_quick(wanted.count):
            return await here_or_aside(partial(wanted.through, self._ends))
        return await trio.to_thread.run_sync(wanted.through, self._ends)

    def _run_here(self, passes: Items[_Pass], wanted: _Wanted) -> list[FloatRows]:
        """The same in one thread: nothing has to be waited for."""
        for one in passes:
            x: FloatRows = self._ends.embedding.gather(one.token_ids)
            for index, segment in enumerate(self._segments):
                x = segment.compute(self._rounded(x), one.parts(index))
            self._taken(one, wanted, x)
        return wanted.through(self._ends)

    def _rounded(self, x: FloatRows) -> FloatRows:
        return x if self._boundary is None else wire.rounded(x, self._boundary)

    def _taken(self, one: _Pass, wanted: _Wanted, stream: FloatRows) -> None:
        wanted.take(one, self._rounded(stream))
        shares = self._meter.take([len(chunk) for chunk in one.chunks])
        for sequence, share in zip(one.sequences, shares, strict=True):
            sequence.tally.add(share)


def _own(feed: Feed) -> ModelSequence:
    assert isinstance(feed.sequence, ModelSequence), "a sequence belongs to the kind of runner that opened it"
    return feed.sequence


class LocalShard(Protocol):
    """:class:`dmoe.runtime.ExpertShard`, or one in a cell of this node."""

    shard: Shard

    def partial(
        self, layer: int, h: FloatRows, experts: IntRows | None = None, weights: FloatRows | None = None
    ) -> FloatRows: ...


class LocalExperts:
    """All experts of some layers in this process, with the roundings of the wire (route ``local``)."""

    def __init__(
        self, manifest: Manifest, shards: Items[LocalShard], threads: int = 1, layers: Collection[int] | None = None
    ) -> None:
        """``shards`` must hold every sum group of every layer (of ``layers``), or LocalError is raised. ``threads``:
        sum groups of a large batch run so many at a time."""
        arch = manifest.architecture
        by_id = {shard.shard.id: shard for shard in shards}
        self._layers = {
            layer: list(_held(manifest, by_id, layer))
            for layer in arch.sparse_layers
            if layers is None or layer in layers
        }
        one = next(iter(self._layers.values()), [])
        self._flops_per_row = sum(shard.shard.flops_per_row for shard in one)
        self._dtype = manifest.wire_dtype
        self._threads = ThreadPoolExecutor(max(1, threads), "experts")

    async def run(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        """See :class:`dmoe.segment.Experts`."""
        if len(h) * self._flops_per_row <= INLINE_FLOPS_MAX:
            await trio.lowlevel.checkpoint()
            return await here_or_aside(partial(self.compute, layer, h, routing))
        return await trio.to_thread.run_sync(self.compute, layer, h, routing)

    def compute(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        """See :class:`dmoe.segment.HereExperts`."""
        seen = wire.rounded(h, self._dtype)

        def partial(shard: LocalShard) -> FloatRows:
            return shard.partial(layer, seen, routing.experts, routing.weights)

        if len(h) * self._flops_per_row > INLINE_FLOPS_MAX:
            rounded = [wire.rounded(rows, self._dtype) for rows in self._threads.map(partial, self._layers[layer])]
            return wire.total(rounded, h.shape)
        partials = [partial(shard) for shard in self._layers[layer]]
        # rows are rounded one by one, so all groups can be rounded in one call
        rows = wire.rounded(np.concatenate(partials), self._dtype)
        return wire.total(list(rows.reshape(len(partials), *h.shape)), h.shape)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def _held(manifest: Manifest, by_id: Mapping[ShardId, LocalShard], layer: int) -> Iterator[LocalShard]:
    for group in range(len(manifest.sum_groups)):
        shard = manifest.expert_shard(layer, group)
        if shard.id not in by_id:
            raise LocalError("not_found", f"this node lacks shard {shard.id} of {manifest.name}")
        yield by_id[shard.id]


def local_experts(manifest: Manifest, store: ShardFiles, options: RuntimeOptions) -> LocalExperts:
    """All experts, loaded."""
    shards = [ExpertShard(manifest, shard, store, options) for shard in manifest.expert_shards()]
    return LocalExperts(manifest, shards, threads=options.thread_count)


def local_runner(manifest: Manifest, store: ShardFiles, options: RuntimeOptions, peer_id: str = "") -> ModelRunner:
    """Route ``local``, loaded."""
    files = open_files(manifest, store, [manifest.trunk])
    segment = PieceSegment(manifest, Pieces(manifest, files, options), local_experts(manifest, store, options))
    return ModelRunner(manifest, Ends(manifest, files, options), [segment], OwnMeter(manifest, peer_id))


def fused_runner(manifest: Manifest, store: ShardFiles, options: RuntimeOptions, peer_id: str = "") -> ModelRunner:
    """Route ``fused``, loaded. Raises LocalError for a sparse model."""
    files = open_files(manifest, store, manifest.parts)
    segment = FusedSegment(manifest, files, options)
    return ModelRunner(manifest, Ends(manifest, files, options), [segment], OwnMeter(manifest, peer_id))
