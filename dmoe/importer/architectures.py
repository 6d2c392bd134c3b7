"""What the readers of both layouts share: how a family names its tensors, neuron blocks, the routers of plain models.

Owns: :class:`Family`, whose defaults are the names in GGUF files. Does not own: which family has what
(``families``, ``gguffamilies``).
"""

from dataclasses import dataclass

from dmoe.core.manifest import BLOCK, Router

CONTEXT_MAX = 32768
"""Rope tables are made for at most so many positions."""


@dataclass(frozen=True, slots=True)
class Family:
    """Names of a family's tensors; ``{l}`` is the layer. Which of them a model has follows from its architecture; the
    experts' gates and ups are one tensor where ``gate_up_experts`` is named. ``in_turns`` (gpt-oss): that tensor has
    gate and up in turns; it and that of the downs are transposed, or else MXFP4 blocks and scales stand for each."""

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
    in_turns: bool = False
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
    key_up: str = "blk.{l}.attn_k_b.weight"
    value_up: str = "blk.{l}.attn_v_b.weight"
    shared_gate: str = "blk.{l}.ffn_gate_shexp.weight"
    shared_up: str = "blk.{l}.ffn_up_shexp.weight"
    shared_down: str = "blk.{l}.ffn_down_shexp.weight"
    shared_gate_weight: str = "blk.{l}.ffn_gate_inp_shexp.weight"
    router_bias: str = "blk.{l}.exp_probs_b.bias"
    gate_up_experts_bias: str = ""
    gate_experts_bias: str = "blk.{l}.ffn_gate_exps.bias"
    up_experts_bias: str = "blk.{l}.ffn_up_exps.bias"
    down_experts_bias: str = "blk.{l}.ffn_down_exps.bias"


def neuron_blocks(width: int) -> int:
    """Into how many blocks a dense feed-forward part of ``width`` neurons is cut."""
    return next(count for count in (4, 2, 1) if width % (count * BLOCK) == 0 or count == 1)


def router_of(experts: int, used: int, blocks: int) -> Router:
    """The router of ``experts`` with ``used`` chosen, or of a dense model's ``blocks``."""
    if not experts:
        return Router(kind="all", experts=blocks, top_k=blocks)
    return Router(kind="softmax_topk", experts=experts, top_k=used, normalise=True)
