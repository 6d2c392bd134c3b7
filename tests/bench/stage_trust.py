"""Parts of ``bench_trust`` about stages: verdicts on honest hosts and liars, costs, how soon liars are found."""

import math
from functools import partial
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import trio

from dmoe.core import wire
from dmoe.core.history import History
from dmoe.judging import stage_layer
from dmoe.runtime import merged, open_files
from dmoe.stages.loading import load_stage
from dmoe.stages.retrace import retrace
from tests.unit.dmoe.model_kit import tiny
from tests.unit.dmoe.stage_trust_kit import (
    answer,
    nudged,
    options,
    prompts,
    quiet,
    rewritten,
    rows_of,
    stage_trust_swarm,
    through,
)
from tests.unit.dmoe.stages_kit import staged

KINDS = {
    "fp32": {"kind": "F32"},
    "int8": {"kind": "F32", "quantisation": "int8"},
    "int4_offsets": {"kind": "Q4_1"},
    "sparse_fp32": {"kind": "F32", "experts": 4},
    "sparse_int8": {"kind": "F32", "experts": 4, "quantisation": "int8"},
}
LIES = {"fp32": ("fp16", "int8"), "sparse_fp32": ("fp16", "int8"), "int8": ("int4",), "sparse_int8": ("int4",)}
HONEST_SEQUENCES, HONEST_SECONDS = 400, 60.0
CONFIDENCE = 0.99


async def verdicts(folder: Path) -> dict[str, Any]:
    """Honest sequences of all lengths, pieces, threads and scales, judged; of lies the share of rows found guilty."""
    out: dict[str, Any] = {}
    for kind, options_of in KINDS.items():
        store, manifest = await trio.to_thread.run_sync(partial(tiny, folder / f"stage-{kind}", **options_of))
        stage, random = manifest.stages[0], np.random.default_rng(1)
        segments = [load_stage(manifest, stage, store, options(threads)) for threads in (1, 2)]
        tensors, dtype = merged(open_files(manifest, store, [stage])), manifest.wire_dtype
        load = partial(stage_layer, manifest, tensors)

        def made(rows: Any, seed: int, manifest: Any = manifest, load: Any = load) -> Any:
            return retrace(manifest, manifest.stages[0].layers, load, rows, np.random.default_rng(seed))

        worst, sequences, count, begun = 0.0, 0, 0, perf_counter()
        while sequences < HONEST_SEQUENCES and perf_counter() - begun < HONEST_SECONDS:
            length = int(random.integers(1, 40))
            rows = rows_of(manifest, length, seed=sequences, scale=2.0 ** random.uniform(-4, 4))
            cuts = sorted(set(random.integers(1, length + 1, 4).tolist()) - {length})
            pieces = np.diff([0, *cuts, length]).tolist()
            y = await through(segments[sequences % 2], rows, pieces)
            worst = max(worst, float(made(rows, sequences).ratios(wire.rounded(y, dtype), dtype).max()))
            sequences, count = sequences + 1, count + length
        rows = rows_of(manifest, 32, seed=7)
        y = await through(segments[0], rows)
        honest = made(rows, 0)

        def guilty(lie: Any, honest: Any = honest, dtype: Any = dtype) -> float:
            return round(float((honest.ratios(wire.rounded(lie, dtype), dtype) > 1).mean()), 3)

        caught = {"zeros": guilty(np.zeros_like(y)), "as_it_came": guilty(rows)}
        nudges = [honest.ratios(wire.rounded(nudged(y, Random(seed)), dtype), dtype).max() > 1 for seed in range(32)]
        caught["nudge_of_a_row"] = round(float(np.mean(nudges)), 3)
        for lie in LIES.get(kind, ()):
            cheap = await trio.to_thread.run_sync(rewritten, store, manifest, stage, lie)
            caught[lie] = guilty(await through(cheap, rows))
        out[kind] = {
            "honest_sequences": sequences,
            "honest_rows": count,
            "worst_ratio": round(worst, 3),
            "caught": caught,
        }
    out["false_accusations"] = sum(each["worst_ratio"] > 1 for each in out.values())
    out["history_us_per_row"] = {width: _history(width) for width in (576, 2048, 7168)}
    return out


def _history(width: int, rows: int = 64) -> float:
    """Hashing what came and went, the best of several."""
    x = wire.rounded(np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32))
    history, best = History(width, "fp16"), math.inf
    for _ in range(20):
        begun = perf_counter()
        history.append(0, x, x).said(1)
        best = min(best, perf_counter() - begun)
    return round(best / rows * 1e6, 1)


async def cost(folder: Path, share: float, answers: int = 150) -> dict[str, Any]:
    """Rows times layers that audits computed over those of all passes, and time of verdicts over time."""
    store, manifest = await trio.to_thread.run_sync(partial(staged, folder / "stage-cost", kind="F32"))
    async with stage_trust_swarm(folder / "stage-cost", store, manifest) as swarm:
        await swarm.node()
        for stages in ((0, 1, 2), (0, 1, 2)):
            await swarm.node(*stages)
        runner, begun = await swarm.runner(share=share), perf_counter()
        for seed, prompt in enumerate(prompts(answers)):
            await answer(runner, prompt, 20, seed=seed)
        await quiet(runner)
        audits, spent = runner.audits, perf_counter() - begun
        again, here = audits.rows_audited / audits.rows_asked, runner.auditor.busy_seconds / spent
        return {
            "stage_audit_cost": round(again + here, 4),
            "rows": audits.rows_asked,
            "outcomes": dict(runner.auditor.counts),
        }


async def liars(folder: Path, share: float, wrong: float, runs: int = 2) -> dict[str, Any]:
    """Stage hosts that lie in a share of their runs, without probes: answers (and the liar's runs) until found out."""
    bound, found = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - share)), {}
    for lie in ("fp16", "int8", "nudge", "zeros"):
        for run in range(runs):
            here = folder / f"stage-liar-{lie}-{wrong}-{run}"
            store, manifest = await trio.to_thread.run_sync(partial(staged, here, kind="F32"))
            async with stage_trust_swarm(here, store, manifest, seed=run + 1) as swarm:
                await swarm.node()
                liar = await swarm.node(1, lie=lie, share=wrong)
                await swarm.node(0, 1, 2)
                runner = await swarm.runner(share=share, seed=run)
                pinned = 0
                for seed, prompt in enumerate(prompts(4 * bound, seed=run, most=12)):
                    if not runner.auditor.trust.trusted(liar):
                        break
                    await answer(runner, prompt, 8, seed=seed)
                    pinned = seed + 1
                    await quiet(runner)
                runs_of = swarm.segments[liar, 1].runs
                found.setdefault(lie, []).append({"answers": pinned, "runs_of_the_liar": runs_of})
    return {"wrong_share": wrong, "bound_99_answers": bound, "until_exposed": found}
