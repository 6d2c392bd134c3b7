"""How much memory an import takes beside the model's size: ``rios bench import`` over a random checkpoint of 2 GB.

Each format in a process of its own; its peak resident memory is what the kernel counted (``getrusage`` of the child).
The last line of stdout is one JSON object; ``import_peak_above_layer_bytes`` is the largest peak less the largest layer
as it is stored: the limit is 1 GB.

    python tests/bench/bench_import.py [--gb N] [--folder DIR]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from dmoe.importer.sample import Sizes, write_sample

FORMATS = ("source", "fp32", "int8")
KIB = 1024


def measure(source: Path, home: Path, form: str) -> dict[str, int]:
    """One import in a process of its own."""
    command = [sys.executable, "-m", "node", "bench", "import", str(source), "--format", form, "--json"]
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        data: dict[str, int] = json.loads(child.stdout.read())
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, data
    return {**data, "peak_bytes": usage.ru_maxrss * KIB}


def figures(found: dict[str, dict[str, int]]) -> dict[str, object]:
    """What is printed, by format where formats differ."""
    return {
        "import_source_bytes": found["source"]["source_bytes"],
        "import_peak_bytes": {form: data["peak_bytes"] for form, data in found.items()},
        "import_layer_bytes": {form: data["layer_bytes"] for form, data in found.items()},
        "import_mb_per_s": {form: data["mb_per_s"] for form, data in found.items()},
        "import_peak_above_layer_bytes": max(data["peak_bytes"] - data["layer_bytes"] for data in found.values()),
    }


def main() -> None:
    """Make the checkpoint, import it in every format, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is made (default: temporary)")
    args = parser.parse_args()
    usual = Sizes(layers=1)
    layers = max(1, round((args.gb * 1e9 - usual.total_bytes) / usual.layer_bytes) + 1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = write_sample(Path(folder) / "sample", Sizes(layers=layers))
        found = {form: measure(source, Path(folder), form) for form in FORMATS}
    for form, data in found.items():
        print(form, json.dumps(data), file=sys.stderr)
    print(
        json.dumps(
            {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "figures": figures(found), "ratios": {}}
        )
    )


if __name__ == "__main__":
    main()
