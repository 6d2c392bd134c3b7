"""Attention as a graph: from the residual stream through norm, attention and its cache to the stream behind it.

Owns: a layer's trunk weights, the cache's shape, where rows stand in the operator's batch, the rope tables. Does not
own: the memory of a cache (``dmoe/kv``) or the rest of a layer (``dmoe/graphs``).

Shapes: rows ``N`` of several sequences, ``f32[N, H]``, one behind the other. Around the attention operator alone they
are a batch of ``B`` slots with ``S`` rows each: ``spread i32[B, S]`` says which row stands where, ``collect i32[N]``
takes them back. The cache (:func:`cache_parts`) is updated in place: past and present are the same memory.

Invariants:
1. Attention never runs with one query row. ONNX Runtime takes another path then, whose sums differ in the last bit,
   and quantised activations amplify that. Behind the rows of each sequence stands a dummy row (one of them, again); its
   result is dropped, its key and value land in the slot that the next token overwrites.
2. Where heads are wider than 128, it never runs with fewer than 65 keys: a product with fewer columns is summed in
   longer slices. Short sequences get more dummy rows.
3. A slot with ``query_seqlens`` 0 is neither read nor written.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dmoe.core.manifest import Architecture
from dmoe.kv import CachePart
from dmoe.latent import latent_rows, latent_values
from dmoe.operators import CONTRIB, Builder, i64, linear, normalise
from dmoe.weights import GroupedWeights, LatentWeights
from dmoe.weights import LayerWeights as LayerWeights

Array = NDArray[Any]


def cache_parts(arch: Architecture, layer: int) -> tuple[CachePart, ...]:
    """What a layer's cache keeps of each position."""
    latent = arch.traits.latent
    if latent is not None:
        return (CachePart("latent", 1, latent.width, is_both=True),)
    return CachePart("k", arch.kv_heads, arch.head_dim), CachePart("v", arch.kv_heads, arch.head_dim)


