"""A model with random weights, written as a folder in Hugging Face layout: what an import is measured with.

Owns: the sizes and the files. The weights repeat one block of normal numbers: as good for measuring, and as fast as the
disk.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.vocabulary import MIB

_FILE_BYTES = 512 * MIB
_BLOCK = 1 << 22
"""bfloat16 numbers that are repeated."""
_VOCAB = 32000
_LAYERS_MAX = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a Mixtral: a sparse model of a common family; without ``experts``: of a Llama, a dense one."""

    hidden: int = 2048
    layers: int = 5
    experts: int = 8
    intermediate: int = 3584
    heads: int = 16
    kv_heads: int = 4
    vocab: int = _VOCAB

    @property
    def layer_bytes(self) -> int:
        """Of one layer's matrices as bfloat16."""
        return 2 * sum(rows * columns for rows, columns in self._layer().values())

    @property
    def total_bytes(self) -> int:
        """Of all matrices as bfloat16."""
        return self.layers * self.layer_bytes + 4 * self.vocab * self.hidden

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{name}.weight", (self.hidden,)
            for name, shape in self._layer().items():
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def _layer(self) -> dict[str, tuple[int, int]]:
        narrow = self.hidden // self.heads * self.kv_heads
        rows = {"q": self.hidden, "k": narrow, "v": narrow, "o": self.hidden}
        found = {f"self_attn.{name}_proj": (size, self.hidden) for name, size in rows.items()}
        if not self.experts:
            found |= {f"mlp.{name}_proj": (self.intermediate, self.hidden) for name in ("gate", "up")}
            return found | {"mlp.down_proj": (self.hidden, self.intermediate)}
        found["block_sparse_moe.gate"] = (self.experts, self.hidden)
        for expert in range(self.experts):
            prefix = f"block_sparse_moe.experts.{expert}."
            found |= {prefix + name: (self.intermediate, self.hidden) for name in ("w1", "w3")}
            found[prefix + "w2"] = (self.hidden, self.intermediate)
        return found

    def config(self) -> dict[str, Any]:
        """Its ``config.json``."""
        sparse = {"num_local_experts": self.experts, "num_experts_per_tok": min(2, self.experts)}
        return {
            "model_type": "mixtral" if self.experts else "llama",
            "architectures": ["MixtralForCausalLM" if self.experts else "LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "eos_token_id": 0,
            "hidden_act": "silu",
            **(sparse if self.experts else {}),
        }


def sizes_of(total_bytes: int) -> Sizes:
    """A model of about so many bytes: as many layers as that takes, of 100 MB; a small one is narrower."""
    small = Sizes(hidden=256, intermediate=512, heads=8, kv_heads=2, vocab=4096, layers=1)
    usual = Sizes(hidden=1024, intermediate=2048, layers=1)
    least = usual if total_bytes >= usual.total_bytes else small
    fixed = least.total_bytes - least.layer_bytes
    layers = max(1, round((total_bytes - fixed) / least.layer_bytes))
    return replace(least, layers=min(layers, _LAYERS_MAX))


def write_sample(folder: Path, sizes: Sizes) -> Path:
    """Write the model into ``folder``. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes.config()))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    numbers = _numbers()
    files = list(_files(sizes))
    placed: dict[str, str] = {}
    for index, tensors in enumerate(files):
        name = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        placed |= dict.fromkeys(tensors, name)
        _write(folder / name, tensors, numbers)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def _files(sizes: Sizes) -> Iterator[dict[str, tuple[int, ...]]]:
    file: dict[str, tuple[int, ...]] = {}
    room = _FILE_BYTES
    for name, shape in sizes.tensors():
        size = 2 * int(np.prod(shape))
        if file and size > room:
            yield file
            file, room = {}, _FILE_BYTES
        file[name] = shape
        room -= size
    yield file


def _numbers() -> NDArray[np.uint16]:
    values = np.random.default_rng(7).standard_normal(_BLOCK, np.float32)
    bits: NDArray[np.uint16] = (values.view(np.uint32) >> 16).astype(np.uint16)
    return bits


def _write(path: Path, tensors: dict[str, tuple[int, ...]], numbers: NDArray[np.uint16]) -> None:
    header: dict[str, object] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            scaled = _scaled(numbers, 1.0 if len(shape) == 1 else shape[-1] ** -0.5)
            left = int(np.prod(shape))
            while left:
                count = min(left, _BLOCK)
                file.write(scaled[:count].data)
                left -= count


def _scaled(numbers: NDArray[np.uint16], by: float) -> NDArray[np.uint16]:
    """The same numbers times a power of two near ``by``: only the exponent changes."""
    step = np.uint16(-round(np.log2(by)) << 7)
    large = (numbers & 0x7F80) > step
    return np.where(large, numbers - step, 0).astype(np.uint16)


def _tokenizer() -> dict[str, Any]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + index) for index in range(256 - len(printable))]
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": 0, "content": "</s>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    texts = ["</s>", *(chr(byte) for byte in printable), *others]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special | flags],
        "normalizer": None,
        "pre_tokenizer": byte,
        "post_processor": None,
        "decoder": byte,
        "model": {"type": "BPE", "vocab": {text: index for index, text in enumerate(texts)}, "merges": []},
    }
