"""A swarm of whole daemons for the fault suite and the soak: nodes that ask, nodes that serve, a tiny random model.

Not a test. Owns how such a swarm is set up, how it is asked, what is counted of its money. Each scenario says in its
own words what it injected, what the user saw and what was lost (:func:`tell`).

Invariants:
1. The first node is issuer and only witness; it publishes the model. Every orchestrator gets :data:`GRANT`.
2. :meth:`Rig.check_money` leaves nothing open: every worker has claimed what it was promised (but for a rest below the
   network's smallest claim), all ledgers agree, and nothing was lost or made.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from config.errors import LocalError, RiosError
from node.rig import NodeProcess, Swarm, rios, wait_for
from tests.ports import free_port
from tests.unit.dmoe.model_kit import write_gguf

MODEL = "tiny"
GRANT = 10_000_000_000
SECONDS_MAX = 60.0
"""No question may take longer, whatever fails."""
PRICE = 100_000_000
LENT_MAX = 110_000
"""Microcredits that a worker may be owed: what it lends, what it tolerates unpaid, and calls in flight."""
FAST = {
    "ledger.microcredits_per_tflop": PRICE,
    "ledger.sync_seconds": 1,
    "p2p.advert_seconds": 5,
    "dmoe.threads": 1,
    "dmoe.call_timeout_ms": 10_000,
}
"""Settings of every node: what takes its time in the field happens within seconds here."""
PLAIN = (sys.executable, str(Path(__file__).with_name("plain_node.py")))
"""What starts a node that does not hedge."""
LEAVING = (sys.executable, str(Path(__file__).with_name("leaving_node.py")))
"""What starts a node that a signal hits in a call; arguments follow."""


@dataclass(frozen=True)
class Place:
    """Where a node runs: what its command begins with, and its address there."""

    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"


class Rig:
    """The swarm: ``orchestrators`` (the first is issuer, witness and publisher) and ``workers``."""

    def __init__(self, swarm: Swarm, *, replicas: int, mode: str) -> None:
        self.swarm = swarm
        self.replicas = replicas
        self.mode = mode
        self.model = ""
        self.orchestrators: list[NodeProcess] = []
        self.workers: list[NodeProcess] = []
        self.keys: dict[str, str] = {}

    @property
    def first(self) -> NodeProcess:
        """Issuer, witness, publisher."""
        return self.orchestrators[0]

    @property
    def live(self) -> list[NodeProcess]:
        """Workers whose process runs."""
        return [worker for worker in self.workers if worker.alive]

    def url(self, node: NodeProcess) -> str:
        """Its gateway."""
        return str(node.ask("status")["gateway"]["url"])

    def client(self, node: NodeProcess | None = None, *, key: str = "") -> openai.OpenAI:
        """The real client library at a gateway, with the user's key or another."""
        node = node or self.first
        url, key = f"{self.url(node)}/v1", key or self.keys[node.name]
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=SECONDS_MAX)

    def ask(
        self,
        node: NodeProcess | None = None,
        *,
        tokens: int = 80,
        on_piece: Callable[[int], None] = lambda count: None,
        **more: Any,
    ) -> tuple[str, Mapping[str, Any]]:
        """An answer of exactly ``tokens`` tokens, streamed over the control socket, and who computed it."""
        question = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "What is it?"}],
            "temperature": 0,
            "max_tokens": tokens,
            "min_tokens": tokens,
            **more,
        }
        for count, (kind, value) in enumerate((node or self.first).request("chat", **question), 1):
            if kind == "result":
                return str(value["text"]), value
            on_piece(count)
        raise AssertionError("an answer without an end")

    def reference(self, tokens: int = 80, route: str = "") -> str:
        """What the first node answers alone, in one process without a network."""
        route = route or "local"
        told = rios(
            self.first, "chat", "--local", "--route", route, "--model", MODEL, "--temperature", "0",
            "--min-tokens", str(tokens), "--max-tokens", str(tokens), "--json", "What is it?",
        )  # fmt: skip
        return str(json.loads(told)["text"])

    def add_orchestrator(self, route: str, place: Place = Place(), **settings: Any) -> NodeProcess:
        """Make the folder and key of a node that asks; the first one founds the network."""
        first = not self.orchestrators
        asks = {"dmoe.serve": False, "dmoe.route": route, "dmoe.orchestrate": (MODEL,), "ledger.witness": first}
        edge = {"gateway.enabled": True, "gateway.port": 0}
        joins = ("--new-network",) if first else ("--genesis", str(self.first.data / "genesis.json"))
        node = self._add(f"orchestrator-{len(self.orchestrators)}", place, {**asks, **edge, **settings}, joins)
        self.orchestrators.append(node)
        return node

    def add_worker(self, name: str, place: Place = Place(), **settings: Any) -> NodeProcess:
        """Make the folder and key of a node that serves."""
        node = self._add(name, place, settings, ("--genesis", str(self.first.data / "genesis.json")))
        self.workers.append(node)
        return node

    def _add(self, name: str, place: Place, settings: Mapping[str, Any], init: tuple[str, ...]) -> NodeProcess:
        known = self.orchestrators[:1]
        node = self.swarm.add(
            name,
            {
                **FAST,
                "p2p.listen": (f"/ip4/{place.address}/tcp/{free_port()}",),  # found again after a restart
                "p2p.mdns": "off",
                "p2p.seeds": tuple(node.status["network"]["addresses"][0] for node in known),
                "dmoe.publishers": tuple(node.peer_id for node in known),
                **settings,
            },
            init,
        )
        node.prefix = place.prefix
        return node

    def start(self, *nodes: NodeProcess) -> None:
        """Start nodes and wait until they answer."""
        self.swarm.start(*nodes)

    def counts(self, node: NodeProcess | None = None) -> dict[str, int]:
        """Shard id -> replicas, of the kinds deployed but the trunk, as a node sees them."""
        (model,) = [each for each in (node or self.first).ask("model.list") if each["id"] == self.model]
        return {shard["id"]: shard["replicas"] for shard in model["detail"] if shard["kind"] != "trunk"}

    def wait_replicas(self, replicas: int = 0, seconds: float = 60.0) -> None:
        """Until every shard has so many (default: as deployed, or as many as there are workers)."""
        wanted = replicas or min(self.replicas, len(self.live))

        def is_ready(node: NodeProcess) -> bool:
            try:
                return bool(node.ask("model.health", model=self.model)["ready"])
            except RiosError as error:
                if error.code != "not_found":  # it has not heard of the model yet
                    raise
                return False

        def there() -> bool:
            if not all(map(is_ready, self.orchestrators)):
                return False
            return all(self.counts(node) and min(self.counts(node).values()) >= wanted for node in self.orchestrators)

        wait_for(there, f"{wanted} replicas of every shard", seconds)

    def rows(self, node: NodeProcess) -> int:
        """Rows it computed since its start."""
        return int(node.ask("status")["work"]["expert_rows"])

    def held(self, node: NodeProcess) -> Any:
        """The shards it holds."""
        return node.ask("model.holdings", model=self.model)["shards"]

    def fetched(self, node: NodeProcess) -> int:
        """Bytes it fetched since its start."""
        return int(node.ask("model.progress")["bytes_fetched"])

    def shard_file(self, node: NodeProcess, number: int) -> Path:
        """The file of one of its expert shards."""
        manifest = json.loads((node.data / "models" / self.model / "manifest.json").read_text())
        shard = [shard for shard in manifest["shards"] if shard["kind"] == "expert"][number]
        return node.data / "models" / self.model / shard["files"][0]["path"]

    def answer(self, node: NodeProcess | None = None) -> str:
        """The answer, or nothing if there was an error."""
        with suppress(RiosError):
            return self.ask(node)[0]
        return ""

    def check_money(self) -> dict[str, int]:
        """Settle everything and check every ledger. All workers must be alive. Returns totals in microcredits."""
        nodes = [*self.orchestrators, *self.workers]
        reports: list[Any] = []

        step = json.loads((self.first.data / "genesis.json").read_text())["min_claim_step"]

        def owed(nodes: Sequence[NodeProcess]) -> list[Any]:
            """Channels with vouchers that are worth a claim."""
            return [each for each in self._channels(nodes, "sell") if each["promised"] >= each["paid"] + step]

        def settled() -> bool:
            for worker in self.workers:
                if owed([worker]):
                    worker.ask("ledger.settle")  # perhaps once more: the last voucher comes after the last answer
            if owed(self.workers) or len({node.ask("status")["ledger"]["entries"] for node in nodes}) > 1:
                return False
            reports[:] = [node.ask("ledger.verify") for node in nodes]  # every signature again: not at every look
            return len({report["digest"] for report in reports}) == 1

        try:
            wait_for(settled, "all ledgers to agree and every voucher to be paid", 240)
        except LocalError as error:
            digests = {node.name: report["digest"][:8] for node, report in zip(nodes, reports, strict=False)}
            raise AssertionError(f"ledgers {digests}, not paid {owed(self.workers)}") from error
        assert all(report["verified"] and report["sum_ok"] for report in reports)
        bought = {each["channel"]: each for each in self._channels(self.orchestrators, "buy")}
        sold = self._channels(self.workers, "sell")
        for each in sold:
            assert each["paid"] <= bought[each["channel"]]["promised"] <= each["lock"], each
            assert not each["stopped"], each
            assert each["earned"] - each["paid"] <= LENT_MAX + step, f"nobody works for long without pay: {each}"
        balances = reports[0]["balances"]
        assert sum(balances.values()) + reports[0]["locked"] == GRANT * len(self.orchestrators)
        earned = {worker.peer_id: balances.get(worker.peer_id, 0) for worker in self.workers}
        paid = sum(each["paid"] for each in sold)
        assert sum(earned.values()) == paid
        return {"paid": paid, "locked": reports[0]["locked"], "channels": len(sold)}

    def _channels(self, nodes: Sequence[NodeProcess], side: str) -> list[Any]:
        return [each for node in nodes for each in node.ask("ledger.channels") if each["side"] == side]


