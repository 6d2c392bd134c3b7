"""A test that hangs costs itself, not the run: where its timeout does not reach, and where that leaves trio's loop."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
HANGS = """
import time
import pytest

@pytest.fixture
def never_ends():
    yield
    time.sleep(600)

def test_before(): pass

@pytest.mark.timeout(1)
def test_hangs(never_ends): raise AssertionError("the timeout ends with the test")

def test_after(): pass
"""
WAITS = """
import pytest, trio

async def waits_for_ever():
    await trio.sleep_forever()

@pytest.mark.timeout(1)
async def test_hangs(nursery):
    nursery.start_soon(waits_for_ever)
    await trio.sleep_forever()

async def test_after():
    await trio.sleep(0)
"""


def test_one_test_is_lost_and_shown(tmp_path: Path) -> None:
    said = run(tmp_path, {"test_one.py": HANGS, "test_two.py": "def test_another(): pass"})
    assert "test_hangs hangs:" in said
    assert "in never_ends" in said, "where"
    assert "2 failed, 3 passed" in said, said


def test_a_time_limit_in_trios_loop_shows_its_tasks_and_costs_one_test(tmp_path: Path) -> None:
    said = run(tmp_path, {"test_one.py": WAITS})
    assert "waits_for_ever\n" in said, said
    assert "1 failed, 1 passed" in said, said


def run(tmp_path: Path, tests: dict[str, str]) -> str:
    """What pytest says of these files."""
    for name, text in tests.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "impatient.py").write_text("import tests.conftest\ntests.conftest.ENDING_SECONDS_MAX = 2\n")
    command = [sys.executable, "-m", "pytest", "-n2", "-v", "-p", "tests.conftest", "-p", "impatient"]
    places = [f"--config-file={REPOSITORY / 'pyproject.toml'}", f"--rootdir={tmp_path}", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    done = subprocess.run(
        [*command, *places],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr
