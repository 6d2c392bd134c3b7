"""ONNX graphs, built here from a manifest's architecture; weights are injected when a session is made.

Owns: which operators compute a model. Does not own: sessions (``dmoe/runtime``) or weights (``dmoe/core/linear``).
Nobody's graph but our own is ever run: a shard carries numbers only.

Shapes: rows ``S`` of one sequence, ``f32[S, H]``; the key/value cache ``f32[1, kv_heads, capacity + 1, head_dim]`` is
updated in place (past and present are the same memory).

Invariants:
1. Attention never runs with one query row: ONNX Runtime takes another path then, whose sums differ in the last bit,
   and quantised activations amplify that. A dummy row is appended to the packed q, k, v and dropped behind the
   operator; its key and value land in the slot that the next token overwrites.
2. Every operator treats each row alone, so a row's result does not depend on the rows computed with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dmoe.core.linear import Linear
from dmoe.core.manifest import BLOCK, Architecture

Array = NDArray[Any]

_CONTRIB = "com.microsoft"
_OPSET, _IR_VERSION = 21, 10
_INLINE_BYTES_MAX = 64
_END = np.array([np.iinfo(np.int64).max], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A serialised model without its weights, and the weights by initialiser name."""

    model: bytes
    weights: Mapping[str, Array]


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer's share of the trunk. ``router`` is None where every expert is always chosen."""

    norm_attention: Array
    norm_experts: Array
    qkv: Linear
    output: Linear
    router: Array | None


@dataclass(slots=True)
class _Builder:
    nodes: list[Any] = field(default_factory=list)
    initialisers: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    block_sums: dict[str, str] = field(default_factory=dict)

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def weight(self, name: str, value: Array) -> str:
        """An initialiser whose bytes are injected at load."""
        if name not in self.weights:
            self.weights[name] = value
            tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
            tensor.external_data.add(key="location", value="injected")
            self.initialisers.append(tensor)
        return name

    def constant(self, value: Array) -> str:
        """A small constant inside the graph; equal ones are shared."""
        assert value.nbytes <= _INLINE_BYTES_MAX
        name = f"c.{value.dtype}." + "x".join(map(str, value.shape)) + "." + "_".join(map(str, value.ravel()))
        if name not in self.constants:
            self.constants.add(name)
            self.initialisers.append(numpy_helper.from_array(value, name))
        return name

    def op(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **at: Any) -> str:  # noqa: ANN401
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **at))
        return outputs[0]

    def graph(self) -> Graph:
        graph = helper.make_graph(self.nodes, "rios", self.inputs, self.outputs, self.initialisers)
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="rios")
        return Graph(model.SerializeToString(), self.weights)


def expert_graph(gate_up: Linear, down: Linear) -> Graph:
    """``h f32[N, H] -> y f32[N, H]``: one expert, ``down(silu(gate(h)) * up(h))``, unweighted."""
    model = _expert_model(gate_up.form, gate_up.rows, gate_up.columns, down.form)
    return Graph(model, {**_named(gate_up, "gate_up"), **_named(down, "down")})


