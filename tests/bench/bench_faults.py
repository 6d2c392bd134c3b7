"""What hosts that die, stall, lie, flood or serve bombs cost an answer: its text never, its time and memory little.

Run it as a program; progress goes to stderr, the last line on stdout is one JSON object with the keys of the parts that
were asked for (``--parts kill,stall,grey,trust,sandbox,flood``, default all; about a quarter of an hour on two quiet
cores). In the first three the real engine answers with a tiny model over a network in memory; every expert and every
stage has two hosts.

- ``kill_failed_requests``, ``kill_changed_texts``: of ``--runs`` seeded runs, one host killed at a random token of
  each, routes experts and stages in turn, greedy and sampled, with drafts, and four answers in one batch.
- ``stall_added_vs_deadline``: the same with a stall of 30 s; the largest added time over (2 x p99 of the time between
  tokens without faults + one call deadline). The median run without faults is what the time is added to.
- ``calls_vs_needed``: calls sent, hedges and retries included, over calls needed, with one host of three slowed down
  20 times.
- ``audit_cost``, ``liars_exposed_within_bound`` of ``liars_runs``, ``false_accusations`` in ``honest_calls``,
  ``framed``: see ``bench_trust``.
- ``sandbox_added_us_16KiB``, ``sandbox_added_us_512KiB``: see ``bench_sandbox``.
- ``flood_memory_mb``, ``flood_p99_ratio``: see ``bench_flood``, with whole daemons.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import trio

from dmoe.core.manifest import Manifest
from dmoe.store import ModelStore
from tests.bench import bench_flood, bench_sandbox, bench_trust
from tests.bench.fault_swarm import CALL_TIMEOUT_MS, Case, FaultSwarm, Told, cases, fault_swarm, model, references

STALL_SECONDS = 30.0
LATER_SECONDS = 0.004
"""A fault strikes this much after its token, or sooner: in the middle of a pass."""
SLOW_SECONDS = 2.0
"""Runs that a fault made this much longer are shown as they happen."""
GREY = 20.0
Made = tuple[ModelStore, Manifest]


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[int(0.99 * (len(values) - 1))]


class Series:
    """Runs of all cases in one swarm, each with a fault."""

    def __init__(self, swarm: FaultSwarm, wanted: list[Case], expected: dict[str, Told], seed: int) -> None:
        self.swarm = swarm
        self.cases = wanted
        self.expected = expected
        self.random = Random(seed)
        self.failed = self.changed = 0
        self.usual: dict[str, float] = {}
        self.gaps: list[float] = []
        self.added: list[float] = []

    async def without_faults(self, turns: int) -> None:
        """How long the cases take; what is late is learnt on the way."""
        for case in self.cases:
            told = [await self.swarm.run(case) for _ in range(turns)]
            for each in told:
                self.compare(case, each, "no fault")
            self.usual[case.name] = median(each.seconds for each in told)
            self.gaps += [gap for each in told[1:] for gap in each.gaps]

    async def with_faults(self, runs: int, name: str, strike: Callable[[Any], Awaitable[None]], mend: Any) -> None:
        """``runs`` of them; ``strike`` and ``mend`` are given the host that is hit."""
        for number in range(runs):
            case = self.cases[number % len(self.cases)]
            host = self.random.choice(self.swarm.hosts)
            at, later = self.random.randrange(1, case.tokens), self.random.uniform(0, LATER_SECONDS)

            async def fault(host: Any = host, later: float = later) -> None:
                await trio.sleep(later)
                await strike(host)

            told = await self.swarm.run(case, at, fault)
            mend(host)
            self.compare(case, told, f"{name} of host {self.swarm.hosts.index(host)} at token {at}, run {number}")
            self.added.append(told.seconds - self.usual.get(case.name, 0.0))
            if self.added[-1] > SLOW_SECONDS:
                say(f"{case.name}, {name} of host {self.swarm.hosts.index(host)}: {self.added[-1]:.2f} s added")
            if (number + 1) % 10 == 0:
                say(f"{name}: {number + 1} of {runs} runs, {self.failed} failed, {self.changed} changed")

    def compare(self, case: Case, told: Told, what: str) -> None:
        """Count what did not come out as it would have been."""
        for found, wanted in zip(told.tokens, self.expected[case.name].tokens, strict=True):
            if isinstance(found, str):
                self.failed += 1
                say(f"{case.name}, {what}: {found}")
            elif found != wanted:
                self.changed += 1
                say(f"{case.name}, {what}: {found} instead of {wanted}")


async def kill(made: Made, folder: Path, wanted: list[Case], expected: dict[str, Told], runs: int, seed: int) -> Any:
    """The keys of killed hosts."""
    async with fault_swarm(made, folder, seed=seed) as swarm:
        series = Series(swarm, wanted, expected, seed)

        async def strike(host: Any) -> None:
            swarm.hub.kill(host.network.peer_id)
            await trio.lowlevel.checkpoint()

        await series.with_faults(runs, "kill", strike, lambda host: swarm.hub.revive(host.network.peer_id))
        return {"kill_runs": runs, "kill_failed_requests": series.failed, "kill_changed_texts": series.changed}


async def stall(made: Made, folder: Path, wanted: list[Case], expected: dict[str, Told], runs: int, seed: int) -> Any:
    """The keys of stalled hosts."""
    async with fault_swarm(made, folder, seed=seed) as swarm:
        series = Series(swarm, wanted, expected, seed)
        await series.without_faults(5)
        say(f"without faults: {series.usual}")

        async def strike(host: Any) -> None:
            swarm.hub.stall(host.network.peer_id)
            await trio.sleep(STALL_SECONDS)
            swarm.hub.wake(host.network.peer_id)

        await series.with_faults(runs, "stall", strike, lambda host: swarm.hub.wake(host.network.peer_id))
        allowed = 2 * p99(series.gaps) + CALL_TIMEOUT_MS / 1000
        return {
            "stall_runs": runs,
            "stall_failed_requests": series.failed,
            "stall_changed_texts": series.changed,
            "stall_added_ms_median": round(1000 * median(series.added), 1),
            "stall_added_ms_max": round(1000 * max(series.added), 1),
            "stall_added_vs_deadline": round(max(series.added) / allowed, 4),
            "hedges": swarm.caller.hedges.budget.hedges,
            "hedges_won": swarm.caller.hedges.won,
        }


async def grey(made: Made, folder: Path, wanted: list[Case], expected: dict[str, Told], runs: int, seed: int) -> Any:
    """The keys of one slow host in three. How many calls a stage's answer needs is seen without faults; only cases are
    taken for which that is always the same."""
    wanted = [case for case in wanted if case.route == "experts" or not case.drafts]
    async with fault_swarm(made, folder, seed=seed, hosts=3, delay_s=(0.0005, 0.001)) as swarm:
        series, runs_of = Series(swarm, wanted, expected, seed), {}
        for turn in range(3):
            for case in wanted:
                before = swarm.calls["stage.run"]
                series.compare(case, await swarm.run(case), f"no fault, turn {turn}")
                runs_of[case.name] = swarm.calls["stage.run"] - before
        sent = Counter(swarm.calls)
        repeated = swarm.repeated
        swarm.hub.slow[swarm.hosts[1].network.peer_id] = GREY
        needed = 0
        for number in range(runs):
            case = wanted[number % len(wanted)]
            series.compare(case, await swarm.run(case), f"grey, run {number}")
            needed += runs_of[case.name]
        sent = swarm.calls - sent
        needed += sent["expert.run"] - (swarm.repeated - repeated)
        say(f"grey: {runs} runs, {series.failed} failed, {series.changed} changed, {dict(sent)} sent, {needed} needed")
        return {
            "grey_runs": runs,
            "grey_failed_requests": series.failed,
            "grey_changed_texts": series.changed,
            "calls_vs_needed": round((sent["expert.run"] + sent["stage.run"]) / needed, 4),
        }


async def in_memory(options: argparse.Namespace) -> dict[str, Any]:
    """The keys of killed, stalled and slow hosts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = await trio.to_thread.run_sync(model, folder / "model")
        wanted = cases(options.tokens)
        expected = await references(made, wanted)
        found: dict[str, Any] = {}
        for number, part in enumerate((kill, stall, grey)):
            if part.__name__ in options.parts:
                where = folder / part.__name__
                where.mkdir()
                found |= await part(made, where, wanted, expected, options.runs, options.seed + number)
        return found


