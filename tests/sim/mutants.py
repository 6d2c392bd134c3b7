"""Every known way to break the protocol, and how often the simulator catches it.

    python -m tests.sim.mutants                    # what make mutants does
    python -m tests.sim.mutants --only votes       # those whose name contains "votes"; --list shows all

Each mutant runs seeds until it is caught so many times or the seeds are used up. One that is caught in fewer than 1 of
20 seeds must name a directed test, which must then fail under it; else the command ends non-zero.
"""

import argparse
import signal
import sys
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from types import FrameType

import pytest

from tests.sim.catalogue import MUTANTS
from tests.sim.mutation import Mutant, applied
from tests.sim.sim import run_seed

SEEDS, CATCHES, RARE = 60, 3, 20
HANG_S = 120
ROOT = Path(__file__).resolve().parents[2]


class _Hang(BaseException):
    """A mutant that loops is caught as well."""


def _ring(_number: int, _frame: FrameType | None) -> None:
    raise _Hang


Hunted = tuple[str, int, int, Counter[str], str, bool]


def hunt(job: tuple[str, int, int, int]) -> Hunted:
    """How many seeds were tried and caught it; by which invariant; the first message; whether its test fails."""
    name, first, count, catches = job
    mutant = next(each for each in MUTANTS if each.name == name)
    tried = caught = 0
    by: Counter[str] = Counter()
    example = ""
    signal.signal(signal.SIGALRM, _ring)
    with applied(mutant):
        for seed in range(first, first + count if mutant.simulated else first):
            tried += 1
            signal.alarm(HANG_S)
            try:
                result, _ = run_seed(seed)
                invariant, message = result.invariant, result.message
            except _Hang:
                invariant, message = "hang", f"seed {seed} does not end"
            signal.alarm(0)
            if invariant:
                caught += 1
                by[invariant] += 1
                example = example or f"seed {seed}: {message}"
                if caught >= catches:
                    break
    return name, tried, caught, by, example, _test_fails(mutant)


def _test_fails(mutant: Mutant) -> bool:
    """Whether the directed test notices the mutant."""
    if not mutant.directed:
        return False
    with applied(mutant), redirect_stdout(StringIO()):
        code = pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / mutant.directed)])
    return code == pytest.ExitCode.TESTS_FAILED


def _line(mutant: Mutant, found: Hunted) -> str:
    _, tried, caught, by, example, fails = found
    rare = "rare" if caught * RARE < tried else ""
    test = f"test {'fails' if fails else 'PASSES'}" if mutant.directed else ""
    return f"{mutant.name:32} {caught:>3}/{tried:<3} {rare:5}{'+'.join(sorted(by)):10} {test:12} {example[:110]}"


def _wrong(mutant: Mutant, found: Hunted) -> str:
    """Why a mutant is not caught well enough (empty: it is)."""
    _, tried, caught, _, _, fails = found
    if mutant.directed and not fails:
        return f"{mutant.name}: its test {mutant.directed} does not notice it"
    if caught * RARE < max(1, tried) and not mutant.directed:
        return f"{mutant.name}: caught in {caught} of {tried} seeds: it needs a directed test"
    return ""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.mutants", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"at most so many for each mutant ({SEEDS})")
    parser.add_argument("--catches", type=int, default=CATCHES, help=f"go on until it was caught so often ({CATCHES})")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="mutants whose names contain this")
    parser.add_argument("--list", action="store_true", help="name them all")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:34} {mutant.what}")
        return 0
    jobs = [(mutant.name, options.first_seed, options.seeds, options.catches) for mutant in chosen]
    wrong: list[str] = []
    by_name = {mutant.name: mutant for mutant in chosen}
    with get_context("spawn").Pool(max(1, options.workers)) as pool:
        for found in pool.imap_unordered(hunt, jobs):
            mutant = by_name[found[0]]
            print(_line(mutant, found), flush=True)
            wrong += filter(None, [_wrong(mutant, found)])
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} mutants are caught")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
