"""Tiny models with random weights, written as real folders in Hugging Face layout, without torch.

The weights depend on the family alone, so that ``tests/vectors/hf_reference.py`` can compute reference logits of the
same models with transformers.
"""

import json
import zlib

import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, EXPERTS, VOCAB = 64, 3, 4, 2, 6, 260
_COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 1,
}
_LATENT = {
    "intermediate_size": 160,
    "moe_intermediate_size": 32,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
CONFIGS = {
    "llama": _COMMON
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 256,
        "rope_theta": 10000.0,
        "head_dim": 16,
    },
    "llama3": _COMMON
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 128,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mixtral": _COMMON
    | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": 96,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
    # biases, a gated shared expert, one dense layer, a window in layers 0 and 2
    "qwen2_moe": _COMMON
    | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "intermediate_size": 160,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 28,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
    },
    # norms per head, heads wider than the hidden state, every second layer sparse, yarn
    "qwen3_moe": _COMMON
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": 160,
        "moe_intermediate_size": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "head_dim": 32,
        "num_hidden_layers": 4,
        "rope_parameters": _YARN | {"rope_theta": 1e6},
    },
    # norms over the whole width, clipped projections
    "olmoe": _COMMON
    | {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "intermediate_size": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "clip_qkv": 1.25,
        "rope_theta": 10000.0,
    },
    # biases everywhere, sinks, a window in layers 0 and 2, yarn with bounds that are not rounded
    "gpt_oss": _COMMON
    | {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "intermediate_size": 96,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "attention_bias": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "swiglu_limit": 7.0,
        "rope_parameters": _YARN | {"rope_theta": 150000.0, "truncate": False},
    },
    # as V2-Lite: queries at once from the hidden state, no groups
    "deepseek_v2_lite": _COMMON
    | _LATENT
    | {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "n_shared_experts": 2,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
    },
    "deepseek_v2": _COMMON
    | _LATENT
    | {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "n_shared_experts": 2,
        "q_lora_rank": 32,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
        "norm_topk_prob": False,
        "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.9},
    },
    "deepseek_v3": _COMMON
    | _LATENT
    | {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "n_shared_experts": 1,
        "q_lora_rank": 32,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "rope_scaling": _YARN | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}
FAMILIES = tuple(CONFIGS)
SPARSE = tuple(name for name in FAMILIES if not name.startswith("llama"))


def _shapes(name):
    """Every tensor's shape, by the names that transformers gives them."""
    config = CONFIGS[name]
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm.weight": (HIDDEN,), p + "post_attention_layernorm.weight": (HIDDEN,)}
        attention = _latent_shapes(config) if "kv_lora_rank" in config else _attention_shapes(config)
        shapes |= {f"{p}self_attn.{part}": shape for part, shape in attention.items()}
        shapes |= {p + part: shape for part, shape in _feed_forward_shapes(config, layer).items()}
    return shapes