@lru_cache(maxsize=64)
def _expert_model(gate_up: tuple[str, ...], rows: int, hidden: int, down: tuple[str, ...]) -> bytes:
    """All experts of one shape and form share a serialised graph."""
    builder = _Builder()
    builder.input("h", TensorProto.FLOAT, ["N", hidden])
    _feed_forward(builder, "", "h", _blank(gate_up, rows, hidden), _blank(down, hidden, rows // 2), "y")
    builder.output("y", ["N", hidden])
    return builder.graph().model


def attention_graph(arch: Architecture, layer: LayerWeights) -> Graph:
    """``x, y f32[S, H] -> x2, h f32[S, H]`` (and ``scores f32[S, experts]``): ``x + y`` is the residual stream, ``y``
    the last layer's experts; ``x2`` the stream behind attention and ``h`` what this layer's experts get."""
    builder = _Builder()
    for name in ("x", "y"):
        builder.input(name, TensorProto.FLOAT, ["S", arch.hidden])
    _declare_shared(builder, arch)
    _attention(builder, arch, "", layer, ("x", "y"), ("x2", "h"))
    for name in ("x2", "h"):
        builder.output(name, ["S", arch.hidden])
    if layer.router is not None:
        experts = arch.router.experts
        builder.op("Gemm", ["h", builder.weight("router", layer.router)], ["scores"], transB=1)
        builder.output("scores", ["S", experts])
    return builder.graph()


def head_graph(arch: Architecture, norm: Array, head: Linear) -> Graph:
    """``x, y f32[N, H] -> logits f32[N, V]`` of ``x + y``."""
    builder = _Builder()
    for name in ("x", "y"):
        builder.input(name, TensorProto.FLOAT, ["N", arch.hidden])
    _head(builder, arch, norm, head, ("x", "y"))
    return builder.graph()


def fused_graph(
    arch: Architecture,
    layers: Sequence[tuple[LayerWeights, Linear, Linear]],
    norm: Array,
    head: Linear,
) -> Graph:
    """The whole model: ``x f32[S, H]`` (embeddings), ``first i64[1] -> logits f32[.., V]`` of the rows from ``first``.

    ``layers`` holds each layer's trunk weights, gate|up and down of its whole feed-forward part.
    """
    builder = _Builder()
    builder.input("x", TensorProto.FLOAT, ["S", arch.hidden])
    builder.input("first", TensorProto.INT64, [1])
    _declare_shared(builder, arch)
    stream, pending = "x", ""
    for index, (layer, gate_up, down) in enumerate(layers):
        prefix = f"{index}."
        names = (f"{prefix}x2", f"{prefix}h")
        _attention(builder, arch, prefix, layer, (stream, pending), names)
        stream = names[0]
        pending = _feed_forward(builder, prefix, names[1], gate_up, down, f"{prefix}y")
    rows = [
        builder.op("Slice", [name, "first", builder.constant(_END), builder.constant(_i64(0))], [f"last.{name}"])
        for name in (stream, pending)
    ]
    _head(builder, arch, norm, head, (rows[0], rows[1]))
    return builder.graph()


def rope_tables(arch: Architecture, positions: int) -> tuple[Array, Array]:
    """cos and sin, ``f32[positions, head_dim / 2]`` (RoFormer, arXiv:2104.09864)."""
    half = np.arange(0, arch.head_dim, 2, dtype=np.float64) / arch.head_dim
    angles = np.outer(np.arange(positions, dtype=np.float64), arch.rope_theta**-half)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _i64(*values: int) -> Array:
    return np.array(values, np.int64)


def _named(linear: Linear, name: str) -> dict[str, Array]:
    return {f"{name}.{suffix}": part for suffix, part in linear.parts.items()}


def _blank(form: tuple[str, ...], rows: int, columns: int) -> Linear:
    """A layer of the right shapes and no memory: graphs need shapes only."""
    blocks = columns // BLOCK
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "w": (np.float32, (rows, columns)),
        "q4": (np.uint8, (rows, blocks, BLOCK // 2)),
        "q8": (np.uint8, (rows, blocks, BLOCK)),
        "s": (np.float32, (rows, blocks)),
        "c": (np.float32, (blocks, rows)),
    }
    return Linear({suffix: np.broadcast_to(dtype(0), shape) for suffix in form for dtype, shape in [shapes[suffix]]})


def _declare_shared(builder: _Builder, arch: Architecture) -> None:
    """Inputs that all layers share. Rope tables are inputs because a session would copy them as initialisers."""
    for name in ("rope_cos", "rope_sin"):
        builder.input(name, TensorProto.FLOAT, ["R", arch.head_dim // 2])
    builder.input("seqlens_k", TensorProto.INT32, [1])
    builder.input("total_length", TensorProto.INT32, [])


def _linear(builder: _Builder, x: str, name: str, layer: Linear, out: str) -> str:
    """``out f32[S, N] = x @ W^T``."""
    parts = {suffix: builder.weight(f"{name}.{suffix}", part) for suffix, part in layer.parts.items()}
    if "w" in parts:
        return builder.op("Gemm", [x, parts["w"]], [out], transB=1)
    bits = 8 if "q8" in parts else 4
    product = f"{out}.product" if "c" in parts else out
    builder.op(
        "MatMulNBits",
        [x, parts[f"q{bits}"], parts["s"]],
        [product],
        domain=_CONTRIB,
        K=layer.columns,
        N=layer.rows,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=4,
    )
    if "c" in parts:
        builder.op("Gemm", [_block_sums(builder, x, layer.columns), parts["c"], product], [out])
    return out


def _block_sums(builder: _Builder, x: str, columns: int) -> str:
    """``f32[S, K] -> f32[S, K/32]``; layers that read the same input share it."""
    if x not in builder.block_sums:
        shape = builder.constant(_i64(0, columns // BLOCK, BLOCK))
        blocks = builder.op("Reshape", [x, shape], [f"{x}.blocks"])
        builder.block_sums[x] = builder.op("ReduceSum", [blocks, builder.constant(_i64(-1))], [f"{x}.sums"], keepdims=0)
    return builder.block_sums[x]


def _normalise(
    builder: _Builder, arch: Architecture, stream: tuple[str, str], weight: str, total: str, out: str
) -> tuple[str, str]:
    """RMS norm of ``stream[0] + stream[1]``; returns the sum's and the norm's names."""
    x, y = stream
    if not y:
        return x, builder.op(
            "SimplifiedLayerNormalization", [x, weight], [out], axis=-1, epsilon=arch.norm_eps, stash_type=1
        )
    outputs = [out, "", "", total] if total else [out]
    builder.op("SkipSimplifiedLayerNormalization", [y, x, weight], outputs, domain=_CONTRIB, epsilon=arch.norm_eps)
    return total, out


def _attention(
    builder: _Builder,
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
    x, h = _normalise(builder, arch, stream, norm, f"{p}x1", f"{p}ha")
    qkv = _linear(builder, h, f"{p}qkv", layer.qkv, f"{p}qkv.rows")
    dummy = builder.weight("dummy_row", np.zeros((1, arch.qkv_width), np.float32))
    padded = builder.op("Concat", [qkv, dummy], [f"{p}qkv.padded"], axis=0)
    batch = builder.op("Reshape", [padded, builder.constant(_i64(1, -1, arch.qkv_width))], [f"{p}qkv.batch"])
    builder.op(
        "GroupQueryAttention",
        [batch, "", "", f"{p}past_k", f"{p}past_v", "seqlens_k", "total_length", "rope_cos", "rope_sin"],
        [f"{p}heads", f"{p}present_k", f"{p}present_v"],
        domain=_CONTRIB,
        num_heads=arch.heads,
        kv_num_heads=arch.kv_heads,
        do_rotary=1,
        rotary_interleaved=int(arch.rope_interleaved),
        scale=float(arch.head_dim**-0.5),
    )
    width = arch.heads * arch.head_dim
    flat = builder.op("Reshape", [f"{p}heads", builder.constant(_i64(-1, width))], [f"{p}heads.flat"])
    bounds = [builder.constant(_i64(value)) for value in (0, -1, 0)]
    rows = builder.op("Slice", [flat, *bounds], [f"{p}heads.rows"])
    attended = _linear(builder, rows, f"{p}output", layer.output, f"{p}attended")
    norm = builder.weight(f"{p}norm_experts", layer.norm_experts)
    _normalise(builder, arch, (x, attended), norm, out[0], out[1])


def _feed_forward(builder: _Builder, prefix: str, h: str, gate_up: Linear, down: Linear, out: str) -> str:
    width = gate_up.rows // 2
    both = _linear(builder, h, f"{prefix}gate_up", gate_up, f"{prefix}both")
    gate, up = f"{prefix}gate", f"{prefix}up"
    builder.op("Split", [both, builder.constant(_i64(width, width))], [gate, up], axis=-1)
    active = builder.op("QuickGelu", [gate], [f"{prefix}silu"], domain=_CONTRIB, alpha=1.0)  # x * sigmoid(x)
    product = builder.op("Mul", [active, up], [f"{prefix}act"])
    return _linear(builder, product, f"{prefix}down", down, out)


def _head(builder: _Builder, arch: Architecture, norm: Array, head: Linear, stream: tuple[str, str]) -> None:
    weight = builder.weight("norm", norm)
    _, h = _normalise(builder, arch, stream, weight, "", "hf")
    _linear(builder, h, "head", head, "logits")
    builder.output("logits", ["N", head.rows])
