"""MoE families in GGUF files: the same weights as a folder in Hugging Face layout give the same logits."""

import numpy as np
import pytest
import trio
from msgspec.structs import replace

from config.errors import IntegrityError
from dmoe.importer.build import import_folder, import_gguf
from dmoe.store import ModelStore
from tests.unit.dmoe.folder_kit import in_mxfp4, weights, write_folder
from tests.unit.dmoe.gguf_kit import ARCHITECTURES, PLAIN, write_family_gguf
from tests.unit.dmoe.model_kit import PUBLISHER, feed
from tests.unit.dmoe.test_import_folder import OPTIONS, Files, local_runner

IDS = [int(token) for token in np.random.default_rng(3).integers(3, 259, 24)]
FAMILIES = [name for name in ARCHITECTURES if name not in PLAIN]


async def logits(make, path, folder, **options):
    """All positions' logits of an imported model, without the roundings of the wire."""
    store = ModelStore(folder)
    manifest = await trio.to_thread.run_sync(lambda: make(path, store, PUBLISHER, **options))
    exact = replace(manifest, wire_dtype="fp32")
    runner = local_runner(exact, Files(store, manifest), OPTIONS)
    return manifest, await feed(runner, await runner.open(60), IDS)


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_gguf_is_the_model_of_the_folder(tmp_path, family):
    _, wanted = await logits(import_folder, write_folder(tmp_path / "hf", family), tmp_path / "a")
    path = write_family_gguf(tmp_path / "tiny.gguf", family)
    manifest, got = await logits(import_gguf, path, tmp_path / "b")
    assert np.abs(got - wanted).max() < 2e-5
    assert manifest.architecture.family == ARCHITECTURES[family]


@pytest.mark.parametrize("family", ["deepseek_v2_lite", "deepseek_v3"])
async def test_older_files_keep_latent_attention_in_one_tensor(tmp_path, family):
    _, wanted = await logits(import_gguf, write_family_gguf(tmp_path / "new.gguf", family), tmp_path / "a")
    old = write_family_gguf(tmp_path / "old.gguf", family, split=False)
    assert np.abs((await logits(import_gguf, old, tmp_path / "b"))[1] - wanted).max() < 2e-5


async def test_gpt_oss_in_mxfp4_is_the_same_model_in_both_layouts(tmp_path):
    """Its experts are on that format's grid, so nothing is lost: in fp32 all four give the same logits."""
    held = weights("gpt_oss")
    plain = await logits(import_folder, write_folder(tmp_path / "f32", "gpt_oss"), tmp_path / "a")
    packed = write_folder(
        tmp_path / "mxfp4",
        "gpt_oss",
        dtype="BF16",
        change=in_mxfp4(held),
        config={"quantization_config": {"quant_method": "mxfp4"}},
    )
    blocks = write_family_gguf(tmp_path / "x.gguf", "gpt_oss", kinds=_experts_in("MXFP4"))
    for index, (make, path) in enumerate([(import_folder, packed), (import_gguf, blocks)]):
        as_floats = await logits(make, path, tmp_path / f"b{index}", quantisation="fp32")
        assert np.abs(as_floats[1] - plain[1]).max() < 1e-6
        manifest, codes = await logits(make, path, tmp_path / f"c{index}")
        assert np.corrcoef(codes.ravel(), plain[1].ravel())[0, 1] > 0.99  # activations are rounded to 8 bits
        store = ModelStore(tmp_path / f"c{index}")
        files = [file for shard in manifest.expert_shards() for file in store.open_shard(manifest, shard)]
        found = {name for file in files for name in file.tensors}
        assert {"layer.0.expert.0.gate_up.q8", "layer.0.expert.0.gate_up.s", "layer.0.expert.0.gate_up.bias"} <= found
        assert "layer.0.expert.0.gate_up.w" not in found


def _experts_in(kind):
    return lambda name: kind if name.endswith("_exps.weight") else "F32"


@pytest.mark.parametrize("quantisation", ["source", "int8", "int4", "fp16"])
async def test_experts_of_a_quantised_file_in_every_format(tmp_path, quantisation):
    _, wanted = await logits(import_folder, write_folder(tmp_path / "hf", "qwen3_moe_gguf"), tmp_path / "a")
    path = write_family_gguf(tmp_path / "tiny.gguf", "qwen3_moe_gguf", kinds=_experts_in("Q8_0"))
    manifest, got = await logits(import_gguf, path, tmp_path / "b", quantisation=quantisation)
    assert manifest.quantisation == quantisation
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > (0.85 if quantisation == "int4" else 0.97)


