"""Stages are audited: liars are found and proved guilty, honest hosts never are, and nobody can be framed."""

from contextlib import suppress
from dataclasses import replace
from functools import partial

import msgspec
import numpy as np
import pytest
import trio

from config.errors import RemoteError, RiosError
from dmoe.core import stageevidence
from dmoe.core.privacy import OPEN, privacy_of
from dmoe.judging import Judging
from dmoe.runner import Feed
from dmoe.stages import chain
from dmoe.stages.audits import _by_hand
from ledger.core import proof
from tests.unit.dmoe.stage_trust_kit import answer, prompts, quiet, rows_of, stage_trust_swarm
from tests.unit.dmoe.stages_kit import staged


async def model(folder, **kwargs):
    return await trio.to_thread.run_sync(lambda: staged(folder / "model", **kwargs))


async def until(check, seconds=90):
    with trio.fail_after(seconds):
        while not check():  # noqa: ASYNC110
            await trio.sleep(0.02)


async def passes_until_found(runner, sequence, liar, most):
    """Passes, each audited, until the liar is not trusted any more."""
    for token in range(most):
        await runner.forward([Feed(sequence=sequence, tokens=(token + 3, token + 9), outputs=1)])
        await quiet(runner)
        if not runner.auditor.trust.trusted(liar):
            return
    raise AssertionError(f"{liar} is trusted after {most} passes")


@pytest.mark.parametrize(("lie", "may_forward"), [("fp16", True), ("int8", False), ("nudge", True)])
async def test_a_stage_host_that_lies_is_proved_guilty_and_used_no_more(tmp_path, lie, may_forward):
    store, manifest = await model(tmp_path, kind="F32")
    async with stage_trust_swarm(tmp_path, store, manifest) as s:
        await s.node()
        liar = await s.node(1, lie=lie)
        await s.node(0)
        await s.node(2)
        runner = await s.runner(
            share=100.0, may_forward=may_forward
        )  # every pass is picked, however long it was before
        trust = runner.auditor.trust
        sequence = await runner.open(150)  # by way of the liar, as nobody else is there yet
        await s.node(1)
        await until(lambda: list(runner.audits.replicas(manifest, 1, OPEN, liar)))
        # what an audit can be compared with, and when it may be computed here, is left to chance
        await passes_until_found(runner, sequence, liar, 70)
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


@pytest.mark.parametrize("lent", [False, True])
async def test_stages_that_the_asker_runs_itself_hide_no_liar_behind_them(tmp_path, lent):
    """A spot check brings a stage's files here, and from then on it runs here; its experts may be elsewhere."""
    store, manifest = await model(tmp_path, kind="F32", experts=4 if lent else 0)
    async with stage_trust_swarm(tmp_path, store, manifest) as s:
        await s.node()
        liar = await s.node(1, lie="nudge")
        await s.node(2)
        runner = await s.runner(share=100.0, own=(0,), lent=lent)
        sequence = await runner.open(60)  # by way of the liar, as nobody else is there yet
        honest = await s.node(1)
        await until(lambda: list(runner.audits.replicas(manifest, 1, OPEN, liar)))
        assert sequence.legs[0].here is not None
        assert not s.hosts[0].indices(manifest.model_id)
        await passes_until_found(runner, sequence, liar, 25)
        assert runner.auditor.trust.trusted(honest)
        assert not runner.auditor.counts["stage contradicted"]


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


