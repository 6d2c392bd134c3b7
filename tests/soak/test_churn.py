"""A short churn: twelve daemons, a node joins or dies every ten seconds, four clients ask all the time.

``make soak MINUTES=60`` runs it for an hour. ``make test`` runs it after all others, alone: twelve daemons that share
two processors with other tests answer too late for anybody's patience.
"""

import json
import os
from pathlib import Path

import pytest

from tests.soak.churn import run

MINUTES = float(os.environ.get("SOAK_MINUTES", "3"))


@pytest.mark.timeout(60 * MINUTES + 600)
def test_no_wrong_answer_no_lost_credit_and_every_replica_back(tmp_path: Path) -> None:
    told = run(tmp_path, MINUTES, seed=1)  # raises if money is lost or replicas stay away
    print("\n" + json.dumps(told))
    assert told["answers"] > 20
    assert not told["wrong"], told["wrong_told"]
    assert not told["failed"], told["failed_told"]
