"""How soon liars are exposed, whether honest workers are ever accused, and what audits cost.

``python -m tests.bench.bench_trust [honest] [size] [framing] [cost] [liars] [stages] [stagecost] [stageliars]``
(default: all, about ten minutes on two quiet cores): each part is told on stderr, the last line of stdout is one JSON
object.

With share p of the calls audited, a liar that is wrong in a share s of its calls is exposed within
``ln(0.01) / ln(1 - p s)`` of them in 99 of 100 runs; ``liars`` prints that bound beside what happened. It is sooner
there, because a liar is also asked where the other replica is audited: all of its calls are counted, also these.
"""

import json
import logging
import math
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import trio

from dmoe.core import wire
from tests.bench import stage_trust as bench_stages
from tests.unit.dmoe.model_kit import tiny
from tests.unit.dmoe.trust_kit import (
    Routing,
    cancelling,
    closed,
    expert,
    nudged,
    ratios,
    rewritten,
    session,
    silent,
    tied,
    trust_swarm,
)

SHARE = 0.02
CONFIDENCE = 0.99
LIES = (
    ("fp32", "fp16"),
    ("fp32", "int8"),
    ("int8", "int4"),
    ("fp32", "nudge"),
    ("int8", "nudge"),
    ("int8", "zeros"),
)
HONEST_CALLS = 100_000
BATCHES = (*[1] * 25, 2, 3, 5, 8, 32)


def honest(calls: int = HONEST_CALLS, seconds: float = 600.0) -> dict[str, object]:
    """Calls of every quantisation, 1 and 2 threads, several batch sizes and scales, judged row by row."""
    random = np.random.default_rng(0)
    worst: dict[str, float] = {}
    done = rows = accused = 0
    begun = perf_counter()
    kinds = ("fp32", "fp16", "int8", "int4")
    found = {kind: expert(kind, 64, 64, seed=1) for kind in kinds}
    runs = {(kind, threads): session(found[kind], threads) for kind in kinds for threads in (1, 2)}
    while done < calls and perf_counter() - begun < seconds:
        for kind in kinds:
            for threads in (1, 2):
                # as many calls as make 256 rows, each run by itself, all judged in one
                sizes = [int(random.choice(BATCHES)) for _ in range(256)]
                scales = np.repeat(2.0 ** random.uniform(-4, 4, len(sizes)), sizes)[:, None]
                h = wire.rounded((random.standard_normal((sum(sizes), 64)) * scales).astype(np.float32))
                cuts = np.cumsum(sizes)[:-1]
                y = np.concatenate([runs[kind, threads].run(part) for part in np.split(h, cuts)])
                ratio = ratios(found[kind], h, y, "fp16" if done % 2 else "fp32")
                worst[kind] = max(worst.get(kind, 0.0), float(ratio.max()))
                accused += int((ratio > 1).sum())
                done += len(sizes)
                rows += len(h)
    return {"honest_calls": done, "honest_rows": rows, "false_accusations": accused, "worst_ratio": _short(worst)}


def real_size(rows: int = 24) -> dict[str, object]:
    """The same at the size of SmolLM2's blocks and at a larger one: how far honest and wrong answers are apart."""
    out: dict[str, object] = {}
    for hidden, width in ((576, 384), (1024, 1536)):
        for kind in ("fp32", "int8", "int4"):
            given, random = expert(kind, hidden, width), np.random.default_rng(2)
            h = wire.rounded(random.standard_normal((rows, hidden)).astype(np.float32))
            y = session(given).run(h)
            lies = {"nudge": nudged(y, Random(1)), "zeros": np.zeros_like(y)}
            for lie in {"fp32": ("fp16", "int8", "int4"), "int8": ("int4",), "int4": ()}[kind]:
                lies[lie] = session(rewritten(given, lie)).run(h)
            wrong = {name: round(float((ratios(given, h, lie) > 1).mean()), 3) for name, lie in lies.items()}
            out[f"{hidden}x{width}_{kind}"] = {"honest_max": _short(ratios(given, h, y).max()), "caught": wrong}
    return out


def framing(seeds: int = 20) -> dict[str, object]:
    """Inputs solved so that an honest answer is nothing but noise: the worst ratio (1 would be guilty)."""
    worst: dict[str, float] = {}
    for kind in ("fp32", "fp16", "int8", "int4"):
        for solve in (cancelling, silent, closed, tied):
            given = expert(kind, 64, 96 if solve is cancelling else 32, seed=2)
            run = session(given)
            for seed in range(seeds):
                for h in (solve(given, seed)[None, :], wire.rounded(solve(given, seed)[None, :])):
                    for dtype in ("fp16", "fp32"):
                        ratio = float(ratios(given, h, run.run(h), dtype).max())
                        worst[solve.__name__] = max(worst.get(solve.__name__, 0.0), ratio)
    return {"framed_worst_ratio": _short(worst), "framed": sum(ratio > 1 for ratio in worst.values())}


