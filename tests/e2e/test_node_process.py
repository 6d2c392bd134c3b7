"""One node as a real process: what an operator sees when it starts, stops, dies and is wrongly configured."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from node.swarm import NodeProcess, Swarm, wait_for

RIOS = [sys.executable, "-P", "-m", "node"]


def rios(*args: str, config: Path | None = None, environ: dict[str, str] | None = None):
    chosen = ["--config", str(config)] if config else []
    return subprocess.run(
        [*RIOS, *chosen, *args], capture_output=True, text=True, check=False, env={**os.environ, **(environ or {})}
    )


@pytest.fixture
def swarm(tmp_path):
    with Swarm(tmp_path / "swarm") as made:
        yield made


@pytest.fixture
def node(swarm) -> NodeProcess:
    return swarm.add("one", {"ledger.witness": True}, ("--new-network",))


def test_a_node_starts_answers_and_stops_within_five_seconds(swarm, node):
    swarm.start(node)
    health = json.loads(rios("health", "--json", config=node.config_file).stdout)
    assert health["ok"] is True
    assert rios("status", config=node.config_file).returncode == 0
    assert node.stop() == 0
    assert rios("health", config=node.config_file).returncode == 3
    assert not (node.data / "control.sock").exists()


def test_a_killed_node_comes_back_as_itself_with_its_ledger(swarm, node):
    swarm.start(node)
    me = node.peer_id
    node.ask("ledger.grant", to=me, microcredits=5_000_000)
    before = node.ask("ledger.balance", account="")
    node.kill()
    swarm.start(node)
    assert node.peer_id == me
    assert node.ask("ledger.balance", account="") == before
    assert node.ask("ledger.verify")["verified"] is True


def test_two_daemons_never_share_a_data_folder(swarm, node):
    swarm.start(node)
    second = rios("run", config=node.config_file)
    assert second.returncode == 1
    assert "already running" in second.stderr
    assert node.ask("health")["ok"] is True


def test_a_taken_port_is_named(swarm):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        node = swarm.add("taken", {"p2p.listen": (f"/ip4/127.0.0.1/tcp/{port}",)}, ("--new-network",))
        result = rios("run", config=node.config_file)
    assert result.returncode == 1
    assert str(port) in result.stderr
    assert "p2p.listen" in result.stderr


def test_an_unreachable_seed_is_only_a_warning(swarm, node):
    other = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    text = node.config_file.read_text().replace("# seeds = []", f'seeds = ["/ip4/127.0.0.1/tcp/9/p2p/{other}"]')
    node.config_file.write_text(text)
    swarm.start(node)
    assert node.ask("health")["ok"] is True
    wait_for(lambda: "seed" in node.log_file.read_text(), "a word about the seed", 10)


def test_a_broken_key_file_is_named(swarm, node):
    key = node.data / "identity.key"
    key.write_bytes(key.read_bytes()[:20])
    result = rios("run", config=node.config_file)
    assert result.returncode == 1
    assert str(key) in result.stderr


def test_a_key_with_a_passphrase_needs_it(swarm, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("correct horse\n")
    folder = tmp_path / "locked"
    folder.mkdir()
    config = folder / "rios.toml"
    config.write_text('[node]\ndata_dir = "data"\n')
    made = rios("init", "--keep-config", "--new-network", config=config, environ={"RIOS_PASSPHRASE_FILE": str(secret)})
    assert made.returncode == 0, made.stderr
    without = rios("id", config=config)
    assert without.returncode == 2
    assert "passphrase" in without.stderr
    assert rios("id", config=config, environ={"RIOS_PASSPHRASE": "wrong"}).returncode == 2
    right = rios("id", config=config, environ={"RIOS_PASSPHRASE": "correct horse"})
    assert right.returncode == 0, right.stderr


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--config", "/nonexistent/rios.toml", "run"), 2, "rios init"),
        (("--set", "node.nam=x", "config", "check"), 2, "did you mean 'name'"),
        (("frobnicate",), 2, "invalid choice"),
        (("ledger", "grant", "x", "-1"), 2, ""),
        (("model", "import", "/nonexistent.gguf"), 1, "/nonexistent.gguf"),
    ],
)
def test_wrong_commands_get_the_right_exit_code(args, code, says, tmp_path):
    environ = {"XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    result = rios(*args, environ=environ)
    assert result.returncode == code, result.stderr
    assert says in result.stderr


def test_sigterm_ends_the_daemon_cleanly_and_its_log_has_no_traceback(swarm, node):
    swarm.start(node)
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(5) == 0
    assert "Traceback" not in node.log_file.read_text()


def test_doctor_works_with_the_daemon_stopped_and_finds_what_is_wrong(swarm, node):
    well = rios("doctor", config=node.config_file)
    assert well.returncode == 0, well.stdout
    (node.data / "identity.key").chmod(0o644)
    ill = rios("doctor", "--json", config=node.config_file)
    assert ill.returncode == 1
    assert any("chmod 600" in finding["fix"] + finding["what"] for finding in json.loads(ill.stdout))
