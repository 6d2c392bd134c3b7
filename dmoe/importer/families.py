"""Model families in Hugging Face layout as data: their tensors' names and what their ``config.json`` must say.

A family that is not in the table is refused by name, and so is a variant of a known family that computes something
this package does not (scaled rope, other activations): a wrong answer is worse than none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from config.errors import IntegrityError
from dmoe.core.manifest import Architecture
from dmoe.importer.architectures import CONTEXT_MAX, Family, neuron_blocks, router_of

_LAYER = "model.layers.{l}."


@dataclass(frozen=True, slots=True)
class HfFamily:
    """A family's tensors, the key that counts its experts, and the ``rope_theta`` of a config that names none."""

    tensors: Family
    experts_key: str = ""
    rope_theta: float = 10000.0


def _names(**experts: str) -> Family:
    attention = _LAYER + "self_attn."
    return Family(
        rope_interleaved=False,
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        norm="model.norm.weight",
        norm_attention=_LAYER + "input_layernorm.weight",
        norm_experts=_LAYER + "post_attention_layernorm.weight",
        queries=attention + "q_proj.weight",
        keys=attention + "k_proj.weight",
        values=attention + "v_proj.weight",
        output=attention + "o_proj.weight",
        **{name: _LAYER + pattern for name, pattern in experts.items()},
    )


_DENSE = {"gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight"}
_MIXTRAL = {
    "router": "block_sparse_moe.gate.weight",
    # a doubled brace stays for the source, which fills in the expert
    "gate_experts": "block_sparse_moe.experts.{{e}}.w1.weight",
    "up_experts": "block_sparse_moe.experts.{{e}}.w3.weight",
    "down_experts": "block_sparse_moe.experts.{{e}}.w2.weight",
}

HF_FAMILIES: Mapping[str, HfFamily] = {
    "llama": HfFamily(_names(**_DENSE)),
    "mixtral": HfFamily(_names(**_MIXTRAL), experts_key="num_local_experts", rope_theta=1e6),
}


def hf_family_of(config: Mapping[str, Any]) -> tuple[str, HfFamily]:
    """The family that a ``config.json`` names. Raises IntegrityError for one that is not known."""
    name = str(config.get("model_type", ""))
    if name not in HF_FAMILIES:
        known = ", ".join(sorted(HF_FAMILIES))
        raise IntegrityError("integrity", f"config.json: model_type {name[:40]!r} is not supported", f"known: {known}")
    return name, HF_FAMILIES[name]


def hf_architecture_of(config: Mapping[str, Any], vocab: int) -> Architecture:
    """The hyper-parameters in a ``config.json``. Raises IntegrityError naming a key that is missing or wrong."""
    name, family = hf_family_of(config)
    _refuse_variants(config)

    def number(key: str, default: float | None = None) -> float:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _fault(f"key {key} is missing or no number")
        return value

    heads, hidden = int(number("num_attention_heads")), int(number("hidden_size"))
    width = int(number("intermediate_size"))
    experts = int(number(family.experts_key)) if family.experts_key else 0
    used = int(number("num_experts_per_tok")) if experts else 0
    context = int(number("max_position_embeddings"))
    # within one window, sliding attention is full attention
    window = int(number("sliding_window", context))
    architecture = Architecture(
        family=name,
        hidden=hidden,
        layers=int(number("num_hidden_layers")),
        heads=heads,
        kv_heads=int(number("num_key_value_heads", heads)),
        head_dim=int(number("head_dim", hidden // max(heads, 1))),
        vocab=vocab,
        intermediate=width if experts else width // neuron_blocks(width),
        rope_theta=float(_rope(config).get("rope_theta") or number("rope_theta", family.rope_theta)),
        rope_interleaved=False,
        norm_eps=float(number("rms_norm_eps")),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        context=min(context, window, CONTEXT_MAX),
        router=router_of(experts, used, neuron_blocks(width)),
    )
    architecture.check()
    return architecture


def _refuse_variants(config: Mapping[str, Any]) -> None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise _fault(f"rope of type {kind!r} is not supported")
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(key, wanted) != wanted:
            raise _fault(f"{key} = {config[key]!r} is not supported")
    for key in ("partial_rotary_factor", "quantization_config"):
        if config.get(key) not in (None, 1, 1.0):
            raise _fault(f"{key} is not supported")


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise _fault("rope_parameters is not an object")
    return rope


def _fault(what: str) -> IntegrityError:
    return IntegrityError("integrity", f"config.json: {what}")
