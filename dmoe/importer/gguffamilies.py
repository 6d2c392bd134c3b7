"""Model families in GGUF layout as data: which metadata and tensors they have, and how they become ours.

A family that is not in the table is refused by name, and so is a variant of a known family that computes something
this package does not: a wrong answer is worse than none. Keys and tensors are named as llama.cpp names them
(``gguf.constants``); where its files say less than the original configuration, the original's values stand here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import UNSET
from msgspec.structs import replace as changed
from numpy.typing import NDArray

from config.errors import IntegrityError
from dmoe.core.manifest import Architecture, Router
from dmoe.core.variant import PLAIN, Latent, RopeScaling, Variant
from dmoe.importer.architectures import CONTEXT_MAX, Family, neuron_blocks, router_of
from dmoe.importer.ggufconfig import Keys, rope_of

_SOFTMAX, _SIGMOID = 1, 2  # gguf.ExpertGatingFuncType
_HALVES = Family(rope_interleaved=False)
"""Rope pairs a head's halves; the files keep the original order of rows."""


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """A family's tensors; how its metadata become a variant (without rope) and a router (of experts and choices per
    row). ``rounded``: see :class:`RopeScaling`."""

    tensors: Family
    traits: Callable[[Keys], Variant]
    router: Callable[[Keys, int, int], Router]
    rounded: bool = True


def _softmax(normalise: bool) -> Callable[[Keys, int, int], Router]:
    def router(keys: Keys, experts: int, used: int) -> Router:
        keys.must_be("expert_gating_func", _SOFTMAX)
        keys.must_be("expert_weights_scale", 0, 1)
        named = keys.flag("expert_weights_norm", normalise)
        return Router(kind="softmax_topk", experts=experts, top_k=used, normalise=named)

    return router


def _oss_router(keys: Keys, experts: int, used: int) -> Router:
    return Router(kind="topk_softmax", experts=experts, top_k=used)


def _deepseek_router(keys: Keys, experts: int, used: int) -> Router:
    """A file that names no gating function is one of V2, whose router is a softmax."""
    keys.must_be("expert_gating_func", 0, _SOFTMAX, _SIGMOID)
    sigmoid = keys.get("expert_gating_func") == _SIGMOID
    router = Router(
        kind="sigmoid_topk" if sigmoid else "softmax_topk",
        experts=experts,
        top_k=used,
        normalise=keys.flag("expert_weights_norm", False),
        scale=float(keys.number("expert_weights_scale", 1)) or 1.0,
    )
    groups = keys.integer("expert_group_count", 1)
    if groups <= 1:
        return router
    return changed(router, groups=groups, groups_used=keys.integer("expert_group_used_count"))


def _qwen2(keys: Keys) -> Variant:
    width = keys.integer("expert_shared_feed_forward_length", keys.integer("feed_forward_length"))
    return Variant(qkv_bias=True, shared_intermediate=width, shared_gate=True)


def _olmoe(keys: Keys) -> Variant:
    return Variant(qk_norm="whole", qkv_clip=float(keys.number("attention.clamp_kqv", 0)))


def _oss(keys: Keys) -> Variant:
    """Every second layer, the first one first, sees a window."""
    window, layers = keys.integer("attention.sliding_window"), keys.integer("block_count")
    keys.must_be("attention.sliding_window_pattern", 2)
    return Variant(
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        windows=tuple(0 if layer % 2 else window for layer in range(layers)),
        activation="clamped",
        expert_bias=True,
        router_bias=True,
    )


def _deepseek(keys: Keys) -> Variant:
    rope = keys.integer("rope.dimension_count")
    # files made since the latent form of attention came to llama.cpp say a head's widths under keys of their own
    head = keys.integer("attention.key_length_mla", keys.integer("attention.key_length"))
    value = keys.integer("attention.value_length_mla", keys.integer("attention.value_length"))
    dense = tuple(range(keys.integer("leading_dense_block_count", 0)))
    latent = Latent(
        rank=keys.integer("attention.kv_lora_rank"),
        rope=rope,
        plain=head - rope,
        value=value,
        query_rank=keys.integer("attention.q_lora_rank", 0),
    )
    width = keys.integer("expert_feed_forward_length") * keys.integer("expert_shared_count", 0)
    return Variant(
        latent=latent,
        dense_layers=dense,
        dense_intermediate=keys.integer("feed_forward_length") if dense else 0,
        shared_intermediate=width,
        router_bias=keys.get("expert_gating_func") == _SIGMOID,
        attention_scale=_grown(keys, head),
    )


