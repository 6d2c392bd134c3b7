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
from dmoe.core.variant import PLAIN, Latent, Variant
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
_QWEN2 = _named(
    _LLAMA,
    **_feed_forward(_MLP + "shared_expert.", "shared_"),
    shared_gate_weight=_MLP + "shared_expert_gate.weight",
)
_DEEPSEEK = _named(
    _LLAMA,
    **_feed_forward(_MLP + "shared_experts.", "shared_"),
    query_down=_ATTENTION + "q_a_proj.weight",
    query_down_norm=_ATTENTION + "q_a_layernorm.weight",
    query_up=_ATTENTION + "q_b_proj.weight",
    latent_down=_ATTENTION + "kv_a_proj_with_mqa.weight",
    latent_norm=_ATTENTION + "kv_a_layernorm.weight",
    latent_up=_ATTENTION + "kv_b_proj.weight",
    router_bias=_MLP + "gate.e_score_correction_bias",
)
_OSS = _named(
    _LLAMA,
    sinks=_ATTENTION + "sinks",
    router=_MLP + "router.weight",
    router_bias=_MLP + "router.bias",
    in_turns=True,
    gate_up_experts_bias=_MLP + "experts.gate_up_proj_bias",
    down_experts_bias=_MLP + "experts.down_proj_bias",
    **_STACKED,
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


def _deepseek2_router(config: Config, experts: int, used: int) -> Router:
    config.must_be("scoring_func", "softmax")
    config.must_be("norm_topk_prob", False)  # transformers and DeepSeek's own code differ about it
    config.must_be("topk_method", "greedy", "group_limited_greedy")
    grouped = config.get("topk_method") == "group_limited_greedy"
    router = Router(kind="softmax_topk", experts=experts, top_k=used, scale=_scale(config, 1.0))
    return _grouped(config, router) if grouped else router


def _deepseek3_router(config: Config, experts: int, used: int) -> Router:
    config.must_be("scoring_func", "sigmoid")
    config.must_be("topk_method", "noaux_tc")
    normalise = config.flag("norm_topk_prob", True)
    scale = _scale(config, 2.5)
    router = Router(kind="sigmoid_topk", experts=experts, top_k=used, normalise=normalise, scale=scale)
    return _grouped(config, router, 8, 4)


def _scale(config: Config, default: float) -> float:
    return float(config.number("routed_scaling_factor", default))


def _grouped(config: Config, router: Router, groups: int | None = None, used: int | None = None) -> Router:
    groups, used = config.integer("n_group", groups), config.integer("topk_group", used)
    if groups == 1:
        return router
    return changed(router, groups=groups, groups_used=used)


def _llama(config: Config) -> Variant:
    config.must_be("attention_bias", False)
    config.must_be("mlp_bias", False)
    return PLAIN


def _mixtral(config: Config) -> Variant:
    config.must_be("attention_bias", False)
    return Variant(windows=_windows(config, config.get("sliding_window") is not None))


def _qwen2(config: Config) -> Variant:
    dense = _dense_layers(config)
    return Variant(
        qkv_bias=config.flag("qkv_bias", True),
        windows=_windows(config, config.flag("use_sliding_window", False), alternating=True),
        dense_layers=dense,
        dense_intermediate=config.integer("intermediate_size") if dense else 0,
        shared_intermediate=config.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _qwen3(config: Config) -> Variant:
    dense, bias = _dense_layers(config), config.flag("attention_bias", False)
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        windows=_windows(config, config.flag("use_sliding_window", False)),
        dense_layers=dense,
        dense_intermediate=config.integer("intermediate_size") if dense else 0,
    )


def _olmoe(config: Config) -> Variant:
    bias = config.flag("attention_bias", False)
    return Variant(qkv_bias=bias, output_bias=bias, qk_norm="whole", qkv_clip=float(config.number("clip_qkv", 0)))


def _oss(config: Config) -> Variant:
    bias = config.flag("attention_bias", True)
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
        windows=_windows(config, True, alternating=True),
        activation="clamped",
        activation_limit=float(config.number("swiglu_limit", 7.0)),
        expert_bias=True,
        router_bias=True,
    )


def _deepseek(config: Config, first_dense: int, shared: int, router_bias: bool) -> Variant:
    for key in ("attention_bias", "mlp_bias"):
        config.must_be(key, False)
    config.must_be("moe_layer_freq", 1)
    dense = tuple(range(config.integer("first_k_dense_replace", first_dense)))
    latent = Latent(
        rank=config.integer("kv_lora_rank"),
        rope=config.integer("qk_rope_head_dim"),
        plain=config.integer("qk_nope_head_dim"),
        value=config.integer("v_head_dim"),
        query_rank=0 if config.get("q_lora_rank") is None else config.integer("q_lora_rank"),
    )
    return Variant(
        latent=latent,
        dense_layers=dense,
        dense_intermediate=config.integer("intermediate_size") if dense else 0,
        shared_intermediate=config.integer("moe_intermediate_size") * config.integer("n_shared_experts", shared),
        router_bias=router_bias,
    )


