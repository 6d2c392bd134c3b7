"""Tiny models with random weights, written as real folders in Hugging Face layout, without torch.

The weights depend on the family alone, so that ``tests/vectors/hf_reference.py`` can compute reference logits of the
same models with transformers.
"""

import json
import zlib

import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, EXPERTS, VOCAB = 64, 3, 4, 2, 6, 260
FAMILIES = ("llama", "mixtral")
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
CONFIGS = {
    "llama": _COMMON
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 256,
        "rope_theta": 10000.0,
        "head_dim": 16,
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
}


def _shapes(family):
    width, kv = CONFIGS[family]["intermediate_size"], HIDDEN // HEADS * KV_HEADS
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm.weight": (HIDDEN,), p + "post_attention_layernorm.weight": (HIDDEN,)}
        rows = {"q": HIDDEN, "k": kv, "v": kv, "o": HIDDEN}
        shapes |= {f"{p}self_attn.{part}_proj.weight": (size, HIDDEN) for part, size in rows.items()}
        if family == "llama":
            shapes |= {f"{p}mlp.{part}_proj.weight": (width, HIDDEN) for part in ("gate", "up")}
            shapes[p + "mlp.down_proj.weight"] = (HIDDEN, width)
            continue
        shapes[p + "block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            e = f"{p}block_sparse_moe.experts.{expert}."
            shapes |= {e + "w1.weight": (width, HIDDEN), e + "w3.weight": (width, HIDDEN)}
            shapes[e + "w2.weight"] = (HIDDEN, width)
    return shapes


def weights(family):
    """All tensors, f32. Every value is exact in bfloat16, so that the three float types hold the same model."""
    tensors = {}
    for name, shape in _shapes(family).items():
        random = np.random.RandomState(zlib.crc32(name.encode()))  # its stream is frozen for good
        values = random.uniform(-1, 1, shape).astype(np.float32)
        values = 1 + values / 4 if len(shape) == 1 else values * np.float32(2.5 * shape[-1] ** -0.5)
        tensors[name] = (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return tensors


def safetensors_bytes(tensors, dtype="F32"):
    """A file's bytes, independent of the reader under test."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, values in tensors.items():
        data = {
            "F32": lambda v: v.tobytes(),
            "F16": lambda v: v.astype("<f2").tobytes(),
            "BF16": lambda v: (v.view("<u4") >> 16).astype("<u2").tobytes(),
        }.get(dtype, lambda v: v.tobytes())(values)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(body), len(body) + len(data)]}
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
    merged = {key: value for key, value in (CONFIGS[family] | (config or {})).items() if value is not None}
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
