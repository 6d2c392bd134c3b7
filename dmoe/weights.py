"""A layer's share of the trunk, found among a shard's tensors: shapes and dtypes checked, by the architecture alone.

Owns: which tensors a layer of an architecture must have (``core/variant`` names them). Does not own: where they come
from (``dmoe/importer/tensors``) or what is computed with them (``dmoe/attention``, ``dmoe/latent``, ``dmoe/graphs``).

Fails with IntegrityError naming the tensor at fault.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from config.errors import IntegrityError
from dmoe.core.architecture import Architecture
from dmoe.core.linear import Linear, find, vector
from dmoe.core.variant import Latent

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class GroupedWeights:
    """Grouped-query attention. The norms are None where queries and keys are not normalised."""

    qkv: Linear
    query_norm: Array | None
    key_norm: Array | None
    sinks: Array | None


@dataclass(frozen=True, slots=True, eq=False)
class LatentWeights:
    """Latent attention. ``query_down`` and its norm are None where queries come from the hidden state at once.
    ``key_up [heads * rank, plain]`` and ``value_up [heads * value, rank]`` hold a matrix per head."""

    query_down: Linear | None
    query_norm: Array | None
    query: Linear
    latent_down: Linear
    latent_norm: Array
    key_up: Linear
    value_up: Linear


@dataclass(frozen=True, slots=True, eq=False)
class OwnWeights:
    """A feed-forward part that every row goes through in the trunk. ``gate f32[1, H]``: how much of it counts."""

    gate_up: Linear
    down: Linear
    gate: Array | None


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer's share of the trunk. ``router`` is None where there is no choice; ``choice_bias``: what a sigmoid
    router adds to its scores for the choice; ``is_sparse``: the layer has experts."""

    norm_attention: Array
    norm_experts: Array
    attention: GroupedWeights | LatentWeights
    output: Linear
    own: OwnWeights | None
    router: Linear | None
    choice_bias: Array | None
    is_sparse: bool

    @property
    def size_bytes(self) -> int:
        """Of the largest projection of attention: decides whether a pool of threads pays."""
        attention = self.attention
        return (attention.qkv if isinstance(attention, GroupedWeights) else attention.query).size_bytes


def layer_weights(arch: Architecture, tensors: Mapping[str, Array], layer: int) -> LayerWeights:
    """The trunk's share of a layer."""
    name, traits = f"layer.{layer}", arch.traits
    latent, is_sparse = traits.latent, layer not in traits.dense_layers
    routed = is_sparse and arch.router.kind != "all"
    # a sigmoid router's bias is added to its scores, behind the graph
    behind = arch.router.kind == "sigmoid_topk"
    router = choice_bias = None
    if routed:
        router = find(
            tensors, f"{name}.router", arch.router.experts, arch.hidden, bias=traits.router_bias and not behind
        )
        if router.bits:
            raise IntegrityError("integrity", f"tensor {name}.router is quantised; routers are floats")
    if routed and behind and traits.router_bias:
        choice_bias = vector(tensors, f"{name}.router.bias", arch.router.experts)
    return LayerWeights(
        norm_attention=vector(tensors, f"{name}.norm_attention", arch.hidden),
        norm_experts=vector(tensors, f"{name}.norm_experts", arch.hidden),
        attention=_latent(arch, latent, tensors, name) if latent else _grouped(arch, tensors, name),
        output=find(tensors, f"{name}.output", arch.hidden, arch.output_width, bias=traits.output_bias),
        own=_own(arch, tensors, layer),
        router=router,
        choice_bias=choice_bias,
        is_sparse=is_sparse,
    )


def _grouped(arch: Architecture, tensors: Mapping[str, Array], name: str) -> GroupedWeights:
    traits = arch.traits
    heads, kv_heads = (arch.heads, arch.kv_heads) if traits.qk_norm == "whole" else (1, 1)
    normed = traits.qk_norm != "none"
    return GroupedWeights(
        qkv=find(tensors, f"{name}.qkv", arch.qkv_width, arch.hidden, bias=traits.qkv_bias),
        query_norm=vector(tensors, f"{name}.query_norm", heads * arch.head_dim) if normed else None,
        key_norm=vector(tensors, f"{name}.key_norm", kv_heads * arch.head_dim) if normed else None,
        sinks=vector(tensors, f"{name}.sinks", arch.heads) if traits.sinks else None,
    )


def _latent(arch: Architecture, latent: Latent, tensors: Mapping[str, Array], name: str) -> LatentWeights:
    low, queries = latent.query_rank, arch.heads * arch.head_dim
    return LatentWeights(
        query_down=find(tensors, f"{name}.query_down", low, arch.hidden) if low else None,
        query_norm=vector(tensors, f"{name}.query_norm", low) if low else None,
        query=find(tensors, f"{name}.query", queries, low or arch.hidden),
        latent_down=find(tensors, f"{name}.latent_down", latent.width, arch.hidden),
        latent_norm=vector(tensors, f"{name}.latent_norm", latent.rank),
        key_up=find(tensors, f"{name}.key_up", arch.heads * latent.rank, latent.plain),
        value_up=find(tensors, f"{name}.value_up", arch.heads * latent.value, latent.rank),
    )


def _own(arch: Architecture, tensors: Mapping[str, Array], layer: int) -> OwnWeights | None:
    traits, name = arch.traits, f"layer.{layer}"
    is_dense = layer in traits.dense_layers
    width = traits.dense_intermediate if is_dense else traits.shared_intermediate
    if not width:
        return None
    kind = f"{name}.ffn" if is_dense else f"{name}.shared"
    gate = None
    if traits.shared_gate and not is_dense:
        gate = find(tensors, f"{name}.shared.gate", 1, arch.hidden).dequantised()
    return OwnWeights(
        gate_up=find(tensors, f"{kind}.gate_up", 2 * width, arch.hidden),
        down=find(tensors, f"{kind}.down", arch.hidden, width),
        gate=gate,
    )
