"""Nodes of a network in memory take, fetch, serve and drop shards; files are real, experts are fakes."""

from contextlib import asynccontextmanager
from random import Random
from types import SimpleNamespace

import msgspec
import pytest
import trio
import trio.testing

from config.errors import RequestError
from dmoe import hosting
from dmoe.caller import Caller
from dmoe.core import deployment, wire
from dmoe.core.deployment import Deployment
from dmoe.core.manifest import Manifest, Shard
from dmoe.hosting import Hosting
from dmoe.ports import Quote
from dmoe.stages.host import StageHost
from dmoe.store import ModelStore
from dmoe.worker import Worker
from p2p.core.advert import ModelOffer, bitmap
from p2p.core.identity import Identity
from p2p.memory import MemoryHub
from p2p.services import Service
from tests.unit.dmoe.swarm_kit import ALL, GROUPS, LAYERS, PUBLISHER, FakeShard, content, make_manifest, model_file
from tests.unit.dmoe.test_calling import expected, rows

MIB = 1 << 20


class Node:
    def __init__(self, hub, folder, identity=None):
        self.network = hub.add(identity)
        self.folder = folder
        self.store = ModelStore(folder / "models")
        self.worker = Worker(self.network, quote=Quote(0, 0, 0))
        self.stages = StageHost(self.network, quote=Quote(0, 0, 0))
        self.segments = []
        self.scope = None

    def load_stage(self, manifest, shard):
        self.segments.append(FakeSegment(shard))
        return self.segments[-1]

    async def start(self, nursery, staged=False, **limits):
        options = {"disk_bytes_max": 1 << 30, "ram_bytes_max": 1 << 30, **limits}
        self.hosting = Hosting(
            self.network,
            self.store,
            self.worker,
            load=lambda manifest, shard: FakeShard(shard),
            state_file=self.folder / "hosting.json",
            publishers=limits.pop("publishers", frozenset({PUBLISHER.peer_id})),
            settle_seconds=0.0,
            patience_seconds=0.5,
            hold_seconds=0.2,
            check_seconds=0.1,
            random=Random(1),
            **{name: value for name, value in options.items() if name != "publishers"},
            **({"stages": self.stages, "load_stage": self.load_stage} if staged else {}),
        )
        await nursery.start(self.worker.run)
        await nursery.start(self.stages.run)
        await nursery.start(self.hosting.run)

    def held(self, manifest):
        return self.worker.indices(manifest.model_id)

    def shard(self, manifest, index=0):
        (deployed,) = self.hosting.status()["deployments"]
        return deployed["shards"][index]


class Net:
    def __init__(self, nursery, tmp_path):
        self.hub = MemoryHub(1)
        self.nursery = nursery
        self.tmp_path = tmp_path
        self.nodes = []

    async def node(self, identity=None, start=True, **limits):
        node = Node(self.hub, self.tmp_path / str(len(self.nodes)), identity)
        self.nodes.append(node)
        if start:
            await node.start(self.nursery, **limits)
        return node

    async def publisher(self, manifest, **limits):
        node = await self.node(PUBLISHER, start=False)
        put_model(node, manifest)
        await node.start(self.nursery, **limits)
        return node


def put_model(node, manifest):
    node.store.add_manifest(manifest)
    for shard in manifest.shards:
        for file in shard.files:
            node.store.path(manifest.model_id, file).write_bytes(content(shard.id))
    node.store.path(manifest.model_id, manifest.tokenizer).write_bytes(b"{}")


@asynccontextmanager
async def network(tmp_path):
    async with trio.open_nursery() as nursery:
        yield Net(nursery, tmp_path)
        nursery.cancel_scope.cancel()


async def until(condition, what):
    with trio.move_on_after(20):
        while not condition():  # noqa: ASYNC110 - files and threads raise no event
            await trio.sleep(0.02)
        return
    raise AssertionError(f"not within 20 s: {what}")


