"""The whole thing behind real NAT: a daemon that nobody can dial serves experts, to a public node and a hidden one."""

import contextlib
import json
import subprocess
from typing import Any

import pytest
from rig import Host

from config.errors import RiosError
from node.rig import NodeProcess, Swarm, _environ, rios, rios_command, wait_for
from tests.unit.dmoe.model_kit import write_gguf

LISTEN = ("/ip4/0.0.0.0/tcp/4701",)


@pytest.fixture
def swarm(rig):
    with Swarm(rig.folder / "swarm") as made:
        yield made


def place(swarm: Swarm, host: Host, name: str, settings: dict[str, Any]) -> NodeProcess:
    node = swarm.add(name, {"p2p.listen": LISTEN, "p2p.mdns": "off", "dmoe.threads": 1, **settings})
    node.prefix = ("ip", "netns", "exec", host.namespace)
    return node


def told(node: NodeProcess, *command: str) -> str:
    """What a command says on a node's host."""
    full = [*node.prefix, *rios_command(), "--config", str(node.config_file), *command]
    return subprocess.run(full, capture_output=True, text=True, env=_environ(), timeout=60, check=False).stdout


def answer(node: NodeProcess, model: str) -> str:
    def ready() -> bool:
        with contextlib.suppress(RiosError):  # the model is not there yet
            return bool(node.ask("model.health", model=model)["ready"])
        return False

    wait_for(ready, f"{node.name} to be ready", 60)
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "What is it?"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    return str(next(value for kind, value in node.request("chat", **asked) if kind == "result")["text"])


def test_a_daemon_behind_nat_serves_experts(rig, swarm):
    public = place(swarm, rig.host("r"), "public", {"dmoe.serve": False, "dmoe.orchestrate": ("tiny",)})
    gguf = write_gguf(rig.folder / "tiny.gguf")
    model = json.loads(rios(public, "model", "import", str(gguf), "--name", "tiny", "--json"))["model_id"]
    swarm.start(public)
    (seed,) = public.status["network"]["addresses"]
    known = {"p2p.seeds": (seed,), "dmoe.publishers": (public.peer_id,), "p2p.upnp": False}
    worker = place(swarm, rig.behind(rig.router("n", random_ports=True), "p"), "worker", known)
    swarm.start(worker)
    public.ask("model.deploy", model=model, replicas=1)
    text = answer(public, model)
    rows = worker.ask("status")["work"]["expert_rows"]
    assert rows > 0

    settings = {**known, "dmoe.serve": False, "dmoe.orchestrate": ("tiny",)}
    hidden = place(swarm, rig.behind(rig.router("m"), "c", "10.8.0"), "hidden", settings)
    swarm.start(hidden)
    assert answer(hidden, model) == text
    assert worker.ask("status")["work"]["expert_rows"] > rows
    link = hidden.ask("status")["network"]["details"]["links"][worker.peer_id]
    assert link["relay"] == public.peer_id
    assert public.ask("status")["network"]["details"]["reachability"]["relay"]["passed_bytes"] > 0

    assert "public: peers dialled" in told(public, "status")
    shown = told(worker, "status")
    assert "relayed: " in shown
    assert "forward TCP port 4701 to 10.9.0.2" in shown
    findings = json.loads(told(worker, "doctor", "--json"))
    (finding,) = [each for each in findings if each["what"].startswith("reach: relayed")]
    assert finding["level"] == "warn"
    assert "UPnP" in finding["fix"]
