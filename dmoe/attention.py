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
2. A slot with ``query_seqlens`` 0 is neither read nor written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dmoe.core.linear import Linear
from dmoe.core.manifest import Architecture
from dmoe.kv import CachePart
from dmoe.operators import CONTRIB, Builder, i64, linear, normalise

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer's share of the trunk. ``router`` is None where every expert is always chosen."""

    norm_attention: Array
    norm_experts: Array
    qkv: Linear
    output: Linear
    router: Array | None


def rope_tables(arch: Architecture, positions: int) -> tuple[Array, Array]:
    """cos and sin, ``f32[positions, head_dim / 2]`` (RoFormer, arXiv:2104.09864)."""
    half = np.arange(0, arch.head_dim, 2, dtype=np.float64) / arch.head_dim
    angles = np.outer(np.arange(positions, dtype=np.float64), arch.rope_theta**-half)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def cache_parts(arch: Architecture, layer: int) -> tuple[CachePart, ...]:
    """What a layer's cache keeps of each position."""
    return CachePart("k", arch.kv_heads, arch.head_dim), CachePart("v", arch.kv_heads, arch.head_dim)


def declare_shared(builder: Builder, arch: Architecture) -> None:
    """Inputs that all layers share. Rope tables are inputs because a session would copy them as initialisers."""
    for name in ("rope_cos", "rope_sin"):
        builder.input(name, TensorProto.FLOAT, ["R", arch.head_dim // 2])
    for name, shape in (("seqlens_k", ["B"]), ("query_seqlens", ["B"]), ("total_length", [])):
        builder.input(name, TensorProto.INT32, shape)
    builder.input("spread", TensorProto.INT32, ["B", "S"])
    builder.input("collect", TensorProto.INT32, ["N"])


class Places:
    """Where the rows of a group stand in attention's batch: the memory of the inputs that all layers share."""

    def __init__(self, slots: int, rows_max: int, rows: int) -> None:
        """For ``slots`` neighbouring slots, at most ``rows_max`` rows of each, ``rows`` in all."""
        self.spread = np.zeros((slots, rows_max + 1), np.int32)
        self.collect = np.zeros(rows, np.int32)
        self.seqlens_k = np.zeros(slots, np.int32)
        self.query_seqlens = np.zeros(slots, np.int32)
        self.total_length = np.zeros((), np.int32)
        self._rows: Sequence[tuple[int, int]] = ()

    def fill(self, rows: Sequence[tuple[int, int]], lengths: Sequence[int]) -> None:
        """``rows``: (slot within the group, how many rows) per sequence, in the order of the rows; ``lengths``: how
        many positions each has had so far."""
        if rows != self._rows:
            self._rows = rows
            self._place(rows)
        longest = 0
        for (slot, count), length in zip(rows, lengths, strict=True):
            self.seqlens_k[slot] = total = length + count  # the last key's index: the dummy row's
            longest = max(longest, total)
        self.total_length[...] = longest + 1

    def _place(self, rows: Sequence[tuple[int, int]]) -> None:
        self.query_seqlens[:] = self.seqlens_k[:] = 0
        first, width = 0, self.spread.shape[1]
        for slot, count in rows:
            self.query_seqlens[slot] = count + 1
            self.spread[slot, :count] = np.arange(first, first + count)
            self.spread[slot, count:] = first  # the dummy, and padding
            self.collect[first : first + count] = np.arange(slot * width, slot * width + count)
            first += count

    def inputs(self) -> dict[str, Array]:
        """By the names of :func:`declare_shared`."""
        names = ("spread", "collect", "seqlens_k", "query_seqlens", "total_length")
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
        builder.output(f"{p}present_{part.name}", shape)
    norm = builder.weight(f"{p}norm_attention", layer.norm_attention)
    x, h = normalise(builder, arch, stream, norm, f"{p}x1", f"{p}ha")
    qkv = linear(builder, h, f"{p}qkv", layer.qkv, f"{p}qkv.rows")
    batch = builder.op("Gather", [qkv, "spread"], [f"{p}qkv.batch"], axis=0)
    unused = [""] * 7  # positions, bias, sinks, scales, norms of query and key
    shared = ["seqlens_k", "total_length", "rope_cos", "rope_sin", *unused, "query_seqlens"]
    builder.op(
        "GroupQueryAttention",
        [batch, "", "", f"{p}past_k", f"{p}past_v", *shared],
        [f"{p}heads", f"{p}present_k", f"{p}present_v"],
        domain=CONTRIB,
        num_heads=arch.heads,
        kv_num_heads=arch.kv_heads,
        do_rotary=1,
        rotary_interleaved=int(arch.rope_interleaved),
        scale=float(arch.head_dim**-0.5),
    )
    width = arch.heads * arch.head_dim
    flat = builder.op("Reshape", [f"{p}heads", builder.constant(i64(-1, width))], [f"{p}heads.flat"])
    rows = builder.op("Gather", [flat, "collect"], [f"{p}heads.rows"], axis=0)
    attended = linear(builder, rows, f"{p}output", layer.output, f"{p}attended")
    norm = builder.weight(f"{p}norm_experts", layer.norm_experts)
    normalise(builder, arch, (x, attended), norm, out[0], out[1])
