"""The tiny models of ``folder_kit`` as GGUF files: the same weights under llama.cpp's names, in its layouts.

Configurations here leave out what llama.cpp's format cannot say (windows and dense layers of Qwen, unequal mscales).
"""

import math

import gguf
import numpy as np

from tests.unit.dmoe import folder_kit
from tests.unit.dmoe.folder_kit import CONFIGS, weights

_YARN = folder_kit._YARN
PLAIN = {
    "qwen2_moe": {"mlp_only_layers": [], "use_sliding_window": False, "sliding_window": None},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "deepseek_v2": {"rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    # what rope_freqs.weight is known by: Llama 3's own lengths
    "llama3": {
        "max_position_embeddings": 16384,
        "rope_scaling": CONFIGS["llama3"]["rope_scaling"] | {"original_max_position_embeddings": 8192},
    },
}
for _name, _change in PLAIN.items():
    CONFIGS[f"{_name}_gguf"] = CONFIGS[_name] | _change
ARCHITECTURES = {
    "llama": "llama",
    "llama3_gguf": "llama",
    "mixtral": "llama",
    "qwen2_moe_gguf": "qwen2moe",
    "qwen3_moe_gguf": "qwen3moe",
    "olmoe": "olmoe",
    "gpt_oss": "gpt-oss",
    "deepseek_v2_lite": "deepseek2",
    "deepseek_v2_gguf": "deepseek2",
    "deepseek_v3": "deepseek2",
}
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
}
_EXPERT_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def metadata(family, *, split=True):
    """The keys of a family's file. ``split``: keys and values of latent attention in tensors of their own."""
    config, arch = CONFIGS[family], ARCHITECTURES[family]
    heads = config["num_attention_heads"]
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(_rope(config).get("rope_theta") or config.get("rope_theta") or 1e4),
        "expert_count": _experts(config),
        "expert_used_count": config.get("num_experts_per_tok", 0),
    }
    if "head_dim" in config:
        keys |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if "moe_intermediate_size" in config:
        keys["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if "shared_expert_intermediate_size" in config:
        keys["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    if config.get("clip_qkv"):
        keys["attention.clamp_kqv"] = config["clip_qkv"]
    if arch == "gpt-oss":
        keys |= {"attention.sliding_window": config["sliding_window"]}
        keys["expert_feed_forward_length"] = config["intermediate_size"]
    if arch == "deepseek2":
        keys |= _latent(config, split)
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type")) == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
        if "mscale_all_dim" in rope:
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return {f"{arch}.{key}": value for key, value in keys.items()}


def _rope(config):
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _experts(config):
    return config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0


def _latent(config, split):
    rank, rope, plain = (config[f"{key}"] for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    value = config["v_head_dim"]
    keys = {
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
        "attention.key_length": rank + rope if split else plain + rope,
        "attention.value_length": rank if split else value,
        "attention.head_count_kv": 1 if split else config["num_attention_heads"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": 2 if config["model_type"] == "deepseek_v3" else 1,
    }
    if split:
        keys |= {"attention.key_length_mla": plain + rope, "attention.value_length_mla": value}
    if config["q_lora_rank"]:
        keys["attention.q_lora_rank"] = config["q_lora_rank"]
    if config.get("n_group"):
        keys |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    return keys


def tensors(family, *, split=True):
    """Every tensor under its name in GGUF files, f32."""
    config, arch = CONFIGS[family], ARCHITECTURES[family]
    found, stacks = {}, {}
    for name, values in weights(family).items():
        if name in _NAMES:
            found[_NAMES[name]] = values
            continue
        _, _, layer, part = name.split(".", 3)
        block = f"blk.{layer}."
        if ".experts." in f".{part}":
            _stack(block, part, values, found, stacks)
            continue
        stem, _, ending = part.rpartition(".")
        if part in _PARTS:
            found[block + _PARTS[part]] = values
        elif stem == "self_attn.kv_b_proj" and split:
            found |= _split_up(block, config, values)
        else:
            if arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config["num_attention_heads" if "q_proj" in stem else "num_key_value_heads"]
                values = _permuted(values, heads)
            target = "post_attention_norm" if arch == "gpt-oss" and "post" in stem else _PARTS[stem]
            found[f"{block}{target}.{ending}"] = values[0] if target == "ffn_gate_inp_shexp" else values
    found |= {name: np.stack([values[expert] for expert in sorted(values)]) for name, values in stacks.items()}
    if "llama3" in family:
        found["rope_freqs.weight"] = _llama3_factors(config)
    return found


def _stack(block, part, values, found, stacks):
    """Experts one by one, or all of a layer: transposed, gate and up in turns."""
    last = part.split("experts.")[1]
    if last.startswith("gate_up_proj"):
        ending = "bias" if last.endswith("bias") else "weight"
        rows = values if ending == "bias" else values.transpose(0, 2, 1)
        found[f"{block}ffn_gate_exps.{ending}"] = np.ascontiguousarray(rows[:, 0::2])
        found[f"{block}ffn_up_exps.{ending}"] = np.ascontiguousarray(rows[:, 1::2])
    elif last == "down_proj":
        found[f"{block}ffn_down_exps.weight"] = np.ascontiguousarray(values.transpose(0, 2, 1))
    elif last == "down_proj_bias":
        found[f"{block}ffn_down_exps.bias"] = values
    else:
        expert, kind, _ = last.split(".")
        stacks.setdefault(f"{block}ffn_{_EXPERT_PARTS[kind]}_exps.weight", {})[int(expert)] = values


def _permuted(values, heads):
    """llama.cpp's order of the rows of Q and K: rope pairs neighbours."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _split_up(block, config, values):
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    heads = values.reshape(config["num_attention_heads"], plain + value, -1)
    return {
        f"{block}attn_k_b.weight": np.ascontiguousarray(heads[:, :plain].transpose(0, 2, 1)),
        f"{block}attn_v_b.weight": np.ascontiguousarray(heads[:, plain:]),
    }


def _llama3_factors(config):
    """``LlamaModel.generate_extra_tensors`` of llama.cpp's converter."""
    rope, size = config["rope_scaling"], config["hidden_size"] // config["num_attention_heads"]
    factors = []
    for index in range(0, size, 2):
        length = 2 * math.pi * config["rope_theta"] ** (index / size)
        original = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_family_gguf(path, family, *, split=True, kinds=lambda name: "F32", change=None, drop=(), parts=0):
    """A family's file, or the first of several with ``parts`` tensors each. ``kinds``: a tensor's type by name;
    ``change``: other metadata (None leaves a key out); ``drop``: tensors to leave out."""
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family], split_max_tensors=parts)
    size = CONFIGS[family]["vocab_size"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefgh"][:size]
    text = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [0.0] * size,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (size - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "general.name": family,
    }
    for key, value in (text | metadata(family, split=split) | (change or {})).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, values in tensors(family, split=split).items():
        if name in drop:
            continue
        kind = kinds(name)
        if kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            of = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if parts else path
