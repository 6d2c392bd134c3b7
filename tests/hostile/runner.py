"""Runs hostile cases in this process, under limits that a failure cannot exceed: ``python runner.py FOLDER NAMES...``.

Prints one JSON line per case: what its opening was answered with, how long it took, and the largest memory so far.
"""

import json
import resource
import sys
import time
from pathlib import Path

from config.errors import RiosError

MEMORY_BYTES = 6 << 30
CPU_SECONDS = 240


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from tests.hostile.corpus import CASES

    root, names = Path(sys.argv[1]), set(sys.argv[2:])
    for number, case in enumerate(CASES):
        if names and case.name not in names:
            continue
        folder = root / str(number)
        folder.mkdir()
        opening = case.make(folder)
        started, said = time.monotonic(), {"kind": "accepted", "message": ""}
        try:
            opening()
        except RiosError as error:
            said = {"kind": type(error).__name__, "code": error.code, "message": error.message}
        except Exception as error:  # noqa: BLE001 - the test says which
            said = {"kind": f"BUG {type(error).__name__}", "message": str(error)[:300]}
        used = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        seconds = round(time.monotonic() - started, 3)
        print(json.dumps({"name": case.name, "seconds": seconds, "rss_mib": used, **said}), flush=True)


if __name__ == "__main__":
    main()
