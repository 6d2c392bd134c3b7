"""Audits over the network in memory, with real shards and a real ledger: liars are exposed, proved, banned, unpaid;
nobody else is."""

import contextlib
import logging
import shutil

import msgspec
import numpy as np
import pytest
import trio

from config.errors import IntegrityError, RemoteError
from dmoe.core import evidence
from dmoe.core.privacy import Privacy
from dmoe.judging import Judging
from dmoe.store import ModelStore
from dmoe.trust import Trust
from ledger.core import proof
from ledger.core.errors import RuleError
from tests.unit.dmoe.model_kit import made
from tests.unit.dmoe.trust_kit import calls, trust_swarm


async def until(condition, seconds=20.0):
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.02)


def found_out(caller, peer):
    return lambda: not caller.audit.trust.trusted(peer)


async def model(folder, kind="fp32", **options):
    return await made(folder / "model", quantisation=kind, kind="F32", **options)


LIES = [("fp32", "fp16", 0), ("fp32", "int8", 4), ("int8", "int4", 0), ("fp32", "nudge", 4), ("int8", "zeros", 0)]


@pytest.mark.parametrize(("kind", "lie", "experts"), LIES)
async def test_a_liar_is_proved_wrong_banned_and_paid_no_more(tmp_path, caplog, kind, lie, experts):
    caplog.set_level(logging.ERROR, "rios.security.trust")
    store, manifest = await model(tmp_path, kind, experts=experts)
    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        liar, honest = await s.node(lie=lie), await s.node()
        caller = await s.caller(share=1.0)
        await calls(caller, manifest, 40, rows=2, until=found_out(caller, liar))
        assert found_out(caller, liar)()
        assert caller.audit.trust.trusted(honest)
        await until(lambda: s.blamed)
        assert [entry[:3] for entry in s.blamed] == [(0, liar, "cheat")]
        (channel,) = [c for c in s.ledgers[0].buyer.channels() if c["peer_id"] == liar]
        assert channel["stopped"].startswith("proved wrong: layer")
        report = caller.session(manifest)
        await report.run(0, np.ones((1, 128), np.float32), _routing(manifest))
        assert set(report.report().rows) == {honest}  # it is not asked any more
        (file,) = (tmp_path / "evidence-0").iterdir()
        found = evidence.read(file.read_bytes())
        assert found.worker == liar
        judged = await trio.to_thread.run_sync(Judging(store).judge, found)
        assert judged.outcome == "guilty"
        proof.check(found.worker, found.leaf, found.receipt, found.signature, found.index, found.path)
        assert any(liar in record.message for record in caplog.records)


def _routing(manifest):
    from tests.unit.dmoe.trust_kit import routing

    return routing(manifest, 1, np.random.default_rng(0))


@pytest.mark.parametrize(("kind", "experts"), [("fp32", 0), ("int8", 4), ("int4", 0), ("source", 4)])
async def test_honest_workers_pass_every_audit(tmp_path, kind, experts):
    store, manifest = await made(tmp_path / "model", quantisation=kind, kind="Q4_1", experts=experts)
    async with trust_swarm(tmp_path, store, manifest) as s:
        for serves in (False, True, True):
            await s.node(serves=serves)
        caller = await s.caller(share=1.0, probes=True)
        for rows in (1, 5, 40):
            await calls(caller, manifest, 4, rows=rows, seed=rows)
        await until(lambda: caller.audit._queue.statistics().current_buffer_used == 0)
        assert caller.audit.counts["passed"] > 10
        assert not caller.audit.counts["differed"]
        assert not caller.audit.counts["guilty"]
        assert not s.blamed


async def test_audits_cost_no_more_than_their_share(tmp_path):
    store, manifest = await model(tmp_path)
    async with trust_swarm(tmp_path, store, manifest) as s:
        for serves in (False, True, True):
            await s.node(serves=serves)
        caller = await s.caller(share=0.02)
        session = caller.session(manifest)
        from tests.unit.dmoe.trust_kit import Routing

        random = np.random.default_rng(0)
        for _ in range(700):
            await session.run(1, random.standard_normal((1, 128)).astype(np.float32), Routing())
        await trio.sleep(0.2)
        asked = sum(session.report().rows.values())
        assert 0 < caller.audit.rows_audited <= 0.03 * asked


async def test_single_experts_are_asked_for_too_because_a_low_weight_hides_in_a_sum(tmp_path):
    store, manifest = await model(tmp_path, experts=4)
    async with trust_swarm(tmp_path, store, manifest) as s:
        for serves in (False, True, True):
            await s.node(serves=serves)
        caller = await s.caller(share=1.0)
        alone, single = [], caller.audit._single

        async def seen(sample):
            asked = await single(sample)
            if asked is not sample:  # none of its experts was asked for with the row that was drawn
                alone.append(asked)
            return asked

        caller.audit._single = seen
        await calls(caller, manifest, 400, rows=2, until=lambda: len(alone) >= 6)
        assert len(alone) >= 6
        for sample in alone:
            assert len(sample.asked.rows) == 1
            (members,) = [place.experts for place in sample.owed.places]
            (experts,) = sample.asked.experts.tolist()
            assert experts[0] in members
            assert sample.asked.weights[0, 0] >= 0.5
            assert not set(experts[1:]) & set(members)
            assert -1 not in experts  # nothing marks it
        assert not s.blamed


