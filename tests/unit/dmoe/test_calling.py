"""Workers and callers over the network in memory: the same numbers whoever computes, fail-over, payment, busy."""

import re
from contextlib import asynccontextmanager
from random import Random

import msgspec
import numpy as np
import pytest
import trio
import trio.testing

from config.errors import BusyError, RemoteError, RequestError
from dmoe.caller import Caller
from dmoe.core import wire
from dmoe.ports import Quote
from dmoe.worker import Worker
from p2p.face import Reply
from p2p.memory import MemoryHub
from p2p.services import Service
from tests.unit.dmoe.swarm_kit import (
    ALL,
    GROUPS,
    HIDDEN,
    LAYERS,
    QUOTE,
    CountingBuyer,
    CountingSeller,
    FakeShard,
    Routing,
    make_manifest,
    serve_shards,
)


@pytest.fixture
def autojump_clock():
    """Time jumps once nothing happens for a while: a worker's thread must not look like a peer that hangs."""
    return trio.testing.MockClock(autojump_threshold=0.005)


FIRST, SECOND = range(4), range(4, 8)
FREE = Quote(0, 0, 0)


class Swarm:
    """Nodes of one hub, each with a worker; the first one also calls."""

    def __init__(self, nursery, manifest, *, seed=1, **hub):
        self.hub = MemoryHub(seed, **hub)
        self.nursery = nursery
        self.manifest = manifest
        self.nodes, self.workers, self.shards = [], [], []

    async def node(self, indices=(), *, quote=FREE, seller=None, **worker):
        network = self.hub.add()
        self.nodes.append(network)
        self.workers.append(Worker(network, quote=quote, seller=seller, **worker))
        await self.nursery.start(self.workers[-1].run)
        self.shards.append(serve_shards(self.workers[-1], network, self.manifest, indices))
        return network

    async def caller(self, *, buyer=None, **options):
        caller = Caller(self.nodes[0], worker=self.workers[0], buyer=buyer, random=Random(5), **options)
        await self.nursery.start(caller.run)
        await trio.testing.wait_all_tasks_blocked()
        return caller


@asynccontextmanager
async def swarm(manifest, **hub):
    async with trio.open_nursery() as nursery:
        yield Swarm(nursery, manifest, **hub)
        nursery.cancel_scope.cancel()


def rows(count=1, seed=0):
    return np.random.default_rng(seed).normal(size=(count, HIDDEN)).astype(np.float32)


def expected(manifest, layer, h, routing=ALL):
    """All shards in this process, with the roundings of the wire."""
    dtype = manifest.wire_dtype
    seen = wire.rounded(h, dtype)
    shards = [FakeShard(manifest.expert_shard(layer, g)) for g in range(GROUPS)]
    partials = [wire.rounded(s.partial(layer, seen, routing.experts, routing.weights), dtype) for s in shards]
    return wire.total(partials, seen.shape)


def slow(worker, manifest, shard):
    """The loaded first shard, believed slow (so it runs in a thread) and held up by its closed gate."""
    loaded = worker.local(manifest.model_id, 0, 0)
    loaded.row_seconds = 1.0
    shard.gate.clear()
    return loaded


async def running(loaded):
    """Return once the shard runs in its thread."""
    while not loaded.running:
        await trio.lowlevel.checkpoint()


async def answer(session, manifest, h, routing=ALL):
    """Every layer's answer, compared bit for bit with the local one."""
    for layer in range(LAYERS):
        got = await session.run(layer, h, routing)
        assert got.tobytes() == expected(manifest, layer, h, routing).tobytes()


async def test_remote_and_local_experts_add_up_bit_for_bit():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node((0, 4))
        await s.node((1, 2, 5))
        await s.node((3, 6, 7))
        session = (await s.caller()).session(manifest)
        await answer(session, manifest, rows(1))
        await answer(session, manifest, rows(5) * 60000)  # some rows need bf16
        report = session.report()
        assert set(report.rows) == {node.peer_id for node in s.nodes}
        assert sum(report.rows.values()) == 6 * GROUPS * LAYERS
        assert report.serving[s.nodes[1].peer_id] == {"layers": [0, 1, 2, 3], "experts": [1, 2]}
        assert report.retries == 0


