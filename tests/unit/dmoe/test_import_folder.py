"""Folders in Hugging Face layout: the logits are those of transformers, and what is wrong is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import trio
from msgspec.structs import replace

from config.errors import IntegrityError, LocalError
from config.generation import Message
from dmoe.golden import verify
from dmoe.importer import rows
from dmoe.importer.build import import_folder
from dmoe.importer.folder import FolderSource
from dmoe.layers import fused_runner, local_runner
from dmoe.runner import Feed
from dmoe.runtime import RuntimeOptions
from dmoe.store import ModelStore
from dmoe.text import Tokenizer
from tests.unit.dmoe.folder_kit import FAMILIES, stacked, weights, write_folder
from tests.unit.dmoe.model_kit import PUBLISHER, feed

OPTIONS = RuntimeOptions(device="cpu", threads=1)
REFERENCE = Path(__file__).resolve().parents[2] / "vectors" / "hf_reference.npz"


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE) as found:
        return dict(found)


class Files:
    """A model's files under a manifest that was changed for a test."""

    def __init__(self, store, manifest):
        self.store, self.manifest = store, manifest

    def open_shard(self, _, shard):
        return self.store.open_shard(self.manifest, shard)


async def imported(tmp_path, family, quantisation="source", **kwargs):
    folder = write_folder(tmp_path / "tiny", family, **kwargs)
    store = ModelStore(tmp_path / "models")
    run = lambda: import_folder(folder, store, PUBLISHER, quantisation=quantisation)  # noqa: E731
    return store, await trio.to_thread.run_sync(run)


async def compare(runner, wanted, name):
    """Largest difference over prefill and 20 greedy steps with cache; every token must be the reference's."""
    sequence = await runner.open(60)
    prefill = await feed(runner, sequence, wanted[f"{name}.ids"])
    worst, last = np.abs(prefill - wanted[f"{name}.prefill"]).max(), prefill[-1]
    for token, logits in zip(wanted[f"{name}.tokens"], wanted[f"{name}.logits"], strict=True):
        assert int(last.argmax()) == int(token)
        (last,) = await feed(runner, sequence, [token])
        worst = max(worst, np.abs(last - logits).max())
    print(f"{name}: largest difference {worst:.2e}")
    return float(worst)


@pytest.mark.parametrize(
    ("family", "dtype", "files"),
    [*((family, "F32", 1) for family in FAMILIES), ("llama", "BF16", 3), ("mixtral", "BF16", 3)],
)
async def test_logits_and_tokens_are_those_of_transformers(tmp_path, reference, family, dtype, files):
    store, manifest = await imported(tmp_path, family, dtype=dtype, files=files)
    exact = replace(manifest, wire_dtype="fp32")  # half floats between the parts would hide small faults
    files = Files(store, manifest)
    assert await compare(local_runner(exact, files, OPTIONS), reference, family) < 1e-4
    if family.startswith("llama"):
        assert await compare(fused_runner(manifest, store, OPTIONS), reference, family) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
async def test_sequences_of_unlike_lengths_go_through_together(tmp_path, reference, family):
    """Three prompts in one pass, then their tokens together: each has the logits that it has alone."""
    store, manifest = await imported(tmp_path, family)
    exact = replace(manifest, wire_dtype="fp32")
    runner = local_runner(exact, Files(store, manifest), OPTIONS)
    marks = ("", "0", "1")
    sequences = [await runner.open(40) for _ in marks]
    prompts = [tuple(map(int, reference[f"{family}.ids{mark}"])) for mark in marks]
    last = await runner.forward([Feed(sequence=s, tokens=ids) for s, ids in zip(sequences, prompts, strict=True)])
    for mark, logits in zip(marks, last, strict=True):
        assert np.abs(logits[0] - reference[f"{family}.prefill{mark}"][-1]).max() < 1e-4
    for step in range(3):
        tokens = [int(reference[f"{family}.tokens{mark}"][step]) for mark in marks]
        assert [int(logits[-1].argmax()) for logits in last] == tokens
        feeds = [Feed(sequence=s, tokens=(token,)) for s, token in zip(sequences, tokens, strict=True)]
        last = await runner.forward(feeds)
        for mark, logits in zip(marks, last, strict=True):
            assert np.abs(logits[0] - reference[f"{family}.logits{mark}"][step]).max() < 1e-4


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
async def test_experts_stacked_in_one_tensor_are_the_same_model(tmp_path, family):
    _, apart = await imported(tmp_path / "apart", family)
    _, together = await imported(tmp_path / "stacked", family, change=stacked(weights(family)))
    assert together.files() == apart.files()


