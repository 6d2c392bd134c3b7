"""An import that streams writes the same bytes and computes the same logits as one that holds the model in memory."""

import json
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import trio

from config.errors import IntegrityError
from dmoe import layerwise
from dmoe.core.linear import Linear
from dmoe.core.manifest import CHUNK_BYTES
from dmoe.importer import rows, write
from dmoe.importer.build import import_folder, import_gguf
from dmoe.importer.quantise import convert, quantise_int8
from dmoe.importer.rows import Rows
from dmoe.importer.sample import Sizes, write_sample
from dmoe.runtime import RuntimeOptions
from dmoe.shardfile import ShardFile, to_bytes
from dmoe.store import ModelStore
from tests.unit.dmoe.folder_kit import write_folder
from tests.unit.dmoe.model_kit import PUBLISHER, feed, load, write_gguf


def imported(root, source, quantisation):
    run = import_folder if source.is_dir() else import_gguf
    store = ModelStore(root)
    return store, run(source, store, PUBLISHER, quantisation=quantisation)


@pytest.mark.parametrize(
    ("kind", "quantisation"), [("Q4_1", "source"), ("F16", "source"), ("F16", "int8"), ("Q5_1", "int4")]
)
def test_whatever_the_size_of_a_block_the_files_have_the_same_bytes(tmp_path, monkeypatch, kind, quantisation):
    path = write_gguf(tmp_path / "tiny.gguf", kind=kind, experts=4, tied=False)
    monkeypatch.setattr(rows, "BLOCK_WEIGHTS_MAX", 1 << 40)
    _, whole = imported(tmp_path / "whole", path, quantisation)
    # a row, a few rows, across the edges of q, k and v; the search for int4 is slow in small blocks
    for size in (5000,) if quantisation == "int4" else (1, 1000, 5000):
        monkeypatch.setattr(rows, "BLOCK_WEIGHTS_MAX", size)
        store, manifest = imported(tmp_path / str(size), path, quantisation)
        assert manifest.model_id == whole.model_id
    for shard in manifest.shards:
        for file in shard.files:
            data = store.path(manifest.model_id, file).read_bytes()
            assert data == b"".join(to_bytes(ShardFile(store.path(manifest.model_id, file)).tensors))
            assert file.sha256 == sha256(data).hexdigest()
            assert file.size_bytes == len(data)


def test_hashes_are_right_where_tensors_and_chunks_do_not_end_together(tmp_path):
    random = np.random.default_rng(3)
    weights = random.standard_normal((9001, 96)).astype(np.float32)
    layer = Rows(9001, 96, "m", lambda part: quantise_int8(weights[part]))
    vector = random.standard_normal(777).astype(np.float32)
    counted = []
    file, params = write.write_shard(
        write.FolderTarget(tmp_path), "a/b.safetensors", [("v", vector), ("m", layer)], counted.append
    )
    data = (tmp_path / "a" / "b.safetensors").read_bytes()
    wanted = {"v": vector, **quantise_int8(weights).tensors("m")}
    assert data == b"".join(to_bytes(wanted))
    assert file.chunks == tuple(
        sha256(data[at : at + CHUNK_BYTES]).hexdigest() for at in range(0, len(data), CHUNK_BYTES)
    )
    assert params == 777 + 9001 * 96
    assert sum(counted) == len(data) == write.size_of(write.shapes_of([("v", vector), ("m", layer)]))


def test_layers_in_different_forms_are_joined_in_one_form_in_every_block():
    random = np.random.default_rng(4)
    weights = random.standard_normal((64, 64)).astype(np.float32)
    plain, coded = Linear({"w": weights}), quantise_int8(weights)
    both = rows.joined([Rows(64, 64, "a", plain.take_rows), Rows(64, 64, "b", coded.take_rows)])
    for part in (slice(0, 5), slice(60, 70), slice(100, 128)):
        expected = np.concatenate([weights, coded.dequantised()])[part]
        found = both.read(part)
        assert found.form == both.sample().form
        assert (found.dequantised() == expected).all()


