"""Tiny llama models with random weights, written as real GGUF files."""

import math
from functools import partial

import gguf
import numpy as np
import trio

from dmoe.importer.build import import_gguf
from dmoe.layers import local_runner
from dmoe.runner import Feed
from dmoe.runtime import RuntimeOptions
from dmoe.store import ModelStore
from p2p.core.identity import Identity
from tests.unit.dmoe.blocks_kit import random_blocks

PUBLISHER = Identity.from_seed(b"p" * 32)
HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH = 128, 3, 4, 2, 256
CHARACTERS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
TOKENS = ["<|endoftext|>", *CHARACTERS]
VOCAB = len(TOKENS)


def write_gguf(
    path, *, kind="Q4_1", experts=0, top_k=2, tied=True, seed=0, change=None, extra=None, control=(), hidden=HIDDEN
):
    """A llama with random weights of ``kind`` (or what it says of a tensor's name); ``change`` maps
    metadata keys to other values (None leaves one out), ``extra`` names further tensors, ``control`` further control
    tokens."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {
        "llama.block_count": LAYERS,
        "llama.context_length": 512,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] + [1] * len(CHARACTERS),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    if experts:
        metadata |= {"llama.expert_count": experts, "llama.expert_used_count": top_k}
    metadata["tokenizer.ggml.tokens"] = [*TOKENS, "ab", *control]
    metadata["tokenizer.ggml.token_type"] += [1] + [3] * len(control)
    vocabulary = VOCAB + 1 + len(control)
    for key, value in (metadata | (change or {})).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)

    def add(name, *shape, as_kind=kind):
        as_kind = as_kind(name) if callable(as_kind) else as_kind
        scale = 1.0 if as_kind == "one" else shape[-1] ** -0.5
        values = random.standard_normal(shape).astype(np.float32) * np.float32(scale)
        if as_kind == "one":
            writer.add_tensor(name, 1 + values / 10)
        elif as_kind in ("F32", "I8"):
            writer.add_tensor(name, values.astype(np.float32 if as_kind == "F32" else np.int8))
        else:
            of = gguf.GGMLQuantizationType[as_kind]
            try:
                data = gguf.quantize(values, of)
            except NotImplementedError:
                data = random_blocks(as_kind, math.prod(shape[:-1]), shape[-1], int(random.integers(1 << 30)), scale)
            writer.add_tensor(name, data.reshape(*shape[:-1], -1), raw_dtype=of)

    add("token_embd.weight", vocabulary, hidden, as_kind="F32" if kind == "F32" else "Q8_0")
    add("output_norm.weight", hidden, as_kind="one")
    if not tied:
        add("output.weight", vocabulary, hidden)
    kv_width = hidden // HEADS * KV_HEADS
    for layer in range(LAYERS):
        p = f"blk.{layer}."
        add(p + "attn_norm.weight", hidden, as_kind="one")
        add(p + "ffn_norm.weight", hidden, as_kind="one")
        add(p + "attn_q.weight", hidden, hidden)
        add(p + "attn_k.weight", kv_width, hidden)
        add(p + "attn_v.weight", kv_width, hidden)
        add(p + "attn_output.weight", hidden, hidden)
        if experts:
            add(p + "ffn_gate_inp.weight", experts, hidden, as_kind="F32")
            add(p + "ffn_gate_exps.weight", experts, WIDTH, hidden)
            add(p + "ffn_up_exps.weight", experts, WIDTH, hidden)
            add(p + "ffn_down_exps.weight", experts, hidden, WIDTH)
        else:
            add(p + "ffn_gate.weight", WIDTH, hidden)
            add(p + "ffn_up.weight", WIDTH, hidden)
            add(p + "ffn_down.weight", hidden, WIDTH)
    for name in extra or ():
        add(name, hidden, as_kind="one")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(folder, *, quantisation="source", **kwargs):
    """A store with one tiny imported model, and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_gguf(folder / "tiny.gguf", **kwargs)
    store = ModelStore(folder / "models")
    return store, import_gguf(path, store, PUBLISHER, quantisation=quantisation)


async def made(folder, **kwargs):
    """The same inside a running event loop, which an import would block."""
    return await trio.to_thread.run_sync(partial(tiny, folder, **kwargs))


def load(store, manifest, threads=1):
    """Route ``local``."""
    return local_runner(manifest, store, RuntimeOptions(device="cpu", threads=threads))


async def feed(runner, sequence, ids, outputs=None, want="logits"):
    """Append tokens to one sequence: the outputs of all of them, or of the last ``outputs``."""
    tokens = tuple(int(token) for token in ids)
    count = len(tokens) if outputs is None else outputs
    (out,) = await runner.forward([Feed(sequence=sequence, tokens=tokens, outputs=count, want=want)])
    return out


def numpy_logits(source, manifest, ids):
    """The same model in plain numpy and fp64, from the GGUF's own dequantised weights."""
    arch = manifest.architecture

    def tensor(name):
        found = source._tensor(name)
        values = gguf.dequantize(found.data, found.tensor_type).astype(np.float64)
        return values.reshape(source.shape(name))

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + arch.norm_eps) * tensor(name)

    def rope(x):
        angle = np.outer(np.arange(len(ids)), arch.rope_theta ** -(np.arange(0, arch.head_dim, 2) / arch.head_dim))
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    def silu_ffn(x, gate, up, down):
        a = x @ gate.T
        return (a / (1 + np.exp(-a)) * (x @ up.T)) @ down.T

    x = tensor("token_embd.weight")[ids]
    count, group = len(ids), arch.heads // arch.kv_heads
    for layer in range(arch.layers):
        p = f"blk.{layer}."
        h = norm(x, p + "attn_norm.weight")
        q = rope((h @ tensor(p + "attn_q.weight").T).reshape(count, arch.heads, -1))
        k = rope((h @ tensor(p + "attn_k.weight").T).reshape(count, arch.kv_heads, -1)).repeat(group, 1)
        v = (h @ tensor(p + "attn_v.weight").T).reshape(count, arch.kv_heads, -1).repeat(group, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(arch.head_dim)
        scores += np.triu(np.full((count, count), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(count, -1) @ tensor(p + "attn_output.weight").T
        h = norm(x, p + "ffn_norm.weight")
        if arch.router.kind == "all":
            x = x + silu_ffn(h, *(tensor(p + f"ffn_{part}.weight") for part in ("gate", "up", "down")))
            continue
        logits = h @ tensor(p + "ffn_gate_inp.weight").T
        gates = np.exp(logits - logits.max(-1, keepdims=True))
        gates /= gates.sum(-1, keepdims=True)
        stacks = [tensor(p + f"ffn_{part}_exps.weight") for part in ("gate", "up", "down")]
        for row in range(count):
            chosen = np.argsort(-gates[row], kind="stable")[: arch.router.top_k]
            share = gates[row, chosen] / gates[row, chosen].sum()
            for expert, weight in zip(chosen, share, strict=True):
                x[row] += weight * silu_ffn(h[row], *(stack[expert] for stack in stacks))
    head = "token_embd.weight" if arch.tie_embeddings else "output.weight"
    return norm(x, "output_norm.weight") @ tensor(head).T