def _grown(keys: Keys, head: int) -> float:
    """The scale of DeepSeek's attention logits: yarn enlarges it, and leaves cos and sin as they are."""
    if keys.get("rope.scaling.type") != "yarn":
        return 0.0
    weight = keys.number("rope.scaling.yarn_log_multiplier", 0)
    grown = 1 + weight * math.log(max(keys.number("rope.scaling.factor"), 1))
    return float(head**-0.5 * grown * grown)


GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    # the rows of Q and K are permuted in files of this family, so that rope pairs neighbours
    "llama": GgufFamily(Family(rope_interleaved=True), lambda keys: PLAIN, _softmax(normalise=True)),
    "qwen2moe": GgufFamily(_HALVES, _qwen2, _softmax(normalise=False)),
    "qwen3moe": GgufFamily(_HALVES, lambda keys: Variant(qk_norm="head"), _softmax(normalise=True)),
    "olmoe": GgufFamily(_HALVES, _olmoe, _softmax(normalise=False)),
    "gpt-oss": GgufFamily(
        Family(
            rope_interleaved=False,
            norm_experts="blk.{l}.post_attention_norm.weight",
            router_bias="blk.{l}.ffn_gate_inp.bias",
        ),
        _oss,
        _oss_router,
        rounded=False,
    ),
    "deepseek2": GgufFamily(Family(rope_interleaved=True), _deepseek, _deepseek_router),
}


def gguf_family_of(metadata: Mapping[str, Any]) -> tuple[str, GgufFamily]:
    """The family a GGUF names. Raises IntegrityError for one that is not known."""
    name = str(metadata.get("general.architecture", ""))
    if name not in GGUF_FAMILIES:
        known = ", ".join(sorted(GGUF_FAMILIES))
        raise IntegrityError("integrity", f"architecture {name[:40]!r} is not supported", f"known: {known}")
    return name, GGUF_FAMILIES[name]


def gguf_architecture_of(
    metadata: Mapping[str, Any], vocab: int, tied: bool, rope_factors: NDArray[np.float32] | None = None
) -> Architecture:
    """The hyper-parameters in a GGUF's metadata. A dense model's feed-forward part is cut into neuron blocks, each an
    always-chosen expert. ``rope_factors``: see :func:`rope_of`. Raises IntegrityError naming a key that is missing or
    wrong."""
    name, family = gguf_family_of(metadata)
    keys = Keys(name, metadata)
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    experts, used = keys.integer("expert_count", 0), keys.integer("expert_used_count", 0)
    width = keys.integer("feed_forward_length")
    blocks = neuron_blocks(width)
    traits = family.traits(keys)
    traits = changed(traits, rope=_rope(keys, family, traits, rope_factors))
    head_dim, kv_heads = _heads(keys, traits.latent, heads, hidden)
    architecture = Architecture(
        family=name,
        hidden=hidden,
        layers=keys.integer("block_count"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        intermediate=keys.integer("expert_feed_forward_length", width) if experts else width // blocks,
        rope_theta=float(keys.number("rope.freq_base", 10000.0)),
        rope_interleaved=family.tensors.rope_interleaved,
        norm_eps=float(keys.number("attention.layer_norm_rms_epsilon")),
        tie_embeddings=tied,
        context=min(keys.integer("context_length"), CONTEXT_MAX),
        router=family.router(keys, experts, used) if experts else router_of(0, 0, blocks),
        variant=traits if traits != PLAIN else UNSET,
    )
    architecture.check()
    return architecture


def _rope(keys: Keys, family: GgufFamily, traits: Variant, factors: NDArray[np.float32] | None) -> RopeScaling | None:
    scaling = rope_of(keys, factors, rounded=family.rounded)
    if scaling is not None and traits.latent is not None:
        return changed(scaling, attention_factor=1.0)  # see _grown
    return scaling


def _heads(keys: Keys, latent: Latent | None, heads: int, hidden: int) -> tuple[int, int]:
    """A head's width, and how many of them keys and values have."""
    if latent is not None:
        return latent.plain + latent.rope, heads
    width = keys.integer("attention.key_length", hidden // max(heads, 1))
    if keys.integer("attention.value_length", width) != width:
        keys.fault("attention.value_length", "differs from the width of keys, which is not supported")
    if keys.integer("rope.dimension_count", width) != width:
        keys.fault("rope.dimension_count", "is not a head's width: partial rope is not supported")
    return width, keys.integer("attention.head_count_kv", heads)
