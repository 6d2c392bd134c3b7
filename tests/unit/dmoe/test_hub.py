"""Fetching from a hub: only what an import needs, resumable, and a clear word about everything that goes wrong."""

import os

import httpx2
import huggingface_hub
import pytest

from config.errors import ConfigError, IntegrityError, LocalError
from dmoe.importer import hub as under_test
from dmoe.importer.build import Wishes, import_model
from dmoe.store import ModelStore
from tests.unit.dmoe.folder_kit import write_folder
from tests.unit.dmoe.hub_kit import COMMIT, point_at, serving
from tests.unit.dmoe.model_kit import PUBLISHER, write_gguf

RESOLVE = f"/owner/model/resolve/{COMMIT}/"


@pytest.fixture
def hub(monkeypatch):
    with serving() as (made, address):
        point_at(address, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield made
        huggingface_hub.close_session()


def put(hub, folder, prefix=""):
    for path in folder.iterdir():
        hub.files[prefix + path.name] = path.read_bytes()


def fetch(hub, tmp_path, text="hf:owner/model", show=lambda done, total, what: None, say=lambda text: None):
    return under_test.fetch(under_test.parse(text), tmp_path / "cache", show, say)


def fetched(hub):
    return [path.removeprefix(RESOLVE) for path, _, _ in hub.asked if path.startswith(RESOLVE)]


def test_a_folder_of_safetensors_comes_with_what_it_needs_and_imports(hub, tmp_path):
    put(hub, write_folder(tmp_path / "tiny", "mixtral", files=3))
    hub.files |= {
        "README.md": b"x",
        "pytorch_model.bin": b"x" * 99,
        "consolidated.safetensors": b"x",
        "tiny.gguf": b"x",
    }
    said, shown = [], []
    folder = fetch(hub, tmp_path, show=lambda *values: shown.append(values), say=said.append)
    names = {path.name for path in folder.iterdir()}
    wanted = {f"model-{index}-of-00003.safetensors" for index in ("00001", "00002", "00003")}
    wanted |= {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
    assert names == wanted == set(fetched(hub))
    assert "MB to fetch into" in said[0]
    assert "MB free" in said[0]
    assert shown[-1][0] == shown[-1][1] == sum(len(hub.files[name]) for name in wanted)
    assert {token for _, _, token in hub.asked} == {"Bearer hf_secret"}
    store = ModelStore(tmp_path / "models")
    manifest = import_model(folder, store, PUBLISHER, Wishes(name="model", origin="hf:owner/model"))
    assert (manifest.name, manifest.source.name) == ("model", "hf:owner/model")
    before = len(hub.asked)
    assert fetch(hub, tmp_path) == folder
    assert len(hub.asked) == before + 1  # what is here is not fetched again


@pytest.mark.parametrize(
    ("text", "names", "chosen"),
    [
        ("hf:owner/model", ["m.Q8_0.gguf", "m.Q4_K_M.gguf", "m.F16.gguf"], ["m.Q4_K_M.gguf"]),
        ("hf:owner/model", ["a.IQ9.gguf", "b.other.gguf"], ["a.IQ9.gguf"]),
        ("hf:owner/model:m.F16.gguf", ["m.Q4_K_M.gguf", "m.F16.gguf"], ["m.F16.gguf"]),
        (
            "hf:owner/model@v1:big/m-00001-of-00002.gguf",
            ["big/m-00002-of-00002.gguf", "big/m-00001-of-00002.gguf"],
            ["big/m-00001-of-00002.gguf", "big/m-00002-of-00002.gguf"],
        ),
    ],
)
def test_the_right_gguf_is_chosen(hub, tmp_path, text, names, chosen):
    hub.files = {name: name.encode() for name in names}
    path = fetch(hub, tmp_path, text)
    assert fetched(hub) == chosen
    assert str(path).endswith(chosen[0])
    assert path.read_bytes() == chosen[0].encode()


def test_a_gguf_file_imports(hub, tmp_path):
    hub.files["tiny.Q8_0.gguf"] = write_gguf(tmp_path / "tiny.gguf", kind="Q8_0").read_bytes()
    path = fetch(hub, tmp_path)
    assert import_model(path, ModelStore(tmp_path / "models"), PUBLISHER, Wishes()).name == "tiny"


def test_an_interrupted_download_goes_on_where_it_ended(hub, tmp_path):
    data = os.urandom(25 << 20)
    hub.files["m.gguf"] = data

    def interrupt(done, total, what):
        if done > 5 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(hub, tmp_path, show=interrupt)
    (part,) = (tmp_path / "cache").rglob("*.part")
    have = part.stat().st_size
    assert 5 << 20 < have < len(data)
    assert part.read_bytes() == data[:have]
    said = []
    path = fetch(hub, tmp_path, say=said.append)
    assert path.read_bytes() == data
    assert hub.asked[-1][1] == f"bytes={have}-"
    assert f"{(len(data) - have) / 1e6:.0f} MB to fetch" in said[0]
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_connection_that_breaks_again_and_again_keeps_what_came(hub, tmp_path):
    hub.files["m.gguf"] = os.urandom(25 << 20)
    hub.drop_after = 12 << 20  # of each answer: the library itself goes on until nothing new comes, in steps of 10 MiB
    assert fetch(hub, tmp_path).read_bytes() == hub.files["m.gguf"]
    ranges = [given for path, given, _ in hub.asked if path.startswith(RESOLVE)]
    assert ranges == [None, f"bytes={10 << 20}-", f"bytes={20 << 20}-"]


def test_a_file_with_another_hash_is_refused_and_fetched_anew(hub, tmp_path):
    hub.files["m.gguf"] = b"right"
    hub.lies["m.gguf"] = b"wrong"
    with pytest.raises(IntegrityError, match=r"m\.gguf came with another hash"):
        fetch(hub, tmp_path)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    hub.lies.clear()
    assert fetch(hub, tmp_path).read_bytes() == b"right"


@pytest.mark.parametrize(
    ("status", "code", "error", "says"),
    [
        (401, "RepoNotFound", "not_found", "no such repository, or it is private"),
        (404, "RepoNotFound", "not_found", "no such repository, or it is private"),
        (403, "GatedRepo", "forbidden", "open only to those who accepted its terms"),
        (404, "RevisionNotFound", "not_found", "no such revision"),
        (401, "", "unauthenticated", "the hub answered 401"),
        (400, "", "unavailable", "the hub answered 400"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, tmp_path, status, code, error, says):
    hub.errors["/api/models/owner/model"] = (status, code)
    with pytest.raises(LocalError, match=says) as caught:
        fetch(hub, tmp_path)
    assert caught.value.code == error
    assert caught.value.message.startswith("hf:owner/model")
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_gated_names_itself(hub, tmp_path):
    hub.files["m.gguf"] = b"x"
    hub.errors[RESOLVE + "m.gguf"] = (403, "GatedRepo")
    with pytest.raises(LocalError, match=r"hf:owner/model: m\.gguf is open only"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(
    ("files", "text", "error", "says"),
    [
        ({"pytorch_model.bin": b"x"}, "hf:owner/model", LocalError, r"has no \.safetensors and no \.gguf file"),
        ({"a.gguf": b"x"}, "hf:owner/model:b.gguf", LocalError, r"b\.gguf: there is no such file \(it has: a\.gguf"),
        ({"a-00001-of-00002.gguf": b"x"}, "hf:owner/model", LocalError, r"lacks a-00002-of-00002\.gguf"),
        ({"../a.gguf": b"x"}, "hf:owner/model", IntegrityError, r"lists a file called '\.\./a\.gguf'"),
        ({"/etc/a.gguf": b"x"}, "hf:owner/model", IntegrityError, "lists a file called"),
        (
            {"a.safetensors": b"x", "model.safetensors.index.json": b'{"weight_map": {"x": "../b.safetensors"}}'},
            "hf:owner/model",
            IntegrityError,
            "which is not there",
        ),
        (
            {"a.safetensors": b"x", "model.safetensors.index.json": b"[]"},
            "hf:owner/model",
            IntegrityError,
            "no weight_map",
        ),
    ],
)
def test_a_repository_that_cannot_be_imported_says_why(hub, tmp_path, files, text, error, says):
    hub.files = files
    with pytest.raises(error, match=says):
        fetch(hub, tmp_path, text)


def test_too_small_a_disk_is_seen_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    hub.files["m.gguf"] = bytes(1000)
    usage = under_test.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(under_test.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(LocalError, match="are free") as caught:
        fetch(hub, tmp_path)
    assert caught.value.code == "disk_full"
    assert fetched(hub) == []


def test_without_a_network_it_says_so(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LocalError, match="hf:owner/model: the connection failed") as caught:
        fetch(hub, tmp_path)
    assert caught.value.code == "unavailable"


@pytest.mark.parametrize(
    "text", ["hf:", "hf:model", "hf:a/b/c", "hf:owner/model:x.bin", "hf:owner/model@", "hf:../x y"]
)
def test_what_names_no_repository_is_refused(text):
    with pytest.raises((LocalError, ConfigError), match="names no repository"):
        under_test.parse(text)


@pytest.mark.skipif("RIOS_TEST_HUB" not in os.environ, reason="asks the real hub; set RIOS_TEST_HUB=1 to run it")
def test_the_real_hub_answers(tmp_path):
    try:
        path = under_test.fetch(
            under_test.parse("hf:HuggingFaceTB/SmolLM2-135M-Instruct"), tmp_path, lambda done, total, what: None
        )
    except (LocalError, httpx2.HTTPError) as error:
        pytest.skip(f"the hub cannot be reached: {error}")
    assert (path / "config.json").is_file()
