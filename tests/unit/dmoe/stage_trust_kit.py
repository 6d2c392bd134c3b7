"""Stages with real layers, honest and lying, in a swarm with a real ledger whose orchestrator audits."""

from contextlib import asynccontextmanager
from functools import partial
from random import Random

import msgspec
import numpy as np
import trio

import dmoe.runtime
import dmoe.segment
from config.settings import LedgerSettings
from dmoe import layers
from dmoe.audit import Auditor, Rules
from dmoe.caller import Caller
from dmoe.core import wire
from dmoe.core.costs import shape_of
from dmoe.core.linear import Linear
from dmoe.judging import Judging
from dmoe.planning import Held, Planner, wishes_of
from dmoe.ports import Quote
from dmoe.runner import Feed
from dmoe.runtime import RuntimeOptions, open_files
from dmoe.segment import Part
from dmoe.stages.caller import StageCaller
from dmoe.stages.directions import Directions
from dmoe.stages.host import StageHost
from dmoe.stages.loaded import LoadedStage, stage_plan_of
from dmoe.stages.loading import load_spread, load_stage
from dmoe.trust import Trust
from ledger.core.genesis import Genesis
from ledger.ledger import open_ledger
from p2p.core.advert import ModelOffer, bitmap
from p2p.core.identity import Identity
from p2p.memory import MemoryHub
from tests.unit.dmoe.lent_kit import LentExperts
from tests.unit.dmoe.trust_kit import DEVICE, FORMS

QUOTE = Quote(7, 1_000_000, 0)


def options(threads=1):
    return RuntimeOptions(device="cpu", threads=threads)


def rewritten(store, manifest, stage, kind):
    """A stage whose weights are in another form, as a machine computes that saves work."""
    honest = dmoe.runtime.merged

    def cheap(files):
        tensors = dict(honest(files))
        names = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in ("w", "h", "b", "q8", "q4")}
        for name in names:
            parts = {
                s: tensors[f"{name}.{s}"] for s in ("w", "h", "b", "q8", "q4", "s", "c") if f"{name}.{s}" in tensors
            }
            layer = Linear(parts)
            if name.endswith(("router", "embedding")) or layer.columns % 32:
                continue
            for suffix in parts:
                del tensors[f"{name}.{suffix}"]
            made = FORMS[kind](layer.dequantised())
            tensors |= {f"{name}.{suffix}": part for suffix, part in made.parts.items()}
        return tensors

    dmoe.runtime.merged = dmoe.segment.merged = cheap
    try:
        return load_stage(manifest, stage, store, options())
    finally:
        dmoe.runtime.merged = dmoe.segment.merged = honest


async def through(segment, rows, pieces=None):
    """``rows`` through a loaded stage in pieces, as they come out."""
    cache, found, at = await segment.open(len(rows) + 1), [], 0
    for size in pieces or [len(rows)]:
        found.append((await segment.run(rows[at : at + size], [Part(cache, size)])).copy())
        at += size
    cache.close()
    return np.concatenate(found)


class LyingStage:
    """Layers whose answers are wrong in a share of the runs. ``lie``: fp16, int8, int4 (weights), nudge, zeros."""

    def __init__(self, honest, store, manifest, stage, lie, share=1.0, seed=0):
        self.honest, self.lie, self.share, self.random = honest, lie, share, Random(seed)
        self.lies = self.runs = 0
        self.cheap = rewritten(store, manifest, stage, lie) if lie in FORMS else None
        self.ram_bytes = honest.ram_bytes
        self.twins = {}

    async def open(self, capacity, like=None, length=0):
        cache = await self.honest.open(capacity, like, length)
        if self.cheap is not None:
            self.twins[cache] = await self.cheap.open(capacity, self.twins[like] if like else None, length)
        return cache

    async def run(self, x, parts):
        self.runs += 1
        true, twins = (await self.honest.run(x, parts)).copy(), None
        if self.cheap is not None:
            for part in parts:
                self.twins[part.cache].truncate(part.cache.length - part.rows)
            twins = (await self.cheap.run(x, [Part(self.twins[part.cache], part.rows) for part in parts])).copy()
        if self.random.random() >= self.share:
            return true
        self.lies += 1
        if twins is not None:
            return twins
        return np.zeros_like(true) if self.lie == "zeros" else nudged(true, self.random)

    def compute(self, x, parts):
        return None

    def close(self):
        self.honest.close()


