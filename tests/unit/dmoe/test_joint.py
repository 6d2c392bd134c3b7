"""Neuron blocks of a layer that run as one session: the same bits, also while blocks come and go."""

import gc
from threading import Thread
from weakref import ref

import numpy as np
import pytest
import trio

from config.errors import LocalError
from dmoe import joint
from dmoe.batches import Batches
from dmoe.joint import BlockShard, Joints
from dmoe.loaded import LoadedShard, Together, plan_of
from dmoe.runtime import ExpertShard, RuntimeOptions
from tests.unit.dmoe.model_kit import tiny

OPTIONS = RuntimeOptions(device="cpu", threads=1)
COUNTS = (1, 3, 40, 1)


@pytest.fixture(scope="module", params=["source", "int8", "fp32", "int4"])
def model(request, tmp_path_factory):
    return tiny(tmp_path_factory.mktemp(request.param), quantisation=request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("dense"))


def groups_of(manifest, layer=0):
    return [manifest.expert_shard(layer, group) for group in range(len(manifest.sum_groups))]


def rows(manifest, count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, manifest.architecture.hidden)).astype(np.float32)


def same(found, expected):
    return [each.tobytes() for each in found] == [each.tobytes() for each in expected]


def test_blocks_have_their_own_bits_in_any_choice_and_number(model):
    store, manifest = model
    shards = groups_of(manifest)
    assert len(shards) > 1
    alone = [ExpertShard(manifest, shard, store, OPTIONS) for shard in shards]
    joints, together = Joints(OPTIONS), []
    for shard in shards:
        together.append(joints.load(manifest, shard, store))
        held = list(range(len(together)))
        for chosen in (held, held[::-1], held[-1:], held[::2]):
            for layer in manifest.layers_of(shards[0]):
                for seed, count in enumerate(COUNTS):
                    h = rows(manifest, count, seed)
                    found = together[chosen[0]].partials([together[each] for each in chosen], layer, h)
                    assert same(found, [alone[each].partial(layer, h) for each in chosen])
    assert same([together[1].partial(0, h)], [alone[1].partial(0, h)])


def test_shards_of_several_blocks_add_them_in_order(dense):
    store, manifest = dense
    shards = groups_of(manifest)
    alone = [ExpertShard(manifest, shard, store, OPTIONS) for shard in shards]
    one, two = (Joints(OPTIONS).load(manifest, shard, store) for shard in shards[:2])
    company = joint.Company(manifest)
    for each in (one, two):
        each.company = each.place = company
        company.join(each)
    one.experts = (*shards[0].experts, *shards[1].experts)  # as if its group had both
    h = rows(manifest, 3)
    both, second = company.run(0, [one], h)[0], company.run(0, [two], h)[0]
    expected = alone[0].partial(0, h)
    expected += alone[1].partial(0, h)
    assert same([both, second], [expected, alone[1].partial(0, h)])


def test_what_has_left_is_freed_and_the_others_go_on(dense):
    store, manifest = dense
    joints = Joints(OPTIONS)
    first, *others = [joints.load(manifest, shard, store) for shard in groups_of(manifest)]
    h = rows(manifest, 2)
    before = others[0].partials(others, 0, h)
    gone = ref(first.files[0])
    first.close()
    first.tidy()
    del first
    gc.collect()
    assert gone() is None
    assert same(others[0].partials(others, 0, h), before)
    company = others[0].company
    for shard in others:
        shard.close()
        shard.tidy()
    assert not company._layers
    again = joints.load(manifest, groups_of(manifest)[0], store)
    assert same([again.partial(0, h)], [ExpertShard(manifest, again.shard, store, OPTIONS).partial(0, h)])


def test_a_shard_that_does_not_open_leaves_the_others_as_they_were(dense, monkeypatch):
    store, manifest = dense
    joints, shards = Joints(OPTIONS), groups_of(manifest)
    one = joints.load(manifest, shards[0], store)
    h = rows(manifest, 1)
    before = one.partial(0, h)
    real, made = joint.open_session, []

    def fails_later(*args, **kwargs):
        made.append(args)
        if len(made) > 1:
            raise LocalError("local", "there is not enough memory to load the model")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(joint, "open_session", fails_later)
        with pytest.raises(LocalError, match="not enough memory"):
            joints.load(manifest, shards[1], store)
        one.tidy()  # fails as well, and says so in the log only
        assert same([one.partial(0, h)], [before])
    one.tidy()
    two = joints.load(manifest, shards[1], store)
    alone = ExpertShard(manifest, shards[1], store, OPTIONS)
    assert same(one.partials([one, two], 1, h), [one.partial(1, h), alone.partial(1, h)])


def test_calls_go_on_while_blocks_come_and_go(dense):
    store, manifest = dense
    joints, shards = Joints(OPTIONS), groups_of(manifest)
    one = joints.load(manifest, shards[0], store)
    h = rows(manifest, 1)
    expected, wrong, ended = one.partial(0, h).tobytes(), [], []

    def ask():
        while not ended:
            if one.partial(0, h).tobytes() != expected:
                wrong.append(1)

    threads = [Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            others = [joints.load(manifest, shard, store) for shard in shards[1:]]
            for other in others:
                other.close()
                other.tidy()
    finally:
        ended.append(True)
        for thread in threads:
            thread.join()
    assert not wrong


def test_sparse_models_have_a_session_per_expert(dense, tmp_path):
    store, manifest = tiny(tmp_path, experts=4)
    assert isinstance(Joints(OPTIONS).load(manifest, manifest.expert_shard(0, 0), store), ExpertShard)
    store, manifest = dense
    assert isinstance(Joints(OPTIONS).load(manifest, manifest.expert_shard(0, 0), store), BlockShard)


async def test_crowding_calls_of_one_place_run_once_for_all_its_shards(dense):
    store, manifest = dense
    joints, shards = Joints(OPTIONS), groups_of(manifest)
    held = [joints.load(manifest, shard, store) for shard in shards]
    assert all(isinstance(shard, Together) for shard in held)
    alone = [ExpertShard(manifest, shard, store, OPTIONS) for shard in shards]
    loaded = [LoadedShard(plan_of(manifest, shard), each) for shard, each in zip(shards, held, strict=True)]
    asked, real = [], held[0].company.run

    def run(layer, some, h):
        asked.append((layer, len(some), len(h)))
        return real(layer, some, h)

    held[0].company.run = run
    batches = Batches(threads=1, queue_rows_max=1000, batch_rows_max=100)
    found = {}

    async def call(name, layer, some, count):
        h = rows(manifest, count, name)
        found[name] = await batches.later([loaded[n] for n in some], layer, h, None, None, trio.current_time() + 30)
        expected = [alone[n].partial(layer, h) for n in some]
        assert same(found[name], expected)

    every = range(len(shards))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(batches.run)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as calls:
            for name in range(6):
                calls.start_soon(call, name, 0, every, 1 + name)
        assert sum(count for _, _, count in asked) == 21
        assert {size for _, size, _ in asked} == {len(shards)}
        asked.clear()
        async with trio.open_nursery() as calls:  # not the same calls at every shard, and another layer
            calls.start_soon(call, 10, 0, [0, 1], 2)
            calls.start_soon(call, 11, 0, [1, 0], 3)
            calls.start_soon(call, 12, 0, [1], 4)
            calls.start_soon(call, 13, 1, every, 5)
        assert len(found) == 10
        nursery.cancel_scope.cancel()
    assert all(each.free and not each.rows_waiting for each in loaded)
