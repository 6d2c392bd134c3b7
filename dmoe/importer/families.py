"""Model families in Hugging Face layout as data: their tensors' names and what their ``config.json`` says.

A family that is not in the table is refused by name, and so is a variant of a known family that computes something
this package does not (other activations, longrope): a wrong answer is worse than none. The semantics are those of
transformers 5; keys that a configuration lacks have its defaults.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as renamed
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace as changed

from config.errors import IntegrityError
from dmoe.core.manifest import Architecture, Router
from dmoe.core.variant import PLAIN, Variant
from dmoe.importer.architectures import CONTEXT_MAX, Family, neuron_blocks, router_of
from dmoe.importer.hfconfig import Config, fault, rope_of

_LAYER = "model.layers.{l}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."


def _named(family: Family, **names: Any) -> Family:  # noqa: ANN401 - texts, which mypy cannot tell from flags
    """A family with some other names."""
    return renamed(family, **names)


def _feed_forward(prefix: str, kind: str = "") -> dict[str, Any]:
    """gate, up and down below ``prefix``; ``kind`` is what our names of them have in front."""
    return {f"{kind}{part}": f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down")}


_LLAMA = Family(
    rope_interleaved=False,
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    norm="model.norm.weight",
    norm_attention=_LAYER + "input_layernorm.weight",
    norm_experts=_LAYER + "post_attention_layernorm.weight",
    queries=_ATTENTION + "q_proj.weight",
    keys=_ATTENTION + "k_proj.weight",
    values=_ATTENTION + "v_proj.weight",
    output=_ATTENTION + "o_proj.weight",
    queries_bias=_ATTENTION + "q_proj.bias",
    keys_bias=_ATTENTION + "k_proj.bias",
    values_bias=_ATTENTION + "v_proj.bias",
    output_bias=_ATTENTION + "o_proj.bias",
    query_norm=_ATTENTION + "q_norm.weight",
    key_norm=_ATTENTION + "k_norm.weight",
    **_feed_forward(_MLP),
    router=_MLP + "gate.weight",
    # a doubled brace stays for the source, which fills in the expert
    gate_experts=_MLP + "experts.{{e}}.gate_proj.weight",
    up_experts=_MLP + "experts.{{e}}.up_proj.weight",
    down_experts=_MLP + "experts.{{e}}.down_proj.weight",
)
_STACKED = {"gate_up_experts": _MLP + "experts.gate_up_proj", "down_experts": _MLP + "experts.down_proj"}
"""How transformers 5 holds experts in memory, and some files keep them: all of a layer in one tensor."""
_MIXTRAL = _named(
    _LLAMA,
    router=_LAYER + "block_sparse_moe.gate.weight",
    gate_experts=_LAYER + "block_sparse_moe.experts.{{e}}.w1.weight",
    up_experts=_LAYER + "block_sparse_moe.experts.{{e}}.w3.weight",
    down_experts=_LAYER + "block_sparse_moe.experts.{{e}}.w2.weight",
)


@dataclass(frozen=True, slots=True)
class HfFamily:
    """A family's tensors, in the ways that files name them; the keys that count its experts; how its configuration
    becomes a router (of experts and choices per row) and a variant; the rope's theta of a configuration without one."""

    layouts: tuple[Family, ...]
    traits: Callable[[Config], Variant]
    router: Callable[[Config, int, int], Router] = lambda config, experts, used: _softmax(config, experts, used)
    experts_keys: tuple[str, ...] = ()
    width_key: str = "intermediate_size"
    rope_theta: float = 10000.0
    drafts: bool = False
    """Files may hold one layer more, which only drafts further tokens."""


def _softmax(config: Config, experts: int, used: int) -> Router:
    normalise = config.flag("norm_topk_prob", False)
    return Router(kind="softmax_topk", experts=experts, top_k=used, normalise=normalise)


def _llama(config: Config) -> Variant:
    config.must_be("attention_bias", False)
    config.must_be("mlp_bias", False)
    return PLAIN


def _mixtral(config: Config) -> Variant:
    config.must_be("attention_bias", False)
    return PLAIN


HF_FAMILIES: Mapping[str, HfFamily] = {
    "llama": HfFamily((_LLAMA,), _llama),
    "mixtral": HfFamily(
        (_MIXTRAL, _named(_LLAMA, **_STACKED)),
        _mixtral,
        lambda config, experts, used: router_of(experts, used, 1),
        experts_keys=("num_local_experts",),
        rope_theta=1e6,
    ),
}


def hf_family_of(values: Mapping[str, Any]) -> tuple[str, HfFamily]:
    """The family that a ``config.json`` names. Raises IntegrityError for one that is not known."""
    name = str(values.get("model_type", ""))
    if name not in HF_FAMILIES:
        known = ", ".join(sorted(HF_FAMILIES))
        raise IntegrityError("integrity", f"config.json: model_type {name[:40]!r} is not supported", f"known: {known}")
    return name, HF_FAMILIES[name]


def hf_layout_of(family: HfFamily, has: Callable[[str], bool]) -> Family:
    """The way in which a folder names its tensors: the first of which any layer's experts are there."""
    for layout in family.layouts[1:]:
        if any(has(layout.gate_up_experts.format(l=layer)) for layer in range(4)):
            return layout
    return family.layouts[0]


def hf_architecture_of(values: Mapping[str, Any], vocab: int) -> Architecture:
    """The hyper-parameters in a ``config.json``. Raises IntegrityError naming a key that is missing or wrong."""
    name, family = hf_family_of(values)
    config = Config(values)
    config.must_be("hidden_act", "silu")
    if config.get("quantization_config") is not None:
        fault("quantization_config is not supported")
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    width = config.integer(family.width_key)
    experts = _experts(config, family)
    context = config.integer("max_position_embeddings")
    theta, rope, growth = rope_of(config, family.rope_theta)
    if rope is not None:
        fault(f"rope of type {rope.kind!r} is not supported")
    traits = changed(family.traits(config), rope=rope)
    latent, head_dim = traits.latent, config.integer("head_dim", hidden // max(heads, 1))
    kv_heads = config.integer("num_key_value_heads", heads)
    if latent is not None:
        head_dim, kv_heads = latent.plain + latent.rope, heads
    if growth != 1.0:
        traits = changed(traits, attention_scale=head_dim**-0.5 * growth)
    if all(window >= min(context, CONTEXT_MAX) for window in traits.windows):
        traits = changed(traits, windows=())
    if experts:
        router = family.router(config, experts, config.integer("num_experts_per_tok"))
    else:
        router = router_of(0, 0, neuron_blocks(width))
    architecture = Architecture(
        family=name,
        hidden=hidden,
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        intermediate=width if experts else width // neuron_blocks(width),
        rope_theta=theta,
        rope_interleaved=config.flag("rope_interleave", True) if latent else False,
        norm_eps=float(config.number("rms_norm_eps")),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        # within one window, sliding attention is full attention
        context=min(context, config.integer("sliding_window", context), CONTEXT_MAX),
        router=router,
        variant=traits if traits != PLAIN else UNSET,
    )
    architecture.check()
    return architecture


def _experts(config: Config, family: HfFamily) -> int:
    for key in family.experts_keys:
        if config.get(key) is not None:
            return config.integer(key)
    return config.integer(family.experts_keys[0]) if family.experts_keys else 0