def nudged(rows, random):
    """1 % added to one large number of one row."""
    wrong = rows.copy()
    row = random.randrange(len(wrong))
    large = np.argsort(-np.abs(wrong[row]))[: max(1, wrong.shape[1] // 8)]
    wrong[row, large[random.randrange(len(large))]] *= np.float32(1.01)
    return wrong


class StageTrustSwarm:
    """Node 0 asks (and is issuer and witness); the others serve stages. All have the model's files."""

    def __init__(self, nursery, folder, store, manifest, seed=1):
        self.nursery, self.folder, self.store, self.manifest, self.seed = nursery, folder, store, manifest, seed
        self.hub = MemoryHub(seed)
        self.ids = [Identity.from_seed(bytes([n + 1]) * 32) for n in range(8)]
        keys = [identity.public_key for identity in self.ids]
        self.genesis = Genesis(issuer=keys[0], root=keys[0], witnesses=(keys[0],), f=0)
        self.networks, self.ledgers, self.hosts, self.blamed, self.segments = [], [], [], [], {}

    async def node(self, *stages, lie=None, share=1.0, device=DEVICE, threads=1):
        """One more node; its peer id."""
        number = len(self.networks)
        network = self.hub.add(self.ids[number])
        settings = LedgerSettings(sync_seconds=1, witness=number == 0)
        path = self.folder / f"{number}.db"
        ledger = await open_ledger(
            network, self.ids[number], self.genesis, path, settings, nursery=self.nursery, in_thread=False
        )
        host = StageHost(network, quote=QUOTE, seller=ledger.seller, device=device)
        await self.nursery.start(host.run)
        self.networks.append(network)
        self.ledgers.append(ledger)
        self.hosts.append(host)
        manifest = self.manifest
        for index in stages:
            stage = manifest.stages[index]
            made = await trio.to_thread.run_sync(partial(load_stage, manifest, stage, self.store, options(threads)))
            if lie is not None:
                lying = partial(LyingStage, made, self.store, manifest, stage, lie, share, self.seed)
                made = await trio.to_thread.run_sync(lying)
            self.segments[network.peer_id, index] = made
            host.load(stage_plan_of(manifest, stage), made)
        if stages:
            offer = ModelOffer(
                manifest.model_id,
                bitmap(host.indices(manifest.model_id)),
                QUOTE.number,
                QUOTE.microcredits_per_tflop,
                0,
            )
            network.directory.update(lambda advert: msgspec.structs.replace(advert, models=(offer,)))
        return network.peer_id

    async def runner(
        self, number=0, *, share, probes=False, privacy=None, store=None, may_forward=True, seed=0, own=(), lent=False
    ):
        """A runner at a node; ``runner.audits``, ``runner.auditor`` are its audits. ``own``: stages that it runs itself
        and serves to nobody; their experts may be ``lent``."""
        network, ledger, manifest = self.networks[number], self.ledgers[number], self.manifest
        if number == 0:
            await ledger.grant(self.ids[0].public_key, 1_000_000_000)
        trust = Trust()
        if not probes:
            trust.is_probed = lambda *key: True

        def audits(purse, replicas):
            return Auditor(
                network,
                purse,
                replicas,
                None,
                Judging(store or self.store),
                trust,
                Rules(share, self.folder / f"evidence-{number}"),
                notary=ledger.buyer,
                blame=lambda peer, fault, why: self.blamed.append((number, peer, fault, why)),
                random=Random(number + 3 + 100 * seed),
            )

        caller = Caller(network, buyer=ledger.buyer, audits=audits)
        await self.nursery.start(caller.run)
        mine = {index: manifest.stages[index] for index in own}
        layers_of = shape_of(manifest).layers
        spans = [layers_of[first : last + 1] for first, last in (shard.layers for shard in mine.values())]
        kept = {group.shard for span in spans for layer in span for group in layer}
        held = frozenset({manifest.shard_index(manifest.trunk.id)} | kept)

        def load(index):
            shard = mine[index]
            if not lent:
                return LoadedStage(stage_plan_of(manifest, shard), load_stage(manifest, shard, self.store, options()))
            experts = LentExperts(manifest, self.store, options())
            spread = load_spread(manifest, shard, self.store, options(), experts)
            return LoadedStage(stage_plan_of(manifest, shard), spread)

        planner = Planner(network, caller, lambda m: Held(held), wishes_of("stages"), threads=1, runs={"stages"})
        stages = StageCaller(
            network,
            self.hosts[number],
            Directions(planner, network),
            caller.dispatcher,
            buyer=ledger.buyer,
            auditor=caller.audit,
            random=Random(number + 7 + 100 * seed),
            may_forward=may_forward,
        )
        await self.nursery.start(stages.run)
        ends = layers.Ends(manifest, open_files(manifest, self.store, [manifest.trunk]), options())
        runner = stages.runner(manifest, ends, load, privacy)
        runner.audits, runner.auditor, runner.prober = stages.shared.audits, caller.audit, stages._prober
        return runner

    async def close(self):
        for ledger in self.ledgers:
            await ledger.aclose()


@asynccontextmanager
async def stage_trust_swarm(folder, store, manifest, **more):
    async with trio.open_nursery() as nursery:
        made = StageTrustSwarm(nursery, folder, store, manifest, **more)
        try:
            yield made
            await made.close()
        finally:
            nursery.cancel_scope.cancel()


async def answer(runner, prompt, said=6, seed=0, drafts=True):
    """A prompt and some tokens after it, now and then with drafts that are refused; everything that came out."""
    random = Random(seed)
    sequence = await runner.open(len(prompt) + said + 8)
    (logits,) = await runner.forward([Feed(sequence=sequence, tokens=tuple(prompt), outputs=1)])
    out = [logits[-1]]
    for _ in range(said):
        token = int(out[-1].argmax())
        guesses = tuple(random.randrange(200) for _ in range(3)) if drafts and random.random() < 0.3 else ()
        (logits,) = await runner.forward([Feed(sequence=sequence, tokens=(token, *guesses), outputs=1 + len(guesses))])
        sequence.truncate(sequence.length - len(guesses))
        out.append(logits[0])
    sequence.close()
    return out


def prompts(count, seed=0, most=40):
    """Random prompts of different lengths."""
    random = Random(seed)
    return [[random.randrange(1, 240) for _ in range(random.randint(3, most))] for _ in range(count)]


def rows_of(manifest, count, seed=0, scale=1.0):
    """Random rows as they travel."""
    random = np.random.default_rng(seed)
    rows = (random.standard_normal((count, manifest.architecture.hidden)) * scale).astype(np.float32)
    return wire.rounded(rows, manifest.wire_dtype)


async def quiet(runner, seconds=90):
    """Wait until no audit waits or runs."""
    with trio.fail_after(seconds):
        while runner.audits.unfinished:  # noqa: ASYNC110
            await trio.sleep(0.02)