def _attention_shapes(config):
    size = config.get("head_dim", HIDDEN // HEADS)
    rows = {"q": size * HEADS, "k": size * KV_HEADS, "v": size * KV_HEADS}
    shapes = {f"{part}_proj.weight": (count, HIDDEN) for part, count in rows.items()}
    shapes["o_proj.weight"] = (HIDDEN, size * HEADS)
    family = config["model_type"]
    if family == "qwen2_moe":
        shapes |= {f"{part}_proj.bias": (count,) for part, count in rows.items()}
    if family == "gpt_oss":
        shapes |= {f"{part}_proj.bias": (count,) for part, count in (rows | {"o": HIDDEN}).items()}
        shapes["sinks"] = (HEADS,)
    if family in ("qwen3_moe", "olmoe"):
        shapes |= {f"{part}_norm.weight": (size if family == "qwen3_moe" else rows[part],) for part in "qk"}
    return shapes


def _latent_shapes(config):
    rank, plain, rope, value = (config[f"{key}"] for key in ("kv_lora_rank", *_HEAD_KEYS))
    queries = HEADS * (plain + rope)
    shapes = {
        "kv_a_proj_with_mqa.weight": (rank + rope, HIDDEN),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (HEADS * (plain + value), rank),
        "o_proj.weight": (HIDDEN, HEADS * value),
    }
    low = config["q_lora_rank"]
    if low is None:
        return shapes | {"q_proj.weight": (queries, HIDDEN)}
    down = {"q_a_proj.weight": (low, HIDDEN), "q_a_layernorm.weight": (low,)}
    return shapes | down | {"q_b_proj.weight": (queries, low)}


_HEAD_KEYS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _ffn(prefix, width, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return {gate: (width, HIDDEN), up: (width, HIDDEN), down: (HIDDEN, width)}


def _feed_forward_shapes(config, layer):
    family, wide = config["model_type"], config["intermediate_size"]
    if _is_dense(config, layer):
        return _ffn("mlp.", wide)
    width = config.get("moe_intermediate_size", wide)
    experts = config.get("n_routed_experts", EXPERTS)
    if family == "gpt_oss":
        return _in_turns_shapes(experts, wide)
    block = "block_sparse_moe." if family == "mixtral" else "mlp."
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    shapes = {f"{block}gate.weight": (experts, HIDDEN)}
    for expert in range(experts):
        shapes |= _ffn(f"{block}experts.{expert}.", width, names)
    if family == "qwen2_moe":
        shapes |= _ffn("mlp.shared_expert.", config["shared_expert_intermediate_size"])
        shapes["mlp.shared_expert_gate.weight"] = (1, HIDDEN)
    if "n_shared_experts" in config:
        shapes |= _ffn("mlp.shared_experts.", width * config["n_shared_experts"])
    if family == "deepseek_v3":
        shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    return shapes


def _in_turns_shapes(experts, width):
    return {
        "mlp.router.weight": (experts, HIDDEN),
        "mlp.router.bias": (experts,),
        "mlp.experts.gate_up_proj": (experts, HIDDEN, 2 * width),
        "mlp.experts.gate_up_proj_bias": (experts, 2 * width),
        "mlp.experts.down_proj": (experts, width, HIDDEN),
        "mlp.experts.down_proj_bias": (experts, HIDDEN),
    }


def _is_dense(config, layer):
    if config["model_type"] == "llama" or layer < config.get("first_k_dense_replace", 0):
        return True
    return layer in config.get("mlp_only_layers", ()) or bool((layer + 1) % config.get("decoder_sparse_step", 1))


def stacked(tensors):
    """The same experts as transformers 5 holds them: one tensor per layer for gates and ups, one for downs."""
    layers = {}
    for name in tensors:
        if ".mlp.experts." in name:
            head, _, rest = name.partition(".mlp.experts.")
            expert, part, _ = rest.split(".")
            layers.setdefault(head, {})[part, int(expert)] = tensors[name]
    changes = {name: None for name in tensors if ".mlp.experts." in name}
    for head, found in layers.items():
        count = 1 + max(expert for _, expert in found)
        both = [np.concatenate([found["gate_proj", e], found["up_proj", e]]) for e in range(count)]
        changes[f"{head}.mlp.experts.gate_up_proj"] = np.stack(both)
        changes[f"{head}.mlp.experts.down_proj"] = np.stack([found["down_proj", e] for e in range(count)])
    return changes


def weights(family):
    """All tensors, f32. Every value is exact in bfloat16, so that the three float types hold the same model."""
    tensors = {}
    for name, shape in _shapes(family).items():
        random = np.random.RandomState(zlib.crc32(name.encode()))  # its stream is frozen for good
        values = random.uniform(-1, 1, shape).astype(np.float32)
        if name.endswith("bias"):
            values = values / 4
        else:
            values = 1 + values / 4 if len(shape) == 1 else values * np.float32(2.5 * shape[-1] ** -0.5)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = mxfp4(values)
            values = 2 * from_mxfp4(blocks, scales).transpose(0, 2, 1)
        tensors[name] = (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return tensors


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def mxfp4(values):
    """A transposed stack ``f32[E, K, N]`` as gpt-oss's files keep it: ``u8[E, N, K/32, 16]`` and ``u8[E, N, K/32]``."""
    rows = values.transpose(0, 2, 1)
    groups = rows.reshape(*rows.shape[:2], -1, 32)
    exponents = np.ceil(np.log2(np.abs(groups).max(axis=-1) / 6))
    codes = np.abs((groups / np.exp2(exponents)[..., None])[..., None] - _E2M1).argmin(axis=-1).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).astype(np.uint8)


def from_mxfp4(blocks, scales):
    """``f32[E, N, K]``."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    weights = _E2M1[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]
    return weights.reshape(*scales.shape[:2], -1)


def in_mxfp4(tensors):
    """Changes to a gpt-oss folder's tensors that keep its experts, which are on that grid, in MXFP4."""
    changes = {}
    for name, values in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            changes[name] = None
            changes[f"{name}_blocks"], changes[f"{name}_scales"] = mxfp4(values)
    return changes


def safetensors_bytes(tensors, dtype="F32"):
    """A file's bytes, independent of the reader under test."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, values in tensors.items():
        data = {
            "F32": lambda v: v.tobytes(),
            "F16": lambda v: v.astype("<f2").tobytes(),
            "BF16": lambda v: (v.view("<u4") >> 16).astype("<u2").tobytes(),
        }.get("U8" if values.dtype == np.uint8 else dtype, lambda v: v.tobytes())(values)
        kind = "U8" if values.dtype == np.uint8 else dtype
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def byte_level():
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def _tokenizer():
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for index, text in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": byte,
        "post_processor": None,
        "decoder": byte,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate([*special, *byte_level()])},
            "merges": [],
        },
    }


def write_folder(folder, family, *, dtype="F32", files=1, config=None, change=None):
    """A model's folder. ``config``: other values (None leaves a key out); ``change``: other tensors (None leaves one
    out); ``files``: how many weight files, with an index if more than one."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config or {}
    merged = {key: value for key, value in (CONFIGS[family] | config).items() if config.get(key, 0) is not None}
    (folder / "config.json").write_text(json.dumps(merged))
    tensors = {name: values for name, values in (weights(family) | (change or {})).items() if values is not None}
    names = [f"model-{index + 1:05d}-of-{files:05d}.safetensors" for index in range(files)]
    names = names if files > 1 else ["model.safetensors"]
    placed = {name: names[index % files] for index, name in enumerate(tensors)}
    for file in names:
        part = {name: values for name, values in tensors.items() if placed[name] == file}
        (folder / file).write_bytes(safetensors_bytes(part, dtype))
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    options = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    options["chat_template"] = "{{ bos_token }}{{ messages[0]['content'] }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder
