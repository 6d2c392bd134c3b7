"""``dmoe.threads`` holds for the pools that libraries make as well."""

import os
import subprocess
import sys

import pytest

from node.threads import VARIABLES

PROBE = """
import sys
import node.cli, node.local
from node import threads
assert "numpy" not in sys.modules, "the command line loads numpy before it knows the settings"
threads.bound({count})
import numpy, psutil
numpy.ones((300, 300)) @ numpy.ones((300, 300))
print(len(psutil.Process().threads()))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="with one core every pool has one thread")
def test_blas_gets_no_more_threads_than_allowed():
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    counts = []
    for count in (0, 1):
        done = subprocess.run(
            [sys.executable, "-c", PROBE.format(count=count)], env=environ, capture_output=True, text=True, check=True
        )
        counts.append(int(done.stdout))
    assert counts[0] > counts[1] == 1
