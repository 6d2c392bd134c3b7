"""Honest experts, liars, inputs that are solved for, and a swarm with real shards and a real ledger."""

from contextlib import asynccontextmanager
from functools import partial
from random import Random

import msgspec
import numpy as np
import trio

from config.settings import LedgerSettings
from dmoe.audit import Auditor, Rules
from dmoe.caller import Caller
from dmoe.core import verdict, wire
from dmoe.core.linear import Linear
from dmoe.core.privacy import OPEN
from dmoe.core.variant import PLAIN
from dmoe.graphs import expert_graph
from dmoe.importer.quantise import quantise_int4, quantise_int8
from dmoe.judging import Judging
from dmoe.ports import Quote
from dmoe.runtime import Expert as Session
from dmoe.runtime import ExpertShard, RuntimeOptions, expert_weights, merged, open_session, partial_sum
from dmoe.trust import Trust
from dmoe.worker import Worker, plan_of
from ledger.core.genesis import Genesis
from ledger.ledger import open_ledger
from p2p.core.advert import ModelOffer, bitmap
from p2p.core.identity import Identity
from p2p.memory import MemoryHub

QUOTE = Quote(7, 1_000_000, 0)
DEVICE = "x86_64-cpu"
FORMS = {
    "fp32": lambda w: Linear({"w": w}),
    "fp16": lambda w: Linear({"h": w.astype(np.float16)}),
    "int8": quantise_int8,
    "int4": quantise_int4,
}


def expert(kind, hidden=128, width=64, seed=0):
    """Random weights in one form."""
    random = np.random.default_rng(seed)
    gate_up = (random.standard_normal((2 * width, hidden)) / hidden**0.5).astype(np.float32)
    down = (random.standard_normal((hidden, width)) / width**0.5).astype(np.float32)
    return verdict.Expert(FORMS[kind](gate_up), FORMS[kind](down))


def session(found, threads=1):
    """An expert as a worker runs it."""
    graph = expert_graph(found.gate_up, found.down)
    return Session(open_session(graph, threads=threads), found.down.rows)


def rewritten(found, kind):
    """The same expert with weights in another form: what a machine computes that saves work."""
    return verdict.Expert(FORMS[kind](found.gate_up.dequantised()), FORMS[kind](found.down.dequantised()))


def ratios(found, h, answer, dtype="fp16"):
    """Distance over bound of every row of an answer."""
    honest = verdict.recompute({0: found}, [0], PLAIN, h, None, None)
    return verdict.judge(wire.rounded(answer, dtype), honest, dtype).ratio


def nudged(answer, random):
    """1 % added to one element of each row: one that counts."""
    wrong = answer.copy()
    rows = np.arange(len(wrong))
    large = np.argsort(-np.abs(wrong), axis=1)[:, : max(1, wrong.shape[1] // 8)]
    at = large[rows, [random.randrange(large.shape[1]) for _ in rows]]
    wrong[rows, at] *= np.float32(1.01)
    return wrong


# --- inputs that are solved for


def cancelling(found, seed=0, steps=300):
    """An input whose output nearly cancels (Levenberg-Marquardt from a random start, kept away from zero)."""
    random = np.random.default_rng(seed)
    both, down = found.gate_up.dequantised().astype(float), found.down.dequantised().astype(float)
    width = len(both) // 2
    gate, up = both[:width], both[width:]

    def parts(x):
        g, u = gate @ x, up @ x
        s = 1 / (1 + np.exp(-g))
        slope = s * (1 + g * (1 - s))
        y = down @ (g * s * u)
        return y, down @ ((slope * u)[:, None] * gate + (g * s)[:, None] * up)

    x, damping = random.standard_normal(gate.shape[1]) * 2, 1.0
    for _ in range(steps):
        y, slopes = parts(x)
        step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(x)), slopes.T @ y)
        tried = x - step
        if np.linalg.norm(tried) < 1:
            tried *= 2 / np.linalg.norm(tried)
        if np.linalg.norm(parts(tried)[0]) < np.linalg.norm(y):
            x, damping = tried, max(damping / 3, 1e-12)
        else:
            damping *= 4
            if damping > 1e12:
                break
    return x.astype(np.float32)


