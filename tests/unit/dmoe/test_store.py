"""Models on disk: altered and truncated files are found and named, chunks are served, nothing is half there."""

import errno
import json
import os
from hashlib import sha256

import numpy as np
import pytest

from config.errors import IntegrityError, LocalError
from dmoe.core import linear
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.shardfile import ShardFile, to_bytes
from dmoe.store import ModelStore
from tests.unit.dmoe.model_kit import tiny


@pytest.fixture
def model(tmp_path):
    return tiny(tmp_path)


def first_file(store, manifest):
    shard = manifest.expert_shards()[0]
    return shard, store.path(manifest.model_id, shard.files[0])


def test_a_new_store_on_the_same_folder_knows_the_model(model):
    store, manifest = model
    again = ModelStore(store.root)
    assert again.manifests() == {manifest.model_id: manifest}
    assert all(again.has_shard(manifest.model_id, shard.id) for shard in manifest.shards)
    for wanted in (manifest.name, manifest.model_id, manifest.model_id[:10]):
        assert again.find(wanted) == manifest
    assert json.loads(again.read(manifest, manifest.tokenizer))["model"]["type"] == "BPE"
    assert again.disk_bytes() > sum(shard.size_bytes for shard in manifest.parts)


def test_unknown_models_are_named(model):
    store, manifest = model
    with pytest.raises(LocalError, match="'nothing' is not here") as caught:
        store.find("nothing")
    assert manifest.name in caught.value.hint
    with pytest.raises(LocalError, match="is not here"):
        store.manifest("0" * 64)


def test_a_truncated_file_is_found_and_named(model):
    store, manifest = model
    shard, path = first_file(store, manifest)
    assert store.has_shard(manifest.model_id, shard.id)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(IntegrityError, match=rf"{path.name} has {size - 1} bytes instead of {size}"):
        store.verify_shard(manifest.model_id, shard.id)
    with pytest.raises(IntegrityError, match=path.name):
        ExpertShard(manifest, shard, store, RuntimeOptions(device="cpu"))


def test_a_changed_byte_is_found_and_named(model):
    store, manifest = model
    shard, path = first_file(store, manifest)
    assert store.has_shard(manifest.model_id, shard.id)
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(1, 1))
    with pytest.raises(IntegrityError, match=f"{path.name} was altered"):
        store.verify_shard(manifest.model_id, shard.id)
    assert not store.has_shard(manifest.model_id, shard.id)


def test_a_missing_file_is_named(model):
    store, manifest = model
    shard, path = first_file(store, manifest)
    store.remove_shard(manifest.model_id, shard.id)
    with pytest.raises(LocalError, match=rf"{path.name} is missing"):
        store.verify_shard(manifest.model_id, shard.id)


def test_a_file_that_cannot_be_deleted_is_named(model, monkeypatch):
    store, manifest = model
    shard, path = first_file(store, manifest)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(path), "unlink", read_only)
    with pytest.raises(LocalError, match=f"{path.name}: Read-only"):
        store.remove_shard(manifest.model_id, shard.id)


def test_chunks_are_served_by_their_hash_and_never_altered(model):
    store, manifest = model
    shard, path = first_file(store, manifest)
    whole = b""
    for chunk in shard.files[0].content().chunks:
        data = store.read_chunk(chunk)
        assert sha256(data).digest() == chunk
        whole += data
    assert whole == path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    assert store.read_chunk(shard.files[0].content().chunks[0]) is None
    assert store.read_chunk(bytes(32)) is None


