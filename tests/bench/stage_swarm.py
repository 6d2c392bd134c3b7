"""A swarm of node processes that serves the bundled model by stages, for benchmarks: not one itself.

A publisher that only has the files, three hosts that hold every stage, and orchestrators that have but the trunk. Each
orchestrator is pinned to one stage per host. With ``delay_ms`` every connection between two nodes is late by it.
"""

import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmoe.core.manifest import Manifest
from node.rig import NodeProcess, Swarm, wait_for

BENCH = Path(__file__).parent
HOSTS = 3
PLACED_SECONDS_MAX = 240


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class StageSwarm:
    """The processes. :meth:`close` ends them."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        orchestrators: Mapping[str, Mapping[str, Any]],
        *,
        delay_ms: float = 0.0,
        mode: str = "stages",
    ) -> None:
        """``folder``: the model's folder in some store. ``orchestrators``: name -> further settings."""
        self.manifest = manifest
        self.swarm = Swarm()
        self._lines: subprocess.Popen[str] | None = None
        try:
            self._start(folder, orchestrators, delay_ms, mode)
        except BaseException:
            self.close()
            raise

    def _start(self, folder: Path, orchestrators: Mapping[str, Mapping[str, Any]], delay_ms: float, mode: str) -> None:
        names = ["publisher", *(f"host-{n}" for n in range(HOSTS)), *orchestrators]
        self._ports = {name: (free_port(), free_port()) for name in names}
        if delay_ms:
            lines = [f"{front}={back}" for front, back in self._ports.values()]
            command = [sys.executable, str(BENCH / "slow_lines.py"), str(delay_ms), *lines]
            self._lines = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self._lines.stdout is not None
            assert self._lines.stdout.readline() == "up\n"
        publisher = self._add("publisher", delay_ms, {"dmoe.serve": False}, ())
        shutil.copytree(folder, publisher.data / "models" / self.manifest.model_id)
        self.swarm.start(publisher)
        seeds = (self._address("publisher", delay_ms) + f"/p2p/{publisher.peer_id}",)
        self.hosts = [self._add(f"host-{n}", delay_ms, {}, seeds) for n in range(HOSTS)]
        self.swarm.start(*self.hosts)
        publisher.ask("model.deploy", model=self.manifest.model_id, replicas=HOSTS, mode=mode)
        spans = [f"{first}-{last}" for first, last in (stage.layers for stage in self.manifest.stages)]
        pins = tuple(f"{span}={self.hosts[n % HOSTS].peer_id}" for n, span in enumerate(spans))
        self.orchestrators = {
            name: self._add(
                name,
                delay_ms,
                {
                    "dmoe.serve": False,
                    "dmoe.orchestrate": (self.manifest.model_id,),
                    "dmoe.plan_pins": pins,
                    **settings,
                },
                seeds,
            )
            for name, settings in orchestrators.items()
        }
        self.swarm.start(*self.orchestrators.values())
        wait_for(lambda: self._is_placed(publisher), "the stages to be placed", PLACED_SECONDS_MAX)
        for node in self.orchestrators.values():
            wait_for(lambda node=node: self._can_answer(node), "the trunk at the orchestrators", PLACED_SECONDS_MAX)

    def _add(self, name: str, delay_ms: float, settings: Mapping[str, Any], seeds: tuple[str, ...]) -> NodeProcess:
        shared = {
            "p2p.listen": (f"/ip4/127.0.0.1/tcp/{self._ports[name][1]}",),
            "p2p.announce": (self._address(name, delay_ms),),
            "p2p.mdns": "off",
            "p2p.seeds": seeds,
            "p2p.loopback_limits": False,
            "dmoe.publishers": ("*",),
            "dmoe.threads": 1,
            "dmoe.route": "stages",
        }
        return self.swarm.add(name, {**shared, **settings})

    def _address(self, name: str, delay_ms: float) -> str:
        return f"/ip4/127.0.0.1/tcp/{self._ports[name][0 if delay_ms else 1]}"

    def _is_placed(self, node: NodeProcess) -> bool:
        rows = [row for row in node.ask("model.list") if row["id"] == self.manifest.model_id]
        shards = [shard for shard in rows[0]["detail"] if shard["kind"] != "trunk"] if rows else []
        return bool(shards) and min(shard["replicas"] for shard in shards) >= HOSTS

    def _can_answer(self, node: NodeProcess) -> bool:
        models = node.ask("status")["work"]["models"]
        return any(model["id"] == self.manifest.model_id and model["ready"] for model in models)

    def ask(self, name: str, question: str, tokens: int, **more: Any) -> Any:
        """A greedy answer of exactly so many tokens by an orchestrator."""
        asked = {"temperature": 0, "min_tokens": tokens, "max_tokens": tokens, **more}
        messages = [{"role": "user", "content": question}]
        return self.orchestrators[name].ask("chat", model=self.manifest.model_id, messages=messages, **asked)

    def close(self) -> None:
        """End everything."""
        self.swarm.close()
        if self._lines is not None:
            assert self._lines.stdin is not None
            self._lines.stdin.close()
            self._lines.wait(timeout=20)
            assert self._lines.stdout is not None
            self._lines.stdout.close()
