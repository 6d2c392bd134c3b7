"""A model run a layer at a time: so a machine can check a model that it cannot hold.

Owns: the order in which pieces are opened, run once and freed. Does not own: what they compute (``dmoe/graphs``).

Invariants:
1. The logits are, bit for bit, those of the route ``local`` over the whole model: the same pieces in the same order,
   with the same roundings. An expert that no row chose adds nothing and is not opened.
2. At most one piece is in memory: a layer's attention, one expert, or a block of the head's rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from dmoe.attention import Places, cache_parts, rope_tables
from dmoe.core import linear, wire
from dmoe.core.linear import Linear
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.routing import ALL_EXPERTS, Routing, route
from dmoe.graphs import attention_graph, expert_graph, head_graph
from dmoe.operators import Graph
from dmoe.runtime import (
    Binding,
    RuntimeOptions,
    ShardFiles,
    attention_threads,
    expert_weights,
    head_weights,
    layer_weights,
    merged,
    open_session,
    release,
    weighted_sum,
)
from dmoe.shardfile import ShardFile

Array = NDArray[Any]
FloatRows = NDArray[np.float32]

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
    return await _Pass(manifest, store, options, ran).run(np.asarray(prompt, np.int64))


class _Pass:
    def __init__(
        self, manifest: Manifest, store: ShardFiles, options: RuntimeOptions, ran: Callable[[int], None]
    ) -> None:
        self.manifest, self.store, self.options, self.ran = manifest, store, options, ran
        self.arch = manifest.architecture
        self.trunk = store.open_shard(manifest, manifest.trunk)
        self.tensors = merged(self.trunk)
        self.threads = attention_threads(
            (layer_weights(self.arch, self.tensors, layer) for layer in range(self.arch.layers)), options
        )
        self.open: dict[str, tuple[int, Sequence[ShardFile]]] = {}

    async def run(self, ids: NDArray[np.int64]) -> FloatRows:
        rows = len(ids)
        x = linear.find(self.tensors, "embed", self.arch.vocab, self.arch.hidden).gather(ids)
        y = np.zeros_like(x)
        rope = rope_tables(self.arch, rows + 1)
        for layer in range(self.arch.layers):
            await trio.lowlevel.checkpoint()
            x, h, routing = self._attention(layer, x, y, rope)
            y = self._experts(layer, h, routing)
        return self._head(x[-1:] + y[-1:])

    def _attention(
        self, layer: int, x: FloatRows, y: FloatRows, rope: tuple[Array, Array]
    ) -> tuple[FloatRows, FloatRows, Routing]:
        """The stream behind attention, what the experts get, and who gets it."""
        arch, rows = self.arch, len(x)
        weights = layer_weights(arch, self.tensors, layer)
        places = Places(1, rows, rows)
        places.fill([(0, rows)], [0])
        out, h = np.empty_like(x), np.empty_like(x)
        scores = np.empty((rows, arch.router.experts), np.float32)
        inputs = {"x": x, "y": y, "rope_cos": rope[0], "rope_sin": rope[1], **places.inputs()}
        outputs = {"x2": out, "h": h}
        for part in cache_parts(arch, layer):
            cache = np.zeros((1, part.heads, rows + 1, part.width), np.float32)
            inputs[f"past_{part.name}"] = outputs[f"present_{part.name}"] = cache
        routed = arch.router.kind != "all"
        outputs |= {"scores": scores} if routed else {}
        _run(attention_graph(arch, layer, weights), self.threads, inputs, outputs)
        self._freed(self.trunk, weights.qkv.size_bytes + weights.output.size_bytes)
        return out, h, route(arch.router, scores) if routed else ALL_EXPERTS

    def _experts(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        seen = wire.rounded(h, self.manifest.wire_dtype)
        partials = []
        for group in range(len(self.manifest.sum_groups)):
            partial = self._partial(self.manifest.expert_shard(layer, group), layer, seen, routing)
            partials.append(wire.rounded(partial, self.manifest.wire_dtype))
        return wire.total(partials, h.shape)

    def _partial(self, shard: Shard, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        files = self._files(shard, layer)
        tensors = merged(files)

        def run(expert: int, rows: FloatRows) -> FloatRows:
            gate_up, down = expert_weights(self.arch, tensors, layer, expert)
            out = np.empty((len(rows), self.arch.hidden), np.float32)
            _run(expert_graph(gate_up, down), 1, {"h": np.ascontiguousarray(rows)}, {"y": out})
            self._freed(files, gate_up.size_bytes + down.size_bytes)
            return out

        if routing.experts is not None and routing.weights is not None:
            return weighted_sum(shard.experts, h, routing.experts, routing.weights, run)
        total = run(shard.experts[0], h)
        for expert in shard.experts[1:]:
            total += run(expert, h)
        return total

    def _head(self, x: FloatRows) -> FloatRows:
        norm, head = head_weights(self.arch, self.tensors)
        step = max(1, HEAD_WEIGHTS_MAX // self.arch.hidden // _HEAD_ROWS_MULTIPLE) * _HEAD_ROWS_MULTIPLE
        logits = np.empty((len(x), self.arch.vocab), np.float32)
        for start in range(0, self.arch.vocab, step):
            block = head.take_rows(slice(start, start + step))
            block = Linear({suffix: np.ascontiguousarray(part) for suffix, part in block.parts.items()})
            out = np.empty((len(x), block.rows), np.float32)
            _run(head_graph(self.arch, norm, block), self.options.thread_count, {"x": x}, {"logits": out})
            logits[:, start : start + step] = out
            self._freed(self.trunk, block.size_bytes)
        last: FloatRows = logits[-1]
        return last

    def _files(self, shard: Shard, layer: int) -> Sequence[ShardFile]:
        """A shard's files; those of layers that are done are closed."""
        self.open = {key: kept for key, kept in self.open.items() if kept[0] >= layer}
        if shard.id not in self.open:
            self.open[shard.id] = shard.layers[1], self.store.open_shard(self.manifest, shard)
        return self.open[shard.id][1]

    def _freed(self, files: Sequence[ShardFile], count: int) -> None:
        release(files)
        self.ran(count)


def _run(graph: Graph, threads: int, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
    """Open a piece, run it once and free it."""
    Binding(open_session(graph, threads=threads), inputs, outputs).run()
