"""``on_missing``: what happens when nobody has a chosen expert any more: an error that names it, or, where the operator
wishes it, the other experts of the row weigh more and the answer says that it is degraded."""

import msgspec
import numpy as np
import pytest
import trio
import trio.testing

from config.errors import RemoteError
from config.generation import Finished
from dmoe import session
from dmoe.asking import Work
from dmoe.core.routes import map_of
from dmoe.session import GRACE_SECONDS, LOST_SECONDS
from gateway.openai.stream import rios_of
from p2p.core.advert import ModelOffer, bitmap
from tests.unit.dmoe.answer_kit import answer, request
from tests.unit.dmoe.engine_kit import SelfRunningEngine
from tests.unit.dmoe.swarm_kit import ALL, GROUPS, Routing, make_manifest
from tests.unit.dmoe.test_calling import expected, rows, swarm
from tests.unit.dmoe.test_planning import node

SHARD = 2
"""Layers 0 and 1, sum group 2: experts 4 and 5."""
OTHERS = [index for index in range(2 * GROUPS) if index != SHARD]


def routing(*chosen, weights=(0.75, 0.25)):
    return Routing(np.array(chosen, np.int32), np.tile(np.array(weights, np.float32), (len(chosen), 1)))


@pytest.fixture
def autojump_clock():
    """Time jumps once nothing happens for a while: a worker's thread must not look like a peer that hangs."""
    return trio.testing.MockClock(autojump_threshold=0.05)


@pytest.fixture
def manifest():
    return make_manifest(top_k=2, experts_per_group=2)


async def test_the_weights_of_what_is_left_are_rescaled_to_the_same_sum(manifest, autojump_clock):
    async with swarm(manifest) as s:
        await s.node()
        await s.node(OTHERS)
        run = (await s.caller(renormalise=True)).session(manifest)
        h, chosen = rows(3), routing((0, 4), (5, 7), (1, 6))
        out = await run.run(0, h, chosen)
        # the same rows with the experts that are there alone, at the weight of both
        alone = Routing(np.array([[0], [7], [1]], np.int32), np.array([[1.0], [1.0], [0.75]], np.float32))
        want = expected(manifest, 0, h, alone)
        assert np.allclose(out[:2], want[:2], atol=2e-3)  # rounded to fp16 before, not after
        whole = expected(manifest, 0, h, chosen)
        assert out[2].tobytes() == whole[2].tobytes()
        assert run.report().missing == ((0, 4), (0, 5))


async def test_without_the_wish_the_layer_fails_and_names_the_experts(manifest, autojump_clock):
    async with swarm(manifest) as s:
        await s.node()
        await s.node(OTHERS)
        run = (await s.caller()).session(manifest)
        with pytest.raises(RemoteError, match="layer 0, experts 4, 5") as caught:
            await run.run(0, rows(2), routing((0, 4), (1, 6)))
        assert caught.value.code == "no_replica"
        await run.run(0, rows(2), routing((0, 1), (1, 6)))
        assert run.report().missing == ()


async def test_a_row_that_chose_nothing_else_fails_all_the_same(manifest, autojump_clock):
    async with swarm(manifest) as s:
        await s.node()
        await s.node(OTHERS)
        run = (await s.caller(renormalise=True)).session(manifest)
        for _ in range(2):
            with pytest.raises(RemoteError, match="experts 4, 5"):
                await run.run(0, rows(2), routing((0, 1), (4, 5)))
            await run.run(0, rows(1), routing((0, 4)))


async def test_dense_models_never_do_without(autojump_clock):
    dense = make_manifest()
    async with swarm(dense) as s:
        await s.node()
        await s.node(OTHERS)
        run = (await s.caller(renormalise=True)).session(dense)
        with pytest.raises(RemoteError, match="no replica of layer 0"):
            await run.run(0, rows(1), ALL)


async def test_the_grace_is_waited_for_once_and_a_replica_that_comes_back_is_used(manifest, autojump_clock):
    async with swarm(manifest) as s:
        await s.node()
        await s.node(OTHERS)
        run = (await s.caller(renormalise=True)).session(manifest)
        chosen, started = routing((0, 4)), trio.current_time()
        for _ in range(5):
            await run.run(0, rows(1), chosen)
        assert trio.current_time() - started == pytest.approx(GRACE_SECONDS)
        await s.node([SHARD])
        await trio.testing.wait_all_tasks_blocked()
        out = await run.run(0, rows(1), chosen)
        assert out.tobytes() == expected(manifest, 0, rows(1), chosen).tobytes()


