"""Clients of other makes, each in an environment of its own (``config/deploy/clients.sh``, ``make clients``)."""

from pathlib import Path
from typing import Any

import pytest
import trio

ENVIRONMENTS = Path(__file__).parents[2] / ".bench"
RUN_SECONDS = 180


def program_of(environment: str, program: str) -> str:
    """The path of a program; skips where its environment was not made."""
    folder = ENVIRONMENTS / environment
    if not (folder / "made").exists():
        pytest.skip(f"there is no environment {folder}; to make it: make clients")
    return str(folder / "bin" / program)


async def run(command: list[str], **more: Any) -> str:
    """What it printed; it must end well."""
    with trio.fail_after(RUN_SECONDS):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, **more)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return done.stdout.decode()