def trust() -> dict[str, Any]:
    """The keys of liars, of the honest and of what audits cost."""
    figures = bench_trust.measure()
    liars = [figure for name, figure in figures.items() if name.startswith("liars_")]
    return {
        "audit_cost": figures["cost"]["audit_cost"],
        "liars_runs": sum(each["of"] for each in liars),
        "liars_exposed_within_bound": sum(each["within"] for each in liars),
        "liars_bounds": {str(each["wrong_share"]): each["bound_99"] for each in liars},
        "honest_calls": figures["honest"]["honest_calls"],
        "false_accusations": figures["honest"]["false_accusations"],
        "framed": figures["framing"]["framed"],
        "trust": figures,
    }


def sandbox() -> dict[str, Any]:
    """The keys of cells."""
    found = bench_sandbox.measure()
    added = {name: value for name, value in found.items() if name.startswith("sandbox_added_us_")}
    return {**added, "sandbox": {name: value for name, value in found.items() if name not in added}}


def flood() -> dict[str, Any]:
    """The keys of floods and slow-lorises."""
    found = bench_flood.measure()
    return {**found.pop("ratios"), "flood": found}


APART: dict[str, Callable[[], dict[str, Any]]] = {"trust": trust, "sandbox": sandbox, "flood": flood}
IN_MEMORY = ("kill", "stall", "grey")
PARTS = (*IN_MEMORY, *APART)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The keys of the parts that were asked for."""
    found: dict[str, Any] = {"benchmark": "faults", "parts": options.parts, "seed": options.seed}
    if set(IN_MEMORY) & set(options.parts):
        found |= {"tokens": options.tokens} | trio.run(in_memory, options)
    for name, part in APART.items():
        if name in options.parts:
            say(f"{name} ...")
            found |= part()
    return found


def parts_of(text: str) -> list[str]:
    """The parts named in ``a,b``, in their order. Raises ArgumentTypeError for an unknown one."""
    wanted = [name.strip() for name in text.split(",")]
    if unknown := [name for name in wanted if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in wanted]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="runs per kind of fault in memory")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each of their answers")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn there")
    parser.add_argument("--parts", type=parts_of, default=list(PARTS), help=f"default: {','.join(PARTS)}")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