async def test_a_replica_that_failed_is_tried_again_after_a_while(manifest, autojump_clock):
    async with swarm(manifest) as s:
        await s.node()
        await s.node(OTHERS)
        await s.node([SHARD])
        s.shards[2][SHARD].fault = ValueError("broken")
        run = (await s.caller(renormalise=True)).session(manifest)
        chosen = routing((0, 4))
        lacking = await run.run(0, rows(1), chosen)
        s.shards[2][SHARD].fault = None
        await run.run(0, rows(1), chosen)
        assert s.shards[2][SHARD].batches == []
        await trio.sleep(LOST_SECONDS + 0.1)
        out = await run.run(0, rows(1), chosen)
        assert out.tobytes() == expected(manifest, 0, rows(1), chosen).tobytes() != lacking.tobytes()


def test_rescaling_is_exact_for_whichever_groups_are_lost(manifest):
    work = Work(map_of(manifest), 0, rows(2), *vars_of(routing((0, 4), (2, 6), weights=(0.5, 0.25))), 0.0)
    assert work.wanted == [0, 1, 2, 3]
    for group in (0, 1, 3):
        work.partials[group] = np.full((2, rows(1).shape[1]), np.float32(group + 1))
    assert work.leave_out(2)
    row = work.total()
    assert row[0, 0] == np.float32(0.75 / 0.5) * 7
    assert row[1, 0] == 7
    assert not work.leave_out(0)
    assert work.lost == {2}
    assert [(expert, rows.tolist()) for expert, rows in work.chosen_of(2)] == [(4, [0])]


def vars_of(routed):
    return routed.experts, routed.weights


async def test_an_answer_says_that_it_is_degraded_down_to_the_client(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "GRACE_SECONDS", 0.05)
    async with node(tmp_path, experts=4, renormalise=True) as (models, networks, manifest, _):
        lost = offer(networks, manifest, without=manifest.expert_shards()[0])
        await trio.testing.wait_all_tasks_blocked()
        engine = SelfRunningEngine(models, default_route="experts")
        assert engine.models()[0].ready
        _, finished = await answer(engine, request(prompt="hello there, everybody", max_tokens=20, min_tokens=20))
        assert finished.missing
        assert {expert for _, expert in finished.missing} <= set(lost.experts)
        told = rios_of(finished)
        assert told["degraded"] is True
        assert told["missing"][0] == {"layer": finished.missing[0][0], "expert": finished.missing[0][1]}
        assert isinstance(finished, Finished)


async def test_what_was_computed_without_experts_is_no_beginning_of_another_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "GRACE_SECONDS", 0.05)
    asked = request(prompt="a prompt that is long enough to be kept", max_tokens=5, min_tokens=5, temperature=0)
    async with node(tmp_path, experts=4, renormalise=True) as (models, networks, manifest, _):
        engine = SelfRunningEngine(models, default_route="experts")
        reference = await answer(engine, asked)
        kept = await answer(engine, asked)
        assert kept[1].cached_tokens > 0
        offer(networks, manifest, without=manifest.expert_shards()[0])
        await trio.testing.wait_all_tasks_blocked()
        other = request(prompt="b" + asked.prompt, max_tokens=5, min_tokens=5, temperature=0)
        assert (await answer(engine, other))[1].missing
        offer(networks, manifest)
        await trio.testing.wait_all_tasks_blocked()
        whole = await answer(engine, other)
        assert whole[1].missing == ()
        assert whole[1].cached_tokens == 0
        assert (await answer(engine, asked))[0] == reference[0]


def offer(networks, manifest, without=None):
    """The other node offers every expert shard but one."""
    kept = {manifest.shard_index(shard.id) for shard in manifest.expert_shards() if shard != without}
    made = ModelOffer(manifest.model_id, bitmap(kept), 0, 0, 0)
    networks[1].directory.update(lambda advert: msgspec.structs.replace(advert, models=(made,)))
    return without


async def test_a_layer_without_any_expert_is_refused_before_the_answer(tmp_path):
    async with node(tmp_path, experts=4, renormalise=True) as (models, networks, *_):
        networks[1].directory.update(lambda advert: msgspec.structs.replace(advert, models=()))
        await trio.testing.wait_all_tasks_blocked()
        assert not SelfRunningEngine(models, default_route="experts").models()[0].ready