async def test_a_replica_is_tried_out_before_it_is_relied_on_and_its_lie_is_told_to_all(tmp_path):
    store, manifest = await model(tmp_path)
    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        liar, honest = await s.node(lie="nudge"), await s.node()
        bystander = await s.node(serves=False)
        other = await s.caller(3, share=0.5, paid=False)
        other.audit._notary = other.audit.court._notary = s.ledgers[3].buyer
        other.map(manifest)
        caller = await s.caller(share=0.001, probes=True)
        caller.map(manifest)
        await until(found_out(caller, liar))
        await until(found_out(other, liar))  # it asked nobody: it judged the evidence itself
        await until(lambda: {0, 3} == {entry[0] for entry in s.blamed})
        assert other.audit.counts["guilty by gossip"] == 1
        assert caller.audit.trust.trusted(honest)
        assert not [entry for entry in s.blamed if entry[1] in (honest, bystander)]
        file = next((tmp_path / "evidence-3").iterdir())
        assert evidence.read(file.read_bytes()).worker == liar


async def test_replicas_that_lie_alike_are_found_out_by_a_shard_that_is_fetched(tmp_path):
    store, manifest = await model(tmp_path)
    bare = ModelStore(tmp_path / "bare")
    bare.add_manifest(manifest)
    fetched = []

    async def fetch(_manifest, shard):
        fetched.append(shard.id)
        for file in shard.files:
            bare.path(manifest.model_id, file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(store.path(manifest.model_id, file), bare.path(manifest.model_id, file))

    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        one, other = await s.node(lie="int8"), await s.node(lie="int8")
        caller = await s.caller(share=1.0, store=bare, fetch=fetch)
        with contextlib.suppress(RemoteError):  # nobody else is left in the end
            await calls(caller, manifest, 100, until=lambda: not (_trusts(caller, one) and _trusts(caller, other)))
        assert fetched
        assert not (_trusts(caller, one) and _trusts(caller, other))
        await until(lambda: s.blamed)


def _trusts(caller, peer):
    return caller.audit.trust.trusted(peer)


async def test_forged_evidence_does_not_hide_the_true_one_that_follows(tmp_path):
    store, manifest = await model(tmp_path)
    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        liar, _ = await s.node(lie="zeros"), await s.node()
        await s.node(serves=False)
        caller = await s.caller(share=1.0)
        other = await s.caller(3, share=0.5, paid=False)
        other.audit._notary = other.audit.court._notary = s.ledgers[3].buyer
        other.map(manifest)
        await calls(caller, manifest, 40, until=found_out(caller, liar))
        await until(lambda: s.blamed)
        (file,) = (tmp_path / "evidence-0").iterdir()
        true = evidence.read(file.read_bytes())
        assert _trusts(other, liar)  # a real prompt's evidence is told to nobody
        forged = msgspec.structs.replace(true, signature=bytes(64))
        await s.networks[2].publish("rios/evidence/1", evidence.write(forged))
        await until(lambda: (3, s.networks[2].peer_id, "bad_record") in [entry[:3] for entry in s.blamed])
        assert _trusts(other, liar)
        await s.networks[0].publish("rios/evidence/1", evidence.write(true))
        await until(found_out(other, liar))


async def test_gossip_about_an_honest_worker_is_blamed_on_its_sender(tmp_path):
    store, manifest = await model(tmp_path)
    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        honest = await s.node()
        framer = await s.node(serves=False)
        caller = await s.caller(share=1.0)
        found = await _evidence(caller, s, manifest)
        other = await s.caller(2, share=0.5, paid=False)
        assert other is not None
        caller.audit.court._seen.clear()
        await s.networks[2].publish("rios/evidence/1", evidence.write(found))
        await until(lambda: s.blamed)
        assert s.blamed[0][:3] == (0, framer, "bad_record")
        assert "not guilty" in s.blamed[0][3]
        assert caller.audit.trust.trusted(honest)


async def _evidence(caller, s, manifest):
    """True evidence of an honest answer."""
    auditor, kept = caller.audit, []
    auditor._pass = lambda sample: kept.append(sample)
    await calls(caller, manifest, 2)
    await until(lambda: kept)
    owed = kept[0].owed
    signed = await s.ledgers[0].buyer.proof(owed.channel, owed.leaf(), 10.0)
    from dmoe.samples import evidence_of

    return evidence_of(owed, signed)


async def test_tampered_evidence_a_wrong_worker_and_a_replayed_leaf_are_refused_by_name(tmp_path):
    store, manifest = await model(tmp_path)
    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        await s.node()
        caller = await s.caller(share=1.0)
        true = await _evidence(caller, s, manifest)

        def check(changed):
            proof.check(changed.worker, changed.leaf, changed.receipt, changed.signature, changed.index, changed.path)

        check(true)
        judging = Judging(store)
        assert (await trio.to_thread.run_sync(judging.judge, true)).outcome == "not guilty"
        answer = bytearray(true.answered)
        answer[1] ^= 0x40
        for change in (
            {"answered": bytes(answer)},
            {"layer": true.layer + 1},
            {"groups": (true.groups[0] ^ 1, *true.groups[1:])},
            {"device": "arm64-cpu"},
            {"answered_bf16": b"\xff"},
            {"asked_bf16": b"\x01"},
            {"model_id": bytes(32)},
            {"rows": 2},
            {"index": true.index + 1},
            {"path": (*true.path, bytes(32))},
        ):
            with pytest.raises(RuleError) as refused:
                check(msgspec.structs.replace(true, **change))
            assert refused.value.rule == "path"
        with pytest.raises(RuleError) as refused:
            check(msgspec.structs.replace(true, worker=s.networks[0].peer_id))
        assert refused.value.rule == "signature"
        receipt = bytearray(true.receipt)
        receipt[-1] ^= 1
        with pytest.raises(RuleError) as refused:
            check(msgspec.structs.replace(true, receipt=bytes(receipt)))
        assert refused.value.rule == "signature"
        with pytest.raises(IntegrityError):
            evidence.read(evidence.write(true)[:-1])
        with pytest.raises(IntegrityError, match="version"):
            evidence.read(evidence.write(msgspec.structs.replace(true, version=2)))


async def test_where_the_arithmetic_is_not_known_nobody_is_guilty_but_others_are_asked(tmp_path):
    store, manifest = await model(tmp_path, "int8")
    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        strange, _ = await s.node(lie="zeros"), await s.node()
        s.workers[1].device = "riscv64-cpu"
        caller = await s.caller(share=1.0)
        await calls(caller, manifest, 60, until=found_out(caller, strange))
        assert found_out(caller, strange)()
        assert caller.audit.counts["unclear"]
        assert not caller.audit.counts["guilty"]
        assert not s.blamed


async def test_without_a_ledger_a_liar_is_shut_out_though_nothing_can_be_proved(tmp_path):
    store, manifest = await model(tmp_path)
    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        liar, _ = await s.node(lie="zeros"), await s.node()
        for worker in s.workers:
            worker._seller = None
        caller = await s.caller(share=1.0, paid=False)
        await calls(caller, manifest, 40, until=found_out(caller, liar))
        await until(lambda: s.blamed)
        assert not (tmp_path / "evidence-0").exists()


async def test_a_receipt_that_is_not_over_the_answers_is_not_paid(tmp_path):
    store, manifest = await model(tmp_path)
    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        forger = await s.node()
        caller = await s.caller(share=1.0)
        served = s.ledgers[1].seller.served
        s.workers[1]._seller.served = lambda payer, channel, quote, kflop, leaf: served(
            payer, channel, quote, kflop, bytes(reversed(leaf))
        )

        def stopped():
            return any("never came" in c["stopped"] for c in s.ledgers[0].buyer.channels() if c["peer_id"] == forger)

        with contextlib.suppress(RemoteError):  # nobody else is left to ask then
            await calls(caller, manifest, 2000, until=stopped)
        await until(stopped)


def test_reputations_survive_restarts_and_a_damaged_file_is_left_behind(tmp_path, caplog):
    file = tmp_path / "trust.json"
    trust = Trust(file)
    trust.passed("good")
    trust.guilty("bad", "layer 3")
    again = Trust(file)
    assert not again.trusted("bad")
    assert again.trusted("good")
    assert again.table()["bad"]["why"] == "layer 3"
    assert again.forgive("bad")
    assert not again.forgive("good")
    assert Trust(file).trusted("bad")
    file.write_text('{"peers": {"bad": 1}}')
    assert Trust(file).trusted("bad")
    assert "cannot be read" in caplog.text


async def test_an_audit_shows_private_rows_to_nobody_who_may_not_see_them(tmp_path):
    store, manifest = await model(tmp_path, experts=4)
    async with trust_swarm(tmp_path, store, manifest) as s:
        await s.node(serves=False)
        trusted, _ = await s.node(), await s.node()
        caller = await s.caller(share=1.0)
        rule = Privacy(trusted=frozenset((trusted,)), only_trusted=True)
        await calls(caller, manifest, 20, rows=2, privacy=rule)
        await until(lambda: sum(caller.audit.counts.values()) >= 10)
        assert s.workers[1].statistics()["calls"] > 0
        assert s.workers[2].statistics()["calls"] == 0
        await calls(caller, manifest, 20, rows=2)  # others' rows may be shown
        await until(lambda: s.workers[2].statistics()["calls"] > 0)
