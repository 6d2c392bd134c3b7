"""A private swarm of real daemons: founded, invited to, joined; a stranger who knows the seed gets nowhere."""

import json
import subprocess

import pytest

from node.rig import Swarm, _environ, rios, rios_command, wait_for
from tests.ports import free_port


@pytest.fixture
def swarm(tmp_path):
    with Swarm(tmp_path / "swarm") as made:
        yield made


def test_from_new_to_a_working_swarm(swarm):
    founder = swarm.add("founder", {"ledger.witness": True, "p2p.listen": (f"/ip4/127.0.0.1/tcp/{free_port()}",)})
    made = json.loads(rios(founder, "swarm", "new", "--name", "home", "--json"))
    swarm.start(founder)
    assert founder.status["network"]["swarm"] == {"name": "home", "id": made["swarm"]}
    invite = rios(founder, "swarm", "invite").strip()
    member = swarm.add("member", {})
    joined = subprocess.run(
        [*rios_command(), "--config", str(member.config_file), "swarm", "join", "-"],
        input=invite, capture_output=True, text=True, env=_environ(), timeout=60, check=True,
    )  # fmt: skip
    assert made["swarm"] in joined.stdout
    stranger = swarm.add("stranger", {"p2p.seeds": tuple(founder.status["network"]["addresses"])})
    swarm.start(member, stranger)

    def known(node) -> int:
        return node.ask("status")["network"]["known"]

    wait_for(lambda: known(founder) == known(member) == 2, "the members to know each other", 30)
    wait_for(lambda: "this swarm needs a key" in stranger.log_file.read_text(), "the stranger's warning", 30)
    assert known(stranger) == 1
    assert founder.peer_id not in json.dumps(stranger.ask("peers"))
    assert stranger.peer_id not in json.dumps(founder.ask("peers"))
    assert member.ask("status")["ledger"]["net"] == founder.ask("status")["ledger"]["net"]
    assert "private swarm 'home'" in rios(member, "status")
    assert "private swarm 'home'" in subprocess.run(
        [*rios_command(), "--config", str(member.config_file), "doctor"],
        capture_output=True, text=True, env=_environ(), timeout=60, check=False,
    ).stdout  # fmt: skip
    for words, why in (
        (("swarm", "deny", founder.peer_id), "this node itself"),
        (("peers", "ban", founder.peer_id), "this node itself"),
    ):
        assert why in _refused(founder, *words)
    assert "a seed of this node" in _refused(member, "swarm", "deny", founder.peer_id)
    rios(founder, "swarm", "deny", member.peer_id)
    wait_for(lambda: founder.ask("status")["network"]["links"] == 0, "the denied member to be hung up on", 10)
    founder.stop()
    member.stop()
    swarm.start(founder)
    swarm.start(member)  # it dials its seed at once
    wait_for(lambda: "p2p.allow" in member.log_file.read_text(), "the denied member to be told", 20)
    assert founder.ask("status")["network"]["links"] == 0, "the list outlives a restart"
    rios(founder, "swarm", "allow", member.peer_id)
    member.stop()
    swarm.start(member)
    wait_for(lambda: founder.ask("status")["network"]["links"] == 1, "the member to come back", 20)
    assert member.peer_id in rios(founder, "swarm", "allow", stranger.peer_id)
    assert "everybody who has the key" in rios(founder, "swarm", "allow", "--everybody")
    key = json.loads((founder.data / "swarm.json").read_text())["key"]
    for node in swarm.nodes:
        assert key not in json.dumps(node.ask("status"))
        assert key not in node.log_file.read_text()
        assert key not in node.config_file.read_text()


def _refused(node, *words: str) -> str:
    ended = subprocess.run(
        [*rios_command(), "--config", str(node.config_file), *words],
        capture_output=True, text=True, env=_environ(), timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    return ended.stderr
