"""Planning on a real store and an in-memory network: the view of the moment, what ``auto`` answers by, the settings."""

from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from config.errors import ConfigError, RiosError
from config.settings import DmoeSettings, chosen_route
from dmoe.caller import Caller
from dmoe.core.plan import Pin, Wishes
from dmoe.core.spans import Ask
from dmoe.models import StoredModels, SwarmExperts
from dmoe.planning import KEPT_SECONDS, Planner, class_of, wishes_of
from dmoe.ports import Quote
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.worker import Worker, plan_of
from p2p.core.advert import Hardware, ModelOffer, bitmap
from p2p.memory import MemoryHub
from tests.unit.dmoe.answer_kit import answer, request
from tests.unit.dmoe.engine_kit import SelfRunningEngine
from tests.unit.dmoe.model_kit import made

OPTIONS = RuntimeOptions(device="cpu", threads=1)
PRICE = 700
ASK = Ask(prompt_tokens=100, answer_tokens=50)


@asynccontextmanager
async def node(folder, *, wishes=None, renormalise=False, **kwargs):
    """A node that answers with a tiny model, beside one that serves all its experts."""
    store, manifest = await made(folder, **kwargs)
    async with trio.open_nursery() as nursery:
        hub = MemoryHub(3)
        networks = [hub.add() for _ in range(2)]
        workers = [Worker(network, quote=Quote(0, PRICE, 0)) for network in networks]
        for worker in workers:
            await nursery.start(worker.run)
        for shard in manifest.expert_shards():
            workers[1].load(plan_of(manifest, shard), ExpertShard(manifest, shard, store, OPTIONS))
        offer = ModelOffer(manifest.model_id, bitmap(workers[1].indices(manifest.model_id)), 0, PRICE, 0)
        hardware = Hardware(cores=3, expert_kflop_per_s=40_000_000, memory_bytes_per_s=9_000_000_000)
        networks[1].directory.update(
            lambda advert: msgspec.structs.replace(
                advert, models=(offer,), hardware=hardware, load=7, reach="relayed", paused=False
            )
        )
        networks[0].directory.update(lambda advert: msgspec.structs.replace(advert, hardware=hardware))
        caller = Caller(networks[0], worker=workers[0], renormalise=renormalise)
        await nursery.start(caller.run)
        await trio.testing.wait_all_tasks_blocked()
        models = StoredModels(store, SwarmExperts(caller), OPTIONS, networks[0].peer_id)
        models.planner = Planner(networks[0], caller, models.held, wishes or Wishes(), threads=1)
        yield models, networks, manifest, store
        nursery.cancel_scope.cancel()


def forget_experts(store, manifest):
    for shard in manifest.expert_shards():
        for file in shard.files:
            store.path(manifest.model_id, file).unlink()


async def test_the_view_is_what_adverts_and_calls_say(tmp_path):
    async with node(tmp_path) as (models, networks, manifest, _):
        planner, other = models.planner, networks[1].peer_id
        view = planner.view(manifest)
        (peer,) = view.peers
        assert (peer.peer_id, peer.cores, peer.kflop_per_s, peer.queue_rows) == (other, 3, 40_000_000, 7)
        assert (peer.microcredits_per_tflop, peer.dialable, peer.row_us, peer.barred) == (PRICE, False, None, "")
        assert {manifest.shards[index].kind for index in peer.shards} == {"expert"}
        assert view.me.shards == frozenset(range(len(manifest.shards)))
        await answer(SelfRunningEngine(models, default_route="experts"), request(max_tokens=3, min_tokens=3))
        called = planner.view(manifest).peers[0]
        assert called.row_us > 0
        assert called.round_trip_us != peer.round_trip_us
        networks[1].directory.update(lambda advert: msgspec.structs.replace(advert, paused=True))
        await trio.testing.wait_all_tasks_blocked()
        assert planner.view(manifest).peers[0].barred == "paused by its operator"


@pytest.mark.parametrize(("experts", "expected"), [(0, "fused"), (4, "local")])
async def test_auto_stays_here_where_everything_is_here(tmp_path, experts, expected):
    async with node(tmp_path, experts=experts) as (models, *_):
        engine = SelfRunningEngine(models, default_route="auto")
        _, finished = await answer(engine, request(max_tokens=3, min_tokens=3))
        assert finished.route == expected
        assert models.planner.statistics()["chosen"] == {expected: 1}


