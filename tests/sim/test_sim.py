"""The simulator in short: a hundred seeds, and that the simulator itself can be trusted. ``make sim`` runs more."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from tests.sim.catalogue import MUTANTS
from tests.sim.mutation import Edit, Mutant, applied
from tests.sim.plan import plan_of
from tests.sim.seed import run
from tests.sim.sim import REPLAY, run_seed, simulate

FIRST = int(os.environ.get("RIOS_SIM_SEED", "0"))
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.mark.timeout(900)
def test_a_hundred_seeds_break_no_invariant():
    totals = simulate(FIRST, 100, workers=1)
    assert totals["seeds"] == 100
    assert not totals["failed"], f"replay with {REPLAY.format(totals['failed'][0])}"
    assert totals["objects"] > 2000, "hardly anything became final: the seeds test nothing"


def test_a_seed_replays_exactly_here_and_in_another_process():
    first, second = run(FIRST + 3), run(FIRST + 3)
    assert first == second
    assert first.events > 500
    code = f"from tests.sim.seed import run; r = run({FIRST + 3}); print(r.hash, r.events)"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": ROOT}
        out = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, check=True)
        assert out.stdout.split() == [str(first.hash).encode(), str(first.events).encode()]


def test_other_seeds_are_other_stories():
    assert len({run(FIRST + n).hash for n in range(3)}) == 3


def test_real_signatures_and_files_are_part_of_it(tmp_path):
    plan = replace(plan_of(49), restores=1, changes=1)
    assert plan.real
    result = run(49, plan=plan, folder=tmp_path)
    assert not result.invariant, result.message
    assert (tmp_path / "w0.db").stat().st_size > 100_000


def test_trio_has_the_private_names_that_make_runs_repeat():
    internals = trio._core._run
    assert internals._ALLOW_DETERMINISTIC_SCHEDULING is False, "a run left it on"
    internals._r.seed(1)

    async def order() -> list[int]:
        seen: list[int] = []

        async def note(n: int) -> None:
            await trio.lowlevel.checkpoint()
            seen.append(n)

        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(note, n)
        return seen

    def run_once() -> list[int]:
        internals._ALLOW_DETERMINISTIC_SCHEDULING = True
        internals._r.seed(5)
        try:
            return trio.run(order, clock=MockClock(autojump_threshold=0))
        finally:
            internals._ALLOW_DETERMINISTIC_SCHEDULING = False

    assert run_once() == run_once()


def test_every_mutant_still_fits_the_code():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        with applied(mutant):
            pass


def test_an_edit_that_no_longer_fits_is_an_error():
    lost = Mutant("lost", "", (Edit("ledger.core.quorums:quorum_of", "no such text", ""),))
    with pytest.raises(ValueError, match="0 times"), applied(lost):
        pass


@pytest.mark.parametrize("name", ["quorum-f-plus-1", "slots-forgotten", "locks-ignored"])
def test_the_simulator_sees_what_is_broken(name):
    before = run_seed(FIRST + 1)[0]
    with applied(next(mutant for mutant in MUTANTS if mutant.name == name)):
        caught = next((r for n in range(20) if (r := run_seed(FIRST + n)[0]).invariant), None)
    assert caught, "20 seeds do not see it"
    assert run_seed(FIRST + 1)[0] == before, "the program is whole again"
