"""A test that hangs where its timeout does not reach costs itself, not the run."""

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


def test_one_test_is_lost_and_shown(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(HANGS)
    (tmp_path / "impatient.py").write_text("import tests.conftest\ntests.conftest.ENDING_SECONDS_MAX = 2\n")
    (tmp_path / "test_two.py").write_text("def test_another(): pass")
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
    said = done.stdout + done.stderr
    assert "test_hangs hangs:" in said
    assert "in never_ends" in said, "where"
    assert "2 failed, 3 passed" in said, said
