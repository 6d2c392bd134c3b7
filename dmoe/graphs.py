"""ONNX graphs, built here from a manifest's architecture; weights are injected when a session is made.

Owns: which operators compute a model. Does not own: sessions (``dmoe/runtime``) or weights (``dmoe/core/linear``).

Invariant: every operator treats each row alone, so a row's result does not depend on the rows computed with it
(attention: on the rows of its own sequence only).
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dmoe.attention import attention, declare_shared
from dmoe.core.linear import Form, Linear
from dmoe.core.manifest import Architecture
from dmoe.core.variant import PLAIN, Variant
from dmoe.operators import CONTRIB, Builder, Graph, i64, linear, normalise
from dmoe.weights import LayerWeights, OwnWeights

Array = NDArray[Any]


class Activation(NamedTuple):
    """What becomes of gate and up; see :data:`dmoe.core.variant.Activation`."""

    kind: str
    alpha: float
    limit: float


SILU = Activation("silu", 1.0, 0.0)


def expert_graph(gate_up: Linear, down: Linear, traits: Variant = PLAIN) -> Graph:
    """``h f32[N, H] -> y f32[N, H]``: one expert, ``down(silu(gate(h)) * up(h))``, unweighted; or with the activation
    and the biases of ``traits``."""
    activation = Activation(traits.activation, traits.activation_alpha, traits.activation_limit)
    model = _expert_model(gate_up.form, gate_up.rows, gate_up.columns, down.form, activation)
    return Graph(model, {**_named(gate_up, "gate_up"), **_named(down, "down")})


@lru_cache(maxsize=64)
def _expert_model(gate_up: Form, rows: int, hidden: int, down: Form, activation: Activation) -> bytes:
    """All experts of one shape and form share a serialised graph."""
    builder = Builder()
    builder.input("h", TensorProto.FLOAT, ["N", hidden])
    _feed_forward(builder, "", "h", _blank(gate_up, rows, hidden), _blank(down, hidden, rows // 2), "y", activation)
    builder.output("y", ["N", hidden])
    return builder.graph().model


def blocks_graph(blocks: Mapping[int, tuple[Linear, Linear]], traits: Variant = PLAIN) -> Graph:
    """``h.B f32[N_B, H] -> y.B f32[N_B, H]`` for every ``B``: several experts (gate|up and down) side by side, each as
    in :func:`expert_graph` on rows of its own, maybe none."""
    activation = Activation(traits.activation, traits.activation_alpha, traits.activation_limit)
    builder = Builder()
    for block, (gate_up, down) in blocks.items():
        h, y, rows = f"h.{block}", f"y.{block}", f"N.{block}"
        builder.input(h, TensorProto.FLOAT, [rows, gate_up.columns])
        _feed_forward(builder, f"{block}.", h, gate_up, down, y, activation)
        builder.output(y, [rows, gate_up.columns])
    return builder.graph()


def attention_graph(arch: Architecture, index: int, layer: LayerWeights) -> Graph:
    """``x, y f32[N, H] -> x2, h f32[N, H]`` (and ``scores f32[N, experts]``) of layer ``index``: ``x + y`` is the
    residual stream, ``y`` the last layer's experts; ``x2`` the stream behind attention, ``h`` what the experts get."""
    builder = Builder()
    for name in ("x", "y"):
        builder.input(name, TensorProto.FLOAT, ["N", arch.hidden])
    declare_shared(builder, arch)
    attention(builder, arch, "", index, layer, ("x", "y"), ("x2" if layer.own is None else "attended.sum", "h"))
    if layer.own is not None:
        builder.op("Add", ["attended.sum", _own(builder, layer.own, "h")], ["x2"])
    builder.output("x2", ["N", arch.hidden])
    if layer.is_sparse:
        builder.output("h", ["N", arch.hidden])
    if layer.router is not None:
        linear(builder, "h", "router", layer.router, "scores")
        builder.output("scores", ["N", arch.router.experts])
    return builder.graph()


