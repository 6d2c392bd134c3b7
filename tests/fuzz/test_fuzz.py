"""The fuzzers for a few seconds; ``make fuzz`` runs a million inputs of each."""

import os

import pytest

from tests.fuzz.fuzz import TARGETS, fuzz

COUNTS = {"frames": 15_000, "adverts": 3_000, "records": 3_000}


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_input_neither_crashes_nor_hangs_nor_grows(target):
    seed = int(os.environ.get("RIOS_FUZZ_SEED", "1"))
    result = fuzz(target, count=COUNTS.get(target, 3_000), seed=seed)
    assert result["inputs"] >= COUNTS.get(target, 3_000)
