"""Stages at real node processes: the text of one process, whoever computes; experts beside them; deaths on the way.

The publisher of a dense and of a sparse tiny model, two hosts of their stages, and an orchestrator that has but the
trunks.
"""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.rig import NodeProcess, Swarm, rios, wait_for
from tests.unit.dmoe.model_kit import write_gguf

TOKENS, LONG = 60, 200
QUESTION = [{"role": "user", "content": "What is it? What is it? It is what it is."}]


class Rig:
    """The swarm and its two models."""

    def __init__(self, swarm: Swarm, folder: Path) -> None:
        self.swarm = swarm
        shared = {"p2p.advert_seconds": 5, "dmoe.threads": 1, "ledger.microcredits_per_tflop": 1_000_000}
        self.publisher = swarm.add(
            "publisher", {**shared, "dmoe.serve": False, "ledger.witness": True}, ("--new-network",)
        )
        self.models = {
            name: self._import(folder, name, **options)
            for name, options in {"dense": {}, "sparse": {"experts": 4, "seed": 3}}.items()
        }
        swarm.start(self.publisher)
        seeds = tuple(self.publisher.status["network"]["addresses"][:1])
        settings = {**shared, "p2p.seeds": seeds, "dmoe.publishers": (self.publisher.peer_id,)}
        genesis = ("--genesis", str(self.publisher.data / "genesis.json"))
        self.hosts = [swarm.add(f"host-{n}", settings, genesis) for n in (1, 2)]
        wanted = {"dmoe.serve": False, "dmoe.orchestrate": tuple(self.models)}
        self.orchestrator = swarm.add("orchestrator", {**settings, **wanted}, genesis)
        swarm.start(*self.hosts, self.orchestrator)
        self.publisher.ask("ledger.grant", to=self.orchestrator.peer_id, microcredits=1_000_000_000)
        for model in self.models.values():
            self.publisher.ask("model.deploy", model=model, replicas=2, mode="stages")
        wait_for(lambda: all(self.replicas(model) >= 2 for model in self.models.values()), "two replicas a stage", 40)
        wait_for(self.can_answer, "the trunks and money", 20)

    def can_answer(self) -> bool:
        ready = self.orchestrator.ask("status")["work"]["models"]
        return len(ready) == 2 and self.orchestrator.ask("ledger.balance")["balance"] > 0

    def _import(self, folder: Path, name: str, **options: Any) -> str:
        gguf = write_gguf(folder / f"{name}.gguf", **options)
        told = rios(self.publisher, "model", "import", str(gguf), "--name", name, "--layers-per-shard", "1", "--json")
        return str(json.loads(told)["model_id"])

    def replicas(self, model: str) -> int:
        rows = [row for row in self.publisher.ask("model.list") if row["id"] == model]
        return min((s["replicas"] for s in rows[0]["detail"] if s["kind"] == "stage"), default=0) if rows else 0

    def ask(self, model: str, node: NodeProcess | None = None, **more: Any) -> Any:
        asked = {"temperature": 0, "min_tokens": TOKENS, "max_tokens": TOKENS, "route": "stages", **more}
        return (node or self.orchestrator).ask("chat", model=model, messages=QUESTION, **asked)

    def runs(self, node: NodeProcess) -> int:
        return int(node.ask("status")["work"]["stages"]["runs"])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("stages")
    with Swarm(folder / "swarm") as swarm:
        yield Rig(swarm, folder)


def alone(rig: Rig, model: str) -> str:
    """The reference: the same stages, all in one process without a network."""
    told = rios(
        rig.publisher, "chat", "--local", "--route", "stages", "--model", model, "--temperature", "0",
        "--min-tokens", str(TOKENS), "--max-tokens", str(TOKENS), "--json", QUESTION[0]["content"],
    )  # fmt: skip
    return str(json.loads(told)["text"])


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_hosts_give_the_text_of_one_process(rig: Rig, name: str) -> None:
    model = rig.models[name]
    before = [rig.runs(host) for host in rig.hosts]
    answer = rig.ask(model)
    assert answer["text"] == alone(rig, model)
    assert sum(rig.runs(host) for host in rig.hosts) > sum(before)
    layers = {layer for served in answer["serving"].values() for layer in served["layers"]}
    assert layers == {0, 1, 2}
    assert rig.orchestrator.peer_id not in answer["serving"]


def test_several_answers_share_passes_and_keep_their_texts(rig: Rig) -> None:
    model, texts = rig.models["dense"], [""] * 6
    single = rig.ask(model)["text"]

    def one(index: int) -> None:
        texts[index] = rig.ask(model)["text"]

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [single] * 6


def test_work_at_hosts_is_paid_for(rig: Rig) -> None:
    rig.ask(rig.models["dense"])
    channels = rig.orchestrator.ask("ledger.channels")
    spent = {c["peer_id"]: c for c in channels if c["side"] == "buy"}
    assert spent
    for host in rig.hosts:
        if host.peer_id not in spent:
            continue
        ours = spent[host.peer_id]
        wait_for(lambda host=host, ours=ours: _sold(host) >= ours["kflop"] > 0, "the host to have counted", 10)
        assert not ours["stopped"]
        assert _sold(host) == next(
            c["kflop"] for c in rig.orchestrator.ask("ledger.channels") if c["channel"] == ours["channel"]
        )


def _sold(host: NodeProcess) -> int:
    return sum(int(c["kflop"]) for c in host.ask("ledger.channels") if c["side"] == "sell")


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_a_host_that_dies_in_the_middle_changes_no_letter(rig: Rig, name: str) -> None:
    model = rig.models[name]
    # drawn, not the likeliest: texts that repeat themselves are guessed ahead, over before anything can happen to them
    sampled: dict[str, Any] = {"temperature": 1, "seed": 5, "min_tokens": LONG, "max_tokens": LONG}
    before = {host.name: rig.runs(host) for host in rig.hosts}
    text = rig.ask(model, **sampled)["text"]
    busiest = max(rig.hosts, key=lambda host: rig.runs(host) - before[host.name])
    pieces, killed = [], []
    for kind, value in rig.orchestrator.request("chat", model=model, messages=QUESTION, route="stages", **sampled):
        if kind == "result":
            answer = value
            continue
        pieces.append(value)
        if len(pieces) == 5:
            busiest.kill()
            killed.append(busiest)
    assert killed
    assert answer["text"] == text
    assert answer["retries"] > 0
    killed[0].start()
    killed[0].wait_started()
    back = rig.models.values()  # the next test kills the other host
    wait_for(lambda: all(rig.replicas(each) >= 2 for each in back), "the host to be back with all it had", 40)
