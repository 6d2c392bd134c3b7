"""Huge lengths, slow-lorises, floods and bombs against a whole daemon, over HTTP and libp2p, by hostile processes.

While each lasts, an honest client gets the right answer again and again, and no node grows by more than a bound. (The
limits of ``p2p`` alone, each by name, stand in ``tests/e2e/test_doors_processes.py``.)
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.rig import Rig, swarm_of, tell

SECONDS = float(os.environ.get("FLOOD_SECONDS", "1.5"))
GROWTH_BYTES_MAX = 128 << 20
TESTS = Path(__file__).resolve().parents[1]

WITH_KEY = {"gzip_bomb", "deep_json", "never_read", "half_body", "slow_chunks", "huge_length", "huge_chunk"}
HTTP = {
    15: ("huge_length", "huge_chunk", "huge_head"),
    16: ("silent", "slow_head", "slow_body", "slow_chunks", "half_body", "never_read"),
    18: ("gzip_bomb", "deep_json"),
}
P2P = {
    15: ("lane_length", "frame_partial"),
    16: ("negotiation", "libp2p_noise", "half_read"),
    17: ("kad_streams", "rpc_streams", "call_flood"),
    18: ("header_bombs",),
}


def cases(kinds: dict[int, tuple[str, ...]]) -> list[object]:
    return [pytest.param(kind, id=f"{number}_{kind}") for number, each in kinds.items() for kind in each]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    settings = {"p2p.loopback_limits": True}
    with swarm_of(tmp_path_factory.mktemp("floods"), settings=settings) as made:
        yield made


@pytest.fixture(scope="module")
def text(rig: Rig) -> str:
    return rig.reference()


def rss(rig: Rig) -> int:
    return int(rig.first.ask("status")["node"]["rss_bytes"])


def besieged(rig: Rig, text: str, command: list[str]) -> tuple[str, list[float], int]:
    """Answers during an attack: what the attacker printed, seconds of each answer, bytes of growth."""
    before, peak, seconds = rss(rig), 0, []
    environ = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    attacker = subprocess.Popen(
        ["nice", sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environ,
    )
    try:
        assert attacker.stdout is not None
        assert attacker.stdout.readline() == "begin\n"
        while attacker.poll() is None:
            began = time.monotonic()
            assert rig.ask()[0] == text
            seconds.append(time.monotonic() - began)
            peak = max(peak, rss(rig))
        told = attacker.stdout.read()
    finally:
        attacker.kill()
        attacker.wait()
        attacker.stdout.close()
    assert seconds
    assert peak - before < GROWTH_BYTES_MAX
    assert all(node.alive for node in rig.swarm.nodes)
    return told, seconds, peak - before


@pytest.mark.parametrize("kind", cases(HTTP))
def test_http(rig: Rig, text: str, kind: str) -> None:
    host, port = rig.url(rig.first).removeprefix("http://").split(":")
    key = rig.keys[rig.first.name] if kind in WITH_KEY else ""
    program = str(TESTS / "faults" / "http_hostile.py")
    source = f"127.{60 + [k for each in HTTP.values() for k in each].index(kind)}.1.1"
    told, seconds, growth = besieged(rig, text, [program, kind, host, port, str(SECONDS), key, source])
    answers = json.loads(told)
    assert not any(status.startswith("5") and status != "503" for status in answers), answers
    assert "200" not in answers
    with rig.client() as client:
        assert client.models.list().data, "the gateway answers others"
    tell(
        f"{kind} over HTTP for {SECONDS} s; the attacker was told {answers}",
        f"{len(seconds)} right answers, the slowest in {max(seconds):.2f} s; the node grew by {growth >> 20} MiB",
    )


@pytest.mark.parametrize("kind", cases(P2P))
def test_p2p(rig: Rig, text: str, kind: str) -> None:
    _, _, host, _, port, *_ = rig.first.status["network"]["addresses"][0].split("/")
    source = f"127.{20 + [k for each in P2P.values() for k in each].index(kind)}.1.1"
    program = str(TESTS / "e2e" / "hostile.py")
    command = [program, kind, host, port, rig.first.peer_id, str(SECONDS), source]
    _, seconds, growth = besieged(rig, text, command)
    tell(
        f"{kind} over libp2p for {SECONDS} s",
        f"{len(seconds)} right answers, the slowest in {max(seconds):.2f} s; the node grew by {growth >> 20} MiB",
    )