async def test_a_model_may_ask_for_fp32_on_the_wire():
    manifest = make_manifest(top_k=2, experts_per_group=3, wire_dtype="fp32")
    async with swarm(manifest) as s:
        await s.node((0, 4))
        await s.node((1, 2, 3, 5, 6, 7))
        session = (await s.caller()).session(manifest)
        routing = Routing(np.array([[0, 4], [11, 10], [5, 6]], np.int32), np.full((3, 2), 0.7, np.float32))
        await answer(session, manifest, rows(3), routing)
        fine = np.full((1, HIDDEN), np.float32(1.0001))  # fp16 would lose it
        only = Routing(np.array([[4, 3]], np.int32), np.ones((1, 2), np.float32))
        assert (await session.run(0, fine, only)).tobytes() == expected(manifest, 0, fine, only).tobytes()

        asked = {"model": manifest.model_id, "layer": 0, "groups": [1], "quote": 0, "channel": b"", "top_k": 2}
        header, buffer = wire.encode(fine)
        routed = [only.experts.tobytes(), only.weights.tobytes()]
        with pytest.raises(RemoteError, match="fp16, the model's manifest says fp32"):
            await s.nodes[0].call(
                s.nodes[1].peer_id, "expert.run", {**asked, **header}, [buffer, *routed], deadline_ms=1000
            )


async def test_large_batches_are_cut_and_give_the_same_numbers():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        await s.node((*FIRST, *SECOND))
        await s.node((*FIRST, *SECOND))
        session = (await s.caller()).session(manifest)
        await answer(session, manifest, rows(700))
        used = [node.peer_id for node in s.nodes[1:] if session.report().rows.get(node.peer_id)]
        assert len(used) == 2, "chunks of one batch spread over both replicas"


async def test_sparse_routing_sends_only_rows_that_chose_an_expert():
    manifest = make_manifest(top_k=2, experts_per_group=3)
    async with swarm(manifest) as s:
        await s.node((0, 4))
        await s.node((1, 2, 5, 6))
        await s.node((3, 7))
        session = (await s.caller()).session(manifest)
        experts = np.array([[0, 4], [11, 10], [5, 6], [1, 2], [9, 3]], np.int32)
        routing = Routing(experts, np.linspace(0.1, 0.9, 10, dtype=np.float32).reshape(5, 2))
        await answer(session, manifest, rows(5), routing)
        batches = [size for shard in s.shards[2].values() for size in shard.batches]
        assert set(batches) == {2}
        only = Routing(np.array([[0, 1]], np.int32), np.ones((1, 2), np.float32))
        calls = s.workers[1].statistics()["calls"]
        await answer(session, manifest, rows(1), only)
        assert s.workers[1].statistics()["calls"] == calls, "nobody is asked for experts that no row chose"


async def test_a_killed_node_changes_nothing_while_another_replica_lives():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        await s.node((*FIRST, *SECOND))
        await s.node((*FIRST, *SECOND))
        session = (await s.caller()).session(manifest)
        await answer(session, manifest, rows(2))
        s.hub.down.add(s.nodes[1].peer_id)  # dead, but its advert is still believed
        await answer(session, manifest, rows(3))
        s.hub.kill(s.nodes[1].peer_id)
        await answer(session, manifest, rows(4))
        assert session.report().rows[s.nodes[2].peer_id] > 0


