"""Privacy: not one row of a private answer reaches a peer that is not allowed. Real layers of a sparse model, nodes of
a network in memory; every host counts the rows it computes."""

from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
import trio

from config.errors import ConfigError, RequestError, RiosError
from config.generation import EmbeddingRequest
from dmoe.caller import Caller
from dmoe.core.plan import KINDS
from dmoe.core.privacy import OPEN, privacy_of
from dmoe.core.spans import Ask
from dmoe.models import StoredModels, SwarmExperts
from dmoe.planning import Planner, wishes_of
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.stages.caller import StageCaller
from dmoe.stages.directions import Directions
from dmoe.stages.host import StageHost
from dmoe.stages.loading import load_stage
from dmoe.worker import Worker, plan_of
from p2p.core.advert import ModelOffer, bitmap
from tests.unit.dmoe.answer_kit import events_of, request, tokens_of
from tests.unit.dmoe.engine_kit import SelfRunningEngine
from tests.unit.dmoe.stages_kit import FREE, staged, swarm

OPTIONS = RuntimeOptions(device="cpu", threads=1)
ASKED = {"prompt": "a secret to begin with", "max_tokens": 10, "min_tokens": 10, "temperature": 0}
LAYERS = 3
ANYBODY = privacy_of((), False, (0, 0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return staged(tmp_path_factory.mktemp("private"), kind="F32", experts=4)


@pytest.fixture(scope="module")
def reference(model):
    """The answer's tokens by route, all in this process."""
    store, _ = model

    async def tokens(route):
        engine = SelfRunningEngine(StoredModels(store, None, OPTIONS, "me"), default_route=route)
        return tokens_of(await events_of(engine, request(**ASKED)))

    return {"experts": trio.run(tokens, "local"), "stages": trio.run(tokens, "stages")}


class Expertise:
    """A worker with the experts of some layers."""

    def __init__(self, network, worker, manifest):
        self.network, self.worker, self.manifest = network, worker, manifest
        self.peer_id = network.peer_id

    def rows(self, layer=None):
        shards = self.worker.statistics()["shards"].get(self.manifest.model_id, {})
        own = {shard.id: shard.layers[0] for shard in self.manifest.expert_shards()}
        return sum(s["rows_computed"] for name, s in shards.items() if layer is None or own[name] == layer)


def rows_of_stages(node):
    stages = node.host.statistics()["stages"].values()
    return sum(stage["rows_computed"] for found in stages for stage in found.values())


async def serve_experts(net, manifest, store, layers=range(LAYERS)):
    network = net.hub.add()
    worker = Worker(network, quote=FREE)
    await net.nursery.start(worker.run)
    for shard in manifest.expert_shards():
        if shard.layers[0] in layers:
            worker.load(plan_of(manifest, shard), ExpertShard(manifest, shard, store, OPTIONS))
    offer = ModelOffer(manifest.model_id, bitmap(worker.indices(manifest.model_id)), 0, 0, 0)
    network.directory.update(lambda advert: msgspec.structs.replace(advert, models=(offer,)))
    return Expertise(network, worker, manifest)


@asynccontextmanager
async def home(model, *, experts=0, stages=0, route="experts", rule=lambda trusted: OPEN, renormalise=False, held=None):
    """A node with all files that answers, and others: the first one is trusted, the others are strangers. ``rule``
    makes the operator's rule from the trusted peer's id; ``held``: worker -> the layers whose experts it has."""
    store, manifest = model
    load = lambda index: load_stage(manifest, manifest.stages[index], store, OPTIONS)  # noqa: E731
    async with swarm(manifest, segment=load) as net:
        workers = [
            await serve_experts(net, manifest, store, (held or {}).get(n, range(LAYERS))) for n in range(experts)
        ]
        hosts = [await net.node(*range(len(manifest.stages))) for _ in range(stages)]
        privacy = rule((workers or hosts)[0].peer_id)
        here = net.hub.add()
        caller = Caller(here, renormalise=renormalise)
        models = StoredModels(store, SwarmExperts(caller), OPTIONS, here.peer_id, privacy=privacy)
        models.planner = Planner(here, caller, models.held, wishes_of(route, privacy=privacy), threads=1, runs=KINDS)
        own = StageHost(here, quote=FREE)
        models.stages = StageCaller(here, own, Directions(models.planner, here), caller.dispatcher, timeout_ms=2000)
        for part in (caller.run, own.run, models.stages.run):
            await net.nursery.start(part)
        await trio.testing.wait_all_tasks_blocked()
        engine = SelfRunningEngine(models, default_route=route)
        yield SimpleNamespace(
            net=net, workers=workers, hosts=hosts, engine=engine, models=models, me=here.peer_id, caller=caller
        )


def wanted(privacy="", route=None, **asked):
    return replace(request(**{**ASKED, **asked}), privacy=privacy, route=route)


async def ask(engine, privacy="", **asked):
    events = await events_of(engine, wanted(privacy, **asked))
    return tokens_of(events), events[-1]


async def ask_and_kill(swarm, peer_id):
    """A long answer, during which a peer dies."""
    prepared = await swarm.engine.prepare(wanted(max_tokens=60, min_tokens=60))
    async with swarm.engine.stream(prepared) as stream:
        async for _ in stream:
            swarm.net.hub.kill(peer_id)


def trusted_only(peer):
    return privacy_of([peer], True, (0, 0))


def trusted_if_asked(peer):
    return privacy_of([peer], False, (0, 0))


@pytest.mark.parametrize(("rule", "asked"), [(trusted_only, ""), (trusted_if_asked, "trusted")])
async def test_experts_of_a_private_answer_are_at_the_trusted_peer_alone(model, reference, rule, asked):
    async with home(model, experts=3, rule=rule) as swarm:
        trusted, *strangers = swarm.workers
        for _ in range(3):
            tokens, end = await ask(swarm.engine, asked)
            assert tokens == reference["experts"]
        assert trusted.rows() > 0
        assert [stranger.rows() for stranger in strangers] == [0, 0]
        assert set(end.serving) == {trusted.peer_id}


async def test_without_a_rule_strangers_compute(model, reference):
    async with home(model, experts=3, rule=lambda _: ANYBODY) as swarm:
        for _ in range(3):
            assert (await ask(swarm.engine))[0] == reference["experts"]
        assert sum(worker.rows() for worker in swarm.workers[1:]) > 0


@pytest.mark.parametrize("renormalise", [False, True])
async def test_a_trusted_peer_that_dies_is_an_error_that_names_the_rule(model, renormalise):
    async with home(model, experts=2, rule=trusted_only, renormalise=renormalise) as swarm:
        trusted, stranger = swarm.workers
        with pytest.raises(RiosError) as failure:
            await ask_and_kill(swarm, trusted.peer_id)
        assert failure.value.code == "no_replica"
        assert "dmoe.trusted_peers_only" in failure.value.message
        with pytest.raises(RiosError, match=r"others have it, but dmoe\.trusted_peers_only"):
            await swarm.engine.prepare(request(**ASKED))
        assert stranger.rows() == 0


async def test_a_layer_that_only_strangers_have_is_refused_before_anything_is_sent(model):
    async with home(model, experts=2, rule=trusted_only, held={0: (0, 1)}, renormalise=True) as swarm:
        with pytest.raises(RiosError, match=r"no replica of .*expert-l02.*dmoe\.trusted_peers_only allows"):
            await swarm.engine.prepare(request(**ASKED))
        made = swarm.models.planner.plan(model[1], Ask())
        why = {each.kind: each.why_not for each in made.candidates}
        assert "dmoe.trusted_peers_only allows this node and the 1 of dmoe.trusted_peers" in why["experts"]
        assert [worker.rows() for worker in swarm.workers] == [0, 0]


async def test_what_calls_hedges_and_second_tries_choose_from_names_no_stranger(model):
    async with home(model, experts=3, rule=lambda _: ANYBODY) as swarm:
        first, second, stranger = (worker.peer_id for worker in swarm.workers)
        rule = privacy_of([first, second], True, (0, 1))
        _, table = swarm.caller._replicas.table(swarm.caller.map(model[1]), rule)
        listed = [{replica.peer_id for need in layer for replica in need.replicas} for layer in table.needs]
        assert listed == [{first, second}, {first, second}, set()]
        assert set(table.quotes) == {first, second}
        _, everybody = swarm.caller.table(swarm.caller.map(model[1]))
        assert stranger in everybody.quotes


async def test_a_private_answer_beside_open_ones_with_the_same_beginning(model, reference):
    """They share no pass: the open one goes to both peers, the private one to the trusted peer."""
    async with home(model, experts=2, rule=trusted_if_asked) as swarm:
        trusted, stranger = swarm.workers
        await ask(swarm.engine)  # kept for its beginning
        ends = {}

        async def one(name, privacy):
            ends[name] = await ask(swarm.engine, privacy)

        async with trio.open_nursery() as nursery:
            for n in range(6):
                nursery.start_soon(one, n, "trusted" if n % 2 else "")
        assert [ends[n][0] for n in range(6)] == [reference["experts"]] * 6
        assert all(set(ends[n][1].serving) == {trusted.peer_id} for n in (1, 3, 5))
        assert sum(ends[n][1].expert_rows.get(stranger.peer_id, 0) for n in (0, 2, 4)) > 0


@pytest.mark.parametrize("route", ["experts", "stages"])
async def test_local_keeps_everything_here_whatever_the_route(model, reference, route):
    options = {"experts": 2} if route == "experts" else {"stages": 2}
    async with home(model, route=route, rule=lambda _: ANYBODY, **options) as swarm:
        tokens, end = await ask(swarm.engine, "local")
        assert tokens == reference["experts"]  # by route local: the same bits as experts
        assert set(end.serving) == {swarm.me}
        assert [worker.rows() for worker in swarm.workers] + [rows_of_stages(host) for host in swarm.hosts] == [0, 0]


async def test_local_and_a_route_that_needs_others_is_refused(model):
    async with home(model, experts=1, rule=trusted_only) as swarm:
        with pytest.raises(RiosError, match="others have it, but privacy local: nothing of this request may leave"):
            await swarm.engine.prepare(wanted("local", "experts"))
        assert swarm.workers[0].rows() == 0


async def test_vectors_are_private_too(model):
    async with home(model, experts=2, rule=trusted_if_asked) as swarm:
        trusted, stranger = swarm.workers
        wanted = EmbeddingRequest(model=model[1].name, inputs=("a secret", "another"), privacy="trusted")
        found = await swarm.engine.embed(await swarm.engine.prepare_embeddings(wanted))
        assert set(found.expert_rows) == {trusted.peer_id}
        assert stranger.rows() == 0


@pytest.mark.parametrize("forwarding", [True, False])
@pytest.mark.parametrize(("rule", "asked"), [(trusted_only, ""), (trusted_if_asked, "trusted")])
async def test_stages_of_a_private_answer_are_at_the_trusted_peer_alone(model, reference, rule, asked, forwarding):
    async with home(model, stages=3, route="stages", rule=rule) as swarm:
        strangers = swarm.hosts[1:]
        object.__setattr__(swarm.models.stages.shared, "may_forward", forwarding)
        tokens, end = await ask(swarm.engine, asked)
        assert tokens == reference["stages"]
        assert [rows_of_stages(stranger) for stranger in strangers] == [0, 0]
        assert not set(end.serving) & {stranger.peer_id for stranger in strangers}


async def test_a_stage_whose_trusted_host_dies_is_replayed_here_and_never_at_a_stranger(model, reference):
    async with home(model, stages=2, route="stages", rule=trusted_only) as swarm:
        trusted, stranger = swarm.hosts
        swarm.models.planner.wishes = wishes_of(
            "stages", plan_pins=[f"0={trusted.peer_id}"], privacy=trusted_only(trusted.peer_id)
        )
        with pytest.raises(RiosError) as failure:
            await ask_and_kill(swarm, trusted.peer_id)
        assert failure.value.code == "no_replica"
        assert rows_of_stages(trusted) > 0
        assert rows_of_stages(stranger) == 0
        swarm.models.planner.wishes = wishes_of("stages", privacy=trusted_only(trusted.peer_id))
        tokens, end = await ask(swarm.engine)  # without the pin: here, where the files are
        assert tokens == reference["stages"]
        assert set(end.serving) == {swarm.me}
        assert rows_of_stages(stranger) == 0


async def test_the_first_and_last_layers_stay_here(model, reference):
    async with home(model, experts=2, rule=lambda _: privacy_of((), False, (1, 1))) as swarm:
        tokens, end = await ask(swarm.engine)
        assert tokens == reference["experts"]
        for worker in swarm.workers:
            assert worker.rows(0) == worker.rows(2) == 0
        assert sum(worker.rows(1) for worker in swarm.workers) > 0
        assert end.serving[swarm.me]["layers"] == [0, 2]
        made = swarm.models.planner.plan(model[1], Ask())
        assert "dmoe.local_layers = [1, 1] stay on this node" in made.chosen.reason


async def test_local_layers_keep_a_stage_here(model, reference):
    async with home(model, stages=1, route="stages", rule=lambda _: privacy_of((), False, (1, 0))) as swarm:
        swarm.models.planner.wishes = wishes_of(
            "stages",
            plan_pins=[f"1-2={swarm.hosts[0].peer_id}"],
            privacy=privacy_of((), False, (1, 0)),
        )
        tokens, end = await ask(swarm.engine)
        assert tokens == reference["stages"]
        assert end.serving[swarm.hosts[0].peer_id]["layers"] == [1, 2]
        assert end.serving[swarm.me]["layers"] == [0]
        pinned = wishes_of("stages", plan_pins=[f"0={swarm.hosts[0].peer_id}"], privacy=privacy_of((), False, (1, 0)))
        swarm.models.planner.wishes = pinned
        with pytest.raises(RiosError, match=r"local_layers = \[1, 0\] keeps them on this node"):
            await swarm.engine.prepare(request(**ASKED))


def test_settings_that_cannot_be_kept_are_named():
    with pytest.raises(ConfigError, match="trusted_peers: 'bob' is no peer id"):
        privacy_of(["bob"], True, (0, 0))
    with pytest.raises(ConfigError, match=r"local_layers = \[1\] is not two numbers"):
        privacy_of([], True, (1,))


def test_a_request_tightens_and_never_loosens():
    rule = privacy_of(["12D3Koo"], True, (1, 0))
    local = rule.tightened("local")
    assert local.tightened("trusted") == local.tightened("") == local
    assert local.allowed == frozenset()
    assert rule.tightened("trusted").allowed == rule.allowed == {"12D3Koo"}
    assert rule.tightened("trusted").first == 1
    with pytest.raises(RequestError, match="privacy 'none' is not trusted or local"):
        rule.tightened("none")
    assert not privacy_of([], False, (0, 0)).tightened("trusted").allows("12D3Koo", 3, 3, 9)
