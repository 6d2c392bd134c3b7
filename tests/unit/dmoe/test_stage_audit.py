"""Stages are audited: liars are found and proved guilty, honest hosts never are, and nobody can be framed."""

import pytest
import trio

from dmoe.core import stageevidence
from dmoe.judging import Judging
from ledger.core import proof
from tests.unit.dmoe.stage_trust_kit import answer, prompts, quiet, stage_trust_swarm
from tests.unit.dmoe.stages_kit import staged

pytestmark = pytest.mark.usefixtures("tmp_path")


async def model(folder, **kwargs):
    return await trio.to_thread.run_sync(lambda: staged(folder / "model", **kwargs))


async def until(check, seconds=30):
    with trio.fail_after(seconds):
        while not check():  # noqa: ASYNC110
            await trio.sleep(0.02)


@pytest.mark.parametrize("may_forward", [True, False])
@pytest.mark.parametrize("lie", ["zeros", "fp16", "int8", "nudge"])
async def test_a_stage_host_that_lies_is_proved_guilty_and_used_no_more(tmp_path, lie, may_forward):
    store, manifest = await model(tmp_path, kind="F32")
    async with stage_trust_swarm(tmp_path, store, manifest) as s:
        await s.node()
        liar = await s.node(1, lie=lie)
        for stages in ((0,), (1,), (2,), (0, 2)):
            await s.node(*stages)
        runner = await s.runner(share=0.5, may_forward=may_forward)
        trust = runner.auditor.trust
        for seed, prompt in enumerate(prompts(40)):
            if not trust.trusted(liar):
                break
            await answer(runner, prompt, seed=seed)
            await quiet(runner)
        assert not trust.trusted(liar)
        assert [peer for peer in trust.table() if not trust.trusted(peer)] == [liar]
        await until(lambda: list((tmp_path / "evidence-0").glob("*.evidence")))
        (file,) = (tmp_path / "evidence-0").glob("*.evidence")
        found = stageevidence.read(file.read_bytes())
        assert found.worker == liar
        proof.check(found.worker, found.leaf_of(manifest), found.receipt, found.signature, found.index, found.path)
        judged = await trio.to_thread.run_sync(Judging(store).judge, found)
        assert judged.outcome == "guilty"
        await until(lambda: s.blamed)
        assert {peer for _, peer, *_ in s.blamed} == {liar}
        runs = s.segments[liar, 1].runs
        await answer(runner, [3, 4, 5])
        assert s.segments[liar, 1].runs == runs


@pytest.mark.parametrize("kwargs", [{"kind": "F32"}, {"kind": "Q4_1", "experts": 4}], ids=["fp32", "sparse int4"])
async def test_honest_hosts_pass_every_audit(tmp_path, kwargs):
    store, manifest = await model(tmp_path, **kwargs)
    async with stage_trust_swarm(tmp_path, store, manifest) as s:
        await s.node()
        for stages, threads in (((0, 1), 1), ((1, 2), 2), ((0, 2), 1), ((2,), 2)):
            await s.node(*stages, threads=threads)
        runner = await s.runner(share=1.0, probes=True)
        for seed, prompt in enumerate(prompts(6)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer, runner, prompt, 4, seed)
                nursery.start_soon(answer, runner, prompt[::-1], 3, seed + 1)
        await quiet(runner)
        counts = runner.auditor.counts
        assert counts["passed"] > 10
        assert not any(counts[name] for name in ("differed", "shown", "unclear", "guilty", "failed")), counts
        assert not s.blamed
