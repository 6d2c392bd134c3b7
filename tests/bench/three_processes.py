"""Three node processes on loopback that answer with the bundled model, by experts or by stages; not a benchmark itself.

The orchestrator publishes the model and is pinned to run the first stage; two workers hold all experts and stages. Each
The orchestrator publishes the model and is pinned to run the first stage; two workers hold all experts and stages. Each
off, so that what is measured is the way of a token.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from config.load import render_file
from dmoe.core.manifest import Manifest
from node.rig import NodeProcess, Swarm, wait_for
from p2p import keyfile

WORKERS = 2
GRANT = 10_000_000_000
PLACED_SECONDS_MAX = 240


class ThreeProcesses:
    """The processes. :meth:`close` ends them."""

    def __init__(self, manifest: Manifest, folder: Path, threads: int = 1) -> None:
        """``folder``: the model's folder in some store. ``threads``: of each node."""
        self.manifest = manifest
        self.swarm = Swarm()
        try:
            self._start(folder, threads)
        except BaseException:
            self.swarm.close()
            raise

    def _start(self, folder: Path, threads: int) -> None:
        shared = {
            "dmoe.threads": threads,
            "dmoe.drafts_max": 0,
            "dmoe.prefix_cache_tokens": 0,
            "dmoe.publishers": ("*",),
            "dmoe.replicas": WORKERS,
            "ledger.sync_seconds": 1,
            "p2p.advert_seconds": 5,
            "p2p.listen": ("/ip4/127.0.0.1/tcp/0",),
            "node.data_dir": "data",
        }
        mine = {**shared, "dmoe.serve": False, "ledger.witness": True, "dmoe.orchestrate": (self.manifest.model_id,)}
        self.orchestrator = self.swarm.add("orchestrator", mine, ("--new-network",))
        shutil.copytree(folder, self.orchestrator.data / "models" / self.manifest.model_id)
        genesis = str(self.orchestrator.data / "genesis.json")
        seeds = self.swarm.folder / "seeds.txt"
        self.workers = [
            self.swarm.add(f"worker-{n}", {**shared, "p2p.seeds_file": str(seeds)}, ("--genesis", genesis))
            for n in range(WORKERS)
        ]
        where = ["here", *(_peer_id(worker) for worker in self.workers)]
        spans = [f"{first}-{last}" for first, last in (stage.layers for stage in self.manifest.stages)]
        pins = tuple(f"{span}={where[n % len(where)]}" for n, span in enumerate(spans))
        self.orchestrator.config_file.write_text(render_file({**mine, "dmoe.plan_pins": pins}))
        self.swarm.start(self.orchestrator)
        seeds.write_text(self.orchestrator.status["network"]["addresses"][0] + "\n")
        self.swarm.start(*self.workers)
        issuer = str(json.loads(Path(genesis).read_text())["issuer"])
        self.orchestrator.ask("ledger.grant", to=issuer, microcredits=GRANT)
        self.orchestrator.ask("model.deploy", model=self.manifest.model_id, replicas=WORKERS, mode="both")
        wait_for(self._is_placed, "experts and stages to be placed", PLACED_SECONDS_MAX)

    def _is_placed(self) -> bool:
        rows = [row for row in self.orchestrator.ask("model.list") if row["id"] == self.manifest.model_id]
        shards = [shard for shard in rows[0]["detail"] if shard["kind"] != "trunk"] if rows else []
        return bool(shards) and min(shard["replicas"] for shard in shards) >= WORKERS

    def ask(self, prompt: str, tokens: int, route: str) -> Any:
        """A greedy answer of exactly so many tokens."""
        return self.orchestrator.ask(
            "chat",
            model=self.manifest.model_id,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            min_tokens=tokens,
            max_tokens=tokens,
            route=route,
        )

    def close(self) -> None:
        """End the nodes."""
        self.swarm.close()


def _peer_id(node: NodeProcess) -> str:
    """Known before it starts."""
    return str(keyfile.load(node.data / "identity.key", passphrase="").peer_id)