async def test_a_peer_that_fails_rests_and_the_call_is_repeated_elsewhere():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        await s.node((*FIRST, *SECOND))
        await s.node((*FIRST, *SECOND))
        caller = await s.caller()
        probe = caller.session(manifest)
        await probe.run(0, rows(1), ALL)
        (taken, *_) = probe.report().rows
        (broken,) = [n for n, node in enumerate(s.nodes) if node.peer_id == taken]
        for shard in s.shards[broken].values():
            shard.fault = RemoteError("internal", "out of order")
        session = caller.session(manifest)
        for turn in range(5):
            await answer(session, manifest, rows(1, turn))
        assert set(session.report().rows) == {s.nodes[3 - broken].peer_id}
        assert 0 < session.report().retries <= LAYERS, "each shard fails once, then its replica is left alone"


async def test_no_replica_left_names_the_layer_the_experts_and_when_it_was_seen(autojump_clock):
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node((*FIRST,))
        await s.node((*SECOND,))
        session = (await s.caller()).session(manifest)
        await answer(session, manifest, rows(1))
        s.hub.kill(s.nodes[1].peer_id)
        await trio.testing.wait_all_tasks_blocked()
        await session.run(1, rows(1), ALL)
        with pytest.raises(
            RemoteError, match=r"layer 2, expert 0 \(shard expert-l2-3-g0\) of tiny: last seen \d+ s ago"
        ) as e:
            await session.run(2, rows(1), ALL)
        assert e.value.code == "no_replica"
        assert re.search(rf"{s.nodes[1].peer_id} \(last seen \d+ s ago, last answered \d+ s ago\)", e.value.message)


async def test_a_replica_was_seen_until_it_left_however_late_somebody_looks(autojump_clock):
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node((*FIRST,))
        await s.node((*SECOND,))
        caller = await s.caller()
        await answer(caller.session(manifest), manifest, rows(1))
        await trio.sleep(100)
        s.hub.kill(s.nodes[1].peer_id)
        await trio.sleep(50)  # nobody looks meanwhile
        missing = caller.missing(manifest)
        assert missing
        told = caller.where_gone(manifest, missing)
        each = rf"{s.nodes[1].peer_id} \(last seen (\d+) s ago, last answered \d+ s ago\)"
        found = re.fullmatch(rf"last seen (\d+) s ago; replicas: {each}", told)
        assert found, told
        assert 20 < int(found[1]) == int(found[2]) < 60


async def test_replicas_that_are_there_and_never_answer_are_named(autojump_clock):
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        for _ in range(2):
            await s.node((*FIRST, *SECOND))
        for shards in s.shards[1:]:
            for shard in shards.values():
                shard.fault = ValueError("broken")
        session = (await s.caller()).session(manifest)
        with pytest.raises(RemoteError, match="every call to it failed") as e:
            await session.run(0, rows(1), ALL)
        for node in s.nodes[1:]:
            assert f"{node.peer_id} (seen now, never answered)" in e.value.message


async def test_a_replica_that_comes_up_meanwhile_is_waited_for_briefly():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        session = (await s.caller()).session(manifest)

        async def come():
            await trio.testing.wait_all_tasks_blocked()
            await s.node((*FIRST, *SECOND))

        s.nursery.start_soon(come)
        await answer(session, manifest, rows(1))


async def test_a_replica_the_view_does_not_know_is_looked_for(monkeypatch):
    manifest = make_manifest()
    async with swarm(manifest) as s:
        here = await s.node(())
        session = (await s.caller()).session(manifest)
        sought = []

        async def come():
            await s.node((*FIRST, *SECOND))

        async def find(model_id, index=None):
            if not sought:
                s.nursery.start_soon(come)
            sought.append((model_id, index))
            await trio.sleep_forever()

        monkeypatch.setattr(here.directory, "find_providers", find)
        await answer(session, manifest, rows(1))
        assert sought[0][0] == manifest.model_id
        assert {index for _, index in sought} <= set(range(LAYERS * GROUPS))


async def test_a_shard_nobody_ever_had_is_said_to_be_so(autojump_clock):
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        session = (await s.caller()).session(manifest)
        with pytest.raises(RemoteError, match="it was never seen"):
            await session.run(0, rows(1), ALL)


