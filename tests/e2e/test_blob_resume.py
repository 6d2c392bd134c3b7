"""A process that fetches a file is killed in the middle; its next life fetches only what was missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEBIBYTES = 12
KILL_AT = 5
IN_FLIGHT_MAX = 4
"""Chunks on their way when the process dies: three workers, and one that was written but not yet reported."""


@pytest.fixture
def start(tmp_path):
    processes: list[subprocess.Popen[str]] = []

    def make(what: str, name: str, *rest: object) -> subprocess.Popen[str]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = [sys.executable, str(Path(__file__).with_name("blob_node.py")), what, str(folder), str(MEBIBYTES)]
        process = subprocess.Popen(
            [*command, *map(str, rest)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield make
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def read(process: subprocess.Popen[str]) -> dict:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the process ended"
    return json.loads(line)


def test_a_killed_fetch_goes_on_where_it_was(start, tmp_path):
    provider = start("offer", "provider", 4 << 20)
    address = read(provider)["address"]
    target = tmp_path / "model.bin"

    first = start("fetch", "fetcher", target, address)
    verified = 0
    assert read(first)["done"] == 0  # what was there before
    while verified < KILL_AT:
        verified += read(first)["done"] > 0
    first.kill()
    first.wait()
    assert not target.exists()
    assert (tmp_path / "model.bin.part").exists()

    second = start("fetch", "fetcher", target, address)
    kept = read(second)["done"]
    assert kept >= KILL_AT << 20
    last: dict = {}
    while "whole" not in last:
        last = read(second)
    size = (MEBIBYTES << 20) + len(b"the end")
    assert last == {"whole": True, "fetched": size - kept}
    assert second.wait(20) == 0
    assert provider.stdin is not None
    provider.stdin.write("\n")
    provider.stdin.flush()
    counts = read(provider)
    assert counts["different"] == MEBIBYTES + 1
    assert counts["given"] <= MEBIBYTES + 1 + IN_FLIGHT_MAX