async def test_a_layer_that_only_drafts_is_left_out(tmp_path):
    _, plain = await imported(tmp_path / "plain", "deepseek_v3")
    more = {"model.layers.3.eh_proj.weight": np.ones((64, 128), np.float32)}
    _, drafting = await imported(tmp_path / "drafting", "deepseek_v3", change=more)
    assert drafting.files() == plain.files()
    more = {"model.layers.4.input_layernorm.weight": np.ones(64, np.float32)}
    with pytest.raises(IntegrityError, match=r"layers\.4\.\S+ is beyond"):
        await imported(tmp_path / "beyond", "deepseek_v3", change=more)


@pytest.mark.parametrize("family", FAMILIES)
async def test_int8_stays_near_and_its_golden_logits_hold(tmp_path, reference, family):
    store, manifest = await imported(tmp_path, family, "int8", dtype="F16")
    assert manifest.quantisation == "int8"
    assert await verify(manifest, store, OPTIONS) < 1e-4
    runner = local_runner(manifest, store, OPTIONS)
    got = await feed(runner, await runner.open(60), reference[f"{family}.ids"])
    wanted = reference[f"{family}.prefill"]
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.97  # a router in doubt may choose otherwise


async def test_golden_logits_catch_other_weights(tmp_path):
    store, manifest = await imported(tmp_path, "mixtral", "fp32")
    wrong = replace(manifest.golden, logits=tuple(logit + 1 for logit in manifest.golden.logits))
    with pytest.raises(IntegrityError, match="golden logits"):
        await verify(replace(manifest, golden=wrong), Files(store, manifest), OPTIONS)


async def test_the_text_side_comes_along(tmp_path):
    store, manifest = await imported(tmp_path, "mixtral")
    assert manifest.name == "tiny"
    assert manifest.stop_tokens == (1, 3)  # config.json's, then <|im_end|>
    data = (tmp_path / "tiny" / "tokenizer.json").read_bytes()
    text = Tokenizer(data, manifest.chat_template)
    assert text.chat([Message(role="user", content="hi")])[0] == 0  # <s>, which the template names
    assert manifest.model_id in store.manifests()