def test_a_number_that_half_floats_cannot_hold_is_named_and_odd_rows_stay_plain():
    weights = np.ones((6, 32), np.float32)
    weights[4, 3] = 1e6
    layer = Rows(6, 32, "blk.0.x", lambda part: convert(Linear({"w": weights[part]}), "fp16"))
    with pytest.raises(IntegrityError, match=r"tensor blk\.0\.x holds numbers that h cannot hold"):
        list(layer.blocks())
    odd = Rows(6, 3, "odd", lambda part: convert(Linear({"w": weights[part, :3]}), "fp16"))
    assert [block.form.suffixes for _, block in odd.blocks()] == [("w",)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("family", "quantisation"), [("llama", "fp32"), ("llama", "int8"), ("mixtral", "fp32"), ("mixtral", "int8")]
)
async def test_layer_by_layer_gives_the_bits_of_the_whole_model(tmp_path, monkeypatch, family, quantisation, threads):
    source = write_folder(tmp_path / "tiny", family)
    store, manifest = await trio.to_thread.run_sync(imported, tmp_path / "models", source, quantisation)
    await _check(store, manifest, threads, monkeypatch)


@pytest.mark.parametrize("experts", [0, 4])
async def test_layer_by_layer_gives_the_bits_of_the_whole_model_in_int4(tmp_path, monkeypatch, experts):
    source = write_gguf(tmp_path / "tiny.gguf", kind="Q4_1", experts=experts, tied=False)
    store, manifest = await trio.to_thread.run_sync(imported, tmp_path / "models", source, "source")
    await _check(store, manifest, 1, monkeypatch)


async def _check(store, manifest, threads, monkeypatch):
    monkeypatch.setattr(layerwise, "HEAD_WEIGHTS_MAX", 1)  # the head in blocks of 64 rows
    options = RuntimeOptions(device="cpu", threads=threads)
    prompt = [(31 * index + 5) % manifest.architecture.vocab for index in range(20)]
    runner = load(store, manifest, threads)
    (wanted,) = await feed(runner, await runner.open(20), prompt, 1)
    ran = []
    found = await layerwise.last_logits(manifest, store, options, prompt, ran.append)
    assert found.tobytes() == wanted.tobytes()
    assert sum(ran) > 0


async def test_a_real_model_layer_by_layer_gives_its_bits(smollm2_store):
    (manifest,) = smollm2_store.manifests().values()
    options = RuntimeOptions(device="cpu", threads=2)
    runner = load(smollm2_store, manifest, 2)
    (wanted,) = await feed(runner, await runner.open(7), [1, 4, 9, 16, 25, 36, 49], 1)
    found = await layerwise.last_logits(manifest, smollm2_store, options, [1, 4, 9, 16, 25, 36, 49])
    assert found.tobytes() == wanted.tobytes()


_CHILD = """
import json, resource, sys
from pathlib import Path
from dmoe.importer.build import import_folder
from dmoe.store import ModelStore
from p2p.core.identity import Identity
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = ModelStore(Path(sys.argv[2]))
import_folder(Path(sys.argv[1]), store, Identity.from_seed(bytes(32)), quantisation=sys.argv[3], threads=1)
print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.parametrize("quantisation", ["fp32", "int8"])
def test_memory_does_not_grow_with_the_model(tmp_path, quantisation):
    sizes = Sizes(hidden=512, layers=6, experts=4, intermediate=1024, vocab=24000)
    source = write_sample(tmp_path / "sample", sizes)
    command = [sys.executable, "-c", _CHILD, str(source), str(tmp_path / "models"), quantisation]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, peak = (kib << 10 for kib in json.loads(done.stdout))
    as_fp32 = 2 * sizes.total_bytes
    assert as_fp32 > 250 << 20
    print(f"{(peak - before) >> 20} MiB above {before >> 20} MiB")
    assert peak - before < 120 << 20  # blocks, and one expert or one block of the head: not the model, not a file