async def test_auto_calls_others_for_what_is_not_here_and_says_what_lacks_when_they_leave(tmp_path):
    async with node(tmp_path) as (models, networks, manifest, store):
        forget_experts(store, manifest)
        engine = SelfRunningEngine(models, default_route="auto")
        _, finished = await answer(engine, request(max_tokens=3, min_tokens=3))
        assert finished.route == "experts"
        assert set(finished.expert_rows) == {networks[1].peer_id}
        networks[1].directory.update(lambda advert: msgspec.structs.replace(advert, models=()))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(RiosError, match="no replica"):
            await engine.prepare(request())


async def test_a_pin_that_nobody_can_keep_refuses_with_every_reason(tmp_path):
    pins = wishes_of("auto", plan_pins=["0=12D3KooWnobody"])
    async with node(tmp_path, wishes=pins) as (models, *_):
        with pytest.raises(RiosError, match=r"no route is possible: .*pinned to 12D3KooWnobody") as caught:
            await SelfRunningEngine(models, default_route="auto").prepare(request())
        assert caught.value.code == "unavailable"


async def test_a_plan_is_kept_for_a_class_until_the_view_changes(tmp_path, autojump_clock):
    async with node(tmp_path) as (models, networks, manifest, _):
        planner, found = models.planner, []

        def counted():
            found.append(None)
            return 1 << 40

        planner._ram_bytes_free = counted
        for tokens in (100, 120, 128):
            planner.route(manifest, Ask(prompt_tokens=tokens))
        assert len(found) == 1
        networks[1].directory.update(lambda advert: msgspec.structs.replace(advert, paused=True))
        await trio.testing.wait_all_tasks_blocked()
        planner.route(manifest, Ask(prompt_tokens=100))
        assert len(found) == 2
        await trio.sleep(KEPT_SECONDS)
        planner.route(manifest, Ask(prompt_tokens=100))
        planner.route(manifest, Ask(prompt_tokens=200))
        assert len(found) == 4


async def test_passes_here_replace_what_this_machine_claims(tmp_path):
    async with node(tmp_path) as (models, _, manifest, _):
        claimed = {each.kind: each for each in models.planner.plan(manifest, ASK).candidates}
        engine = SelfRunningEngine(models, default_route="local")
        await answer(engine, request(max_tokens=40, min_tokens=40, temperature=0))
        measured = models.planner.view(manifest).me.layer_row_us
        assert measured is not None
        assert measured > 0
        found = {each.kind: each for each in models.planner.plan(manifest, ASK).candidates}
        for kind in ("local", "fused"):
            assert found[kind].token_us != claimed[kind].token_us


def test_classes_are_powers_of_two():
    asked = class_of(Ask(prompt_tokens=100, answer_tokens=64, batch=3, tokens_per_pass=1.7))
    assert asked == Ask(prompt_tokens=128, answer_tokens=64, batch=4, tokens_per_pass=1.5)
    assert class_of(asked) == asked


def test_pins_are_read_and_impossible_ones_refused():
    peer = "12D3KooWabc"
    wishes = wishes_of("auto", plan_pins=["0-9=here", f" 10 = {peer} ", "11-12=experts"], price_weight=3)
    assert wishes.pins == (Pin(0, 9, "here"), Pin(10, 10, peer), Pin(11, 12, "experts"))
    assert wishes.price_weight == 3
    for text in ("here", "a-b=here", "3-1=here", "0-1=moon", "0-1="):
        with pytest.raises(ConfigError, match=r"dmoe\.plan_pins"):
            wishes_of("auto", plan_pins=[text])
    with pytest.raises(ConfigError, match="layers 5 to 9 are pinned twice"):
        wishes_of("auto", plan_pins=["0-9=here", "5-12=experts"])


def test_fused_of_an_older_config_still_means_the_route():
    assert chosen_route(DmoeSettings()) == "auto"
    assert chosen_route(DmoeSettings(fused=True)) == "fused"
    assert chosen_route(DmoeSettings(fused=True, route="experts")) == "experts"
