"""The command line: amounts, exit codes, JSON."""

import json

import pytest

from config.errors import ConfigError
from node.cli import main, parse_credits
from node.demo import Outcome, spans


@pytest.mark.parametrize(("text", "amount"), [("1", 1_000_000), ("0.000001", 1), ("12.5", 12_500_000)])
def test_credits_become_microcredits(text, amount):
    assert parse_credits(text) == amount


@pytest.mark.parametrize("text", ["", "-1", "1.0000001", "1e3", "one", "1.2.3", ".5"])
def test_other_amounts_are_refused(text):
    with pytest.raises(ConfigError):
        parse_credits(text)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RIOS_CONFIG", raising=False)
    return tmp_path


def test_init_makes_a_config_a_key_and_a_network(home, capsys):
    assert main(["init", "--new-network", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (home / "config" / "rios" / "rios.toml").exists()
    key = home / "data" / "rios" / "identity.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert json.loads((home / "data" / "rios" / "genesis.json").read_text())["issuer"] == made["peer_id"]


def test_init_never_replaces_a_config_or_a_key_by_accident(home, capsys):
    assert main(["init"]) == 0
    assert main(["init"]) == 2
    capsys.readouterr()
    assert main(["init", "--force", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["peer_id"]
    assert main(["id", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peer_id"] == first


def test_a_key_can_be_exported_and_imported(home, capsys):
    assert main(["init"]) == 0
    capsys.readouterr()
    assert main(["id", "--json"]) == 0
    original = json.loads(capsys.readouterr().out)["peer_id"]
    backup = home / "backup.key"
    assert main(["id", "export", str(backup)]) == 0
    assert main(["init", "--force"]) == 0
    (home / "data" / "rios" / "identity.key").unlink()
    assert main(["id", "import", str(backup)]) == 0
    capsys.readouterr()
    assert main(["id", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peer_id"] == original


def test_errors_go_to_stderr_and_as_json_to_stdout(home, capsys):
    assert main(["status", "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "not_running"
    assert "rios run" in captured.err


def test_gateway_users_keys_and_credits_without_a_daemon(home, capsys):
    assert main(["init"]) == 0
    capsys.readouterr()
    assert main(["gateway", "key", "create", "--user", "ann", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["secret"].startswith("rios_")
    assert main(["gateway", "user", "credit", "ann", "2.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["balance"] == 2_500_000
    assert main(["gateway", "key", "revoke", made["key_id"]]) == 0
    capsys.readouterr()
    assert main(["gateway", "key", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["revoked_at_ms"] is not None


def test_every_command_explains_itself(capsys):
    for words in (["--help"], ["run", "--help"], ["model", "--help"], ["ledger", "grant", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
        assert "usage: rios" in capsys.readouterr().out


def test_numbers_as_spans():
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert spans([]) == "-"


def test_the_demo_names_every_mismatch():
    node = {"peer_id": "p", "expert_rows": 0}
    ledger = {"verified": {"p": False}, "sum_ok": False, "certificates": 0}
    outcome = Outcome(answer="Lyon", reference_answer="Paris", answer_after_kill="", nodes=[node], ledger=ledger)
    assert len(outcome.faults()) == 7