async def test_evidence_that_was_touched_frames_nobody(tmp_path):
    store, manifest = await model(tmp_path, kind="F32")
    async with stage_trust_swarm(tmp_path, store, manifest) as s:
        await s.node()
        liar = await s.node(1, lie="zeros")
        honest = await s.node(1)
        await s.node(0)
        await s.node(2)
        runner = await s.runner(share=1.0, may_forward=False)
        wrong = await runner.audits.asking.at(liar, manifest, 1, rows_of(manifest, 9))
        assert await runner.audits.judge(wrong)
        await until(lambda: list((tmp_path / "evidence-0").glob("*.evidence")))
        (file,) = (tmp_path / "evidence-0").glob("*.evidence")
        data = file.read_bytes()
        found = stageevidence.read(data)
        judging = Judging(store)

        def signed(evidence):
            leaf = evidence.leaf_of(manifest)
            proof.check(evidence.worker, leaf, evidence.receipt, evidence.signature, evidence.index, evidence.path)

        signed(found)
        change = partial(msgspec.structs.replace, found)
        width = manifest.architecture.hidden * 2
        position, rows, outputs = found.part
        for wrong in (
            change(worker=honest),
            change(layers=manifest.stages[0].layers),
            change(device="aarch64-cpu"),
            change(came=found.came[:-2] + b"\x00\x3c"),
            change(came=found.came[width:] + found.came[:width]),
            change(came=found.went, went=found.came),
            change(went=found.went[:-2] + b"\x00\x3c"),
            change(part=(position + 1, rows - 1, min(outputs, rows - 1))),
            change(index=found.index ^ 1),
            change(receipt=found.receipt[:-1] + bytes([found.receipt[-1] ^ 1])),
        ):
            with pytest.raises((RiosError, ValueError)):
                signed(wrong)
        with pytest.raises(RiosError, match="no stage"):
            change(layers=(0, 2)).stage(manifest)
        for junk in (b"", data[:-1], data[:200], bytes([data[0], 2]) + b"x" * 40, data + b"x"):
            with pytest.raises(RiosError):
                stageevidence.read(junk)
        # a signed answer of an honest host is no evidence against it
        answered = await runner.audits.asking.at(honest, manifest, 1, rows_of(manifest, 9))
        assert not await runner.audits.judge(answered)
        assert judging.judge(found).outcome == "guilty"
        unknown = change(device="x86_64-cuda")
        assert judging.judge(unknown).outcome == "cannot tell"


async def test_a_stage_is_tried_out_before_it_is_relied_on_and_its_lie_is_told_to_all(tmp_path):
    store, manifest = await model(tmp_path, kind="F32")
    async with stage_trust_swarm(tmp_path, store, manifest) as s:
        await s.node()
        liar = await s.node(1, lie="int8")
        await s.node(0, 1, 2)
        await s.node(0, 2)
        other = await s.runner(3, share=1.0)
        runner = await s.runner(share=0.0, probes=True)
        await until(lambda: not runner.auditor.trust.trusted(liar))
        await until(lambda: not other.auditor.trust.trusted(liar))
        assert other.auditor.counts["guilty by gossip"] == 1
        await until(lambda: len({number for number, peer, *_ in s.blamed if peer == liar}) == 2)
        await answer(runner, [3, 4, 5, 6])
        assert runner.prober.done >= 3
        trust = runner.auditor.trust
        assert [peer for peer in trust.table() if not trust.trusted(peer)] == [liar]


async def test_audits_show_rows_to_nobody_whom_privacy_forbids(tmp_path):
    store, manifest = await model(tmp_path, kind="F32")
    async with stage_trust_swarm(tmp_path, store, manifest) as s:
        await s.node()
        trusted = await s.node(0, 1, 2)
        await s.node(0, 1, 2)
        runner = await s.runner(share=1.0, privacy=privacy_of([trusted], True, (0, 0)))
        for prompt in prompts(4):
            await answer(runner, prompt)
        await quiet(runner)
        assert runner.auditor.counts["passed"] + runner.auditor.counts["no replica"] > 0
        assert not s.hosts[2].statistics()["runs"]
        assert s.hosts[1].statistics()["runs"]


