"""Building ONNX graphs: a serialised model, its weights beside it, and the blocks that every graph is made of.

Owns: names, initialisers, and the operators of a linear layer and of a norm. Does not own: whole graphs
(``dmoe/graphs``), attention (``dmoe/attention``), sessions (``dmoe/runtime``).
Nobody's graph but our own is ever run: a shard carries numbers only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dmoe.core.linear import Linear
from dmoe.core.manifest import Architecture

Array = NDArray[Any]

CONTRIB = "com.microsoft"
_OPSET, _IR_VERSION = 21, 10
_INLINE_BYTES_MAX = 64


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A serialised model without its weights, and the weights by initialiser name."""

    model: bytes
    weights: Mapping[str, Array]


@dataclass(slots=True)
class Builder:
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
            tensor.data_type = onnx_type(value)
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
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="rios")
        return Graph(model.SerializeToString(), self.weights)


def onnx_type(weight: Array) -> int:
    """ONNX's type of a weight; ``u16`` holds the bits of bfloat16."""
    return TensorProto.BFLOAT16 if weight.dtype == np.uint16 else helper.np_dtype_to_tensor_dtype(weight.dtype)


def i64(*values: int) -> Array:
    return np.array(values, np.int64)


def linear(builder: Builder, x: str, name: str, layer: Linear, out: str) -> str:
    """``out f32[S, N] = x @ W^T + bias``."""
    parts = {suffix: builder.weight(f"{name}.{suffix}", part) for suffix, part in layer.parts.items()}
    bias = parts.pop("bias", "")
    bits, block = layer.bits, layer.block
    if not bits:
        inputs = [x, _as_f32(builder, *parts.values()), bias]
        return builder.op("Gemm", inputs if bias else inputs[:2], [out], transB=1)
    product = f"{out}.product" if "c" in parts else out
    inputs = [x, parts[f"q{bits}"], parts["s"], "", "", bias]
    builder.op(
        "MatMulNBits",
        inputs if bias else inputs[:3],
        [product],
        domain=CONTRIB,
        K=layer.columns,
        N=layer.rows,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    if "c" in parts:
        builder.op("Gemm", [_block_sums(builder, x, layer.columns, block), parts["c"], product], [out])
    return out


def _as_f32(builder: Builder, weight: str) -> str:
    """Weights stored in 16 bits are cast once, when the session is made (constant folding)."""
    if builder.weights[weight].dtype == np.float32:
        return weight
    return builder.op("Cast", [weight], [f"{weight}.f32"], to=TensorProto.FLOAT)


def _block_sums(builder: Builder, x: str, columns: int, block: int) -> str:
    """``f32[S, K] -> f32[S, K / block]``; layers that read the same input share it."""
    key = f"{x}.{block}"
    if key not in builder.block_sums:
        shape = builder.constant(i64(0, columns // block, block))
        blocks = builder.op("Reshape", [x, shape], [f"{key}.blocks"])
        sums = builder.op("ReduceSum", [blocks, builder.constant(i64(-1))], [f"{key}.sums"], keepdims=0)
        builder.block_sums[key] = sums
    return builder.block_sums[key]


def normalise(
    builder: Builder, arch: Architecture, stream: tuple[str, str], weight: str, total: str, out: str
) -> tuple[str, str]:
    """RMS norm of ``stream[0] + stream[1]``; returns the sum's and the norm's names."""
    x, y = stream
    if not y:
        return x, builder.op(
            "SimplifiedLayerNormalization", [x, weight], [out], axis=-1, epsilon=arch.norm_eps, stash_type=1
        )
    outputs = [out, "", "", total] if total else [out]
    builder.op("SkipSimplifiedLayerNormalization", [y, x, weight], outputs, domain=CONTRIB, epsilon=arch.norm_eps)
    return total, out