def _own(builder: Builder, own: OwnWeights, h: str) -> str:
    """The trunk's own feed-forward part: of a layer without experts, or shared by all rows."""
    y = _feed_forward(builder, "own.", h, own.gate_up, own.down, "own.y")
    if own.gate is None:
        return y
    share = builder.op("Gemm", [h, builder.weight("own.gate.weight", own.gate)], ["own.score"], transB=1)
    return builder.op("Mul", [y, builder.op("Sigmoid", [share], ["own.share"])], ["own.weighted"])


def fused_graph(arch: Architecture, first: int, layers: Sequence[tuple[LayerWeights, Linear, Linear]]) -> Graph:
    """``x f32[N, H] -> out f32[N, H]``: the residual stream before and behind whole layers, from layer ``first`` on.

    ``layers`` holds each layer's trunk weights, gate|up and down of its whole feed-forward part.
    """
    builder = Builder()
    builder.input("x", TensorProto.FLOAT, ["N", arch.hidden])
    declare_shared(builder, arch)
    stream, pending = "x", ""
    for index, (layer, gate_up, down) in enumerate(layers, first):
        prefix = f"{index}."
        names = (f"{prefix}x2", f"{prefix}h")
        attention(builder, arch, prefix, index, layer, (stream, pending), names)
        stream = names[0]
        pending = _feed_forward(builder, prefix, names[1], gate_up, down, f"{prefix}y")
    builder.op("Add", [pending, stream], ["out"])
    builder.output("out", ["N", arch.hidden])
    return builder.graph()


def head_graph(arch: Architecture, norm: Array, head: Linear) -> Graph:
    """``x f32[N, H] -> hidden f32[N, H], logits f32[N, V]``: the residual stream behind the last norm, and the head."""
    builder = Builder()
    builder.input("x", TensorProto.FLOAT, ["N", arch.hidden])
    _, hidden = normalise(builder, arch, ("x", ""), builder.weight("norm", norm), "", "hidden")
    builder.output("hidden", ["N", arch.hidden])
    linear(builder, hidden, "head", head, "logits")
    builder.output("logits", ["N", head.rows])
    return builder.graph()


def _named(linear: Linear, name: str) -> dict[str, Array]:
    return {f"{name}.{suffix}": part for suffix, part in linear.parts.items()}


def _blank(form: Form, rows: int, columns: int) -> Linear:
    """A layer of the right shapes and no memory: graphs need shapes only."""
    shapes = form.shapes(rows, columns).items()
    return Linear({suffix: np.broadcast_to(dtype(0), shape) for suffix, (dtype, shape) in shapes})


def _feed_forward(
    builder: Builder, prefix: str, h: str, gate_up: Linear, down: Linear, out: str, activation: Activation = SILU
) -> str:
    width = gate_up.rows // 2
    both = linear(builder, h, f"{prefix}gate_up", gate_up, f"{prefix}both")
    gate, up = f"{prefix}gate", f"{prefix}up"
    builder.op("Split", [both, builder.constant(i64(width, width))], [gate, up], axis=-1)
    if activation.kind == "clamped":
        gate, up = _clamped(builder, gate, up, activation.limit)
    alpha = activation.alpha if activation.kind == "clamped" else 1.0
    active = builder.op("QuickGelu", [gate], [f"{prefix}silu"], domain=CONTRIB, alpha=alpha)  # x * sigmoid(alpha * x)
    product = builder.op("Mul", [active, up], [f"{prefix}act"])
    return linear(builder, product, f"{prefix}down", down, out)


def _clamped(builder: Builder, gate: str, up: str, limit: float) -> tuple[str, str]:
    """The gate at most ``limit``; up within it, plus one."""
    low, high, one = (builder.constant(np.array(value, np.float32)) for value in (-limit, limit, 1.0))
    gate = builder.op("Clip", [gate, "", high], [f"{gate}.clamped"])
    up = builder.op("Clip", [up, low, high], [f"{up}.clamped"])
    return gate, builder.op("Add", [up, one], [f"{up}.one"])