def _refused(tmp_path, fault, family="mixtral", error=IntegrityError, after=None, **kwargs):
    folder = write_folder(tmp_path / "tiny", family, **kwargs)
    if after:
        after(folder)
    store = ModelStore(tmp_path / "models")
    with pytest.raises(error, match=fault):
        import_folder(folder, store, PUBLISHER)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "rope of type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "key factor is missing or no number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "rope"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs between kinds of layers"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "weights quantised by 'awq' are not supported"),
        ({"hidden_size": None}, "key hidden_size is missing or no number"),
        ({"num_local_experts": "six"}, "key num_local_experts is missing or no number"),
        ({"num_experts_per_tok": 9}, r"router\.top_k = 9"),
        ({"num_local_experts": 5}, r"gate\.weight has shape \[6, 64\], expected \[5, 64\]"),
        ({"num_hidden_layers": 2}, r"layers\.2\.\S+ is beyond"),
        ({"intermediate_size": 64}, r"experts\.0\.w1\.weight has shape \[96, 64\], expected \[64, 64\]"),
        ({"eos_token_id": 1000}, "eos_token_id 1000 is outside the vocabulary"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_name(tmp_path, config, fault):
    _refused(tmp_path, fault, config=config)


@pytest.mark.parametrize(
    ("family", "config", "fault"),
    [
        ("qwen2_moe", {"num_experts": None}, "key num_experts is missing"),
        ("qwen2_moe", {"mlp_only_layers": "1"}, "mlp_only_layers is no list of layers"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "no layer has experts"),
        ("qwen2_moe", {"qkv_bias": False}, r"q_proj\.bias' is not part of a supported model|bias"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ("qwen3_moe", {"layer_types": [], "use_sliding_window": True, "sliding_window": 8}, "layer_types"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid' is not supported"),
        ("deepseek_v2", {"n_group": 3}, "router.groups = 3"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy' is not supported"),
        ("deepseek_v3", {"kv_lora_rank": None}, "key kv_lora_rank is missing"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        ("olmoe", {"attention_bias": True}, r"lacks tensor \S+q_proj\.bias"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(tmp_path, family, config, fault):
    _refused(tmp_path, fault, family, config=config)


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("model.layers.2.block_sparse_moe.experts.3.w2.weight", None, "lacks tensor"),
        ("lm_head.weight", None, "lacks tensor lm_head.weight"),
        ("model.layers.0.self_attn.q_proj.bias", np.zeros(64, np.float32), "is not part of a supported model"),
        ("model.layers.1.self_attn.k_proj.weight", np.zeros((64, 64), np.float32), r"expected \[32, 64\]"),
        ("model.norm.weight", np.full(64, np.nan, np.float32), "not finite"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(tmp_path, name, values, fault):
    _refused(tmp_path, fault, change={name: values})


def test_a_type_that_is_not_supported_is_refused_by_name(tmp_path):
    _refused(tmp_path, r"tensor \S+ is F8_E4M3, which is not supported", dtype="F8_E4M3")


@pytest.mark.parametrize("keep", [0, 5, 300, -1, -100_000])
def test_a_truncated_weight_file_is_refused(tmp_path, keep):
    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])

    _refused(tmp_path, "model.safetensors is not a whole safetensors file", after=cut)


def test_a_missing_weight_file_is_named(tmp_path):
    def remove(folder):
        (folder / "model-00002-of-00003.safetensors").unlink()

    _refused(tmp_path, "model-00002-of-00003.safetensors is missing", error=LocalError, files=3, after=remove)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    def point(folder):
        index = {"weight_map": {"lm_head.weight": "../secret.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    _refused(tmp_path, "not a file of its folder", files=2, after=point)


def test_a_tokenizer_without_template_is_refused_unless_told(tmp_path):
    def strip(folder):
        (folder / "tokenizer_config.json").write_text("{}")

    _refused(tmp_path, "tokenizer_config.json has no chat_template", after=strip)
    (tmp_path / "tiny" / "chat_template.jinja").write_text("")
    assert import_folder(tmp_path / "tiny", ModelStore(tmp_path / "models"), PUBLISHER).chat_template == ""


@pytest.mark.parametrize(("content", "fault"), [(None, "has no tokenizer.json"), ("{}", "tokenizer file cannot")])
def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path, content, fault):
    def replace_it(folder):
        (folder / "tokenizer.json").unlink()
        if content is not None:
            (folder / "tokenizer.json").write_text(content)

    _refused(tmp_path, fault, after=replace_it)


def test_an_empty_folder_is_a_local_error(tmp_path):
    with pytest.raises(LocalError, match=r"has no config\.json"):
        import_folder(tmp_path, ModelStore(tmp_path / "models"), PUBLISHER)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_part_of_a_matrix_is_read_as_it_is(tmp_path, dtype):
    source = FolderSource(write_folder(tmp_path, "llama", dtype=dtype))
    name = "model.layers.1.mlp.down_proj.weight"
    part = source.linear(name, (64, 256), "fp32", (slice(None), slice(64, 128)))
    wanted = weights("llama")[name][:, 64:128]
    if dtype == "F16":
        wanted = wanted.astype(np.float16).astype(np.float32)
    assert part.parts["w"].tobytes() == np.ascontiguousarray(wanted).tobytes()


def test_an_older_tokenizer_says_how_to_convert_it(tmp_path):
    def swap(folder):
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")

    _refused(tmp_path, r"has no tokenizer\.json \(tokenizer\.model is the older form: convert it", after=swap)


def test_templates_and_ends_are_found_wherever_a_folder_keeps_them(tmp_path):
    folder = write_folder(tmp_path / "tiny", "llama", config={"eos_token_id": [1, 2]})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0]['content'] }}!")
    manifest = import_folder(folder, ModelStore(tmp_path / "models"), PUBLISHER)
    assert manifest.stop_tokens == (3, 1, 2)
    assert manifest.chat_template.endswith("!")
    assert '{%- set eos_token = "</s>" +%}' in manifest.chat_template


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        ("[1, 2", "is not readable JSON"),
        ("[]", "is not a JSON object"),
        ('{"weight_map": {"a": 1}}', "has no weight_map of texts"),
        ('{"weight_map": {}}', r"has no \.safetensors file"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "not a file of its folder"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "lacks tensor"),
    ],
)
def test_an_index_that_is_wrong_is_named(tmp_path, index, fault):
    def write(folder):
        (folder / "model.safetensors.index.json").write_text(index)

    _refused(tmp_path, fault, files=2, after=write, error=(IntegrityError, LocalError))


def test_a_tensor_that_two_files_hold_is_refused(tmp_path):
    def twice(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "more.safetensors").write_bytes(data)

    _refused(tmp_path, r"more\.safetensors: tensor \S+ is in another file too", after=twice)


def test_numbers_that_are_not_finite_are_found_in_the_last_block_too(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_WEIGHTS_MAX", 640)
    weight = np.zeros((260, 64), np.float32)
    weight[259, 63] = np.inf
    _refused(tmp_path, r"tensor lm_head\.weight holds numbers that are not finite", change={"lm_head.weight": weight})