async def test_both_sides_count_the_same_work_and_the_same_leaves():
    manifest = make_manifest(top_k=2, experts_per_group=3)
    buyer, seller = CountingBuyer(), CountingSeller()
    async with swarm(manifest) as s:
        await s.node((0, 4))
        worker = await s.node((1, 2, 3, 5, 6, 7), quote=QUOTE, seller=seller)
        buyer.sellers[worker.peer_id] = seller
        session = (await s.caller(buyer=buyer)).session(manifest)
        await session.open()
        assert buyer.opened == [worker.peer_id]
        experts = np.array([[0, 4], [11, 10], [5, 6]], np.int32)
        await answer(session, manifest, rows(3), Routing(experts, np.ones((3, 2), np.float32)))
        assert seller.leaves == buyer.leaves[worker.peer_id]
        assert len(seller.leaves) == LAYERS
        assert seller.kflop[s.nodes[0].peer_id] == buyer.kflop[worker.peer_id] == LAYERS * (5 * 1500 // 1000)


async def test_payment_required_opens_the_channel_again_once():
    manifest = make_manifest()
    buyer, seller = CountingBuyer(), CountingSeller()
    async with swarm(manifest) as s:
        await s.node(())
        worker = await s.node((*FIRST, *SECOND), quote=QUOTE, seller=seller)
        buyer.sellers[worker.peer_id] = seller
        session = (await s.caller(buyer=buyer)).session(manifest)
        await answer(session, manifest, rows(1))
        seller.channels.clear()  # used up
        await answer(session, manifest, rows(1))
        assert buyer.opened == [worker.peer_id] * 2
        assert session.report().retries == 0


async def test_a_worker_that_cannot_be_paid_is_left_for_another_or_named_as_the_reason():
    manifest = make_manifest()
    buyer, seller = CountingBuyer(), CountingSeller()
    async with swarm(manifest) as s:
        await s.node(())
        dear = await s.node((*FIRST, *SECOND), quote=QUOTE, seller=seller)
        free = await s.node((*FIRST,), seller=seller)
        buyer.sellers[dear.peer_id] = seller
        buyer.poor.add(dear.peer_id)
        session = (await s.caller(buyer=buyer)).session(manifest)
        await session.run(0, rows(1), ALL)
        assert set(session.report().rows) == {free.peer_id}
        with pytest.raises(RemoteError, match="too little") as e:
            await session.run(2, rows(1), ALL)
        assert e.value.code == "payment_required"


async def test_a_busy_worker_is_asked_again_after_its_hint():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        await s.node((*FIRST, *SECOND))
        for shard in s.shards[1].values():
            shard.fault = BusyError("full", retry_after_ms=1)
        session = (await s.caller()).session(manifest)

        async def recover():
            while not session._dispatcher.changes:
                await trio.lowlevel.checkpoint()
            for shard in s.shards[1].values():
                shard.fault = None

        s.nursery.start_soon(recover)
        await answer(session, manifest, rows(1))
        assert session.report().retries > 0


async def test_a_hung_replica_is_given_up_within_the_deadline(autojump_clock):
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        hung = await s.node((*FIRST, *SECOND))
        await s.node((*FIRST, *SECOND))

        async def never(call):
            await trio.sleep_forever()

        hung._services["expert.run"] = Service(never)
        session = (await s.caller()).session(manifest)
        for turn in range(3):
            await answer(session, manifest, rows(1, turn))
        assert set(session.report().rows) == {s.nodes[2].peer_id}
        assert trio.current_time() < 10


async def test_alone_and_hung_ends_with_the_deadline(autojump_clock):
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        hung = await s.node((*FIRST, *SECOND))

        async def never(call):
            await trio.sleep_forever()

        hung._services["expert.run"] = Service(never)
        session = (await s.caller(call_timeout_ms=3000)).session(manifest)
        with pytest.raises(RemoteError, match="layer 0 of tiny took longer than 3000 ms") as e:
            await session.run(0, rows(1), ALL)
        assert e.value.code == "deadline"


async def test_an_answer_of_the_wrong_shape_or_not_finite_is_a_failed_replica(autojump_clock):
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        await s.node((*FIRST, *SECOND))
        for shard in s.shards[1].values():
            shard.partial = lambda layer, h, e, w: np.zeros((len(h) + 1, HIDDEN), np.float32)
        session = (await s.caller()).session(manifest)
        with pytest.raises(RemoteError, match="answered with shape"):
            await session.run(0, rows(1), ALL)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"layer": 9}, "not_found"),
        ({"layer": -1}, "invalid_request"),
        ({"layer": "0"}, "invalid_request"),
        ({"groups": [9]}, "not_found"),
        ({"groups": []}, "invalid_request"),
        ({"groups": [0, 0]}, "invalid_request"),
        ({"groups": "0"}, "invalid_request"),
        ({"model": "x"}, "invalid_request"),
        ({"model": "0" * 64}, "not_found"),
        ({"channel": "x"}, "invalid_request"),
        ({"shape": [1, 99]}, "integrity"),
        ({"shape": [2, HIDDEN // 2]}, "invalid_request"),
        ({"top_k": 2}, "invalid_request"),
    ],
)
async def test_bad_calls_are_refused_with_a_reason(change, code):
    manifest = make_manifest()
    async with swarm(manifest) as s:
        node = await s.node((*FIRST,))
        shape, buffer = wire.encode(rows(1))
        header = {"model": manifest.model_id, "layer": 0, "groups": [0], "quote": 0, "channel": b"", **shape, **change}
        with pytest.raises(RemoteError) as e:
            await node.call(node.peer_id, "expert.run", header, [buffer], deadline_ms=1000)
        assert e.value.code == code
        assert e.value.message


async def test_what_waits_runs_in_one_batch_and_each_gets_its_own_rows():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node((*FIRST,))
        loaded = s.workers[0].local(manifest.model_id, 0, 0)
        loaded.row_seconds = 1.0  # believed slow: nothing runs inline
        wanted = [rows(n + 1, n) for n in range(6)]
        got = {}

        async def ask(n):
            (got[n],) = await s.workers[0].compute([loaded], 0, wanted[n], None, None, trio.current_time() + 60)

        async with trio.open_nursery() as nursery:
            for n in range(6):
                nursery.start_soon(ask, n)
        shard = s.shards[0][0]
        assert sum(shard.batches) == 21
        assert len(shard.batches) < 6
        for n, h in enumerate(wanted):
            assert got[n].tobytes() == FakeShard(manifest.shards[0]).partial(0, h, None, None).tobytes()


async def test_a_full_queue_says_busy_with_a_hint():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node((*FIRST,), queue_rows_max=10)
        loaded = s.workers[0].local(manifest.model_id, 0, 0)
        loaded.row_seconds, loaded.rows_waiting = 0.5, 8
        with pytest.raises(BusyError) as e:
            await s.workers[0].compute([loaded], 0, rows(3), None, None, trio.current_time() + 60)
        assert e.value.retry_after_ms == 5500
        with pytest.raises(BusyError):  # there would be room, but not the time
            await s.workers[0].compute([loaded], 0, rows(1), None, None, trio.current_time() + 1)
        with pytest.raises(RequestError, match="at most 10"):
            s.workers[0]._places_of(
                type(
                    "Asked",
                    (),
                    {"model_id": manifest.model_id, "layer": 0, "groups": (0,), "dtype": "fp16", "rows": rows(11)},
                )
            )


async def test_unloading_waits_for_the_calls_on_the_shard():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node((*FIRST,))
        worker, shard = s.workers[0], s.shards[0][0]
        loaded = slow(worker, manifest, shard)
        got = []

        async def ask():
            got.extend(await worker.compute([loaded], 0, rows(2), None, None, trio.current_time() + 60))

        async def unload():
            await worker.unload(manifest.model_id, manifest.shards[0].id)
            assert shard.closed

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await running(loaded)
            nursery.start_soon(unload)
            await trio.testing.wait_all_tasks_blocked()
            assert not shard.closed
            shard.gate.set()
        assert len(got) == 1
        assert worker.local(manifest.model_id, 0, 0) is None
        assert worker.indices(manifest.model_id) == {1, 2, 3}


async def test_two_may_wait_for_calm_at_the_same_time():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node((*FIRST,))
        worker, shard = s.workers[0], s.shards[0][0]
        loaded = slow(worker, manifest, shard)
        done = []

        async def wait(for_what, *arguments):
            await for_what(*arguments)
            done.append(for_what)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.compute, [loaded], 0, rows(2), None, None, trio.current_time() + 60)
            await running(loaded)
            worker._active += 1  # a peer's call: ``compute`` alone is this node's own
            nursery.start_soon(wait, worker.unload, manifest.model_id, manifest.shards[0].id)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(wait, worker.drained)
            await trio.testing.wait_all_tasks_blocked()
            assert not done
            worker._active -= 1
            shard.gate.set()
        assert len(done) == 2


