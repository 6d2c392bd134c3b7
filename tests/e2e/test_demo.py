"""The demo as a stranger runs it: real processes, the real model, a real kill, a real ledger."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from node.rig import wait_for

RIOS = [sys.executable, "-P", "-m", "node"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory):
    scratch = tmp_path_factory.mktemp("scratch")
    before = {child.pid for child in psutil.process_iter()}
    environ = {**os.environ, "TMPDIR": str(scratch)}
    result = subprocess.run(
        [*RIOS, "demo", "--once", "--json"], capture_output=True, text=True, env=environ, check=False
    )
    left = [p for p in psutil.process_iter() if p.pid not in before and "node" in " ".join(_cmdline(p))]
    return result, scratch, left


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_it_ends_well_and_prints_one_line_of_json(demo):
    result, _, _ = demo
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert set(json.loads(result.stdout)) == {
        "answer",
        "reference_answer",
        "answer_after_kill",
        "tokens_per_s",
        "local_tokens_per_s",
        "nodes",
        "killed_peer",
        "ledger",
        "seconds",
    }


def test_three_answers_are_the_same_and_right(demo):
    outcome = json.loads(demo[0].stdout)
    assert "Paris" in outcome["answer"]
    assert outcome["answer"] == outcome["reference_answer"] == outcome["answer_after_kill"]


def test_every_node_did_work_and_stayed_small(demo):
    outcome = json.loads(demo[0].stdout)
    assert len(outcome["nodes"]) == 3
    assert all(node["expert_rows"] > 0 and node["layers"] and node["experts"] for node in outcome["nodes"])
    assert outcome["killed_peer"] in [node["peer_id"] for node in outcome["nodes"][1:]]
    assert all(node["rss_bytes"] < 400_000_000 for node in outcome["nodes"][1:])


def test_the_ledger_adds_up_on_both_survivors_and_workers_were_paid(demo):
    outcome = json.loads(demo[0].stdout)
    ledger = outcome["ledger"]
    survivors = {node["peer_id"] for node in outcome["nodes"]} - {outcome["killed_peer"]}
    assert set(ledger["verified"]) == survivors
    assert all(ledger["verified"].values())
    assert ledger["sum_ok"]
    assert ledger["entries"] > 0
    assert ledger["certificates"] > 0
    survivor = next(iter(survivors - {outcome["nodes"][0]["peer_id"]}))
    assert ledger["balances"][survivor] > 0


def test_nothing_is_left_behind(demo):
    _, scratch, processes = demo
    assert not processes
    assert not list(Path(scratch).glob("rios-*"))


def _hear_ctrl_c() -> None:
    """A shell starts what it puts in the background deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whatever_ends_it_early_it_tidies_up(tmp_path, number):
    environ = {**os.environ, "TMPDIR": str(tmp_path), "NO_COLOR": "1"}
    with subprocess.Popen(
        [*RIOS, "demo", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        preexec_fn=_hear_ctrl_c,
    ) as demo:
        wait_for(lambda: list(tmp_path.glob("rios-*/orchestrator/data/models")), "the import to begin", 60)
        started = psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(number)
        stdout, stderr = demo.communicate()
    assert started
    assert demo.returncode == 130
    assert json.loads(stdout)["error"]["code"] == "cancelled"
    assert "Traceback" not in stderr
    assert not any(process.is_running() for process in started)
    assert not list(tmp_path.iterdir())
