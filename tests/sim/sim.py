"""Runs seeds of the simulation; ends non-zero if any breaks an invariant.

    python -m tests.sim.sim --seeds 10000 --first-seed 0     # what make sim does
    python -m tests.sim.sim --replay 1234                    # one seed, with its event log

One seed in 50 signs with real Ed25519 and keeps its ledgers in files. Progress goes to stderr, one JSON object with the
totals to stdout.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

from tests.sim.seed import Result, run

PROGRESS_S = 10.0
SHOWN_MAX = 10
REPLAY = "python -m tests.sim.sim --replay {}"


def run_seed(seed: int, *, verbose: bool = False) -> tuple[Result, float]:
    """A seed's result and the CPU seconds it took."""
    began = time.process_time()
    gc.disable()  # a run's cycles are collected once, after it
    try:
        with tempfile.TemporaryDirectory(prefix="rios-sim-") as folder:
            result = run(seed, folder=Path(folder), verbose=verbose)
    finally:
        gc.enable()
        gc.collect()
    return result, time.process_time() - began


def _results(first: int, count: int, workers: int) -> Iterator[tuple[Result, float]]:
    seeds = range(first, first + count)
    if workers <= 1:
        yield from map(run_seed, seeds)
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(run_seed, seeds)


def simulate(first: int, count: int, workers: int) -> dict[str, object]:
    """Run seeds; the totals. What went wrong is printed as it comes."""
    began = shown = time.monotonic()
    totals = {"seeds": 0, "cpu_seconds": 0.0, "cpu_seconds_max": 0.0, "objects": 0, "events": 0}
    failed: list[int] = []
    for result, cpu_s in _results(first, count, workers):
        totals["seeds"] += 1
        totals["cpu_seconds"] += cpu_s
        totals["cpu_seconds_max"] = max(totals["cpu_seconds_max"], cpu_s)
        totals["objects"] += result.objects
        totals["events"] += result.events
        if result.invariant:
            failed.append(result.seed)
            print(f"seed {result.seed} breaks {result.message[:500]}\n  replay: {REPLAY.format(result.seed)}")
            sys.stdout.flush()
        if time.monotonic() - shown > PROGRESS_S:
            shown = time.monotonic()
            rate = totals["seeds"] / (shown - began)
            print(
                f"{totals['seeds']} of {count} seeds, {len(failed)} failed, {rate:.1f} a second, "
                f"{totals['cpu_seconds'] / totals['seeds']:.2f} CPU s each",
                file=sys.stderr,
            )
    return {
        **{name: round(value, 3) for name, value in totals.items()},
        "cpu_seconds_per_seed": round(totals["cpu_seconds"] / max(1, totals["seeds"]), 3),
        "failed": sorted(failed),
    }


def replay(seed: int) -> int:
    """One seed with its log."""
    result, cpu_s = run_seed(seed, verbose=True)
    print("\n".join(result.lines))
    print(
        f"seed {seed}: {result.events} events, {result.objects} final objects, {cpu_s:.2f} CPU s, log {result.hash:08x}"
    )
    print(f"breaks {result.message}" if result.invariant else "no violation")
    return 1 if result.invariant else 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.sim", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many seeds (1000)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED", help="the first (0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (2)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one seed and print everything that happens")
    options = parser.parse_args()
    if options.replay is not None:
        return replay(options.replay)
    totals = simulate(options.first_seed, options.seeds, options.workers)
    print(json.dumps(totals))
    return 1 if totals["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