async def test_an_old_price_is_refused():
    manifest = make_manifest()
    seller = CountingSeller({b"c"})
    async with swarm(manifest) as s:
        node = await s.node((*FIRST,), quote=QUOTE, seller=seller)
        shape, buffer = wire.encode(rows(1))
        header = {"model": manifest.model_id, "layer": 0, "groups": [0], "quote": 3, "channel": b"c", **shape}
        with pytest.raises(RemoteError, match="quote 3 is not valid"):
            await node.call(node.peer_id, "expert.run", header, [buffer], deadline_ms=1000)
        assert not seller.leaves


async def test_draining_finishes_what_is_in_flight_and_refuses_the_rest():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        await s.node((*FIRST, *SECOND))
        worker, shard = s.workers[1], s.shards[1][0]
        loaded = slow(worker, manifest, shard)
        session = (await s.caller()).session(manifest)
        got = []

        async def ask():
            got.append(await session.run(0, rows(3), ALL))

        async def drain():
            await worker.drain()
            assert not worker.statistics()["active"]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await running(loaded)
            nursery.start_soon(drain)
            await trio.testing.wait_all_tasks_blocked()
            assert worker.statistics()["active"] == 1
            shard.gate.set()
        assert got[0].tobytes() == expected(manifest, 0, rows(3)).tobytes()
        with pytest.raises(RemoteError, match="shutting down"):
            await session.run(2, rows(1), ALL)


