"""Every known way to break the protocol, and how often the simulator catches it.

    python -m tests.sim.mutants                    # what make mutants does
    python -m tests.sim.mutants --only votes       # those whose name contains "votes"; --list shows all

Each mutant runs seeds until it is caught so many times or the seeds are used up. One that is never caught fails the
command; one that is caught in fewer than 1 of 20 seeds must name a directed test.
"""

import argparse
import signal
import sys
from collections import Counter
from multiprocessing import get_context
from types import FrameType

from tests.sim.catalogue import MUTANTS
from tests.sim.mutation import Mutant, applied
from tests.sim.sim import run_seed

SEEDS, CATCHES, RARE = 60, 3, 20
HANG_S = 120


class _Hang(BaseException):
    """A mutant that loops is caught as well."""


def _ring(_number: int, _frame: FrameType | None) -> None:
    raise _Hang


def hunt(job: tuple[str, int, int, int]) -> tuple[str, int, int, Counter[str], str]:
    """How many seeds were tried and caught it; by which invariant; the first message."""
    name, first, count, catches = job
    mutant = next(each for each in MUTANTS if each.name == name)
    tried = caught = 0
    by: Counter[str] = Counter()
    example = ""
    signal.signal(signal.SIGALRM, _ring)
    with applied(mutant):
        for seed in range(first, first + count):
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
    return name, tried, caught, by, example


def _line(mutant: Mutant, tried: int, caught: int, by: Counter[str], example: str) -> str:
    share = f"{caught}/{tried}"
    rare = " rare" if caught * RARE < tried else ""
    return f"{mutant.name:34} {share:>7}{rare:5} {'+'.join(sorted(by)):12} {mutant.directed:40} {example[:110]}"


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
        for name, tried, caught, by, example in pool.imap_unordered(hunt, jobs):
            mutant = by_name[name]
            print(_line(mutant, tried, caught, by, example), flush=True)
            if not caught and not mutant.directed:
                wrong.append(f"{name}: never caught in {tried} seeds, and no directed test")
            elif caught * RARE < tried and not mutant.directed:
                wrong.append(f"{name}: caught in {caught} of {tried} seeds only: it needs a directed test")
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} mutants are caught")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
