"""The demo as a stranger runs it: real processes, the real model, a real kill, a real ledger."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from node.rig import wait_for

RIOS = [sys.executable, "-P", "-m", "node"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory):
    scratch = tmp_path_factory.mktemp("scratch")
    environ = {**os.environ, "TMPDIR": str(scratch)}
    started: set[psutil.Process] = set()
    with subprocess.Popen(
        [*RIOS, "demo", "--once", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        threading.Thread(target=_watch, args=(process.pid, started), daemon=True).start()
        stdout, stderr = process.communicate()
    result = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    return result, scratch, started


def _watch(pid: int, started: set[psutil.Process]) -> None:
    """Note every process that a process starts, while it lasts."""
    with suppress(psutil.Error):
        demo = psutil.Process(pid)
        while demo.is_running() and demo.status() != psutil.STATUS_ZOMBIE:
            started.update(demo.children(recursive=True))
            time.sleep(0.1)


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
    _, scratch, started = demo
    assert len(started) >= 3, "the nodes were seen"
    # a zombie has ended: where process 1 does not reap, those whose parent went first stay listed
    assert not [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
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
