"""``rios bench``: real measurements of a small random model through the command line; figures fit each other."""

import json

import pytest

from node import bench
from node.cli import main

HIDDEN = 256


@pytest.fixture
def small(tmp_path, monkeypatch):
    """No store, no daemon, and random models of one layer."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RIOS_CONFIG", raising=False)
    small = {"hidden": HIDDEN, "heads": 8, "kv_heads": 2, "vocab": 300, "layers": 1, "intermediate": 64}
    monkeypatch.setattr(bench, "RANDOM", {"dense": {**small, "experts": 0}, "sparse": {**small, "experts": 8}})


def measured(capsys, *args):
    assert main(["bench", *args, "--seconds", "1", "--threads", "2", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_generation_is_measured_by_every_route_that_is_possible_here(small, capsys):
    data = measured(capsys, "generate", "--batch", "1,3", "--format", "fp32")
    assert (data["is_random"], data["daemon_running"], data["quantisation"]) == (True, False, "fp32")
    assert {(each["route"], each["batch"]) for each in data["routes"]} == {
        (route, batch) for route in ("fused", "local", "stages") for batch in (1, 3)
    }
    for each in data["routes"]:
        assert each["prefill_tokens_per_s"] > 0
        assert each["passes"] >= 3
        assert each["decode_ms_p50"] <= each["decode_ms_p99"]
        spent = each["passes"] * each["batch"] / each["decode_tokens_per_s"]
        assert spent >= 0.08  # its share of the second, all of it in passes


def test_experts_are_measured_by_rows_and_threads(small, capsys):
    data = measured(capsys, "expert", "--rows", "1,8")
    assert [(each["threads"], each["rows"]) for each in data["experts"]] == [(1, 1), (1, 8), (2, 1), (2, 8)]
    flops = 2 * 3 * 64 * HIDDEN
    for each in data["experts"]:
        assert each["gflop_per_s"] == pytest.approx(each["rows_per_s"] * flops / 1e9, rel=0.02, abs=0.01)
        assert each["weight_bytes_per_s"] > 0
        assert each["us_p50"] <= each["us_p99"]


def test_the_table_says_what_was_measured(small, capsys):
    assert main(["bench", "expert", "--rows", "2", "--seconds", "1", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "random-sparse (int8)" in out
    assert "random weights: there is no model here" in out
    assert out.splitlines()[3].split()[:3] == ["DEVICE", "THREADS", "ROWS"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate", "--batch", "0"], "--batch '0' is no list of numbers"),
        (["generate", "--batch", "1,two"], "--batch '1,two' is no list of numbers"),
        (["expert", "--rows", ""], "--rows '' is no list of numbers"),
        (["generate", "--seconds", "0"], "--seconds 0"),
        (["generate", "--route", "experts", "--seconds", "1"], "cannot run by route experts here"),
        (["generate", "nothing"], "nothing"),
    ],
)
def test_impossible_wishes_are_refused(small, capsys, args, says):
    assert main(["bench", *args]) in (1, 2)
    assert says in capsys.readouterr().err
