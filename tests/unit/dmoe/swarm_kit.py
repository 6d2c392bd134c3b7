"""A small signed model, shards computed by numpy (fakes: the real ones need ONNX Runtime and weights), and a ledger
that only counts (a fake of both sides of the billing)."""

from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Event

import numpy as np

from config.errors import RemoteError
from dmoe.core.manifest import Architecture, Golden, Manifest, ModelFile, Router, Shard, Source
from dmoe.ports import Quote
from dmoe.worker import Worker, plan_of
from p2p.core.advert import ModelOffer, bitmap
from p2p.core.identity import Identity

HIDDEN, LAYERS, GROUPS = 16, 4, 4
QUOTE = Quote(7, 1_000_000, 0)
PUBLISHER = Identity.from_seed(b"p" * 32)


@dataclass(frozen=True)
class Routing:
    """As :class:`dmoe.layers.Routing`."""

    experts: object = None
    weights: object = None


ALL = Routing()


def content(shard_id: str) -> bytes:
    """The bytes of a shard's file: a bit more than one chunk."""
    return sha256(shard_id.encode()).digest() * (33 * 1024)


def model_file(path: str, data: bytes) -> ModelFile:
    chunks = tuple(sha256(data[i : i + (1 << 20)]).hexdigest() for i in range(0, len(data), 1 << 20))
    return ModelFile(path=path, sha256=sha256(data).hexdigest(), size_bytes=len(data), chunks=chunks)


def make_manifest(*, top_k: int = 0, experts_per_group: int = 1, name: str = "tiny", wire_dtype="fp16") -> Manifest:
    """4 layers, 4 sum groups, shards of 2 layers x 1 group, and a trunk."""
    count = GROUPS * experts_per_group
    groups = tuple(tuple(range(g * experts_per_group, (g + 1) * experts_per_group)) for g in range(GROUPS))
    router = Router(kind="softmax_topk" if top_k else "all", experts=count, top_k=top_k or count)
    architecture = Architecture(
        family="llama",
        hidden=HIDDEN,
        layers=LAYERS,
        heads=2,
        kv_heads=1,
        head_dim=8,
        vocab=32,
        intermediate=8,
        rope_theta=1e4,
        rope_interleaved=False,
        norm_eps=1e-5,
        tie_embeddings=True,
        context=64,
        router=router,
    )
    shards = []
    for first in range(0, LAYERS, 2):
        for group, members in enumerate(groups):
            shard_id = f"expert-l{first}-{first + 1}-g{group}"
            shards.append(
                Shard(
                    id=shard_id,
                    kind="expert",
                    layers=(first, first + 1),
                    group=group,
                    experts=members,
                    files=(model_file(f"{shard_id}.bin", content(shard_id)),),
                    params=1,
                    flops_per_row=1500 * len(members),
                    ram_bytes=1 << 20,
                    dtype="fp32",
                )
            )
    trunk = model_file("trunk.bin", content("trunk"))
    shards.append(
        Shard(
            id="trunk",
            kind="trunk",
            layers=(0, LAYERS - 1),
            group=-1,
            experts=(),
            files=(trunk,),
            params=1,
            flops_per_row=1,
            ram_bytes=1 << 20,
            dtype="fp32",
        )
    )
    manifest = Manifest(
        name=name,
        licence="MIT",
        source=Source(name="made", sha256="0" * 64),
        architecture=architecture,
        quantisation="fp32",
        wire_dtype=wire_dtype,
        sum_groups=groups,
        shards=tuple(shards),
        tokenizer=model_file("tokenizer.json", b"{}"),
        chat_template="",
        stop_tokens=(),
        golden=Golden(prompt=(1,), tokens=(1,), logits=(0.0,), tolerance=1.0),
        publisher=PUBLISHER.peer_id,
    ).sign(PUBLISHER)
    return Manifest.parse(manifest.to_json())


class FakeShard:
    """Experts that are small random matrices drawn from (layer, expert)."""

    ram_bytes = 1 << 20

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.closed = False
        self.batches: list[int] = []
        self.fault: Exception | None = None
        self.gate = Event()
        """Closed (cleared), it holds up what runs in a thread."""
        self.gate.set()
        layers = range(shard.layers[0], shard.layers[1] + 1)
        self.weights = {
            (layer, expert): np.random.default_rng(1000 * layer + expert).normal(size=HIDDEN).astype(np.float32)
            for layer in layers
            for expert in shard.experts
        }

    def partial(self, layer, h, experts, weights):
        assert not self.closed
        assert h.dtype == np.float32
        if self.fault:
            raise self.fault
        assert self.gate.wait(20)
        self.batches.append(len(h))
        out = np.zeros_like(h)
        for expert in self.shard.experts:
            y = np.tanh(h * self.weights[layer, expert]) * np.float32(3)
            if experts is None:
                out += y
            else:
                scale = np.where(experts == expert, weights, np.float32(0)).sum(axis=1, dtype=np.float32)
                out += y * scale[:, None]
        return out

    def close(self):
        self.closed = True


def serve_shards(worker: Worker, network, manifest: Manifest, indices) -> dict[int, FakeShard]:
    """Load shards by manifest index and advertise them."""
    made = {}
    for index in indices:
        shard = manifest.shards[index]
        made[index] = FakeShard(shard)
        worker.load(plan_of(manifest, shard), made[index])
    advertise(worker, network, manifest)
    return made


def advertise(worker: Worker, network, manifest: Manifest) -> None:
    import msgspec

    quote = worker.quote
    offer = ModelOffer(
        manifest.model_id,
        bitmap(worker.indices(manifest.model_id)),
        quote.number,
        quote.microcredits_per_tflop,
        quote.microcredits_per_kv_unit,
    )
    network.directory.update(lambda advert: msgspec.structs.replace(advert, models=(offer,)))


@dataclass
class CountingSeller:
    """Admits the channels it knows; counts what was served."""

    channels: set[bytes] = field(default_factory=set)
    kflop: Counter = field(default_factory=Counter)
    leaves: list[bytes] = field(default_factory=list)

    async def credited(self, channel, seconds):
        pass

    def admit(self, payer, channel, quote):
        if channel not in self.channels:
            raise RemoteError("payment_required", "unknown channel", "open a channel")

    def served(self, payer, channel, quote, kflop, leaf):
        self.kflop[payer] += kflop
        self.leaves.append(leaf)


@dataclass
class CountingBuyer:
    """Opens channels at sellers it can reach directly; refuses the workers in ``poor``."""

    sellers: dict = field(default_factory=dict)
    open: dict = field(default_factory=dict)
    opened: list = field(default_factory=list)
    poor: set = field(default_factory=set)
    kflop: Counter = field(default_factory=Counter)
    given_up: Counter = field(default_factory=Counter)
    leaves: dict = field(default_factory=dict)

    def channel(self, worker):
        return self.open.get(worker)

    async def open_channel(self, worker):
        if worker in self.poor:
            raise RemoteError("payment_required", "the account has too little")
        channel = sha256(f"{worker}{len(self.opened)}".encode()).digest()
        self.opened.append(worker)
        self.open[worker] = channel
        self.sellers[worker].channels.add(channel)
        return channel

    def lost(self, worker, channel, quote, kflop):
        self.given_up[worker] += kflop

    def used(self, worker, channel, quote, kflop, leaf):
        self.kflop[worker] += kflop
        self.leaves.setdefault(worker, []).append(leaf)
