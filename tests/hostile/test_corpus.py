"""Every hostile file of the corpus is refused by the rule that it breaks, and none of them hangs, eats memory or ends
the process that opens it. All are opened by one process with limits (``runner.py``)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.corpus import CASES, UNPICKLED

RUNNER = Path(__file__).with_name("runner.py")
MEMORY_MIB_MAX = 2048
"""Of either process, at its largest. (The process aside may have 1.5 GiB of addresses beside its interpreter.)"""
BOUNDED_SECONDS = 220


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What opening each case was answered with."""
    folder = tmp_path_factory.mktemp("corpus")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(RUNNER.parents[2]), *filter(None, sys.path)])}
    command = [sys.executable, str(RUNNER), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=BOUNDED_SECONDS, env=env, check=False)
    assert ran.returncode == 0, f"the process ended with {ran.returncode}: {ran.stderr[-2000:]}"
    return {line["name"]: line for line in map(json.loads, ran.stdout.splitlines())}


def test_there_are_many_of_them():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_contained(told, case):
    said = told[case.name]
    assert not said["kind"].startswith("BUG"), said
    if case.rule:
        assert said["kind"] in ("IntegrityError", "RequestError", "LocalError"), said
        assert case.rule in said["message"]
    assert max(said["rss_mib"]) < MEMORY_MIB_MAX


def test_nothing_was_unpickled(told):
    assert told
    assert not Path(UNPICKLED).exists()