def silent(found, seed=0):
    """An input that the gates do not see: behind them is nothing but noise."""
    both = found.gate_up.dequantised().astype(float)
    gate = both[: len(both) // 2]
    null = np.linalg.svd(gate)[2][len(gate) :]
    return (np.random.default_rng(seed).standard_normal(len(null)) @ null * 30).astype(np.float32)


def closed(found, seed=0):
    """An input that closes every gate, as far as sigmoids are cut off."""
    both = found.gate_up.dequantised().astype(float)
    gate = both[: len(both) // 2]
    x = np.linalg.lstsq(gate, np.full(len(gate), -30.0), rcond=None)[0]
    return (x + np.random.default_rng(seed).standard_normal(len(x)) * 0.01).astype(np.float32)


def tied(found, seed=0):
    """An input whose values all lie between two 8-bit codes."""
    random = np.random.default_rng(seed)
    x = random.integers(-126, 126, found.gate_up.columns) + 0.5
    x[::16] = 127.0
    return x.astype(np.float32) / 64


# --- a swarm


class LyingShard:
    """A shard whose answers are wrong in a share of the calls. ``lie``: fp16, int8, int4 (weights), nudge, zeros."""

    def __init__(self, honest, store, manifest, shard, lie, share=1.0, seed=0):
        self.honest, self.lie, self.share = honest, lie, share
        self.ram_bytes = honest.ram_bytes
        self.random = Random(seed)
        self.members, self.sessions = shard.experts, {}
        if lie in FORMS:
            tensors = merged(store.open_shard(manifest, shard))
            for layer in manifest.layers_of(shard):
                for member in shard.experts:
                    found = verdict.Expert(*expert_weights(manifest.architecture, tensors, layer, member))
                    self.sessions[layer, member] = session(rewritten(found, lie))

    def partial(self, layer, h, experts=None, weights=None):
        if self.random.random() >= self.share:
            return self.honest.partial(layer, h, experts, weights)
        if self.sessions:
            return partial_sum(self.members, h, experts, weights, lambda e, rows: self.sessions[layer, e].run(rows))
        y = self.honest.partial(layer, h, experts, weights)
        return np.zeros_like(y) if self.lie == "zeros" else nudged(y, self.random)

    def close(self):
        self.honest.close()


class TrustSwarm:
    """Node 0 calls (and is issuer and witness); the others work. All have the model's files unless told otherwise."""

    def __init__(self, nursery, folder, store, manifest, seed=1):
        self.nursery, self.folder, self.store, self.manifest = nursery, folder, store, manifest
        self.hub, self.seed = MemoryHub(seed), seed
        self.ids = [Identity.from_seed(bytes([n + 1]) * 32) for n in range(6)]
        keys = [identity.public_key for identity in self.ids]
        self.genesis = Genesis(issuer=keys[0], root=keys[0], witnesses=(keys[0],), f=0)
        self.networks, self.ledgers, self.workers, self.blamed = [], [], [], []

    async def node(self, *, lie=None, share=1.0, serves=True, groups=None):
        """One more node; its peer id."""
        number = len(self.networks)
        network = self.hub.add(self.ids[number])
        settings = LedgerSettings(sync_seconds=1, witness=number == 0)
        path = self.folder / f"{number}.db"
        ledger = await open_ledger(
            network, self.ids[number], self.genesis, path, settings, nursery=self.nursery, in_thread=False
        )
        worker = Worker(network, quote=QUOTE, seller=ledger.seller, device=DEVICE)
        await self.nursery.start(worker.run)
        self.networks.append(network)
        self.ledgers.append(ledger)
        self.workers.append(worker)
        if serves:
            await trio.to_thread.run_sync(partial(self._serve, worker, lie, share, groups))
            offer = ModelOffer(
                self.manifest.model_id,
                bitmap(worker.indices(self.manifest.model_id)),
                QUOTE.number,
                QUOTE.microcredits_per_tflop,
                QUOTE.microcredits_per_kv_unit,
            )
            network.directory.update(lambda advert: msgspec.structs.replace(advert, models=(offer,)))
        return network.peer_id

    def _serve(self, worker, lie, share, groups):
        for shard in self.manifest.expert_shards():
            if groups is not None and shard.group not in groups:
                continue
            honest = ExpertShard(self.manifest, shard, self.store, RuntimeOptions(device="cpu", threads=1))
            made = honest
            if lie is not None:
                made = LyingShard(honest, self.store, self.manifest, shard, lie, share, self.seed)
            worker.load(plan_of(self.manifest, shard), made)

    async def caller(self, number=0, *, share, probes=False, file=None, store=None, fetch=None, paid=True, seed=0):
        """A caller at a node, which holds the model's files; its audits are seeded."""
        network, ledger = self.networks[number], self.ledgers[number]
        if paid and number == 0:
            await ledger.grant(self.ids[0].public_key, 100_000_000)
        trust = Trust(file)
        rules = Rules(share, self.folder / f"evidence-{number}")

        def audits(purse, replicas):
            return Auditor(
                network,
                purse,
                replicas,
                self.workers[number],
                Judging(store or self.store),
                trust,
                rules,
                notary=ledger.buyer if paid else None,
                fetch=fetch,
                blame=lambda peer, fault, why: self.blamed.append((number, peer, fault, why)),
                random=Random(number + 3 + 100 * seed),
            )

        caller = Caller(
            network,
            worker=self.workers[number],
            buyer=ledger.buyer if paid else None,
            random=Random(number + 5 + 100 * seed),
            audits=audits,
        )
        if not probes:
            trust.is_probed = lambda *key: True
        await self.nursery.start(caller.run)
        return caller

    async def close(self):
        for ledger in self.ledgers:
            await ledger.aclose()


@asynccontextmanager
async def trust_swarm(folder, store, manifest, **options):
    async with trio.open_nursery() as nursery:
        made = TrustSwarm(nursery, folder, store, manifest, **options)
        try:
            yield made
            await made.close()
        finally:
            nursery.cancel_scope.cancel()


class Routing:
    """As :class:`dmoe.layers.Routing`."""

    def __init__(self, experts=None, weights=None):
        self.experts, self.weights = experts, weights


def routing(manifest, count, random):
    """A random choice of the router."""
    if manifest.architecture.router.kind == "all":
        return Routing()
    k, experts = manifest.architecture.router.top_k, manifest.experts_per_layer
    chosen = np.stack([random.permutation(experts)[:k] for _ in range(count)]).astype(np.int32)
    weights = random.random((count, k)).astype(np.float32)
    return Routing(chosen, weights / weights.sum(axis=1, keepdims=True))


async def calls(caller, manifest, count, *, rows=1, seed=0, until=lambda: False, privacy=OPEN):
    """So many passes over all layers with random rows; how many there were until ``until``."""
    random = np.random.default_rng(seed)
    session = caller.session(manifest, privacy)
    for number in range(count):
        if until():
            return number
        for layer in manifest.architecture.sparse_layers:
            h = random.standard_normal((rows, manifest.architecture.hidden)).astype(np.float32)
            await session.run(layer, h, routing(manifest, rows, random))
    return count
