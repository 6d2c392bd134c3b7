"""Two node processes that compute experts and stages of some models, and a node in this process; not a benchmark.

The node here has the trunks and serves nothing, so every expert and every layer is computed by the processes; nothing
is paid. Rows travel as fp32, so that what differs from a reference is the computation.
"""

import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from msgspec.structs import replace

from config.generation import Route
from config.load import load
from config.paths import Paths
from config.vocabulary import PeerId
from dmoe.core.manifest import Manifest
from dmoe.models import StoredModels, SwarmExperts
from dmoe.runner import Runner
from dmoe.runtime import RuntimeOptions
from dmoe.store import ModelStore
from ledger.keys import EpochKeys
from node.daemon import Node, open_node
from node.rig import NodeProcess, Swarm, wait_for
from p2p import keyfile
from p2p.core.identity import Identity

OPTIONS = RuntimeOptions(device="cpu", threads=1)
PUBLISHER = Identity.from_seed(b"p" * 32)
WORKERS = 2
SHARED = {"p2p.mdns": "off", "p2p.advert_seconds": 1, "dmoe.publishers": ("*",), "dmoe.threads": 1}
PLACED_SECONDS_MAX = 60.0


def with_fp32_wire(store: ModelStore, manifest: Manifest) -> Manifest:
    """The same model once more in the store, its rows unrounded on the wire."""
    exact = replace(manifest, wire_dtype="fp32", publisher=PUBLISHER.peer_id, signature="").sign(PUBLISHER)
    folder = Path(tempfile.mkdtemp(dir=store.root, prefix=".exact-"))
    shutil.copytree(store.root / manifest.model_id, folder, dirs_exist_ok=True)
    store.adopt(folder, exact)
    return exact


class ParitySwarm:
    """The processes: both hold all experts of all ``models`` and all stages."""

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
        first = self.swarm.add("worker-0", SHARED)
        for manifest in self._models:
            shutil.copytree(self._store.root / manifest.model_id, first.data / "models" / manifest.model_id)
        self.swarm.start(first)
        self.seeds = tuple(first.status["network"]["addresses"][:1])
        others = [self.swarm.add(f"worker-{n}", {**SHARED, "p2p.seeds": self.seeds}) for n in range(1, WORKERS)]
        self.swarm.start(*others)
        self.workers = [first, *others]
        for manifest in self._models:
            first.ask("model.deploy", model=manifest.model_id, replicas=WORKERS, mode="both")
        wait_for(lambda: self._is_placed(first), "all experts and stages at both workers", PLACED_SECONDS_MAX)

    def _is_placed(self, node: NodeProcess) -> bool:
        rows = {row["id"]: row for row in node.ask("model.list")}
        shards = [shard for model in self._models for shard in rows[model.model_id]["detail"]]
        return all(shard["replicas"] >= WORKERS for shard in shards if shard["kind"] != "trunk")

    @asynccontextmanager
    async def caller(self) -> AsyncIterator[StoredModels]:
        """The models of a node in this process that knows the workers and serves nothing itself."""
        where = Path(tempfile.mkdtemp(dir=self._folder, prefix="caller-"))
        pins = tuple(f"{layer}-{layer}={self.workers[layer % WORKERS].peer_id}" for layer in range(WORKERS))
        settings = {**SHARED, "p2p.seeds": self.seeds, "dmoe.serve": False, "dmoe.plan_pins": pins}
        made = self.swarm.add(where.name, settings)
        shutil.copytree(self._store.root, made.data / "models", dirs_exist_ok=True)
        paths = Paths(made.config_file, made.data)
        identity = keyfile.load(paths.key, passphrase="")
        keys = EpochKeys(identity, paths.epoch_keys)
        async with open_node(load(made.config_file, {}).settings, paths, identity, keys) as node:
            models = StoredModels(node.store, SwarmExperts(node.caller), OPTIONS, identity.peer_id)
            models.stages = node.stages
            with trio.fail_after(PLACED_SECONDS_MAX):
                while not all(self._is_known(node, manifest) for manifest in self._models):
                    await node.network.directory.wait_change()
            yield models

    def _is_known(self, node: Node, manifest: Manifest) -> bool:
        adverts = [node.network.directory.adverts().get(PeerId(worker.peer_id)) for worker in self.workers]
        offers = [advert.offer(manifest.model_id) for advert in adverts if advert is not None]
        wanted = [manifest.shard_index(shard.id) for shard in (*manifest.expert_shards(), *manifest.stages)]
        known = [offer for offer in offers if offer is not None and all(offer.holds(index) for index in wanted)]
        return len(known) == WORKERS

    async def runner(self, models: StoredModels, manifest: Manifest, route: Route) -> Runner:
        """By ``experts`` or ``stages``: all of them at the workers."""
        (model,) = [model for model in models.models() if model.id == manifest.model_id]
        return await model.runner(route)

    def close(self) -> None:
        """End the processes."""
        self.swarm.close()
