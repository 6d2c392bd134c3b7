"""The nodes of the expert benchmark: each a process with the real network, ledger and worker or caller.

Run as a program it is a server: it founds the ledger's network (the first one) or joins it, loads its experts, grants
the caller credits, prints its address and serves until stdin closes. Besides ``expert.run`` it answers three methods of
the benchmark's own: ``bench.floor`` (bare ONNX Runtime calls in this process), ``bench.work`` (those of a routed layer)
and ``bench.cpu``.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from config.settings import LedgerSettings, P2pSettings
from dmoe.core.manifest import Manifest
from dmoe.ports import Quote
from dmoe.worker import Worker, plan_of
from ledger.core.genesis import Genesis
from ledger.ledger import Ledger, open_ledger
from p2p.core.advert import Advert, ModelOffer, bitmap
from p2p.core.identity import Identity
from p2p.face import Call, Reply
from p2p.network import PeerNetwork, open_network
from tests.bench.expert_job import EXPERTS, GROUPS, FfnShard, floor, manifest, session

PRICE = LedgerSettings().microcredits_per_tflop
QUOTE = Quote(PRICE, PRICE, 0)
CREDITS = 10**12
CLIENT = Identity.from_seed(b"c" * 32)
THREADS = len(os.sched_getaffinity(0))


def server_identity(number: int) -> Identity:
    """Servers have fixed keys, so that every process can compute the genesis."""
    return Identity.from_seed(bytes([number + 1]) * 32)


def genesis() -> Genesis:
    """The first server issues and witnesses."""
    key = server_identity(0).public_key
    return Genesis(issuer=key, root=key, witnesses=(key,))


def manifests() -> dict[str, Manifest]:
    """8 experts on the first server, over both wire dtypes; 16 on two, of which each row chooses 4."""
    return {
        "f16": manifest(EXPERTS, 1),
        "f32": manifest(EXPERTS, 1, wire_dtype="fp32"),
        "moe": manifest(2 * EXPERTS, 4),
        "moe_f32": manifest(2 * EXPERTS, 4, wire_dtype="fp32"),
    }


@dataclass(frozen=True)
class Member:
    """A process of the benchmark on the network."""

    network: PeerNetwork
    ledger: Ledger
    nursery: trio.Nursery


@asynccontextmanager
async def member(identity: Identity, seeds: tuple[str, ...]) -> AsyncIterator[Member]:
    """Network and ledger of one process, wired as the daemon does it."""
    settings = LedgerSettings(witness=identity == server_identity(0), sync_seconds=1)
    p2p = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=seeds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        advert = Advert(peer_id=identity.peer_id, seq=0, expires_ms=0, net=genesis().net)
        async with (
            open_network(identity, p2p, data_dir=path / "network", version="bench", advert=advert) as network,
            trio.open_nursery() as nursery,
        ):
            ledger = await open_ledger(network, identity, genesis(), path / "ledger.db", settings, nursery=nursery)
            yield Member(network, ledger, nursery)
            await ledger.aclose()
            nursery.cancel_scope.cancel()


class Server:
    """8 experts of every model that has some here."""

    def __init__(self, number: int, here: Member) -> None:
        self._sessions = [session(number * EXPERTS + n) for n in range(EXPERTS)]
        self.worker = Worker(here.network, quote=QUOTE, seller=here.ledger.seller, threads=THREADS)
        offers = []
        for name, model in manifests().items():
            first = number * EXPERTS if name.startswith("moe") else 0
            if first or not number or name.startswith("moe"):
                offers.append(self._load(model, first))
        here.network.directory.update(lambda advert: msgspec.structs.replace(advert, models=tuple(offers)))
        here.network.serve("bench.floor", self._floor)
        here.network.serve("bench.work", self._work)
        here.network.serve("bench.cpu", self._cpu)

    def _load(self, model: Manifest, first: int) -> ModelOffer:
        mine = {first + n: made for n, made in enumerate(self._sessions)}
        for group in range(GROUPS):
            shard = model.expert_shard(0, group)
            if set(shard.experts) <= mine.keys():
                self.worker.load(plan_of(model, shard), FfnShard(shard.experts, mine))
        indices = self.worker.indices(model.model_id)
        return ModelOffer(model.model_id, bitmap(indices), QUOTE.number, QUOTE.microcredits_per_tflop, 0)

    async def _floor(self, call: Call) -> Reply:
        rows, calls, one = call.header["rows"], call.header["calls"], call.header["one"]
        return Reply({"seconds": floor(self._sessions[:1] if one else self._sessions, rows, calls)})

    async def _work(self, call: Call) -> Reply:
        """The rows of a routed layer, expert after expert."""
        counts = [(n, rows) for n, rows in enumerate(call.header["rows"]) if rows]
        return Reply({"seconds": [floor([self._sessions[n % EXPERTS]], rows, 1)[0] for n, rows in counts]})

    async def _cpu(self, _call: Call) -> Reply:
        return Reply({"seconds": time.process_time(), "worker": self.worker.statistics()})


async def serve(number: int, seeds: tuple[str, ...]) -> None:
    """Serve until stdin closes."""
    async with member(server_identity(number), seeds) as here:
        server = Server(number, here)
        await here.nursery.start(server.worker.run)
        if not number:
            await here.ledger.grant(CLIENT.public_key, CREDITS)
        gc.collect()
        gc.freeze()  # as the daemon does
        print(here.network.addresses[0], flush=True)
        stdin = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
        while await stdin.receive_some(4096):
            pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--seed", action="append", default=[])
    arguments = parser.parse_args()
    trio.run(serve, arguments.number, tuple(arguments.seed))
