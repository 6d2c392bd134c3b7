"""Whole daemons that die, freeze, run out of disk or live in another day, and what the operator sees of replicas.

Two nodes ask and pay (by way of experts, which founded the network and is its witness; by way of stages), two serve.
``FAULT_ROUNDS`` makes the loop of kills longer (``make faults``).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import pytest

from config.errors import RiosError
from node.rig import NodeProcess, rios, rios_command, wait_for
from tests.faults.rig import LEAVING, MODEL, Rig, small_disk, swarm_of, tell

TOKENS = 300
ROUNDS = int(os.environ.get("FAULT_ROUNDS", "6"))
DAY = 24 * 3600


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with swarm_of(tmp_path_factory.mktemp("processes"), mode="both", routes=("experts", "stages")) as made:
        yield made


@pytest.fixture(scope="module")
def texts(rig: Rig) -> dict[str, str]:
    """The answers without any fault; those of the stages are those of one process."""
    found = {node.name: rig.ask(node, tokens=TOKENS)[0] for node in rig.orchestrators}
    assert found["orchestrator-1"] == rig.reference(TOKENS, "stages")
    return found


def ask(rig: Rig, node: NodeProcess, texts: dict[str, str], fault: object = None, after: int = 10) -> float:
    """An answer that must be the right one, with a ``fault`` in the middle; its seconds."""
    began = time.monotonic()
    text, _ = rig.ask(node, tokens=TOKENS, on_piece=lambda count: fault() if fault and count == after else None)
    assert text == texts[node.name]
    return time.monotonic() - began


def test_1_kill_every_role_again_and_again(rig: Rig, texts: dict[str, str]) -> None:
    dice = random.Random(1)
    seconds, lost, killed = [], 0, []
    for turn in range(ROUNDS):
        asks = rig.orchestrators[turn % 2]
        victim = [rig.workers[turn // 2 % 2], rig.orchestrators[0], rig.orchestrators[1]][turn % 3]
        killed.append(victim.name)
        try:
            seconds.append(ask(rig, asks, texts, victim.kill, after=dice.randrange(1, 60)))
        except RiosError as error:
            if victim is not asks:
                raise AssertionError(f"{victim.name} was killed, {asks.name} failed") from error
            lost += 1  # the request dies with the node it was put to; its client asks again
        assert not victim.alive
        rig.start(victim)
        rig.wait_replicas()
        if victim is asks:
            wait_for(lambda asks=asks: rig.ask(asks, tokens=TOKENS)[0] == texts[asks.name], "the same answer", 20)
    money = rig.check_money()
    tell(
        f"kill -9 of {', '.join(killed)}, each in the middle of an answer",
        f"the same text every time, at most {max(seconds):.1f} s; {lost} asked again where the asked node itself died",
        f"nothing; {money['paid']} microcredits earned and paid, to the last one",
    )


@pytest.mark.parametrize("kind", ["experts", "stages"])
def test_10_a_host_dies_in_the_middle_of_a_call(rig: Rig, texts: dict[str, str], kind: str) -> None:
    victim, other = rig.workers[:2]
    asks = rig.orchestrators[("experts", "stages").index(kind)]
    victim.stop()
    victim.prefix = (*LEAVING, kind, "0", "KILL", "0")
    rig.start(victim)
    rig.wait_replicas()
    rios(other, "pause", "--wait")
    wait_for(lambda: _paused(asks, other), "the other host to be known as paused", 20)
    # what is known of the victim may still be its advert of before
    wait_for(lambda: bool(rig.answer(asks)), "an answer of the one host that is left", 20)
    assert victim.process is not None
    process = victim.process

    def die() -> None:
        """In the middle of an answer that nobody else computes, as soon as somebody else could."""
        rios(other, "resume")
        wait_for(lambda: not _paused(asks, other), "the other host to be known again", 20)
        process.send_signal(signal.SIGUSR1)

    try:
        seconds = ask(rig, asks, texts, die)
        assert process.wait(10) == -signal.SIGKILL
    finally:
        victim.kill()
        victim.prefix = ()
        rig.start(victim)
    rig.wait_replicas()
    money = rig.check_money()
    tell(
        f"kill -9 of one of two hosts in a call for {kind}: taken, not answered",
        f"the same text in {seconds:.1f} s; {money['paid']} microcredits paid",
    )


def _paused(asks: NodeProcess, host: NodeProcess) -> bool:
    """What one node knows of another."""
    return bool(next(peer for peer in asks.ask("peers") if peer["peer_id"] == host.peer_id)["paused"])


def test_11_a_grey_host(rig: Rig, texts: dict[str, str]) -> None:
    calm = max(ask(rig, node, texts) for node in rig.orchestrators)
    with grey(rig.workers[0]) as cycles:
        slow = [ask(rig, node, texts) for node in rig.orchestrators for _ in range(2)]
    assert cycles
    assert max(slow) < 60
    rig.check_money()
    tell(
        f"one of two workers runs 50 ms of every 250 ms ({len(cycles)} times)",
        f"the same text in {min(slow):.1f} to {max(slow):.1f} s; {calm:.1f} s without it",
    )


@contextmanager
def grey(node: NodeProcess) -> Iterator[list[float]]:
    """Stop and continue a process all the time."""
    over, cycles = threading.Event(), []
    assert node.process is not None
    process = node.process

    def run() -> None:
        while not over.wait(0.05):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            process.send_signal(signal.SIGCONT)
            cycles.append(time.monotonic())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield cycles
    finally:
        over.set()
        thread.join()
        process.send_signal(signal.SIGCONT)


def test_3_the_disk_of_the_node_that_asks_is_full(rig: Rig, texts: dict[str, str], tmp_path: Path) -> None:
    node = rig.orchestrators[1]
    saved = tmp_path / "data"
    node.stop()
    shutil.copytree(node.data, saved)
    try:
        with small_disk(node.data, "32m"):
            shutil.copytree(saved, node.data, dirs_exist_ok=True)
            rig.start(node)
            rig.wait_replicas()
            ask(rig, node, texts)
            filler = node.data / "filler"
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
            wait_for(lambda: not node.ask("health")["ok"], "a word about the disk", 10)
            (reason,) = [each for each in node.ask("health")["reasons"] if "disk" in each]
            seen = [_openai(rig, node) for _ in range(3)]
            assert node.alive
            filler.unlink()
            wait_for(lambda: node.ask("health")["ok"], "the disk to be well again", 10)
            wait_for(lambda: _openai(rig, node) == "an answer", "answers again", 20)
            ask(rig, node, texts)
            rig.check_money()
            node.stop()
            shutil.rmtree(saved)
            shutil.copytree(node.data, saved)
        shutil.copytree(saved, node.data, dirs_exist_ok=True)
    finally:
        if not node.alive:
            rig.start(node)
    rig.wait_replicas()
    tell(f"no byte left on the disk of the node that is asked and pays ({reason})", "; ".join(seen))


def _openai(rig: Rig, node: NodeProcess) -> str:
    """What the user of the gateway sees."""
    with rig.client(node) as client:
        try:
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "What is it?"}], max_tokens=8
            )
        except openai.APIStatusError as error:
            if error.code in (None, "internal"):
                raise
            return f"{error.status_code}: {error.message}"[:150]
    return "an answer"


def _faketime() -> str:
    found = subprocess.run(["sh", "-c", "ls /usr/lib/*/faketime/libfaketimeMT.so.1"], capture_output=True, text=True)
    return found.stdout.split("\n")[0]


@pytest.mark.parametrize("days", [1, -1])
def test_5_a_worker_whose_clock_is_a_day_off(rig: Rig, texts: dict[str, str], days: int) -> None:
    library = _faketime()
    if not library:
        pytest.skip("libfaketime is missing (apt-get install faketime)")
    node = rig.workers[0]
    node.stop()
    shifted = f"{days * DAY:+d}"
    node.start({"LD_PRELOAD": library, "FAKETIME": shifted, "FAKETIME_DONT_FAKE_MONOTONIC": "1"})
    try:
        node.wait_started()
        seconds = [ask(rig, asks, texts) for asks in rig.orchestrators for _ in range(2)]
        findings = json.loads(_doctor(node))
        (clock,) = [each for each in findings if "clock" in each["what"]]
        assert clock["level"] != "ok", clock
    finally:
        node.stop()
        rig.start(node)
    rig.wait_replicas()
    before = rig.rows(node)
    wait_for(lambda: bool(ask(rig, rig.first, texts)) and rig.rows(node) > before, "it to be used again", 40)
    rig.check_money()
    tell(
        f"the clock of one of two workers is {shifted} s off",
        f"the same text in at most {max(seconds):.1f} s; its operator is told: {clock['what']}",
    )


def _doctor(node: NodeProcess) -> str:
    """What it finds, whatever its exit code."""
    command = [*rios_command(), "--config", str(node.config_file), "doctor", "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


def test_the_operator_sees_and_changes_replicas(rig: Rig, texts: dict[str, str]) -> None:
    rig.wait_replicas()
    ask(rig, rig.first, texts)
    (listed,) = json.loads(rios(rig.first, "model", "ls", "--json"))
    assert listed["replicas_wanted"] == 2
    shown = rios(rig.first, "model", "ls", MODEL)
    assert "WANTED" in shown
    assert "s ago" in shown
    assert "scaled tiny to 1 replicas" in rios(rig.first, "scale", MODEL, "1")
    shards = json.loads(rios(rig.first, "model", "ls", MODEL, "--json"))["shards"]
    assert {shard["wanted"] for shard in shards} == {1}
    assert {shard["kind"] for shard in shards} == {"trunk", "expert", "stage"}, "the mode stays"
    assert "withdrew" in rios(rig.first, "undeploy", MODEL)
    with pytest.raises(RiosError, match="did not deploy"):
        rios(rig.first, "scale", MODEL, "2")
    assert "holds 2 replicas" in rios(rig.first, "deploy", MODEL, "--replicas", "2", "--mode", "both", "--wait")
    rig.workers[1].kill()

    def missed() -> bool:
        rows = json.loads(rios(rig.first, "model", "ls", MODEL, "--json"))["shards"]
        return all(row["there"] == 1 for row in rows if row["kind"] != "trunk")

    wait_for(missed, "the dead replicas to be missed", 20)
    assert "1 missing" in rios(rig.first, "model", "ls", MODEL)
    rig.start(rig.workers[1])
    rig.wait_replicas()
    ask(rig, rig.first, texts)
