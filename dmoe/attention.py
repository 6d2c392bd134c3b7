"""Attention as a graph: from the residual stream through norm, attention and its cache to the stream behind it.

Owns: a layer's trunk weights, the cache's shape and the rope tables. Does not own: the memory of a cache
(``dmoe/layers``) or the rest of a layer (``dmoe/graphs``).

Shapes: rows ``S`` of one sequence, ``f32[S, H]``; the key/value cache ``f32[1, kv_heads, capacity + 1, head_dim]`` is
updated in place (past and present are the same memory).

Invariant: attention never runs with one query row. ONNX Runtime takes another path then, whose sums differ in the last
bit, and quantised activations amplify that. A dummy row is appended to the packed q, k, v and dropped behind the
operator; its key and value land in the slot that the next token overwrites.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dmoe.core.linear import Linear
from dmoe.core.manifest import Architecture
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


def declare_shared(builder: Builder, arch: Architecture) -> None:
    """Inputs that all layers share. Rope tables are inputs because a session would copy them as initialisers."""
    for name in ("rope_cos", "rope_sin"):
        builder.input(name, TensorProto.FLOAT, ["R", arch.head_dim // 2])
    builder.input("seqlens_k", TensorProto.INT32, [1])
    builder.input("total_length", TensorProto.INT32, [])


def attention(
    builder: Builder,
    arch: Architecture,
    prefix: str,
    layer: LayerWeights,
    stream: tuple[str, str],
    out: tuple[str, str],
) -> None:
    """From the residual stream to the stream behind attention and its norm (``out``)."""
    p = prefix
    cache_shape: list[int | str] = [1, arch.kv_heads, "C", arch.head_dim]
    for part in "kv":
        builder.input(f"{p}past_{part}", TensorProto.FLOAT, cache_shape)
        builder.output(f"{p}present_{part}", cache_shape)
    norm = builder.weight(f"{p}norm_attention", layer.norm_attention)
    x, h = normalise(builder, arch, stream, norm, f"{p}x1", f"{p}ha")
    qkv = linear(builder, h, f"{p}qkv", layer.qkv, f"{p}qkv.rows")
    dummy = builder.weight("dummy_row", np.zeros((1, arch.qkv_width), np.float32))
    padded = builder.op("Concat", [qkv, dummy], [f"{p}qkv.padded"], axis=0)
    batch = builder.op("Reshape", [padded, builder.constant(i64(1, -1, arch.qkv_width))], [f"{p}qkv.batch"])
    builder.op(
        "GroupQueryAttention",
        [batch, "", "", f"{p}past_k", f"{p}past_v", "seqlens_k", "total_length", "rope_cos", "rope_sin"],
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
    bounds = [builder.constant(i64(value)) for value in (0, -1, 0)]
    rows = builder.op("Slice", [flat, *bounds], [f"{p}heads.rows"])
    attended = linear(builder, rows, f"{p}output", layer.output, f"{p}attended")
    norm = builder.weight(f"{p}norm_experts", layer.norm_experts)
    normalise(builder, arch, (x, attended), norm, out[0], out[1])