def declare_shared(builder: Builder, arch: Architecture) -> None:
    """Inputs that all layers share. Rope tables are inputs because a session would copy them as initialisers."""
    for name in ("rope_cos", "rope_sin"):
        builder.input(name, TensorProto.FLOAT, ["R", arch.rope_width // 2])
    for name, shape in (("seqlens_k", ["B"]), ("query_seqlens", ["B"]), ("total_length", [])):
        builder.input(name, TensorProto.INT32, shape)
    builder.input("spread", TensorProto.INT32, ["B", "S"])
    builder.input("collect", TensorProto.INT32, ["N"])
    builder.input("positions", TensorProto.INT64, [1, "N"])  # only latent attention reads it


class Places:
    """Where the rows of a group stand in attention's batch: the memory of the inputs that all layers share."""

    def __init__(self, slots: int, rows_max: int, rows: int, keys_min: int = 1) -> None:
        """For ``slots`` neighbouring slots, at most ``rows_max`` rows of each, ``rows`` in all; every sequence gets as
        many dummy rows as it takes to have ``keys_min`` keys, and one at least."""
        self.spread = np.zeros((slots, max(rows_max + 1, keys_min)), np.int32)
        self.collect = np.zeros(rows, np.int32)
        self.positions = np.zeros((1, rows), np.int64)
        self.seqlens_k = np.zeros(slots, np.int32)
        self.query_seqlens = np.zeros(slots, np.int32)
        self.total_length = np.zeros((), np.int32)
        self._keys_min = keys_min
        self._rows: Sequence[tuple[int, int]] = ()

    def fill(self, rows: Sequence[tuple[int, int]], lengths: Sequence[int]) -> None:
        """``rows``: (slot within the group, how many rows) per sequence, in the order of the rows; ``lengths``: how
        many positions each has had so far."""
        if rows != self._rows:
            self._rows = rows
            self._place(rows)
        longest, first = self.spread.shape[1], 0  # the operator demands no less
        for (slot, count), length in zip(rows, lengths, strict=True):
            total = max(length + count + 1, self._keys_min)
            self.positions[0, first : first + count] = np.arange(length, length + count)
            self.query_seqlens[slot] = total - length
            self.seqlens_k[slot] = total - 1  # the last key's index: a dummy row's
            longest = max(longest, total)
            first += count
        self.total_length[...] = longest

    def _place(self, rows: Sequence[tuple[int, int]]) -> None:
        self.query_seqlens[:] = self.seqlens_k[:] = 0
        first, width = 0, self.spread.shape[1]
        for slot, count in rows:
            self.spread[slot, :count] = np.arange(first, first + count)
            self.spread[slot, count:] = first  # dummies, and padding
            self.collect[first : first + count] = np.arange(slot * width, slot * width + count)
            first += count

    def inputs(self) -> dict[str, Array]:
        """By the names of :func:`declare_shared`."""
        names = ("spread", "collect", "seqlens_k", "query_seqlens", "total_length", "positions")
        return {name: getattr(self, name) for name in names}


def attention(
    builder: Builder,
    arch: Architecture,
    prefix: str,
    index: int,
    layer: LayerWeights,
    stream: tuple[str, str],
    out: tuple[str, str],
) -> None:
    """From the residual stream to the stream behind attention and its norm (``out``), in layer ``index``."""
    p = prefix
    for part in cache_parts(arch, index):
        shape: list[int | str] = ["B", part.heads, "C", part.width]
        builder.input(f"{p}past_{part.name}", TensorProto.FLOAT, shape)
        for name in part.outputs:
            builder.output(f"{p}{name}", shape)
    norm = builder.weight(f"{p}norm_attention", layer.norm_attention)
    x, h = normalise(builder, arch, stream, norm, f"{p}x1", f"{p}ha")
    if isinstance(layer.attention, LatentWeights):
        queries, latents = latent_rows(builder, arch, p, layer.attention, h)
        found = _operator(builder, arch, p, index, (queries, latents), "")
        rows = latent_values(builder, arch, p, layer.attention, found)
    else:
        qkv = _grouped(builder, arch, p, layer.attention, h)
        sinks = layer.attention.sinks
        rows = _operator(
            builder, arch, p, index, (qkv, ""), "" if sinks is None else builder.weight(f"{p}sinks", sinks)
        )
    attended = linear(builder, rows, f"{p}output", layer.output, f"{p}attended")
    norm = builder.weight(f"{p}norm_experts", layer.norm_experts)
    normalise(builder, arch, (x, attended), norm, out[0], out[1])


def _operator(builder: Builder, arch: Architecture, p: str, index: int, rows: tuple[str, str], sinks: str) -> str:
    """Attention of ``rows`` (packed queries, keys and values; or queries, and what is key and value at once) over the
    cache: ``f32[N, heads * width]``."""
    latent = arch.traits.latent
    batch = [name and builder.op("Gather", [name, "spread"], [f"{name}.batch"], axis=0) for name in rows]
    past, rope = (["k", "v"], ["rope_cos", "rope_sin"]) if latent is None else (["latent", "latent"], ["", ""])
    shared = ["seqlens_k", "total_length", *rope]
    behind = ["", "", sinks, "", "", "", "", "query_seqlens"]  # positions, bias; scales and norms of query and key
    optional = {"local_window_size": arch.traits.window(index)} if arch.traits.window(index) else {}
    parts = cache_parts(arch, index)
    heads = builder.op(
        "GroupQueryAttention",
        [batch[0], batch[1], batch[1], *(f"{p}past_{name}" for name in past), *shared, *behind],
        [f"{p}heads", *(f"{p}{name}" for part in parts for name in part.outputs)],
        domain=CONTRIB,
        num_heads=arch.heads,
        kv_num_heads=parts[0].heads,
        do_rotary=int(latent is None),
        rotary_interleaved=int(arch.rope_interleaved and latent is None),
        scale=float(arch.traits.attention_scale or arch.head_dim**-0.5),
        **optional,
    )
    width = arch.heads * parts[0].width
    flat = builder.op("Reshape", [heads, builder.constant(i64(-1, width))], [f"{p}heads.flat"])
    return builder.op("Gather", [flat, "collect"], [f"{p}heads.rows"], axis=0)


def _grouped(builder: Builder, arch: Architecture, p: str, layer: GroupedWeights, h: str) -> str:
    """Packed queries, keys and values; normalised and clamped where the model does it (the operator's own norms fail on
    a CPU)."""
    qkv = linear(builder, h, f"{p}qkv", layer.qkv, f"{p}qkv.rows")
    if layer.query_norm is not None and layer.key_norm is not None:
        names = [f"{p}{part}.rows" for part in ("queries", "keys", "values")]
        width, kv_width = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        builder.op("Split", [qkv, builder.constant(i64(width, kv_width, kv_width))], names, axis=-1)
        for place, (name, weight) in enumerate((("query_norm", layer.query_norm), ("key_norm", layer.key_norm))):
            names[place] = _normalised(builder, arch, names[place], builder.weight(f"{p}{name}", weight), len(weight))
        qkv = builder.op("Concat", names, [f"{p}qkv.normed"], axis=-1)
    clip = arch.traits.qkv_clip
    if clip:
        bounds = [builder.constant(np.array(bound, np.float32)) for bound in (-clip, clip)]
        qkv = builder.op("Clip", [qkv, *bounds], [f"{p}qkv.clamped"])
    return qkv


def _normalised(builder: Builder, arch: Architecture, rows: str, weight: str, width: int) -> str:
    """RMS norm of every ``width`` numbers of a row."""
    parts = builder.op("Reshape", [rows, builder.constant(i64(0, -1, width))], [f"{rows}.parts"])
    _, normed = normalise(builder, arch, (parts, ""), weight, "", f"{rows}.normed")
    return builder.op("Reshape", [normed, builder.constant(i64(0, -1))], [f"{rows}.flat"])
