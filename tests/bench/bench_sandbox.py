"""What a cell adds to an expert call: the same call on the same shard in this process and in a cell, in turns.

A shard of random fp32 weights (one expert, 1024-256-1024) is loaded twice. Each turn calls both, in alternating order,
with the same rows; their answers must be equal bit for bit. Medians over the turns; the last line of stdout is one JSON
object:

- ``sandbox_added_us_16KiB``: 4 rows of 1024 fp32 numbers, median of a call in the cell minus median here
- ``sandbox_added_us_512KiB``: 128 rows

In turns, not one after the other: calls come out of the network, so neither side finds its caches warm.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from dmoe.cells.cell import Cell, Counters
from dmoe.cells.link import Options
from dmoe.cells.shard import CellShard
from dmoe.runtime import ExpertShard, RuntimeOptions
from tests.unit.dmoe.model_kit import tiny

HIDDEN = 1024
TURNS = 3000
SIZES = {"16KiB": 4, "512KiB": 128}


def compare(here: ExpertShard, there: CellShard, rows: int, turns: int) -> tuple[list[float], list[float]]:
    """Seconds of each call here and in the cell."""
    h = np.random.default_rng(rows).standard_normal((rows, HIDDEN)).astype(np.float32)
    spent: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(turns):
        answers = []
        for in_cell in (turn % 2 == 0, turn % 2 == 1):
            shard = there if in_cell else here
            start = perf_counter()
            answers.append(shard.partial(0, h))
            spent[in_cell].append(perf_counter() - start)
        assert (answers[0] == answers[1]).all()
    return spent[False], spent[True]


def measure(turns: int = TURNS) -> dict[str, Any]:
    """Medians of every size, and what stands between a cell and this machine."""
    with tempfile.TemporaryDirectory() as folder:
        store, manifest = tiny(Path(folder), hidden=HIDDEN, kind="F32")
        shard = manifest.expert_shard(0, 0)
        here = ExpertShard(manifest, shard, store, RuntimeOptions(device="cpu"))
        cell = Cell(manifest.publisher, Options(threads=1), Counters())
        cell.start()
        try:
            cell.wait_up()
            there = CellShard(cell, manifest, shard, store)
            found: dict[str, Any] = {}
            for name, rows in SIZES.items():
                compare(here, there, rows, turns // 10)  # warm
                inside, outside = compare(here, there, rows, turns)
                found[f"here_us_{name}"] = round(statistics.median(inside) * 1e6, 1)
                found[f"cell_us_{name}"] = round(statistics.median(outside) * 1e6, 1)
                found[f"sandbox_added_us_{name}"] = round(found[f"cell_us_{name}"] - found[f"here_us_{name}"], 1)
            found["walls"] = [wall.name for wall in cell.walls if wall.in_force]
        finally:
            cell.close()
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    found = measure(parser.parse_args().turns)
    print(json.dumps({**found, "cores": os.cpu_count(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