@contextmanager
def swarm_of(
    folder: Path,
    *,
    workers: int = 2,
    replicas: int = 2,
    mode: str = "experts",
    routes: Sequence[str] = ("experts",),
    places: Sequence[Place] = (),
    settings: Mapping[str, Any] | None = None,
    kind: str = "Q4_1",
    prefixes: Sequence[tuple[str, ...]] = (),
    layers_per_shard: int = 1,
    asks_with: tuple[str, ...] = (),
    grant: bool = True,
) -> Iterator[Rig]:
    """A running swarm that holds the model: one orchestrator for each of ``routes``, then the workers. ``places`` are
    those of the nodes in this order (default: loopback). ``kind``: of the model's weights. ``prefixes``: what the
    workers' commands begin with. ``asks_with`` starts the orchestrators' commands; without ``grant`` they have no
    money."""
    places = [*places, *[Place()] * (len(routes) + workers - len(places))]
    with Swarm(folder / "swarm") as swarm:
        rig = Rig(swarm, replicas=replicas, mode=mode)
        rig.add_orchestrator(routes[0], places[0], **(settings or {}))
        gguf = write_gguf(folder / "tiny.gguf", kind=kind)
        cut = ("--layers-per-shard", str(layers_per_shard))
        rig.model = json.loads(rios(rig.first, "model", "import", str(gguf), "--name", MODEL, *cut, "--json"))[
            "model_id"
        ]
        rig.first.prefix += asks_with
        rig.start(rig.first)
        for route, place in zip(routes[1:], places[1:], strict=False):
            rig.add_orchestrator(route, place, **(settings or {})).prefix += asks_with
        rig.start(*rig.orchestrators[1:])
        for number, place in enumerate(places[len(routes) :]):
            rig.add_worker(f"worker-{number}", place, **(settings or {}))
        for worker, prefix in zip(rig.workers, prefixes, strict=False):
            worker.prefix += prefix
        rig.start(*rig.workers)
        for node in rig.orchestrators:
            created = rios(node, "gateway", "key", "create", "--user", "u", "--json")
            rig.keys[node.name] = json.loads(created)["secret"]
            rios(node, "gateway", "user", "credit", "u", "1000000")
            if grant:
                rig.first.ask("ledger.grant", to=node.peer_id, microcredits=GRANT)
        rig.first.ask("model.deploy", model=rig.model, replicas=replicas, mode=mode)
        rig.wait_replicas(min(replicas, workers))
        yield rig


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A tmpfs of ``size`` at ``folder``; skips where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def tell(injected: str, seen: str, lost: str = "nothing") -> None:
    """What every scenario says (``-s`` shows it)."""
    print(f"\ninjected: {injected}\n  the user saw: {seen}\n  lost: {lost}")
