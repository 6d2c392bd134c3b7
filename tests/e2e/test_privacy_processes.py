"""Prompts that are kept from strangers, with whole daemons: what a peer that is not trusted was ever asked to compute.

Two hosts hold everything; one of them is trusted. One orchestrator goes by way of experts, one by way of stages. Both
hosts count the calls they served, shard by shard: rows of hidden states that reached a host are in these counts.
(Audits are off: their probes are calls, too, though of random numbers.)
"""

import json
from collections import Counter
from collections.abc import Iterator

import openai
import pytest

from node.rig import NodeProcess, wait_for
from tests.faults.rig import MODEL, Rig, swarm_of

TOKENS = 60
TURNS_MAX = 10
LAYERS = 3


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("privacy")
    settings = {"dmoe.audit_share": 0.0}
    with swarm_of(folder, mode="both", routes=("experts", "stages"), settings=settings) as made:
        yield made


@pytest.fixture(scope="module")
def texts(rig: Rig) -> dict[str, str]:
    """The answers without any rule; everybody takes part in them."""
    found = {}
    for node in rig.orchestrators:
        before = [served(rig, worker) for worker in rig.workers]
        for _ in range(TURNS_MAX):
            found[node.name] = ask(rig, node)
            if all(served(rig, worker) != calls for worker, calls in zip(rig.workers, before, strict=True)):
                break
        else:
            pytest.fail(f"{node.name} never called one of the hosts: nothing could be kept from it")
    return found


def served(rig: Rig, node: NodeProcess) -> Counter[int]:
    """Layer -> calls for its experts or its stage that a host served since its start."""
    manifest = json.loads((node.data / "models" / rig.model / "manifest.json").read_text())
    layers = {shard["id"]: shard["layers"][0] for shard in manifest["shards"]}
    work, found = node.ask("status")["work"], Counter[int]()
    for shard, figures in work["worker"]["shards"].get(rig.model, {}).items():
        found[layers[shard]] += figures["calls"]
    for shard, figures in work["stages"]["stages"].get(rig.model, {}).items():
        found[layers[shard]] += figures["runs"]
    return found


def ask(rig: Rig, node: NodeProcess, privacy: str = "") -> str:
    """An answer over HTTP, with the header or without."""
    headers = {"x-rios-privacy": privacy} if privacy else {}
    with rig.client(node) as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is it?"}],
            temperature=0,
            max_tokens=TOKENS,
            extra_body={"min_tokens": TOKENS},
            extra_headers=headers,
        )
    return answer.choices[0].message.content or ""


def refused(rig: Rig, node: NodeProcess) -> str:
    """The error that comes instead of an answer."""
    with pytest.raises(openai.InternalServerError) as error:
        ask(rig, node)
    return str(error.value)


def ruled(rig: Rig, **rule: str) -> None:
    """Both orchestrators again, under a rule of their operators."""
    for node in rig.orchestrators:
        node.stop()
    for node in rig.orchestrators:
        node.start({f"RIOS_DMOE_{name.upper()}": value for name, value in rule.items()})
    for node in rig.orchestrators:
        node.wait_started()
    rig.wait_replicas()


def test_trusted_peers_only_shows_nothing_to_anybody_else(rig: Rig, texts: dict[str, str]) -> None:
    trusted, other = rig.workers
    ruled(rig, trusted_peers=trusted.peer_id, trusted_peers_only="true")
    for node in rig.orchestrators:
        before, kept = served(rig, trusted), served(rig, other)
        for _ in range(3):
            assert ask(rig, node) == texts[node.name]
        assert served(rig, trusted) != before
        assert served(rig, other) == kept
    trusted.kill()
    kept = served(rig, other)
    for node in rig.orchestrators:  # at first it is known only that calls fail
        wait_for(lambda node=node: "trusted_peers_only" in refused(rig, node), "an error that names the rule", 40)
    assert served(rig, other) == kept, "an error, not a stranger"
    rig.start(trusted)
    rig.wait_replicas()


def test_local_layers_stay_and_a_request_may_ask_for_more(rig: Rig, texts: dict[str, str]) -> None:
    trusted, other = rig.workers
    ruled(rig, trusted_peers=trusted.peer_id, local_layers="1,1")
    for node in rig.orchestrators:
        before = {worker.name: served(rig, worker) for worker in rig.workers}
        for _ in range(3):
            assert ask(rig, node) == texts[node.name]
        grown = sum((served(rig, worker) - before[worker.name] for worker in rig.workers), Counter[int]())
        assert set(grown) == {1}, f"of {LAYERS} layers the first and the last stay at {node.name}"

        kept, before_trusted = served(rig, other), served(rig, trusted)
        for _ in range(3):
            assert ask(rig, node, "trusted") == texts[node.name]
        assert served(rig, other) == kept
        assert served(rig, trusted) != before_trusted

        before = {worker.name: served(rig, worker) for worker in rig.workers}
        if node is rig.first:
            assert ask(rig, node, "local"), "the publisher has the whole model"
        else:
            with pytest.raises(openai.APIStatusError, match="may leave this node"):
                ask(rig, node, "local")
        assert {worker.name: served(rig, worker) for worker in rig.workers} == before, "nothing left this node"
    rig.check_money()
