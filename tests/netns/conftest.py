"""A rig for each test; skipped, with the reason, where network namespaces cannot be made."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rig import Rig, missing

WHY_NOT = missing()


@pytest.fixture
def rig():
    """A small internet, removed afterwards."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    with Rig() as made:
        yield made