async def test_a_paused_worker_finishes_what_it_took_and_serves_its_own_node_only():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        await s.node((*FIRST, *SECOND))
        worker, shard, node = s.workers[1], s.shards[1][0], s.nodes[1]
        loaded = slow(worker, manifest, shard)
        session = (await s.caller()).session(manifest)
        got = []

        async def ask():
            got.append(await session.run(0, rows(3), ALL))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await running(loaded)
            worker.paused = True
            assert worker.statistics()["active"] == 1
            shard.gate.set()
            await worker.drained()
        assert got[0].tobytes() == expected(manifest, 0, rows(3)).tobytes()
        with pytest.raises(RemoteError, match="paused by its operator"):  # callers that do not know it yet
            await session.run(2, rows(1), ALL)

        node.directory.update(lambda advert: msgspec.structs.replace(advert, paused=True))
        with pytest.raises(RemoteError, match="1 that hold it are paused by their operators") as nobody:
            await session.run(2, rows(1), ALL)
        assert nobody.value.code == "no_replica"
        await s.node((*FIRST, *SECOND))
        refused = worker.statistics()["refused"]
        await answer((await s.caller()).session(manifest), manifest, rows(2))
        assert worker.statistics()["refused"] == refused, "a paused peer is not asked"
        own = Caller(node, worker=worker, random=Random(1))
        computed = loaded.rows_computed
        await answer(own.session(manifest), manifest, rows(2))
        assert loaded.rows_computed > computed

        worker.paused = False
        node.directory.update(lambda advert: msgspec.structs.replace(advert, paused=False))
        served = worker.statistics()["calls"]
        while worker.statistics()["calls"] == served:
            await answer((await s.caller()).session(manifest), manifest, rows(2, seed=1))


