"""``rios model import`` and ``rios bench import`` over real files."""

import json
import signal
import subprocess
import sys
import time

import huggingface_hub
import pytest

from dmoe.importer.sample import Sizes, write_sample
from node.cli import main
from tests.unit.dmoe.folder_kit import write_folder
from tests.unit.dmoe.hub_kit import point_at, serving


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RIOS_CONFIG", str(tmp_path / "rios.toml"))
    assert main(["init", "--set", f"node.data_dir={tmp_path}/data"]) == 0
    return tmp_path


def answer(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_folder_is_imported_and_cut_as_asked(home, capsys):
    folder = write_folder(home / "tiny", "mixtral")
    options = ["--name", "mine", "--licence", "mit", "--experts-per-shard", "2", "--layers-per-shard", "1"]
    assert main(["model", "import", str(folder), *options, "--layers-per-stage", "3", "--json"]) == 0
    data = answer(capsys)
    assert (data["name"], data["licence"], data["stages"]) == ("mine", "mit", 1)
    assert data["shards"] == 3 * 3 + 1 + 1  # three groups of three layers, the trunk, the stage
    assert main(["model", "verify", "mine", "--json"]) == 0
    assert answer(capsys)["golden_difference"] == 0.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--experts-per-shard", "0"], "'0' is not a number of one or more"),
        (["--experts-per-shard", "7"], "--experts-per-shard 7 is not within 1..6"),
        (["--format", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(home, capsys, options, says):
    folder = write_folder(home / "tiny", "mixtral")
    assert main(["model", "import", str(folder), *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("source", ["none.gguf", "hf:one", "hf:a/b:c.bin"])
def test_a_source_that_is_none_is_explained(home, capsys, source):
    assert main(["model", "import", source]) == 1
    assert "names no repository" in (said := capsys.readouterr().err) or "there is no file" in said


def test_bench_import_measures_and_keeps_nothing(home, capsys):
    assert main(["bench", "import", "--mb", "5", "--format", "int8", "--json"]) == 0
    data = answer(capsys)
    assert data["format"] == "int8"
    assert data["source_bytes"] > 4_000_000
    assert data["peak_bytes"] > data["peak_above_start_bytes"] >= 0
    assert {"read headers", "write shards", "golden logits"} <= set(data["phases_s"])
    assert main(["bench", "import", "--mb", "5"]) == 0
    assert "peak memory" in capsys.readouterr().out
    models = home / "data" / "models"
    models.mkdir(parents=True, exist_ok=True)
    assert main(["bench", "import", "--mb", "5"]) == 0  # on the disk that models are on
    assert list(models.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(home):
    source = write_sample(home / "sample", Sizes(hidden=512, layers=8, intermediate=1024, vocab=8192))
    command = [sys.executable, "-m", "node", "model", "import", str(source)]
    models = home / "data" / "models"
    with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
        while running.poll() is None and not list(models.glob(".importing-*/trunk/*")):
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate()
    assert running.returncode == 130
    assert b"interrupted" in said
    assert list(models.iterdir()) == []


def test_a_model_of_a_hub_is_fetched_and_imported(home, capsys, monkeypatch):
    folder = write_folder(home / "files", "llama")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    with serving() as (hub, address):
        point_at(address, monkeypatch)
        hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert main(["model", "import", "hf:owner/model@main", "--json"]) == 0
        said = capsys.readouterr()
        huggingface_hub.close_session()
    assert json.loads(said.out.splitlines()[-1])["name"] == "model"
    assert "hf:owner/model@main: 4 files" in said.err
    (manifest,) = (home / "data" / "models").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["source"]["name"] == "hf:owner/model@main"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([""], "no source"),
        (["tiny", "--name", "a\x1b[31m"], "characters that cannot be shown"),
    ],
)
def test_a_name_obeys_no_terminal_and_no_source_is_not_this_folder(home, capsys, monkeypatch, arguments, says):
    write_folder(home / "tiny", "mixtral")
    monkeypatch.chdir(home)
    assert main(["model", "import", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert main(["model", "ls"]) == 0
    assert "no models" in capsys.readouterr().out


def test_a_quantised_folder_says_by_what(home, capsys):
    folder = write_folder(home / "tiny", "mixtral")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["model", "import", str(folder)]) == 1
    assert "quantised by 'gptq'" in capsys.readouterr().err


def test_an_imported_mixture_answers_here_without_flags(home, capsys):
    assert main(["model", "import", str(write_folder(home / "tiny", "mixtral"))]) == 0
    capsys.readouterr()
    assert main(["embed", "--local", "--json", "abc"]) == 0
    assert answer(capsys)["route"] == "local"


def test_memory_that_is_missing_is_no_fault_of_rios(home, capsys, monkeypatch):
    def full(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr("dmoe.importer.walled._Parent.run", full)
    assert main(["model", "import", str(write_folder(home / "tiny", "mixtral"))]) == 1
    assert "not enough memory" in capsys.readouterr().err
    assert not list((home / "data" / "models").iterdir())


def test_a_stage_host_that_is_no_peer_is_found_by_the_check(home, capsys):
    assert main(["config", "check", "--set", "dmoe.stage_hosts=12D3KooW,x"]) == 2
    assert "'x' is no peer id" in capsys.readouterr().err
