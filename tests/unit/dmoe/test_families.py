"""Families with norms of queries and keys, windows, shared experts and latent attention keep the rules of exactness."""

import numpy as np
import pytest

from dmoe.layers import local_runner
from dmoe.runtime import RuntimeOptions
from tests.unit.dmoe import folder_kit
from tests.unit.dmoe.exact_kit import all_ways_agree
from tests.unit.dmoe.test_import_folder import imported

IDS = [int(token) for token in np.random.default_rng(7).integers(0, 250, 70)]
FAMILIES = ("qwen2_moe", "qwen3_moe", "deepseek_v2_lite", "deepseek_v3")


@pytest.mark.parametrize("quantisation", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_the_same_bits_in_any_chunks_and_in_any_company(tmp_path, family, quantisation):
    store, manifest = await imported(tmp_path, family, quantisation)
    runner = local_runner(manifest, store, RuntimeOptions(device="cpu", threads=1))
    await all_ways_agree(runner, IDS)


@pytest.mark.parametrize(
    ("family", "sizes"), [("deepseek_v3", {"kv_lora_rank": 512, "qk_rope_head_dim": 64}), ("llama", {"head_dim": 256})]
)
async def test_wide_heads_sum_alike_at_every_length(tmp_path, monkeypatch, family, sizes):
    """A product of few columns is summed in longer slices: below 65 keys, heads wider than 128 would notice."""
    monkeypatch.setitem(folder_kit.CONFIGS, "wide", folder_kit.CONFIGS[family] | sizes | {"num_hidden_layers": 2})
    store, manifest = await imported(tmp_path, "wide", "fp32")
    assert manifest.architecture.keys_min == 65
    results = []
    for threads in (1, 2):
        runner = local_runner(manifest, store, RuntimeOptions(device="cpu", threads=threads))
        results.append(await all_ways_agree(runner, IDS))
    assert results[0].tobytes() == results[1].tobytes()