async def test_a_caller_that_leaves_takes_its_waiting_rows_with_it():
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node((*FIRST,))
        worker, shard = s.workers[0], s.shards[0][0]
        loaded = slow(worker, manifest, shard)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.compute, [loaded], 0, rows(2), None, None, trio.current_time() + 60)
            await running(loaded)
            for _ in range(3):
                nursery.start_soon(worker.compute, [loaded], 0, rows(2), None, None, trio.current_time() + 60)
            await trio.testing.wait_all_tasks_blocked()
            assert loaded.rows_waiting == 6
            nursery.cancel_scope.cancel()
        assert loaded.rows_waiting == 0
        assert not loaded.waiting
        shard.gate.set()


async def test_a_shard_that_breaks_fails_its_callers_and_serves_the_next(caplog):
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        await s.node((*FIRST, *SECOND))
        for shard in s.shards[1].values():
            shard.fault = ZeroDivisionError("a bug")
        session = (await s.caller()).session(manifest)
        with pytest.raises(RemoteError, match="handler failed") as e:
            await session.run(0, rows(1), ALL)
        assert e.value.code == "no_replica"
        for shard in s.shards[1].values():
            shard.fault = None
        assert (await session.run(0, rows(1), ALL)).tobytes() == expected(manifest, 0, rows(1)).tobytes()


async def test_a_worker_that_never_names_its_terms_holds_nobody_up(autojump_clock):
    """Its replica is preferred (it claims to be free of load), the other one would do."""
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        sellers = {}
        for _ in range(2):
            seller = CountingSeller()
            node = await s.node((*FIRST, *SECOND), quote=QUOTE, seller=seller)
            sellers[node.peer_id] = seller
        buyer = CountingBuyer(sellers=sellers)
        hung, good = s.nodes[1].peer_id, s.nodes[2].peer_id
        really = buyer.open_channel

        async def open_channel(worker):
            if worker == hung:
                await trio.sleep_forever()
            return await really(worker)

        buyer.open_channel = open_channel
        caller = await s.caller(buyer=buyer)
        caller.dispatcher.estimate(hung).round_trip_us = 0.0
        session = caller.session(manifest)
        before = trio.current_time()
        await session.open()
        await answer(session, manifest, rows(1))
        assert set(session.report().rows) == {good}
        assert trio.current_time() - before < 10


@pytest.mark.flaky(reruns=1)
@pytest.mark.parametrize("lie", ["busy", "garbage", "not_found"])
@pytest.mark.parametrize("liars", [1, 4])
async def test_peers_that_offer_everything_and_answer_nothing_do_not_use_up_the_retries(autojump_clock, lie, liars):
    autojump_clock.autojump_threshold = 0.01  # a thread that is late on a busy machine is no peer that hangs
    manifest = make_manifest()
    async with swarm(manifest) as s:
        await s.node(())
        await s.node((*FIRST, *SECOND))
        for _ in range(liars):
            liar = await s.node((*FIRST, *SECOND))

            async def answers(call):
                if lie == "busy":
                    raise BusyError("no", retry_after_ms=1)
                if lie == "not_found":
                    raise RequestError("not_found", "no")
                return Reply({"shape": [1, 1]}, [b"xx"])

            liar._services["expert.run"] = Service(answers)
        caller = await s.caller()
        for node in s.nodes[2:]:
            caller.dispatcher.estimate(node.peer_id).round_trip_us = 0.0
            caller.dispatcher.estimate(node.peer_id).row_us = 0.001
        session = caller.session(manifest)
        for token in range(100):
            await answer(session, manifest, rows(1, seed=token))
            await trio.sleep(0.05)
        assert set(session.report().rows) == {s.nodes[1].peer_id}
        assert session.report().retries < 60
