"""A mixture: some layers are a stage at one host, others run here with their experts at another. Real layers of a
sparse model, nodes of a network in memory; the bits are those of the same stages in one process."""

import shutil
from contextlib import asynccontextmanager
from types import SimpleNamespace

import msgspec
import pytest
import trio

from config.errors import RiosError
from config.generation import Delta
from dmoe.caller import Caller
from dmoe.core.plan import KINDS
from dmoe.core.spans import Ask
from dmoe.models import StoredModels, SwarmExperts
from dmoe.planning import Planner, wishes_of
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.stages.caller import StageCaller
from dmoe.stages.directions import Directions
from dmoe.stages.host import StageHost
from dmoe.stages.loading import load_stage
from dmoe.store import ModelStore
from dmoe.worker import Worker, plan_of
from p2p.core.advert import ModelOffer, bitmap
from tests.unit.dmoe.answer_kit import events_of, request, tokens_of
from tests.unit.dmoe.engine_kit import SelfRunningEngine
from tests.unit.dmoe.stages_kit import FREE, staged, swarm

OPTIONS = RuntimeOptions(device="cpu", threads=1)
ASKED = {"prompt": "some words to begin with", "max_tokens": 12, "min_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return staged(tmp_path_factory.mktemp("mixed"), kind="F32", experts=4)


async def tokens_and_end(engine, **asked):
    events = await events_of(engine, request(**{**ASKED, **asked}))
    assert isinstance(events[0], Delta)
    return tokens_of(events), events[-1]


@asynccontextmanager
async def mixed_node(model, folder, *, stages=(0,), layers=(1, 2), keep=False):
    """A node with the trunk alone, a host of ``stages`` and a worker with the experts of ``layers``."""
    store, manifest = model
    if not keep:
        store = ModelStore(shutil.copytree(store.root, folder / "store"))
        for shard in manifest.expert_shards():
            for file in shard.files:
                store.path(manifest.model_id, file).unlink()
    whole = model[0]
    load = lambda index: load_stage(manifest, manifest.stages[index], whole, OPTIONS)  # noqa: E731
    async with swarm(manifest, segment=load) as net:
        host = await net.node(*stages)
        experts = await expert_node(net, manifest, whole, layers)
        here = net.hub.add()
        caller = Caller(here)
        models = StoredModels(store, SwarmExperts(caller), OPTIONS, here.peer_id)
        wishes = wishes_of("auto")
        models.planner = Planner(here, caller, models.held, wishes, threads=1, runs=KINDS)
        own = StageHost(here, quote=FREE)
        models.stages = StageCaller(here, own, Directions(models.planner, here), caller.dispatcher)
        for part in (caller.run, own.run, models.stages.run):
            await net.nursery.start(part)
        await trio.testing.wait_all_tasks_blocked()
        yield models, SelfRunningEngine(models, default_route="auto"), host, experts


async def expert_node(net, manifest, store, layers):
    """A node that serves the experts of some layers; ``serve_layer`` adds one."""
    network = net.hub.add()
    worker = Worker(network, quote=FREE)
    await net.nursery.start(worker.run)

    def serve_layer(layer):
        for shard in manifest.expert_shards():
            if shard.layers[0] == layer:
                worker.load(plan_of(manifest, shard), ExpertShard(manifest, shard, store, OPTIONS))
        offer = ModelOffer(manifest.model_id, bitmap(worker.indices(manifest.model_id)), 0, 0, 0)
        network.directory.update(lambda advert: msgspec.structs.replace(advert, models=(offer,)))

    for layer in layers:
        serve_layer(layer)
    return SimpleNamespace(peer_id=network.peer_id, serve_layer=serve_layer)


async def reference(model, **asked):
    """Every stage in this process."""
    store, _ = model
    models = StoredModels(store, None, OPTIONS, "me")
    return (await tokens_and_end(SelfRunningEngine(models, default_route="stages"), **asked))[0]


async def test_auto_takes_the_mixture_and_its_answer_has_the_bits_of_the_stages(model, tmp_path):
    _, manifest = model
    expected = await reference(model)
    async with mixed_node(model, tmp_path) as (models, engine, host, experts):
        made = models.planner.route(manifest, Ask())
        assert made.kind == "mixed"
        assert [(span.where, span.first) for span in made.spans] == [("stage", 0), ("experts", 1), ("experts", 2)]
        tokens, end = await tokens_and_end(engine)
        assert tokens == expected
        assert end.route == "stages"
        assert end.serving[host.peer_id]["layers"] == [0]
        assert end.serving[experts.peer_id] == {"layers": [1, 2], "experts": [0, 1, 2, 3]}
        fed = end.prompt_tokens + end.completion_tokens - 1
        # two of four experts a row, each in a sum group of its own, in two layers
        assert end.expert_rows[experts.peer_id] >= 2 * 2 * fed
        assert end.expert_rows[host.peer_id] >= fed
        assert models.planner.statistics()["chosen"] == {"mixed": 2}


async def test_answers_side_by_side_and_a_beginning_in_common(model, tmp_path):
    texts = ["some words that are long enough to be kept", "others", "some words that are long enough to differ"]
    expected = [await reference(model, prompt=text) for text in texts]
    found = {}
    async with mixed_node(model, tmp_path) as (_, engine, _, _), trio.open_nursery() as nursery:
        await engine.prepare(request(**ASKED))  # it runs from here on

        async def one(text):
            found[text] = (await tokens_and_end(engine, prompt=text))[0]

        for text in texts:
            nursery.start_soon(one, text)
    assert [found[text] for text in texts] == expected


async def test_a_stage_whose_host_died_goes_on_here_with_experts_elsewhere(model, tmp_path):
    long = {"max_tokens": 90, "min_tokens": 90}
    expected = await reference(model, **long)
    async with mixed_node(model, tmp_path, stages=(0,), layers=(1, 2)) as (_, engine, host, experts):
        events = []
        async with engine.stream(await engine.prepare(request(**{**ASKED, **long}))) as stream:
            async for event in stream:
                events.append(event)
                if len(events) == 1:
                    experts.serve_layer(0)  # and no waiting: a quick machine would come to the answer's end
                    host.swarm.hub.kill(host.peer_id)
        assert tokens_of(events) == expected
        end = events[-1]
        assert end.retries > 0
        assert end.serving[experts.peer_id]["layers"] == [0, 1, 2]


async def test_layers_pinned_to_experts_are_not_computed_here_though_their_files_are(model, tmp_path):
    expected = await reference(model)
    async with mixed_node(model, tmp_path, keep=True) as (models, engine, host, experts):
        models.planner.wishes = wishes_of("auto", plan_pins=[f"0={host.peer_id}", "1=experts"])
        tokens, end = await tokens_and_end(engine)
        assert tokens == expected
        assert end.serving[host.peer_id]["layers"] == [0]
        assert end.serving[experts.peer_id]["layers"] == [1]


async def test_without_experts_and_stages_for_a_layer_nothing_is_possible_and_it_is_said(model, tmp_path):
    async with mixed_node(model, tmp_path, layers=(2,)) as (_, engine, _, _):
        with pytest.raises(RiosError, match="no replica of shard expert-l00-00"):
            await engine.prepare(request(**ASKED))
