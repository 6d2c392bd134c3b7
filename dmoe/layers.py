"""The layer loop: tokens through trunk and experts to logits.

Owns: sequences (their key/value cache), chunked prefill, the order in which attention and experts take turns, and the
expert routes that stay in this process. Does not own: sessions (``dmoe/runtime``), remote experts (``dmoe/caller``).

Exactness, held by tests for fp32, int8 and the source's int4, on 1 and 2 threads:
1. Decoding one by one, in chunks, in one prefill, or after rebuilding the cache gives the same bits.
2. Each sum group's partial sum is rounded once to the wire dtype and added in group order, so neither placement nor
   fail-over changes a bit, and route ``local`` equals route ``experts``.
3. The fused model has no wire roundings: its own, faster class.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import trio
from numpy.typing import NDArray

from config.errors import LocalError, RequestError
from dmoe.attention import rope_tables
from dmoe.core import wire
from dmoe.core.manifest import Architecture, Manifest
from dmoe.core.routing import ALL_EXPERTS as ALL_EXPERTS
from dmoe.core.routing import Routing, route
from dmoe.runner import FloatRows, Want
from dmoe.runtime import Binding, ExpertShard, FusedSession, RuntimeOptions, Session, ShardFiles, TrunkSessions

Array = NDArray[Any]

CHUNK_ROWS = 256
"""Rows of a prompt that go through the model at once: bounds the memory of attention and the length of a step."""
INLINE_FLOPS_MAX = 60_000_000
"""A piece of so little work (a few ms) runs on the event loop; more goes to a thread, so that the loop never waits."""


class Experts(Protocol):
    """Where a layer's experts are, behind one call."""

    async def run(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        """The layer's experts on ``h f32[N, H]``: group partials, each rounded to the wire dtype, added in group
        order. ``h`` is overwritten after the call returned."""


class Sequence:
    """One sequence's key/value cache: ``capacity`` positions, updated in place. Used by one ``forward`` at a time."""

    def __init__(self, arch: Architecture, capacity: int) -> None:
        if not 1 <= capacity <= arch.context:
            raise RequestError(
                "context_length_exceeded", f"{capacity} tokens do not fit the model's context of {arch.context}"
            )
        self.capacity = capacity
        self.length = 0
        # one slot more: attention's dummy row is written behind the last token
        shape = (1, arch.kv_heads, capacity + 1, arch.head_dim)
        self.cache = [(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in range(arch.layers)]
        self.seqlens_k = np.zeros(1, np.int32)
        self.total_length = np.zeros((), np.int32)
        cos, sin = rope_tables(arch, capacity + 1)
        self._shared = {
            "seqlens_k": self.seqlens_k,
            "total_length": self.total_length,
            "rope_cos": cos,
            "rope_sin": sin,
        }
        self.steps: dict[int, Any] = {}
        """Bound memory by row count: of single rows, and of the last other count."""

    def copy_from(self, other: "Sequence", length: int) -> None:
        """Take over the first ``length`` positions of another sequence of the same model."""
        assert self.length == 0 <= length <= min(other.length, self.capacity)
        for mine, theirs in zip(self.cache, other.cache, strict=True):
            for own, others in zip(mine, theirs, strict=True):
                own[:, :, :length] = others[:, :, :length]
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        assert 0 <= length <= self.length
        self.length = length

    def begin(self, rows: int) -> None:
        """Announce ``rows`` further positions to the sessions. Raises RequestError if they do not fit."""
        total = self.length + rows
        if total > self.capacity:
            raise RequestError(
                "context_length_exceeded", f"{total} tokens do not fit the sequence's {self.capacity} positions"
            )
        self.seqlens_k[0] = total  # the last key's index: the dummy row's
        self.total_length[...] = total + 1

    def remember(self, rows: int, step: Any) -> None:  # noqa: ANN401 - a step of the trunk or of the fused model
        """Keep a step's bound memory for the next call with as many rows."""
        self.steps = {count: kept for count, kept in self.steps.items() if count == 1}
        self.steps[rows] = step

    def bindings(self, layer: int, prefix: str) -> tuple[dict[str, Array], dict[str, Array]]:
        """A layer's cache, the lengths and the rope tables, as a session's inputs and outputs."""
        keys, values = self.cache[layer]
        inputs = {f"{prefix}past_k": keys, f"{prefix}past_v": values, **self._shared}
        return inputs, {f"{prefix}present_k": keys, f"{prefix}present_v": values}


class _Step:
    """Memory of one pass of ``rows`` rows through the trunk, bound to a sequence's sessions once."""

    def __init__(self, trunk: "Trunk", sequence: Sequence, rows: int) -> None:
        arch = trunk.architecture
        shape = (rows, arch.hidden)
        # the residual stream goes back and forth between two buffers
        self.streams = (np.zeros(shape, np.float32), np.zeros(shape, np.float32))
        self.y = np.zeros(shape, np.float32)
        self.h = np.zeros(shape, np.float32)
        self.scores = np.zeros((rows, arch.router.experts), np.float32)
        self.attention = [
            self._bind(session, sequence, layer, arch) for layer, session in enumerate(trunk.sessions.attention)
        ]
        self.last_stream = self.streams[arch.layers % 2]

    def _bind(self, session: Session, sequence: Sequence, layer: int, arch: Architecture) -> Binding:
        inputs, outputs = sequence.bindings(layer, "")
        inputs |= {"x": self.streams[layer % 2], "y": self.y}
        outputs |= {"x2": self.streams[(layer + 1) % 2], "h": self.h}
        if arch.router.kind != "all":
            outputs["scores"] = self.scores
        return Binding(session, inputs, outputs)


class Trunk:
    """Attention, norms, router, embedding and head: what the node that answers runs itself."""

    def __init__(self, manifest: Manifest, store: ShardFiles, options: RuntimeOptions) -> None:
        self.manifest = manifest
        self.architecture = arch = manifest.architecture
        self.sessions = TrunkSessions(manifest, store, options)
        self.flops_per_row = 2 * arch.hidden * (arch.qkv_width + arch.heads * arch.head_dim)
        self._row = (np.zeros((1, arch.hidden), np.float32), np.zeros((1, arch.hidden), np.float32))
        self._row_logits = np.zeros((1, arch.vocab), np.float32)
        inputs = {"x": self._row[0], "y": self._row[1]}
        self._row_head = Binding(self.sessions.head, inputs, {"logits": self._row_logits})

    def new_sequence(self, capacity: int) -> Sequence:
        """An empty sequence for ``capacity`` tokens. Raises RequestError if the model's context is shorter."""
        return Sequence(self.architecture, capacity)

    def step(self, sequence: Sequence, rows: int) -> _Step:
        """Bound memory for ``rows`` rows."""
        step = sequence.steps.get(rows)
        if step is None:
            step = _Step(self, sequence, rows)
            sequence.remember(rows, step)
        bound: _Step = step
        return bound

    def last_logits(self, x: FloatRows, y: FloatRows) -> FloatRows:
        """``f32[V]`` of the last row of ``x + y``."""
        self._row[0][:], self._row[1][:] = x[-1], y[-1]
        self._row_head.run()
        logits: FloatRows = self._row_logits[0].copy()
        return logits

    def all_outputs(self, x: FloatRows, y: FloatRows, want: Want) -> FloatRows:
        """``f32[N, V or H]`` of every row."""
        out = np.empty((len(x), _width(self.architecture, want)), np.float32)
        Binding(self.sessions.head, {"x": x, "y": y}, {want: out}).run()
        return out


async def forward(
    trunk: Trunk,
    sequence: Sequence,
    token_ids: Items[int],
    experts: Experts,
    *,
    all_positions: bool = False,
    want: Want = "logits",
) -> FloatRows:
    """Append tokens to a sequence. Returns the last position's logits ``f32[V]``, or ``f32[N, V or H]`` of all.

    If it fails or is cancelled, the sequence is as long as after the last whole chunk. Raises RequestError if the
    tokens do not fit, and whatever ``experts`` raises.
    """
    logits = []
    for chunk, is_last in _chunks(token_ids, trunk.architecture):
        step = await _forward_chunk(trunk, sequence, chunk, experts)
        if all_positions:
            logits.append(await trio.to_thread.run_sync(trunk.all_outputs, step.last_stream, step.y, want))
        elif is_last:
            logits.append(trunk.last_logits(step.last_stream, step.y))
    return np.concatenate(logits) if all_positions else logits[0]


async def _forward_chunk(trunk: Trunk, sequence: Sequence, ids: NDArray[np.int64], experts: Experts) -> _Step:
    rows = len(ids)
    sequence.begin(rows)
    step = trunk.step(sequence, rows)
    router = trunk.architecture.router
    inline = rows * trunk.flops_per_row <= INLINE_FLOPS_MAX
    step.streams[0][:] = trunk.sessions.embedding.gather(ids)
    step.y[:] = 0
    for layer, attention in enumerate(step.attention):
        if inline:
            attention.run()
        else:
            await trio.to_thread.run_sync(attention.run)
        routing = ALL_EXPERTS if router.kind == "all" else route(router, step.scores)
        step.y[:] = await experts.run(layer, step.h, routing)
    sequence.length += rows
    return step


def _chunks(token_ids: Items[int], arch: Architecture) -> Iterator[tuple[NDArray[np.int64], bool]]:
    ids = np.asarray(token_ids, np.int64)
    if not ids.size or ids.min() < 0 or ids.max() >= arch.vocab:
        raise RequestError("invalid_request", f"token ids must be one or more numbers within 0..{arch.vocab - 1}")
    for start in range(0, len(ids), CHUNK_ROWS):
        yield ids[start : start + CHUNK_ROWS], start + CHUNK_ROWS >= len(ids)


def _width(arch: Architecture, want: Want) -> int:
    return arch.vocab if want == "logits" else arch.hidden


class LocalExperts:
    """All experts in this process, with the roundings of the wire (route ``local``)."""

    def __init__(self, manifest: Manifest, shards: Items[ExpertShard], threads: int = 1) -> None:
        """``shards`` must hold every sum group of every layer, or LocalError is raised. ``threads``: sum groups of a
        large batch run so many at a time."""
        arch = manifest.architecture
        by_id = {shard.shard.id: shard for shard in shards}
        for shard in manifest.expert_shards():
            if shard.id not in by_id:
                raise LocalError("not_found", f"this node lacks shard {shard.id} of {manifest.name}")
        groups = range(len(manifest.sum_groups))
        self._layers = {
            layer: [by_id[manifest.expert_shard(layer, group).id] for group in groups] for layer in arch.sparse_layers
        }
        self._flops_per_row = sum(shard.shard.flops_per_row for shard in self._layers[arch.sparse_layers[0]])
        self._dtype = manifest.wire_dtype
        self._threads = ThreadPoolExecutor(max(1, threads), "experts")

    async def run(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        """See :class:`Experts`."""
        if len(h) * self._flops_per_row <= INLINE_FLOPS_MAX:
            await trio.lowlevel.checkpoint()
            seen = wire.rounded(h, self._dtype)
            partials = [shard.partial(layer, seen, routing.experts, routing.weights) for shard in self._layers[layer]]
            # rows are rounded one by one, so all groups can be rounded in one call
            rows = wire.rounded(np.concatenate(partials), self._dtype)
            return wire.total(list(rows.reshape(len(partials), *h.shape)), h.shape)
        return await trio.to_thread.run_sync(self._run_parallel, layer, h, routing)

    def _run_parallel(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        seen = wire.rounded(h, self._dtype)

        def run(shard: ExpertShard) -> FloatRows:
            return wire.rounded(shard.partial(layer, seen, routing.experts, routing.weights), self._dtype)

        return wire.total(list(self._threads.map(run, self._layers[layer])), h.shape)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


class _FusedStep:
    """Bound memory of one pass of ``rows`` rows through the fused graph."""

    def __init__(self, model: "FusedModel", sequence: Sequence, rows: int, first: int, want: Want) -> None:
        arch = model.architecture
        self.x = np.zeros((rows, arch.hidden), np.float32)
        self.out = np.zeros((rows - first, _width(arch, want)), np.float32)
        inputs: dict[str, Array] = {"x": self.x, "first": np.array([first], np.int64)}
        outputs: dict[str, Array] = {want: self.out}
        for layer in range(arch.layers):
            cache_in, cache_out = sequence.bindings(layer, f"{layer}.")
            inputs |= cache_in
            outputs |= cache_out
        self.binding = Binding(model.session, inputs, outputs)


class FusedModel:
    """The whole dense model as one graph in this process (route ``fused``)."""

    def __init__(self, manifest: Manifest, store: ShardFiles, options: RuntimeOptions) -> None:
        self.manifest = manifest
        self.architecture = manifest.architecture
        fused = FusedSession(manifest, store, options)
        self.session, self._embedding = fused.session, fused.embedding

    def new_sequence(self, capacity: int) -> Sequence:
        """As :meth:`Trunk.new_sequence`."""
        return Sequence(self.architecture, capacity)

    async def forward(
        self, sequence: Sequence, token_ids: Items[int], *, all_positions: bool = False, want: Want = "logits"
    ) -> FloatRows:
        """As :func:`forward`, in a thread."""
        logits = []
        for chunk, is_last in _chunks(token_ids, self.architecture):
            run = partial(self._forward_chunk, sequence, chunk, all_positions, want)
            found = await trio.to_thread.run_sync(run)
            if is_last or all_positions:
                logits.append(found)
        return np.concatenate(logits) if all_positions else logits[0][-1]

    def _forward_chunk(self, sequence: Sequence, ids: NDArray[np.int64], all_positions: bool, want: Want) -> FloatRows:
        rows = len(ids)
        sequence.begin(rows)
        step = None if all_positions else sequence.steps.get(rows)
        if step is None:
            step = _FusedStep(self, sequence, rows, 0 if all_positions else rows - 1, want)
            if not all_positions:
                sequence.remember(rows, step)
        step.x[:] = self._embedding.gather(ids)
        step.binding.run()
        sequence.length += rows
        out: FloatRows = step.out.copy()
        return out
