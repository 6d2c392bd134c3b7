"""One node as a real process: what an operator sees when it starts, stops, dies and is wrongly configured."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import RiosError
from node.cli import main
from node.rig import NodeProcess, Swarm, wait_for

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


def test_an_operator_shuts_a_peer_out_and_lets_it_in_again(swarm, node):
    swarm.start(node)
    other = swarm.add(
        "two", {"p2p.seeds": tuple(node.status["network"]["addresses"])}, ("--genesis", str(node.data / "genesis.json"))
    )
    swarm.start(other)
    wait_for(lambda: node.ask("status")["network"]["links"] == 1, "the two to be linked", 30)
    row = next(r for r in json.loads(rios("peers", "--json", config=node.config_file).stdout) if not r["self"])
    assert (row["peer_id"], row["linked"], row["score"], row["ban"]) == (other.peer_id, True, 100, None)
    assert row["link"]["round_trip_ms"] >= 0
    assert "100" in rios("peers", config=node.config_file).stdout

    told = rios("peers", "ban", other.peer_id, "--minutes", "5", config=node.config_file)
    assert "is shut out for" in told.stdout
    wait_for(lambda: node.ask("status")["network"]["links"] == 0, "the link to end", 10)
    shown = rios("peers", "bans", config=node.config_file).stdout
    assert other.peer_id in shown
    assert "by the operator" in shown
    wait_for(lambda: node.ask("peers.bans")["refused"].get("ban", 0) > 0, "the peer to be refused", 30)
    told = rios("peers", "unban", other.peer_id, config=node.config_file)
    assert "may come in again" in told.stdout
    assert node.ask("peers.bans")["bans"] == []
    assert rios("peers", "ban", "203.0.113.9/24", config=node.config_file).returncode == 0
    node.stop()
    swarm.start(node)
    assert node.ask("peers.bans")["bans"][0]["subject"] == "203.0.113.0/24", "a restart forgets no ban"
    refused = rios("peers", "ban", "somebody", config=node.config_file)
    assert refused.returncode == 1
    assert "neither a peer nor an address" in refused.stderr


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


@pytest.mark.parametrize("setting", ["gateway.port", "node.metrics_port"])
def test_a_taken_port_of_the_gateway_or_the_metrics_is_named_without_a_traceback(swarm, setting):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        node = swarm.add("taken", {"gateway.enabled": True, "gateway.port": 0}, ("--new-network",))
        result = rios("run", "--json", "--set", f"{setting}={port}", config=node.config_file)
    assert result.returncode == 1
    assert json.loads(result.stdout)["error"]["code"] == "port_taken"
    assert str(port) in result.stderr
    assert setting in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_node_in_order_even_while_it_starts(swarm, node, number):
    node.start()
    wait_for(lambda: (node.data / "ledger.db").exists(), "the node to be half up", 20)
    assert node.process is not None
    node.process.send_signal(number)
    assert node.process.wait(5) == 0
    log = node.log_file.read_text()
    assert "stopped" in log
    assert "Traceback" not in log
    assert not (node.data / "control.sock").exists()


ONLINE = (
    "status", "health", "peers", "id", "paths", "doctor", "model ls", "ledger balance", "ledger statement",
    "ledger verify", "ledger channels", "ledger settle", "ledger statement --csv", "ledger entry {me}:1",
    "ledger audit {me}", "ledger channels {me} --csv", "gateway user ls", "gateway key ls", "config show --origin",
)  # fmt: skip


def test_every_command_answers_a_running_node_in_text_and_json(swarm, node, capsys):
    swarm.start(node)
    me = node.peer_id
    for command in (f"ledger grant {me} 2.5", f"ledger transfer {me} 0.5", *ONLINE):
        words = ["--config", str(node.config_file), *command.format(me=me).split()]
        assert main(words) == 0, command
        assert capsys.readouterr().out.strip(), command
        assert main([*words, "--json"]) == 0, command
        json.loads(capsys.readouterr().out)
    for command, code in (("ledger balance junk", 2), ("ledger grant junk 1", 2), ("chat hi", 1), ("run", 1)):
        assert main(["--config", str(node.config_file), *command.split(), "--json"]) == code, command
        captured = capsys.readouterr()
        assert json.loads(captured.out)["error"]["message"] in captured.err


def test_a_key_is_not_replaced_under_a_running_node(swarm, node, tmp_path, capsys):
    swarm.start(node)
    config = ["--config", str(node.config_file)]
    assert main([*config, "id", "export", str(tmp_path / "copy")]) == 0
    assert main([*config, "id", "import", "--force", str(tmp_path / "copy")]) == 1
    assert "stop it first" in capsys.readouterr().err


def test_settings_of_the_machines_own_node_do_not_reach_a_throw_away_swarm(swarm, tmp_path, monkeypatch):
    monkeypatch.setenv("RIOS_NODE_DATA_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("RIOS_PASSPHRASE", "secret")
    one = swarm.add("one", {}, ("--new-network",))
    swarm.start(one)
    assert one.status["node"]["data_dir"] == str(one.data)
    assert not (tmp_path / "own").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def test_a_full_disk_is_named_loses_nothing_and_passes(small_disk):
    with Swarm(small_disk / "swarm") as swarm:
        node = swarm.add("one", {"ledger.witness": True}, ("--new-network",))
        swarm.start(node)
        me = node.peer_id
        node.ask("ledger.grant", to=me, microcredits=5_000_000)
        filler = small_disk / "filler"
        fill(filler)
        with pytest.raises(RiosError) as caught:
            node.ask("ledger.grant", to=me, microcredits=1_000_000)
        assert caught.value.code == "disk_full"
        assert "disk" in node.ask("health")["reasons"][0]
        refused = rios("init", "--json", config=small_disk / "other.toml")
        assert (refused.returncode, json.loads(refused.stdout)["error"]["code"]) == (1, "disk_full")
        assert not (small_disk / "other.toml").exists()
        filler.unlink()
        node.ask("ledger.grant", to=me, microcredits=1_000_000)
        assert node.ask("ledger.balance", account="")["balance"] == 6_000_000
        assert node.ask("ledger.verify")["verified"] is True
        assert node.ask("health")["ok"] is True


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
        (("--config", "/nonexistent/rios.toml", "run"), 2, "rios.toml init"),
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


def test_a_damaged_ledger_is_rebuilt_from_a_peer_and_checkpoints_are_made(swarm, node, capsys):
    swarm.start(node)
    settings = {"p2p.seeds": tuple(node.status["network"]["addresses"]), "ledger.sync_seconds": 1}
    other = swarm.add("two", settings, ("--genesis", str(node.data / "genesis.json")))
    swarm.start(other)
    for amount in (5_000_000, 7):
        node.ask("ledger.grant", to=other.peer_id, microcredits=amount)
    wait_for(lambda: other.ask("ledger.balance")["balance"] == 5_000_007, "the grants to arrive", 30)
    made = node.ask("ledger.checkpoint", do="new")
    assert made["newest"]["entries"] == 2
    assert other.ask("ledger.checkpoint", do="fetch")["newest"] == made["newest"]
    config = ["--config", str(other.config_file)]
    assert main([*config, "ledger", "repair"]) == 1
    assert "already running" in capsys.readouterr().err
    assert other.stop() == 0
    data = bytearray((other.data / "ledger.db").read_bytes())
    data[8192 : len(data) // 2] = bytes(len(data) // 2 - 8192)
    (other.data / "ledger.db").write_bytes(bytes(data))
    assert main([*config, "ledger", "verify", "--json"]) == 1
    capsys.readouterr()
    assert main([*config, "ledger", "repair", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["repaired"]
    assert report["agrees_with"] == [node.peer_id]
    assert report["entries"] == 2
    swarm.start(other)
    assert other.ask("ledger.verify")["digest"] == node.ask("ledger.verify")["digest"]
