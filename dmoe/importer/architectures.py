"""Model families as data: which GGUF metadata and tensors they have, and how they become ours.

A family that is not in the table is refused by name, and so is a variant of a known family that computes something
this package does not (scaled rope, biases): a wrong answer is worse than none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from config.errors import IntegrityError
from dmoe.core.manifest import BLOCK, Architecture, Router

CONTEXT_MAX = 32768
"""Rope tables are made for at most so many positions."""


@dataclass(frozen=True, slots=True)
class Family:
    """Names of a family's tensors; ``{l}`` is the layer. Which of them a model has follows from its architecture; the
    experts' gates and ups are one tensor where ``gate_up_experts`` is named."""

    rope_interleaved: bool
    embedding: str = "token_embd.weight"
    head: str = "output.weight"
    norm: str = "output_norm.weight"
    norm_attention: str = "blk.{l}.attn_norm.weight"
    norm_experts: str = "blk.{l}.ffn_norm.weight"
    queries: str = "blk.{l}.attn_q.weight"
    keys: str = "blk.{l}.attn_k.weight"
    values: str = "blk.{l}.attn_v.weight"
    output: str = "blk.{l}.attn_output.weight"
    gate: str = "blk.{l}.ffn_gate.weight"
    up: str = "blk.{l}.ffn_up.weight"
    down: str = "blk.{l}.ffn_down.weight"
    router: str = "blk.{l}.ffn_gate_inp.weight"
    gate_experts: str = "blk.{l}.ffn_gate_exps.weight"
    up_experts: str = "blk.{l}.ffn_up_exps.weight"
    down_experts: str = "blk.{l}.ffn_down_exps.weight"
    gate_up_experts: str = ""
    queries_bias: str = "blk.{l}.attn_q.bias"
    keys_bias: str = "blk.{l}.attn_k.bias"
    values_bias: str = "blk.{l}.attn_v.bias"
    output_bias: str = "blk.{l}.attn_output.bias"
    query_norm: str = "blk.{l}.attn_q_norm.weight"
    key_norm: str = "blk.{l}.attn_k_norm.weight"
    sinks: str = "blk.{l}.attn_sinks.weight"
    query_down: str = "blk.{l}.attn_q_a.weight"
    query_down_norm: str = "blk.{l}.attn_q_a_norm.weight"
    query_up: str = "blk.{l}.attn_q_b.weight"
    latent_down: str = "blk.{l}.attn_kv_a_mqa.weight"
    latent_norm: str = "blk.{l}.attn_kv_a_norm.weight"
    latent_up: str = "blk.{l}.attn_kv_b.weight"
    shared_gate: str = "blk.{l}.ffn_gate_shexp.weight"
    shared_up: str = "blk.{l}.ffn_up_shexp.weight"
    shared_down: str = "blk.{l}.ffn_down_shexp.weight"
    shared_gate_weight: str = "blk.{l}.ffn_gate_inp_shexp.weight"
    router_bias: str = "blk.{l}.exp_probs_b.bias"
    gate_experts_bias: str = "blk.{l}.ffn_gate_exps.bias"
    up_experts_bias: str = "blk.{l}.ffn_up_exps.bias"
    down_experts_bias: str = "blk.{l}.ffn_down_exps.bias"


FAMILIES: Mapping[str, Family] = {
    # GGUF permutes the rows of Q and K of this family, so that rope pairs neighbours
    "llama": Family(rope_interleaved=True),
}


def family_of(metadata: Mapping[str, Any]) -> tuple[str, Family]:
    """The family a GGUF names. Raises IntegrityError for one that is not known."""
    name = str(metadata.get("general.architecture", ""))
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise IntegrityError("integrity", f"architecture {name[:40]!r} is not supported", f"known: {known}")
    return name, FAMILIES[name]


def architecture_of(metadata: Mapping[str, Any], vocab: int, tied: bool) -> Architecture:
    """The hyper-parameters in a GGUF's metadata. A dense model's feed-forward part is cut into neuron blocks, each an
    always-chosen expert. Raises IntegrityError naming a key that is missing or wrong."""
    name, family = family_of(metadata)

    def number(key: str, default: float | None = None) -> float:
        value = metadata.get(f"{name}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise IntegrityError("integrity", f"metadata key {name}.{key} is missing or no number")
        return value

    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        raise IntegrityError("integrity", f"metadata key {name}.rope.scaling.type = {scaling!r} is not supported")
    heads = int(number("attention.head_count"))
    hidden = int(number("embedding_length"))
    head_dim = int(number("attention.key_length", hidden // max(heads, 1)))
    if int(number("rope.dimension_count", head_dim)) != head_dim:
        raise IntegrityError("integrity", f"metadata key {name}.rope.dimension_count: partial rope is not supported")
    experts = int(number("expert_count", 0))
    width = int(number("feed_forward_length"))
    blocks = neuron_blocks(width)
    architecture = Architecture(
        family=name,
        hidden=hidden,
        layers=int(number("block_count")),
        heads=heads,
        kv_heads=int(number("attention.head_count_kv", heads)),
        head_dim=head_dim,
        vocab=vocab,
        intermediate=width if experts else width // blocks,
        rope_theta=float(number("rope.freq_base", 10000.0)),
        rope_interleaved=family.rope_interleaved,
        norm_eps=float(number("attention.layer_norm_rms_epsilon")),
        tie_embeddings=tied,
        context=min(int(number("context_length")), CONTEXT_MAX),
        router=router_of(experts, int(number("expert_used_count", 0)), blocks),
    )
    architecture.check()
    return architecture


def neuron_blocks(width: int) -> int:
    """Into how many blocks a dense feed-forward part of ``width`` neurons is cut."""
    return next(count for count in (4, 2, 1) if width % (count * BLOCK) == 0 or count == 1)


def router_of(experts: int, used: int, blocks: int) -> Router:
    """The router of ``experts`` with ``used`` chosen, or of a dense model's ``blocks``."""
    if not experts:
        return Router(kind="all", experts=blocks, top_k=blocks)
    return Router(kind="softmax_topk", experts=experts, top_k=used, normalise=True)