@pytest.mark.parametrize(
    ("family", "change", "fault"),
    [
        ("mixtral", {"llama.rope.scaling.type": "longrope"}, "rope.scaling.type = 'longrope' is not supported"),
        ("deepseek_v3", {"deepseek2.expert_gating_func": 7}, "expert_gating_func = 7 is not supported"),
        ("deepseek_v3", {"deepseek2.attention.kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("deepseek_v2_lite", {"deepseek2.leading_dense_block_count": 3}, "no layer has experts"),
        ("gpt_oss", {"gpt-oss.attention.sliding_window": None}, "sliding_window is missing"),
        ("gpt_oss", {"gpt-oss.rope.scaling.attn_factor": 2.0}, "attn_factor = 2.0 is not supported"),
        ("olmoe", {"olmoe.expert_used_count": 0}, r"router\.top_k = 0"),
        ("qwen3_moe_gguf", {"qwen3moe.attention.value_length": 16}, "value_length differs"),
        ("qwen2_moe_gguf", {"general.architecture": "qwen4moe"}, "architecture 'qwen4moe' is not supported"),
    ],
)
def test_metadata_that_are_not_supported_are_refused_by_name(tmp_path, family, change, fault):
    path = write_family_gguf(tmp_path / "tiny.gguf", family, change=change)
    store = ModelStore(tmp_path / "models")
    with pytest.raises(IntegrityError, match=fault):
        import_gguf(path, store, PUBLISHER)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt_oss", "blk.1.attn_sinks.weight"),
        ("gpt_oss", "blk.2.ffn_up_exps.bias"),
        ("qwen2_moe_gguf", "blk.0.attn_k.bias"),
        ("qwen3_moe_gguf", "blk.0.attn_q_norm.weight"),
        ("deepseek_v3", "blk.1.exp_probs_b.bias"),
        ("deepseek_v3", "blk.2.ffn_gate_exps.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(tmp_path, family, name):
    path = write_family_gguf(tmp_path / "tiny.gguf", family, drop=(name,))
    with pytest.raises(IntegrityError, match=f"lacks tensor {name}"):
        import_gguf(path, ModelStore(tmp_path / "models"), PUBLISHER)


def test_rope_factors_of_another_model_are_refused(tmp_path):
    path = write_family_gguf(tmp_path / "tiny.gguf", "llama3_gguf", change={"llama.rope.freq_base": 10000.0})
    with pytest.raises(IntegrityError, match=r"rope_freqs\.weight scales the rope otherwise"):
        import_gguf(path, ModelStore(tmp_path / "models"), PUBLISHER)


def test_damaged_mxfp4_tensors_are_named(tmp_path):
    change = in_mxfp4(weights("gpt_oss"))
    name = "model.layers.1.mlp.experts.down_proj_scales"
    change[name] = change[name][:, :-1]
    folder = write_folder(tmp_path / "hf", "gpt_oss", change=change)
    with pytest.raises(IntegrityError, match=r"down_proj_scales is U8\[6, 63, 3\], expected U8\[6, 64, 3\]"):
        import_folder(folder, ModelStore(tmp_path / "models"), PUBLISHER)


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt_oss", "MXFP4"), ("qwen2_moe_gguf", "Q5_1"), ("deepseek_v3", "Q4_0")]
)
async def test_rows_have_the_same_bits_however_they_arrive(tmp_path, family, kind):
    path = write_family_gguf(tmp_path / "tiny.gguf", family, kinds=_experts_in(kind))
    store = ModelStore(tmp_path / "models")
    manifest = await trio.to_thread.run_sync(lambda: import_gguf(path, store, PUBLISHER))
    runner = local_runner(manifest, store, OPTIONS)
    found = []
    for sizes in ([24], [7] + [1] * 17, [5, 5, 5, 9]):
        sequence, rows, start = await runner.open(40), [], 0
        for size in sizes:
            rows.append(await feed(runner, sequence, IDS[start : start + size]))
            start += size
        found.append(np.concatenate(rows))
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()


def test_weights_of_16_bits_are_counted_as_the_memory_they_run_in(tmp_path):
    folder = write_folder(tmp_path / "hf", "mixtral", dtype="BF16")
    kept = import_folder(folder, ModelStore(tmp_path / "a"), PUBLISHER)
    floats = import_folder(folder, ModelStore(tmp_path / "b"), PUBLISHER, quantisation="fp32")
    for narrow, wide in zip(kept.shards, floats.shards, strict=True):
        assert narrow.size_bytes < 0.6 * wide.size_bytes
        assert abs(narrow.ram_bytes - wide.ram_bytes) < 20_000


async def test_a_model_in_several_parts_is_the_same_model(tmp_path):
    _, wanted = await logits(import_gguf, write_family_gguf(tmp_path / "whole.gguf", "olmoe"), tmp_path / "a")
    first = write_family_gguf(tmp_path / "split.gguf", "olmoe", parts=9)
    manifest, got = await logits(import_gguf, first, tmp_path / "b")
    assert got.tobytes() == wanted.tobytes()
    assert manifest.source.name == first.name == "split-00001-of-00005.gguf"
