"""Nodes of a network in memory that serve stages, and an orchestrator that calls them."""

from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest
import trio

from dmoe.caller import Caller
from dmoe.planning import Held, Planner, wishes_of
from dmoe.ports import Quote
from dmoe.stages.caller import StageCaller
from dmoe.stages.directions import Directions
from dmoe.stages.host import Limits, StageHost
from dmoe.stages.loaded import LoadedStage, stage_plan_of
from p2p.core.advert import ModelOffer, bitmap
from p2p.memory import MemoryHub
from tests.unit.dmoe.model_kit import tiny

FREE = Quote(0, 0, 0)
PRICED = Quote(7, 1_000_000, 0)


def staged(folder, **kwargs):
    """A store with a tiny model of three layers, a stage each, and its manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmoe.importer.cut.LAYERS_PER_SHARD_MAX", 1)
        return tiny(folder, **kwargs)


class SlowCache:
    """What :class:`SlowSegment` keeps of a sequence: every row that came in."""

    def __init__(self, capacity, width):
        self.capacity, self.length, self.closed = capacity, 0, False
        self.rows = np.zeros((capacity, width), np.float32)

    def truncate(self, length):
        assert 0 <= length <= self.length
        self.length = length

    def close(self):
        self.closed = True


class SlowSegment:
    """Layers as numpy would have them: a row's answer depends on the row, its position and every row before it."""

    ram_bytes = 1000

    def __init__(self, layers, width):
        self.width = width
        self.closed = False
        self.batches = []
        self.gate = trio.Event()
        self.gate.set()
        self.fault = None
        self.opened = []
        random = np.random.default_rng(layers[0])
        self.weights = random.normal(size=width).astype(np.float32)

    async def open(self, capacity, like=None, length=0):
        cache = SlowCache(capacity, self.width)
        if like is not None:
            cache.rows[:length], cache.length = like.rows[:length], length
        self.opened.append(cache)
        return cache

    async def run(self, x, parts):
        assert not self.closed
        self.batches.append([part.rows for part in parts])
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        out, row = np.zeros_like(x), 0
        for part in parts:
            cache = part.cache
            assert not cache.closed
            for _ in range(part.rows):
                cache.rows[cache.length] = x[row]
                cache.length += 1
                past = cache.rows[: cache.length].mean(axis=0, dtype=np.float32)
                out[row] = np.tanh(x[row] * self.weights + past + np.float32(0.01 * cache.length))
                row += 1
        return out

    def compute(self, x, parts):
        return None

    def close(self):
        self.closed = True


class SlowEnds:
    """Embedding and head to go with :class:`SlowSegment`."""

    def __init__(self, arch):
        random = np.random.default_rng(99)
        self.table = random.normal(size=(arch.vocab, arch.hidden)).astype(np.float32)

    @property
    def embedding(self):
        return self

    def gather(self, rows):
        return self.table[rows]

    def is_quick(self, rows):
        return rows == 1

    def outputs(self, x, want):
        if want == "hidden":
            return x
        return np.stack([self.table @ row for row in x]) if len(x) else np.zeros((0, len(self.table)), np.float32)


class StageNode:
    """A node that serves some stages of a model."""

    def __init__(self, swarm, stages, *, quote=FREE, seller=None, **limits):
        self.network = swarm.hub.add()
        self.swarm = swarm
        self.paused = False
        self.host = StageHost(
            self.network, quote=quote, seller=seller, limits=Limits(**limits), paused=lambda: self.paused
        )
        self.segments = {}
        for index in stages:
            self.load(index)

    @property
    def peer_id(self):
        return self.network.peer_id

    def load(self, index):
        manifest = self.swarm.manifest
        stage = manifest.stages[index]
        self.segments[index] = self.swarm.segment(index)
        self.host.load(stage_plan_of(manifest, stage), self.segments[index])
        self.advertise()

    async def unload(self, index):
        stage = self.swarm.manifest.stages[index]
        await self.host.unload(self.swarm.manifest.model_id, stage.id)
        self.advertise()

    def advertise(self):
        manifest, quote = self.swarm.manifest, self.host.quote
        offer = ModelOffer(
            manifest.model_id,
            bitmap(self.host.indices(manifest.model_id)),
            quote.number,
            quote.microcredits_per_tflop,
            quote.microcredits_per_kv_unit,
        )
        self.network.directory.update(lambda advert: msgspec.structs.replace(advert, models=(offer,)))


class StageSwarm:
    """Some nodes, and one that calls them."""

    def __init__(self, nursery, manifest, segment=None, ends=None):
        self.hub = MemoryHub(1)
        self.nursery = nursery
        self.manifest = manifest
        width = manifest.architecture.hidden
        self.segment = segment or (lambda index: SlowSegment(manifest.stages[index].layers, width))
        self.ends = ends or SlowEnds(manifest.architecture)

    async def node(self, *stages, **kwargs):
        node = StageNode(self, stages, **kwargs)
        await self.nursery.start(node.host.run)
        return node

    async def runner(self, *, here=(), buyer=None, pins=(), may_forward=True, timeout_ms=5000):
        """A runner at a node of its own that holds the files of the stages ``here``."""
        node = await self.node(*here)
        caller = Caller(node.network, buyer=buyer)
        manifest = self.manifest
        held = {manifest.shard_index(manifest.trunk.id)}
        for index in here:
            first, last = manifest.stages[index].layers
            held |= {manifest.shard_index(s.id) for s in manifest.expert_shards() if first <= s.layers[0] <= last}
        planner = Planner(
            node.network,
            caller,
            lambda manifest: Held(frozenset(held)),
            wishes_of("stages", plan_pins=pins),
            threads=1,
            runs={"stages"},
        )
        stages = StageCaller(
            node.network,
            node.host,
            Directions(planner, node.network),
            caller.dispatcher,
            buyer=buyer,
            timeout_ms=timeout_ms,
            may_forward=may_forward,
        )
        await self.nursery.start(stages.run)
        await self.nursery.start(caller.run)
        load = lambda index: LoadedStage(stage_plan_of(manifest, manifest.stages[index]), self.segment(index))  # noqa: E731
        runner = stages.runner(manifest, self.ends, load)
        runner.node = node
        return runner


@asynccontextmanager
async def swarm(manifest, **kwargs):
    async with trio.open_nursery() as nursery:
        yield StageSwarm(nursery, manifest, **kwargs)
        nursery.cancel_scope.cancel()
