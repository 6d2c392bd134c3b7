"""``rios doctor`` about a real swarm: seeds, clocks, models, the accounts database."""

import json
import sqlite3
import subprocess
from contextlib import closing

import pytest

from gateway.db.migrate import HEAD
from node.rig import NodeProcess, Swarm, _environ, rios, rios_command, wait_for
from p2p.core.identity import Identity


@pytest.fixture
def swarm(tmp_path):
    with Swarm(tmp_path / "swarm") as made:
        yield made


def findings(node: NodeProcess) -> list[dict[str, str]]:
    command = [*rios_command(), "--config", str(node.config_file), "doctor", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, env=_environ(), timeout=60, check=False)
    return json.loads(told.stdout)


def about(found: list[dict[str, str]], *words: str) -> dict[str, str]:
    (finding,) = [each for each in found if all(word in each["what"] for word in words)]
    return finding


def test_what_the_doctor_finds_in_a_swarm(swarm):
    seed = swarm.add("seed", {}, ("--new-network",))
    swarm.start(seed)
    right = seed.status["network"]["addresses"][0]
    port = right.split("/")[4]
    impostor = right.rpartition("/")[0] + "/" + Identity.from_seed(b"i" * 32).peer_id
    dead = impostor.replace(f"/{port}/", "/1/")
    node = swarm.add("node", {"p2p.seeds": (right, impostor, dead), "gateway.enabled": True, "gateway.port": 0})

    rios(node, "gateway", "user", "create", "u")
    manifest = node.data / "models" / ("a" * 64) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"half": ')
    ill = findings(node)
    assert about(ill, f"proves to be {seed.peer_id}")["level"] == "ok"
    assert about(ill, "another peer answers")["level"] == "warn"
    assert about(ill, "127.0.0.1:1:")["level"] == "warn"
    assert about(ill, f"schema {HEAD}")["level"] == "ok"
    named = about(ill, str(manifest))
    assert named["level"] == "fail"
    assert str(manifest.parent) in named["fix"]

    swarm.start(node)  # the damaged manifest does not keep it from that
    assert str(manifest) in node.log_file.read_text()
    wait_for(lambda: node.ask("status")["network"]["known"] == 2, "the seed to be known", 20)
    well = findings(node)
    assert about(well, "is linked as", seed.peer_id)["level"] == "ok"
    assert about(well, "clock agrees with 1 peer")["level"] == "ok"
    assert seed.ask("status")["network"]["links"] == 1
    node.stop()

    with closing(sqlite3.connect(node.data / "gateway.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()
    newer = about(findings(node), "schema 9999")
    assert newer["level"] == "fail"
    assert "newer RiOS" in newer["fix"]