async def liars(folder: Path, wrong: float, runs: int = 2) -> dict[str, object]:
    """Wrong in a share of the calls, among two honest workers: calls of the liar until it is not trusted any more."""
    bound = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - SHARE * wrong))
    found: dict[str, list[int]] = {}
    for kind, lie in LIES:
        for run in range(runs):
            here = folder / f"{kind}-{lie}-{wrong}-{run}"
            store, manifest = await trio.to_thread.run_sync(
                lambda here=here, kind=kind: tiny(here, quantisation=kind, kind="F32")
            )
            found.setdefault(f"{lie}_for_{kind}", []).append(
                await _exposed(here, store, manifest, lie, wrong, run, bound)
            )
    within = sum(count <= bound for counts in found.values() for count in counts)
    total = sum(map(len, found.values()))
    return {"wrong_share": wrong, "bound_99": bound, "calls_until_exposed": found, "within": within, "of": total}


async def _exposed(here: Path, store: object, manifest: object, lie: str, wrong: float, run: int, bound: int) -> int:
    seed = 100 * run + zlib.crc32(f"{lie} {wrong} {here.name}".encode()) % 97
    random = np.random.default_rng(seed)
    async with trust_swarm(here, store, manifest, seed=seed) as swarm:
        await swarm.node(serves=False)
        # one group a call, so that a share of answers is one of calls; both replicas get half of its calls
        liar = await swarm.node(lie=lie, share=wrong, groups=(0,))
        await swarm.node(groups=(0,))
        await swarm.node(groups=(1, 2, 3))
        caller = await swarm.caller(share=SHARE, seed=seed)
        running, layers = caller.session(manifest), manifest.architecture.layers
        for number in range(10 * bound):
            if not caller.audit.trust.trusted(liar):
                break
            h = random.standard_normal((1, manifest.architecture.hidden)).astype(np.float32)
            await running.run(number % layers, h, Routing())
            if not caller.audit._queue.statistics().current_buffer_used:
                await trio.lowlevel.checkpoint()
        return swarm.workers[1].statistics()["calls"]


async def cost(folder: Path, calls: int = 6000) -> dict[str, object]:
    """Compute that audits caused over compute of the calls, by rows and by the time of the experts."""
    store, manifest = await trio.to_thread.run_sync(lambda: tiny(folder / "cost", quantisation="int8", kind="F32"))
    random = np.random.default_rng(3)
    async with trust_swarm(folder / "cost", store, manifest) as swarm:
        for serves in (False, True, True):
            await swarm.node(serves=serves)
        caller = await swarm.caller(share=SHARE)
        running = caller.session(manifest)
        begun = perf_counter()
        for number in range(calls):
            h = random.standard_normal((1, manifest.architecture.hidden)).astype(np.float32)
            await running.run(number % manifest.architecture.layers, h, Routing())
        spent = perf_counter() - begun
        asked = sum(running.report().rows.values())
        audit = caller.audit
        # rows asked for again cost what the first ones did; verdicts here are timed
        again, here = audit.rows_audited / asked, audit.busy_seconds / spent
        return {
            "audit_cost": round(again + here, 4),
            "audit_rows_share": round(again, 4),
            "audit_fp64_share": round(here, 4),
            "outcomes": dict(audit.counts),
        }


def _short(value: object) -> object:
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    return float(f"{float(value):.3g}")  # type: ignore[arg-type]


PARTS = ("honest", "size", "framing", "cost", "liars", "stages", "stagecost", "stageliars")


def measure(parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """The figures of each part, told on stderr as they come."""
    logging.disable(logging.CRITICAL)
    figures: dict[str, Any] = {}

    def found(name: str, value: dict[str, object]) -> None:
        figures[name] = value
        print(json.dumps({name: value}), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "honest" in parts:
            found("honest", honest())
        if "size" in parts:
            found("size", real_size())
        if "framing" in parts:
            found("framing", framing())
        if "cost" in parts:
            found("cost", trio.run(cost, folder))
        if "liars" in parts:
            for wrong in (1.0, 0.05):
                found(f"liars_{wrong:g}", trio.run(liars, folder, wrong))
        if "stages" in parts:
            found("stages", trio.run(bench_stages.verdicts, folder))
        if "stagecost" in parts:
            found("stagecost", trio.run(bench_stages.cost, folder, SHARE))
        if "stageliars" in parts:
            for wrong in (1.0, 0.05):
                found(f"stageliars_{wrong:g}", trio.run(bench_stages.liars, folder, SHARE, wrong))
    logging.disable(logging.NOTSET)
    return figures


def main(parts: list[str]) -> None:
    """Run the parts that were asked for."""
    figures = measure(parts or PARTS)
    costs = {"cost": "audit_cost", "stagecost": "stage_audit_cost"}
    ratios = {name: figures[part][name] for part, name in costs.items() if part in figures}
    print(json.dumps({"figures": figures, "ratios": ratios}))


if __name__ == "__main__":
    main(sys.argv[1:])