def _dense_layers(config: Config) -> tuple[int, ...]:
    """Qwen: every ``decoder_sparse_step``-th layer has experts, except those that are named."""
    step, named = config.integer("decoder_sparse_step", 1), config.layers("mlp_only_layers")
    if step < 1:
        fault(f"decoder_sparse_step = {step} is not supported")
    layers = range(config.integer("num_hidden_layers"))
    return tuple(layer for layer in layers if layer in named or (layer + 1) % step)


def _windows(config: Config, used: bool, *, alternating: bool = False) -> tuple[int, ...]:
    """How many keys each layer's rows see; empty if all of them see all of a context.

    ``alternating``: a configuration without ``layer_types`` means every second of the first ``max_window_layers``.
    """
    if not used:
        return ()
    layers, window = config.integer("num_hidden_layers"), config.integer("sliding_window")
    kinds = config.get("layer_types")
    if kinds is None:
        most = config.integer("max_window_layers", 28) if alternating else layers
        slides = [layer < most and not (alternating and layer % 2) for layer in range(layers)]
    elif isinstance(kinds, list) and len(kinds) == layers and set(kinds) <= {"sliding_attention", "full_attention"}:
        slides = [kind == "sliding_attention" for kind in kinds]
    else:
        fault("key layer_types is no list of sliding_attention and full_attention, one per layer")
    if window < 1:
        fault(f"sliding_window = {window} is not supported")
    return tuple(window if slide else 0 for slide in slides) if any(slides) else ()


HF_FAMILIES: Mapping[str, HfFamily] = {
    "llama": HfFamily((_LLAMA,), _llama),
    "mixtral": HfFamily(
        (_MIXTRAL, _named(_LLAMA, **_STACKED)),
        _mixtral,
        lambda config, experts, used: router_of(experts, used, 1),
        experts_keys=("num_local_experts",),
        rope_theta=1e6,
    ),
    "qwen2_moe": HfFamily(
        (_QWEN2, _named(_QWEN2, **_STACKED)), _qwen2, experts_keys=("num_experts",), width_key="moe_intermediate_size"
    ),
    "qwen3_moe": HfFamily(
        (_LLAMA, _named(_LLAMA, **_STACKED)),
        _qwen3,
        experts_keys=("num_experts", "num_local_experts"),
        width_key="moe_intermediate_size",
    ),
    "olmoe": HfFamily((_LLAMA, _named(_LLAMA, **_STACKED)), _olmoe, experts_keys=("num_experts", "num_local_experts")),
    "gpt_oss": HfFamily(
        (_OSS,),
        _oss,
        lambda config, experts, used: Router(kind="topk_softmax", experts=experts, top_k=used),
        experts_keys=("num_local_experts",),
        rope_theta=150000.0,
    ),
    "deepseek_v2": HfFamily(
        (_DEEPSEEK, _named(_DEEPSEEK, **_STACKED)),
        lambda config: _deepseek(config, 0, 2, router_bias=False),
        _deepseek2_router,
        experts_keys=("n_routed_experts",),
        width_key="moe_intermediate_size",
    ),
    "deepseek_v3": HfFamily(
        (_DEEPSEEK, _named(_DEEPSEEK, **_STACKED)),
        lambda config: _deepseek(config, 3, 1, router_bias=True),
        _deepseek3_router,
        experts_keys=("n_routed_experts", "num_local_experts"),
        width_key="moe_intermediate_size",
        drafts=True,
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
    _check_quantised(config, family)
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    width = config.integer(family.width_key)
    experts = _experts(config, family)
    context = config.integer("max_position_embeddings")
    theta, rope, growth = rope_of(config, family.rope_theta)
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
        context=min(context, CONTEXT_MAX),
        router=router,
        variant=traits if traits != PLAIN else UNSET,
    )
    architecture.check()
    return architecture


def _check_quantised(config: Config, family: HfFamily) -> None:
    """Of quantised folders only those with MXFP4 experts are read."""
    found = config.get("quantization_config")
    in_turns = family.layouts[0].in_turns
    if found is not None and not (in_turns and isinstance(found, dict) and found.get("quant_method") == "mxfp4"):
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise IntegrityError(
            "integrity",
            f"config.json: weights quantised by {method!r:.80} are not supported",
            "give the model as it was before, or a GGUF file of it",
        )


def _experts(config: Config, family: HfFamily) -> int:
    for key in family.experts_keys:
        if config.get(key) is not None:
            return config.integer(key)
    return config.integer(family.experts_keys[0]) if family.experts_keys else 0