def everywhere(nodes, manifest, replicas):
    counts = [sum(index in node.held(manifest) for node in nodes) for index in range(LAYERS // 2 * GROUPS)]
    return all(count >= replicas for count in counts)


async def test_a_deployment_spreads_shards_over_the_nodes_and_calls_use_them(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        others = [await net.node() for _ in range(2)]
        await publisher.hosting.deploy(manifest.model_id, 2)
        await until(lambda: everywhere(net.nodes, manifest, 2), "two replicas of every shard")
        assert all(node.held(manifest) for node in others), "every node got some"
        assert others[0].hosting.status()["disk_bytes"] > MIB

        caller = Caller(others[0].network, worker=others[0].worker, random=Random(1))
        await net.nursery.start(caller.run)
        session = caller.session(manifest)
        for layer in range(LAYERS):
            got = await session.run(layer, rows(2), ALL)
            assert got.tobytes() == expected(manifest, layer, rows(2)).tobytes()
        net.hub.kill(publisher.network.peer_id)
        await until(lambda: everywhere(others, manifest, 1), "the others cover every shard")
        for layer in range(LAYERS):
            got = await session.run(layer, rows(2), ALL)
            assert wire.rounded(got).tobytes() == wire.rounded(expected(manifest, layer, rows(2))).tobytes()


async def test_others_hear_of_a_load_that_changes_much_and_of_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(hosting, "LOAD_SECONDS", 0.02)
    async with network(tmp_path) as net:
        busy, other = [await net.node() for _ in range(2)]
        waiting = [3]
        busy.worker.rows_waiting = lambda: waiting[0]

        def seen() -> int:
            return other.network.directory.adverts()[busy.network.peer_id].load

        await trio.sleep(0.2)
        assert seen() == 0
        waiting[0] = 400
        await until(lambda: 300 <= seen() <= 400, "the load of 400 rows")
        waiting[0] = 0
        await until(lambda: seen() == 0, "no load")


async def test_surplus_replicas_go_after_the_hold_time_and_their_files_too(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        await publisher.hosting.deploy(manifest.model_id, 1)
        await until(lambda: everywhere([publisher], manifest, 1), "alone, the publisher serves all")
        other = await net.node()
        total = LAYERS // 2 * GROUPS
        await until(lambda: 0 < len(publisher.held(manifest)) < total, "the publisher drops what the other has")
        await until(lambda: len(publisher.held(manifest)) + len(other.held(manifest)) == total, "one replica of each")
        assert everywhere(net.nodes, manifest, 1)
        assert publisher.store.has_shard(manifest.model_id, manifest.shards[0].id), "a publisher keeps its files"
        await publisher.hosting.undeploy(manifest.model_id)
        await until(lambda: not other.held(manifest) and not publisher.held(manifest), "nothing is served any more")
        await until(lambda: not any(other.store.root.rglob("*.bin")), "the files are gone")
        offer = publisher.network.directory.own().offer(manifest.model_id)
        assert not any(offer.holds(index) for index in range(total)), "only the trunk on its disk is still offered"
        with pytest.raises(RequestError, match="did not deploy"):
            await publisher.hosting.undeploy(manifest.model_id)


async def test_a_paused_node_keeps_its_place_and_takes_nothing(tmp_path):
    manifest = make_manifest()
    total = LAYERS // 2 * GROUPS

    def pause(node, paused):
        node.worker.paused = paused
        node.network.directory.update(lambda advert: msgspec.structs.replace(advert, paused=paused))
        node.hosting.wake()

    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        idle = await net.node(start=False)
        idle.worker.paused = True
        idle.network.directory.update(lambda advert: msgspec.structs.replace(advert, paused=True))
        await idle.start(net.nursery)
        await publisher.hosting.deploy(manifest.model_id, 1)
        await until(lambda: everywhere([publisher], manifest, 1), "alone, the publisher serves all")
        await trio.sleep(0.5)
        assert not idle.held(manifest)
        assert len(publisher.held(manifest)) == total
        pause(idle, False)
        await until(lambda: idle.held(manifest) and everywhere(net.nodes, manifest, 1), "it takes its part")
        await until(lambda: len(publisher.held(manifest)) + len(idle.held(manifest)) == total, "one replica of each")

        held = idle.held(manifest)
        pause(idle, True)
        await publisher.hosting.undeploy(manifest.model_id)
        await until(lambda: not publisher.held(manifest), "the publisher drops its part")
        assert idle.held(manifest) == held, "nothing is dropped while paused"
        pause(idle, False)
        await until(lambda: not idle.held(manifest), "it is, afterwards")


async def test_nobody_drops_a_shard_on_the_word_of_peers_that_do_not_have_it(tmp_path, caplog):
    """Three liars claim every shard and endless room; one of them passes questions on to the honest node."""
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        await publisher.hosting.deploy(manifest.model_id, 1)
        await until(lambda: everywhere([publisher], manifest, 1), "alone, the publisher serves all")
        everything = bitmap(set(range(len(manifest.shards))))
        liars = [net.hub.add(models=(ModelOffer(manifest.model_id, everything, 0, 0, 0),)) for _ in range(3)]
        for liar in liars:
            liar.directory.update(lambda advert: msgspec.structs.replace(advert, offered_bytes=1 << 62))
        relaying = liars[0]

        async def relay(call):
            return await relaying.call(publisher.network.peer_id, call.method, call.header, deadline_ms=1000)

        relaying.serve("model.prove", relay)
        await until(
            lambda: caplog.text.count("is kept: 0 of 1 holders") >= 3, "the publisher asks and is not convinced"
        )
        assert everywhere([publisher], manifest, 1)
        honest = await net.node()
        await until(lambda: honest.store.manifests(), "an honest node comes")


async def test_a_restarted_node_serves_what_it_had_without_asking_anybody(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        other = await net.node()
        await publisher.hosting.deploy(manifest.model_id, 2)
        await until(lambda: everywhere([other], manifest, 1), "the other node has all")
        await until(lambda: len(other.hosting.deployments.hosted.get(manifest.model_id, ())) == 9, "it is remembered")
    async with network(tmp_path) as net:
        await net.node(start=False)
        again = await net.node()
        await until(lambda: everywhere([again], manifest, 1), "all is served again, alone")


async def test_a_full_node_is_passed_over_and_says_why(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        small = await net.node(ram_bytes_max=2 * MIB)
        none = await net.node(ram_bytes_max=0)
        await publisher.hosting.deploy(manifest.model_id, 3)
        await until(lambda: everywhere([publisher], manifest, 1), "the publisher serves all")
        await until(lambda: len(small.held(manifest)) == 2, "the small one takes what fits")
        await until(lambda: small.network.directory.own().full, "and says it is full")
        assert not none.held(manifest)


async def test_too_little_disk_is_reported_by_name_and_nothing_breaks(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        tight = await net.node(disk_bytes_max=1000)
        await publisher.hosting.deploy(manifest.model_id, 2)

        def told():
            found = [d for d in tight.hosting.status()["deployments"] for d in d["shards"] if d["error"]]
            return found and found[0]["state"] == "no_room" and "disk_bytes_max" in found[0]["error"]

        await until(told, "the limit is named")
        assert not tight.held(manifest)


async def test_a_damaged_file_is_found_and_fetched_again(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        other = await net.node(start=False)
        put_model(other, manifest)
        file = manifest.shards[0].files[0]
        path = other.store.path(manifest.model_id, file)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        await other.start(net.nursery)
        await publisher.hosting.deploy(manifest.model_id, 2)
        await until(lambda: everywhere([other], manifest, 1), "all shards are served")
        other.store.verify_file(manifest.model_id, file)


async def test_files_nobody_has_are_reported_and_tried_again(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.node(PUBLISHER, start=False)
        publisher.store.add_manifest(manifest)
        await publisher.start(net.nursery)
        await publisher.hosting.deploy(manifest.model_id, 1)
        name = manifest.shards[0].id
        await until(lambda: name in publisher.shard(manifest)["error"], "the file is named")
        assert publisher.shard(manifest)["state"] == "failed"
        put_model(publisher, manifest)
        await until(lambda: everywhere([publisher], manifest, 1), "after they are there all is served")
        assert publisher.shard(manifest)["error"] == ""


async def test_models_of_strangers_are_refused(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        careful = await net.node(publishers=frozenset())
        open_minded = await net.node(publishers=frozenset({"*"}))
        await publisher.hosting.deploy(manifest.model_id, 2)
        await until(lambda: everywhere([open_minded], manifest, 1), "whoever takes all models takes this one")
        assert careful.hosting.status()["deployments"] == []
        assert not careful.store.manifests()
        with pytest.raises(RequestError, match="published by"):
            await careful.hosting.bringer.trunk(manifest.model_id)


async def test_one_peer_cannot_forbid_a_model_that_another_one_gives(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        liar = await net.node()
        await net.publisher(manifest)
        node = await net.node()

        async def forbid(call):
            raise RequestError("forbidden", "you must not have it")

        liar.network._services["model.manifest"] = Service(forbid)
        found = await node.hosting.fetcher.manifest(manifest.model_id, [liar.network.peer_id])
        assert found.model_id == manifest.model_id


async def test_more_deployments_than_fit_in_one_answer_spread_all_the_same(tmp_path):
    async with network(tmp_path) as net:
        one, other = [await net.node(publishers=frozenset({"*"})) for _ in range(2)]
        for n in range(5):
            deployer = Identity.from_seed(bytes([n]) * 32)
            for m in range(60):
                record = Deployment(f"{n:032x}{m:032x}", bytes(32), 0, deployer.peer_id, 1)
                one.hosting.deployments.book.add(deployment.sign(deployer, record))

        def known():
            return len(list(other.hosting.deployments.book))

        await other.hosting.deployments.ask(one.network.peer_id)
        assert known() >= 200
        while known() < 300:
            await other.hosting.deployments.ask(one.network.peer_id)


async def test_trunk_and_tokenizer_come_here_by_name_or_id(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        client = await net.node(ram_bytes_max=0)
        whole = await net.node(ram_bytes_max=0)
        got = []

        async def ask():
            got.append(await client.hosting.bringer.trunk("tiny"))

        net.nursery.start_soon(ask)  # before anybody knows the model
        await publisher.hosting.deploy(manifest.model_id, 1)
        await until(lambda: got, "the trunk is here")
        assert got[0].model_id == manifest.model_id
        assert client.store.has_shard(manifest.model_id, "trunk")
        client.store.verify_file(manifest.model_id, manifest.tokenizer)
        assert not client.store.has_shard(manifest.model_id, manifest.shards[0].id)
        await whole.hosting.bringer.whole(manifest.model_id)
        assert all(whole.store.has_shard(manifest.model_id, shard.id) for shard in manifest.shards)


async def test_deployments_reach_nodes_that_missed_the_gossip(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        await publisher.hosting.deploy(manifest.model_id, 2)
        late = await net.node()
        await until(lambda: late.hosting.status()["deployments"], "it asked and learnt")
        assert late.hosting.status()["deployments"][0]["replicas"] == 2


async def test_a_damaged_state_file_is_an_empty_state(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        node = await net.node(PUBLISHER, start=False)
        (tmp_path / "0" / "hosting.json").write_text('{"deployments": ["zz"')
        put_model(node, manifest)
        await node.start(net.nursery)
        await node.hosting.deploy(manifest.model_id, 1)
        await until(lambda: everywhere([node], manifest, 1), "it works as new")


async def test_a_bad_replica_count_is_refused(tmp_path):
    async with network(tmp_path) as net:
        node = await net.node()
        for count in (0, -1, 65):
            with pytest.raises(RequestError, match="1 to 64"):
                await node.hosting.deploy("0" * 64, count)


class FakeSegment:
    """A stage that computes nothing."""

    def __init__(self, shard):
        self.ram_bytes = shard.ram_bytes
        self.closed = False

    def close(self):
        self.closed = True


def staged_manifest():
    """:func:`make_manifest` with attention files of their own, and a stage for each two layers."""
    manifest = make_manifest(name="staged")
    attention = [model_file(f"trunk-{first}.bin", content(f"trunk-{first}")) for first in (0, 2)]
    trunk = msgspec.structs.replace(manifest.trunk, files=(*manifest.trunk.files, *attention))
    stages = [
        Shard(
            id=f"stage-{first}",
            kind="stage",
            layers=(first, first + 1),
            group=-1,
            experts=tuple(range(GROUPS)),
            files=(file, *(f for s in manifest.expert_shards() if s.layers[0] == first for f in s.files)),
            params=1,
            flops_per_row=1,
            ram_bytes=1 << 20,
            dtype="fp32",
        )
        for first, file in zip((0, 2), attention, strict=True)
    ]
    shards = (*manifest.expert_shards(), trunk, *stages)
    return Manifest.parse(msgspec.structs.replace(manifest, shards=shards).sign(PUBLISHER).to_json())


def put_staged(node, manifest):
    node.store.add_manifest(manifest)
    for shard in manifest.parts:
        for file in shard.files:
            name = file.path.removesuffix(".bin")
            node.store.path(manifest.model_id, file).write_bytes(content(name))
    node.store.path(manifest.model_id, manifest.tokenizer).write_bytes(b"{}")


async def test_a_deployment_of_stages_places_stages_and_nothing_else(tmp_path):
    manifest = staged_manifest()
    async with network(tmp_path) as net:
        publisher = await net.node(PUBLISHER, start=False)
        put_staged(publisher, manifest)
        await publisher.start(net.nursery, staged=True)
        others = [await net.node(staged=True) for _ in range(2)]
        await publisher.hosting.deploy(manifest.model_id, 2, "stages")
        indices = {manifest.shard_index(stage.id) for stage in manifest.stages}

        def held():
            nodes = (publisher, *others)
            return [sum(index in node.stages.indices(manifest.model_id) for node in nodes) for index in indices]

        await until(lambda: min(held()) >= 2, "every stage has two replicas")
        assert all(not node.held(manifest) for node in (publisher, *others))

        def told(index):
            offers = [node.network.directory.own().offer(manifest.model_id) for node in (publisher, *others)]
            return sum(offer is not None and offer.holds(index) for offer in offers)

        await until(lambda: all(told(index) >= 2 for index in indices), "others are told of them")
        (deployed,) = publisher.hosting.status()["deployments"]
        assert {shard["kind"] for shard in deployed["shards"]} == {"trunk", "stage"}
        # experts too: the files are there already, and stay when the stages go
        await publisher.hosting.deploy(manifest.model_id, 2, "both")
        await until(lambda: everywhere([publisher, *others], manifest, 2), "experts have two replicas")
        await publisher.hosting.deploy(manifest.model_id, 2, "experts")
        await until(lambda: not any(held()), "the stages are dropped")
        for node in (publisher, *others):
            for index in node.held(manifest):
                assert node.store.has_shard(manifest.model_id, manifest.shards[index].id)
        assert all(segment.closed for node in others for segment in node.segments)


async def test_a_model_without_stages_cannot_be_deployed_by_them(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        with pytest.raises(RequestError, match="has no stages"):
            await publisher.hosting.deploy(manifest.model_id, 1, "stages")
        with pytest.raises(RequestError, match="experts, stages, both"):
            await publisher.hosting.deploy(manifest.model_id, 1, "everything")


async def test_stages_and_experts_share_the_limit_of_memory(tmp_path):
    manifest = staged_manifest()
    async with network(tmp_path) as net:
        publisher = await net.node(PUBLISHER, start=False)
        put_staged(publisher, manifest)
        await publisher.start(net.nursery, staged=True, ram_bytes_max=5 * MIB)
        await publisher.hosting.deploy(manifest.model_id, 1, "both")

        def errors():
            return [s["error"] for d in publisher.hosting.status()["deployments"] for s in d["shards"] if s["error"]]

        await until(lambda: any("raise dmoe.ram_bytes_max" in error for error in errors()), "the limit is named")
        assert publisher.worker.ram_bytes() + publisher.stages.ram_bytes() <= 5 * MIB


def test_a_deployment_by_stages_of_a_model_without_stages_is_borne():
    trunk = SimpleNamespace(kind="trunk", ram_bytes=5)
    book = SimpleNamespace(replicas=lambda: {"m": 1}, wanted=lambda model, kind: kind == "stage")
    asked = []
    hosting = SimpleNamespace(
        deployments=SimpleNamespace(book=book),
        _store=SimpleNamespace(manifests=lambda: {"m": SimpleNamespace(shards=[trunk])}),
        _taker=SimpleNamespace(has_room=lambda largest: asked.append(largest) or True),
    )
    Hosting._update_full(hosting)
    assert asked == [0]


# --- replicas follow demand


async def crowded(tmp_path, net, **limits):
    """A publisher that holds all of a model once, alone on its rank, and two nodes that have room for help."""
    manifest = make_manifest()
    quick = {"long_seconds": 0.2, "idle_seconds": 0.5, "sample_seconds": 0.02, **limits}
    publisher = await net.publisher(manifest, **quick)
    for _ in range(2):
        await net.node(**quick)
    await publisher.hosting.deploy(manifest.model_id, 1)
    await until(lambda: everywhere(net.nodes, manifest, 1), "one replica of every shard")
    await until(lambda: sum(len(node.held(manifest)) for node in net.nodes) == LAYERS // 2 * GROUPS, "and no more")
    holder = next(node for node in net.nodes if node.held(manifest))
    return manifest, holder, [node for node in net.nodes if node is not holder]


def replicas(net, manifest, index):
    return sum(index in node.held(manifest) for node in net.nodes)


async def test_a_shard_whose_queue_stays_long_gains_a_replica_and_an_idle_one_goes(tmp_path):
    async with network(tmp_path) as net:
        manifest, holder, _ = await crowded(tmp_path, net)
        index = min(holder.held(manifest))
        (loaded,) = [s for s in holder.worker._shards.values() if s.plan.index == index]
        loaded.rows_waiting, loaded.row_seconds = 1000, 0.001
        await until(lambda: replicas(net, manifest, index) == 2, "a replica by demand")
        helper = next(n for n in net.nodes if n is not holder and index in n.held(manifest))
        assert helper.hosting.helping.extras == {(manifest.model_id, index)}
        assert all(replicas(net, manifest, i) == 1 for i in range(LAYERS // 2 * GROUPS) if i != index), "no other shard"
        (extra,) = [s for s in helper.worker._shards.values() if s.plan.index == index]
        extra.row_seconds = 0.001
        for _ in range(20):  # it is used
            extra.rows_computed += 50
            await trio.sleep(0.05)
            assert index in helper.held(manifest), "a surplus that works stays"
        loaded.rows_waiting = 0
        await until(lambda: replicas(net, manifest, index) == 1, "the idle surplus goes")
        await until(lambda: not helper.hosting.helping.extras, "and is forgotten")


async def test_demand_is_bounded_by_what_was_deployed(tmp_path, monkeypatch):
    monkeypatch.setattr(hosting, "ASKED_MAX", 2)
    async with network(tmp_path) as net:
        manifest, holder, _ = await crowded(tmp_path, net, idle_seconds=60.0)
        index = min(holder.held(manifest))

        def press():
            for node in net.nodes:
                for shard in node.worker._shards.values():
                    if shard.plan.index == index:
                        shard.rows_waiting, shard.row_seconds = 1000, 0.001

        press()
        await until(lambda: replicas(net, manifest, index) == 2, "one more")
        press()
        await trio.sleep(1)
        assert replicas(net, manifest, index) == 2, "twice the replicas deployed and no more"


async def test_nobody_takes_a_shard_on_a_strangers_word(tmp_path):
    async with network(tmp_path) as net:
        manifest, holder, (other, *_) = await crowded(tmp_path, net)
        index = min(holder.held(manifest))
        stranger = net.hub.add()
        ask = {"model": manifest.model_id, "shard": index}

        async def why(header, node=other):
            return (await stranger.call(node.network.peer_id, "model.help", header, deadline_ms=2000)).header["why"]

        assert "no such shard" in await why(ask)
        stranger.directory.update(
            lambda own: msgspec.structs.replace(own, models=(ModelOffer(manifest.model_id, b"\xff", 0, 0, 0),))
        )
        await until(lambda: stranger.peer_id in other.network.directory.adverts(), "its claim is known")
        assert "does not know" in await why({**ask, "model": "0" * 64})
        assert "does not know" in await why({**ask, "shard": 1 << 40})
        trunk = manifest.shard_index(manifest.trunk.id)
        assert await why({**ask, "shard": trunk})
        assert await why(ask, holder) == "has it already"
        for bad in ({}, {"model": 3, "shard": 0}, {**ask, "shard": True}, {**ask, "shard": "1"}, {**ask, "model": []}):
            with pytest.raises(Exception, match="must be a model id"):
                await why(bad)
        other.worker.paused = True
        assert await why(ask) == "has no room"
        assert not other.hosting.helping.extras


async def test_a_deployment_is_scaled_in_its_mode(tmp_path):
    manifest = make_manifest()
    async with network(tmp_path) as net:
        publisher = await net.publisher(manifest)
        with pytest.raises(RequestError, match="did not deploy"):
            await publisher.hosting.scale(manifest.model_id, 2)
        await publisher.hosting.deploy(manifest.model_id, 1)
        assert (await publisher.hosting.scale(manifest.model_id, 3)).replicas == 3
        assert publisher.hosting.deployments.book.wanted(manifest.model_id, "expert") == 3
        with pytest.raises(RequestError, match="1 to"):
            await publisher.hosting.scale(manifest.model_id, 0)
        await publisher.hosting.undeploy(manifest.model_id)
        with pytest.raises(RequestError, match="did not deploy"):
            await publisher.hosting.scale(manifest.model_id, 2)