@pytest.mark.parametrize("trick", ["signs for other rows than it was sent", "shows nothing", "says nothing"])
async def test_a_liar_that_keeps_what_it_did_from_sight_is_used_no_more(tmp_path, monkeypatch, trick):
    """At the head of a way that forwards; asked again on a ticket of its own, it answers honestly."""
    store, manifest = await model(tmp_path, kind="F32")
    async with stage_trust_swarm(tmp_path, store, manifest) as s:
        await s.node()
        liar = await s.node(0, lie="int8")
        await s.node(1)
        await s.node(2)
        runner = await s.runner(share=100.0)
        sequence = await runner.open(60)  # by way of the liar, as nobody else is there yet
        honest = await s.node(0)
        await until(lambda: list(runner.audits.replicas(manifest, 0, OPEN, liar)))
        lies, asking, read = s.segments[liar, 0], runner.audits.asking, chain._answer_of

        def misread(reply, link, hops, parts):
            trail, failure = read(reply, link, hops, parts)
            if link.peer == liar and hops and trick == "says nothing":
                return [], failure
            if link.peer == liar and hops:
                said = tuple(replace(each, came=bytes(len(each.came))) for each in trail[0].said)
                trail[0] = replace(trail[0], said=said)
            return trail, failure

        async def not_shown(peer, *args):
            raise RemoteError("not_found", "there is no such ticket here (any more)")

        async def honestly(peer, *args, **kwargs):
            lies.share = 0.0
            try:
                return await at(peer, *args, **kwargs)
            finally:
                lies.share = 1.0

        if trick == "shows nothing":
            at = asking.at
            monkeypatch.setattr(asking, "shown", not_shown)
            monkeypatch.setattr(asking, "at", honestly)
        else:
            monkeypatch.setattr(chain, "_answer_of", misread)
        await passes_until_found(runner, sequence, liar, 12)
        assert runner.auditor.trust.trusted(honest)


@pytest.mark.parametrize("where", ["forwarded", "home"])
async def test_a_host_that_signs_for_other_rows_than_it_sends_is_found_out(tmp_path, where):
    """Between two hosts nobody sees who of them lies: their rows pass the orchestrator from then on."""
    store, manifest = await model(tmp_path, kind="F32")
    async with stage_trust_swarm(tmp_path, store, manifest) as s:
        await s.node()
        liar = await s.node(1 if where == "forwarded" else 2)
        for stage in (0, 1, 2) if where == "forwarded" else (0, 1):
            await s.node(stage)
        runner = await s.runner(share=0.0)
        host = s.hosts[1]
        send = host._send

        def altered(asked, owner, shape, buffer, deadline):
            wrong = memoryview(bytearray(buffer))
            wrong[1] ^= 4
            return send(asked, owner, shape, wrong, deadline)

        host._send = altered
        for seed, prompt in enumerate(prompts(20, most=8)):
            if not runner.auditor.trust.trusted(liar):
                break
            with suppress(RiosError):  # the last host may be the only one
                await answer(runner, prompt, 3, seed=seed, drafts=False)
        if where == "home":
            assert not runner.auditor.trust.trusted(liar)
        else:
            contradicted = runner._legs._shared.chains.contradicted
            assert contradicted
            assert all(liar in pair for pair in contradicted)
            honest = [peer for peer in runner.auditor.trust.table() if peer != liar]
            assert all(runner.auditor.trust.trusted(peer) for peer in honest)


def test_a_number_that_was_altered_by_hand_is_told_from_roundings():
    rows = np.random.default_rng(1).standard_normal((6, 128)).astype(np.float16).astype(np.float32)
    altered = rows.copy()
    altered[4, 9] *= np.float32(1.01)
    assert _by_hand(altered, rows)
    codes = rows.astype(np.float16).view(np.uint16)
    codes[2, 5] += 1  # one rounding to fp16 that went the other way
    assert not _by_hand(codes.view(np.float16).astype(np.float32), rows)
    moved = rows * (1 + np.float32(0.01) * np.random.default_rng(2).standard_normal(rows.shape).astype(np.float32))
    assert not _by_hand(moved, rows), "other codes of activations move all numbers"
    assert not _by_hand(rows, rows)
