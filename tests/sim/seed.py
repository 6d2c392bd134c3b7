"""Runs one seed: the real ledgers, on simulated disks, under a mock clock and deterministic scheduling."""

import traceback
from dataclasses import dataclass
from pathlib import Path

import trio
from trio.testing import MockClock

import ledger.ledger as module
from tests.sim.disk import SimMark
from tests.sim.model import Violation
from tests.sim.plan import Plan, plan_of
from tests.sim.signing import signer
from tests.sim.world import World


@dataclass(frozen=True)
class Result:
    """What came of a seed."""

    seed: int
    invariant: str
    message: str
    hash: int
    events: int
    objects: int
    lines: tuple[str, ...] = ()


def run(seed: int, *, plan: Plan | None = None, folder: Path | None = None, verbose: bool = False) -> Result:
    """Simulate a seed. ``folder`` is where seeds with real files put them (None: they too stay in memory)."""
    internals = trio._core._run  # private names, guarded by test_sim
    internals._ALLOW_DETERMINISTIC_SCHEDULING = True
    internals._r.seed(seed)
    plan = plan or plan_of(seed)
    with signer(real=plan.real):
        world = World(seed, plan=plan, folder=folder, verbose=verbose)
        disks = {node.name: node.disk for node in world.nodes}
        real_store, real_mark = module.Store, module.Mark
        module.Store = lambda path, net, **_: disks[str(path)].open()  # type: ignore[assignment,misc]
        module.Mark = lambda path: SimMark(disks[str(path)])  # type: ignore[assignment,misc]
        invariant = message = ""
        try:
            trio.run(world.main, clock=MockClock(autojump_threshold=0))
        except* Violation as group:
            first = _first(group)
            invariant, message = first.invariant, str(first)
        except* Exception as group:  # noqa: BLE001 - any fault of the program under test is a result
            first = _first(group)
            invariant, message = "error", f"{type(first).__name__}: {first}"
            if verbose:
                world.lines += traceback.format_exception(first)
        finally:
            module.Store, module.Mark = real_store, real_mark  # type: ignore[misc]
            internals._ALLOW_DETERMINISTIC_SCHEDULING = False
            for disk in disks.values():
                disk.destroy()
    return Result(seed, invariant, message, world.hash, world.events, world.model.objects, tuple(world.lines))


def _first(group: BaseExceptionGroup) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group
