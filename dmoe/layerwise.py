"""A model run a layer at a time: so a machine can check a model that it cannot hold.

Owns: the order in which pieces are opened, run once and freed. Does not own: what they compute (``dmoe/segment``,
``dmoe/graphs``).

Invariants:
1. The logits are, bit for bit, those of the route ``local`` over the whole model: the same pieces in the same order,
   with the same roundings. An expert that no row chose adds nothing and is not opened.
2. At most one piece is in memory: a layer's attention, one expert, or a block of the head's rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from dmoe.core import linear, wire
from dmoe.core.linear import Linear
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.routing import Routing
from dmoe.graphs import head_graph
from dmoe.runner import FloatRows
from dmoe.runtime import (
    Binding,
    RuntimeOptions,
    ShardFiles,
    head_weights,
    merged,
    open_expert,
    open_session,
    partial_sum,
    release,
)
from dmoe.segment import Part, Pieces, PieceSegment
from dmoe.shardfile import ShardFile

Array = NDArray[Any]

HEAD_WEIGHTS_MAX = 1 << 22
"""Of a block of the head's rows: 16 MiB as fp32, and as much again while they are packed."""
_HEAD_ROWS_MULTIPLE = 64


async def last_logits(
    manifest: Manifest,
    store: ShardFiles,
    options: RuntimeOptions,
    prompt: Sequence[int],
    ran: Callable[[int], None] = lambda count: None,
) -> FloatRows:
    """``f32[V]`` after the last token of ``prompt``. ``ran`` is called after every piece with its bytes.

    Computes on the caller's thread, with a checkpoint before each layer. Raises what opening shards raises.
    """
    run = _Run(manifest, store, options, prompt, ran)
    for layer in range(manifest.architecture.layers):
        await trio.lowlevel.checkpoint()
        run.layer(layer)
    return run.logits()


def last_logits_here(
    manifest: Manifest,
    store: ShardFiles,
    options: RuntimeOptions,
    prompt: Sequence[int],
    ran: Callable[[int], None] = lambda count: None,
) -> FloatRows:
    """The same without an event loop."""
    run = _Run(manifest, store, options, prompt, ran)
    for layer in range(manifest.architecture.layers):
        run.layer(layer)
    return run.logits()


class _Run:
    def __init__(
        self,
        manifest: Manifest,
        store: ShardFiles,
        options: RuntimeOptions,
        prompt: Sequence[int],
        ran: Callable[[int], None],
    ) -> None:
        arch = manifest.architecture
        self._manifest, self._options, self._ran = manifest, options, ran
        self._trunk = store.open_shard(manifest, manifest.trunk)
        self._tensors = merged(self._trunk)
        self._experts = _PassingExperts(manifest, store, ran)
        embedding = linear.find(self._tensors, "embed", arch.vocab, arch.hidden)
        self._x = embedding.gather(np.asarray(prompt, np.int64))

    def layer(self, layer: int) -> None:
        """The stream through a layer."""
        x = self._x
        pieces = Pieces(self._manifest, self._trunk, self._options, layer, layer)
        segment = PieceSegment(self._manifest, pieces, self._experts)
        cache = segment.pool.open(len(x), None, 0)
        self._x = segment.compute(x, [Part(cache, len(x))]).copy()
        self._ran(_size(self._tensors, f"layer.{layer}."))

    def logits(self) -> FloatRows:
        """Of the stream's last row."""
        return _head(self._manifest, self._tensors, self._trunk, self._options, self._x[-1:], self._ran)


class _PassingExperts:
    """:class:`dmoe.segment.HereExperts` that are opened when a row wants them, and freed at once."""

    def __init__(self, manifest: Manifest, store: ShardFiles, ran: Callable[[int], None]) -> None:
        self.manifest, self.store, self.ran = manifest, store, ran
        self.open: dict[str, tuple[int, Sequence[ShardFile]]] = {}

    async def run(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        """See :class:`dmoe.segment.Experts`."""
        return self.compute(layer, h, routing)

    def compute(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        """See :class:`dmoe.segment.HereExperts`."""
        dtype = self.manifest.wire_dtype
        seen = wire.rounded(h, dtype)
        shards = [self.manifest.expert_shard(layer, group) for group in range(len(self.manifest.sum_groups))]
        return wire.total(
            [wire.rounded(self._partial(shard, layer, seen, routing), dtype) for shard in shards], h.shape
        )

    def _partial(self, shard: Shard, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        files = self._files(shard, layer)
        tensors = merged(files)

        def run(expert: int, rows: FloatRows) -> FloatRows:
            out = open_expert(self.manifest, tensors, layer, expert).run(rows)
            release(files)
            self.ran(_size(tensors, f"layer.{layer}.expert.{expert}."))
            return out

        return partial_sum(shard.experts, h, routing.experts, routing.weights, run)

    def _files(self, shard: Shard, layer: int) -> Sequence[ShardFile]:
        """A shard's files; those of layers that are done are closed."""
        self.open = {key: kept for key, kept in self.open.items() if kept[0] >= layer}
        if shard.id not in self.open:
            self.open[shard.id] = shard.layers[1], self.store.open_shard(self.manifest, shard)
        return self.open[shard.id][1]


def _head(
    manifest: Manifest,
    tensors: Mapping[str, Array],
    files: Sequence[ShardFile],
    options: RuntimeOptions,
    x: FloatRows,
    ran: Callable[[int], None],
) -> FloatRows:
    """Logits of the stream's last row, block by block: a column of them depends on its own row of the head alone."""
    arch = manifest.architecture
    norm, head = head_weights(arch, tensors)
    step = max(1, HEAD_WEIGHTS_MAX // arch.hidden // _HEAD_ROWS_MULTIPLE) * _HEAD_ROWS_MULTIPLE
    logits = np.empty((len(x), arch.vocab), np.float32)
    for start in range(0, arch.vocab, step):
        block = head.take_rows(slice(start, start + step))
        block = Linear({suffix: np.ascontiguousarray(part) for suffix, part in block.parts.items()})
        out = np.empty((len(x), block.rows), np.float32)
        Binding(
            open_session(head_graph(arch, norm, block), threads=options.thread_count), {"x": x}, {"logits": out}
        ).run()
        logits[:, start : start + step] = out
        release(files)
        ran(block.size_bytes)
    last: FloatRows = logits[-1]
    return last


def _size(tensors: Mapping[str, Array], prefix: str) -> int:
    return sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(prefix))
