"""Two node processes that compute the experts of some models, and a caller in this process; not a benchmark itself.

The caller is a network node without a worker: it has the trunks, every expert is computed by the processes, and nothing
is paid. Rows travel as fp32, so that what differs from a reference is the computation.
"""

import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from msgspec.structs import replace

from config.settings import P2pSettings
from dmoe.caller import Caller
from dmoe.core.manifest import Manifest
from dmoe.layers import Ends, ModelRunner
from dmoe.runtime import RuntimeOptions, open_files
from dmoe.segment import Pieces, PieceSegment
from dmoe.store import ModelStore
from node.rig import NodeProcess, Swarm, wait_for
from p2p.core.advert import Advert
from p2p.core.identity import Identity
from p2p.network import open_network

OPTIONS = RuntimeOptions(device="cpu", threads=1)
PUBLISHER = Identity.from_seed(b"p" * 32)
WORKERS = 2
PLACED_SECONDS_MAX = 60.0


def with_fp32_wire(store: ModelStore, manifest: Manifest) -> Manifest:
    """The same model once more in the store, its rows unrounded on the wire."""
    exact = replace(manifest, wire_dtype="fp32", publisher=PUBLISHER.peer_id, signature="").sign(PUBLISHER)
    folder = Path(tempfile.mkdtemp(dir=store.root, prefix=".exact-"))
    shutil.copytree(store.root / manifest.model_id, folder, dirs_exist_ok=True)
    store.adopt(folder, exact)
    return exact


class ParitySwarm:
    """The processes: both hold all experts of all ``models``, so that every layer is shared between them."""

    def __init__(self, folder: Path, store: ModelStore, models: Sequence[Manifest]) -> None:
        """``folder``: where the nodes live; ``store``: where the models are."""
        self._store = store
        self._models = models
        self._folder = folder
        self.swarm = Swarm(folder / "swarm")
        try:
            self._start()
        except BaseException:
            self.swarm.close()
            raise

    def _start(self) -> None:
        shared = {"p2p.mdns": "off", "p2p.advert_seconds": 1, "dmoe.publishers": ("*",), "dmoe.threads": 1}
        first = self.swarm.add("worker-0", shared)
        for manifest in self._models:
            shutil.copytree(self._store.root / manifest.model_id, first.data / "models" / manifest.model_id)
        self.swarm.start(first)
        self.seeds = tuple(first.status["network"]["addresses"][:1])
        others = [self.swarm.add(f"worker-{n}", {**shared, "p2p.seeds": self.seeds}) for n in range(1, WORKERS)]
        self.swarm.start(*others)
        self.workers = [first, *others]
        for manifest in self._models:
            first.ask("model.deploy", model=manifest.model_id, replicas=WORKERS)
        wait_for(lambda: self._is_placed(first), "all experts at both workers", PLACED_SECONDS_MAX)

    def _is_placed(self, node: NodeProcess) -> bool:
        rows = {row["id"]: row for row in node.ask("model.list")}
        shards = [shard for model in self._models for shard in rows[model.model_id]["detail"]]
        return all(shard["replicas"] >= WORKERS for shard in shards if shard["kind"] == "expert")

    @asynccontextmanager
    async def caller(self) -> AsyncIterator[Caller]:
        """A node in this process that knows the workers."""
        identity = Identity.from_seed(b"c" * 32)
        settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=self.seeds, mdns="off")
        advert = Advert(peer_id=identity.peer_id, seq=0, expires_ms=0)
        data = self._folder / "caller"
        async with (
            open_network(identity, settings, data_dir=data, version="parity", advert=advert) as network,
            trio.open_nursery() as nursery,
        ):
            caller = Caller(network)
            await nursery.start(caller.run)
            with trio.fail_after(PLACED_SECONDS_MAX):
                while not all(self._is_known(caller, manifest) for manifest in self._models):
                    await network.directory.wait_change()
            yield caller
            nursery.cancel_scope.cancel()

    def _is_known(self, caller: Caller, manifest: Manifest) -> bool:
        _, table = caller.table(caller.map(manifest))
        needs = [need for layer in table.needs for need in layer]
        return all(len(need.replicas) == WORKERS for need in needs)

    def runner(self, caller: Caller, manifest: Manifest) -> ModelRunner:
        """Route ``experts``: the trunk here, every expert at a worker."""
        files = open_files(manifest, self._store, [manifest.trunk])
        session = caller.session(manifest)
        segment = PieceSegment(manifest, Pieces(manifest, files, OPTIONS), session)
        return ModelRunner(manifest, Ends(manifest, files, OPTIONS), [segment], session)

    def close(self) -> None:
        """End the processes."""
        self.swarm.close()