def test_a_manifest_alone_can_be_kept_and_removed(model, tmp_path):
    _, manifest = model
    other = ModelStore(tmp_path / "other")
    other.add_manifest(manifest)
    assert ModelStore(other.root).find(manifest.name) == manifest
    assert not other.has_shard(manifest.model_id, manifest.trunk.id)
    other.remove(manifest.model_id)
    assert ModelStore(other.root).manifests() == {}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data.replace(b'"tiny"', b'"tinx"'), "signature"),
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: b"", "damaged"),
        (lambda data: b"\xff" * 100, "damaged"),
    ],
)
def test_a_damaged_manifest_is_passed_over_and_named(model, damage, said, caplog):
    store, manifest = model
    path = store.root / manifest.model_id / "manifest.json"
    good = path.read_bytes()
    path.write_bytes(damage(good))
    (store.root / ("0" * 64)).mkdir()
    (store.root / ("0" * 64) / "manifest.json").write_bytes(good)  # of another model
    again = ModelStore(store.root)
    assert again.manifests() == {}
    assert set(again.damaged) == {path.parent, store.root / ("0" * 64)}
    error = again.damaged[path.parent]
    assert str(path) in error.message
    assert said in error.message
    assert str(path) in caplog.text
    assert "import it again" in error.hint
    again.add_manifest(manifest)  # as it comes back from a peer
    assert path.parent not in again.damaged
    assert all(again.has_shard(manifest.model_id, shard.id) for shard in manifest.shards)


def test_a_dead_import_is_no_model(model):
    store, _ = model
    (store.root / ".importing-dead").mkdir()
    assert len(ModelStore(store.root).manifests()) == 1


def write(path, header, data=b"\0" * 64):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"t": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (b"{", "truncated"),
        (b"{ ", "not JSON"),
        (b"[1]", "not an object"),
        (b"[" * 100_000, "nested too deeply"),
        ({"t": 5}, "described wrongly"),
        (entry(dtype="F64", shape=(8,), offsets=(0, 64)), "not one of F32"),
        (entry(shape=(5,)), "does not fit its bytes"),
        (entry(offsets=(0, 1600), shape=(400,)), "lies outside the file"),
        (entry(offsets=(-16, 0)), "impossible"),
        (entry(shape=(1 << 50,)), "impossible"),
        (entry(shape=("4",)), "impossible"),
    ],
)
def test_a_strangers_header_cannot_reach_outside_its_file(tmp_path, header, fault):
    with pytest.raises(IntegrityError, match=fault):
        ShardFile(write(tmp_path / "bad.safetensors", header))


def test_short_files_are_refused(tmp_path):
    for data in (b"", b"1234", (1 << 60).to_bytes(8, "little") + b"x" * 50):
        path = tmp_path / "short.safetensors"
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match="short"):
            ShardFile(path)


def test_shard_files_are_ordinary_safetensors(tmp_path):
    from safetensors.numpy import load_file

    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(8, dtype=np.uint8)}
    path = tmp_path / "plain.safetensors"
    path.write_bytes(b"".join(to_bytes(tensors)))
    ours, theirs = ShardFile(path).tensors, load_file(path)
    for name, tensor in tensors.items():
        assert np.array_equal(ours[name], tensor)
        assert np.array_equal(theirs[name], tensor)


def test_wrong_tensors_are_named():
    tensors = {"x.q8": np.zeros((4, 2, 32), np.uint8), "x.s": np.zeros((4, 3), np.float32)}
    with pytest.raises(IntegrityError, match=r"tensor x\.s is float32\[4, 3\], not float32\[4, 2\]"):
        linear.find(tensors, "x", 4, 64)
    with pytest.raises(IntegrityError, match="tensor y is missing"):
        linear.find(tensors, "y", 4, 64)
    with pytest.raises(IntegrityError, match=r"tensor norm is not f32\[4\]"):
        linear.vector(tensors, "norm", 4)


def test_without_a_gpu_auto_runs_and_cuda_says_why():
    assert RuntimeOptions(device="auto").providers()[-1] == "CPUExecutionProvider"
    if len(RuntimeOptions(device="auto").providers()) == 1:
        with pytest.raises(LocalError, match="no CUDA runtime"):
            RuntimeOptions(device="cuda").providers()
