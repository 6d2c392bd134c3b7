"""The command line: amounts, exit codes, JSON."""

import errno
import io
import json
import os
import subprocess
import sys
import tomllib

import pytest

from config.errors import ConfigError, LocalError
from node import asking, local
from node.answering import request_of
from node.cli import Context, Output, main, parse_credits
from node.commands import build_parser
from node.demo import Outcome, spans
from tests.unit.dmoe.model_kit import write_gguf

SEED = "/ip4/127.0.0.1/tcp/4701/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"


@pytest.mark.parametrize(("text", "amount"), [("1", 1_000_000), ("0.000001", 1), ("12.5", 12_500_000)])
def test_credits_become_microcredits(text, amount):
    assert parse_credits(text) == amount


@pytest.mark.parametrize("text", ["", "-1", "1.0000001", "1e3", "one", "1.2.3", ".5", "²", "1.²", "٣"])
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
    assert main(["gateway", "user", "credit", "ann", "0"]) != 0
    assert "more than 0" in capsys.readouterr().err
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


def test_the_sampling_flags_of_chat_reach_the_engine():
    flags = "--min-p 0.1 --frequency-penalty 0.5 --presence-penalty -1 --repetition-penalty 1.2 --top-p 0.9"
    options = asking.chat_options(Context(build_parser().parse_args(["chat", "hi", *flags.split()])))
    sampling = request_of({"messages": [], **options}, ["tiny"]).sampling
    assert (sampling.min_p, sampling.top_p, sampling.repetition_penalty) == (0.1, 0.9, 1.2)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -1)


@pytest.fixture
def tiny_model(home):
    """A node with one tiny model."""
    assert main(["init"]) == 0
    assert main(["model", "import", str(write_gguf(home / "tiny.gguf")), "--name", "tiny"]) == 0


def said(capsys, *words):
    """What a command says as JSON."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_chat_is_held_to_a_form(tiny_model, home, capsys):
    (home / "schema.json").write_text('{"enum": [{"a": 1}, {"a": 2}]}')
    (home / "yes.lark").write_text('start: "yes"')
    ask = ("chat", "--local", "--temperature", "1", "hi")
    assert json.loads(said(capsys, *ask, "--json-schema", str(home / "schema.json"))["text"])["a"] in (1, 2)
    answer = said(capsys, *ask, "--regex", "[0-9]{5}", "--logprobs", "2", "--logit-bias", "16=100")
    assert answer["text"] == "00000", "token 16 is the digit 0"
    assert [len(place["top"]) for place in answer["logprobs"]] == [2] * 5
    assert said(capsys, *ask, "--choice", "x", "--choice", "y")["text"] in ("x", "y")
    assert said(capsys, *ask, "--grammar", str(home / "yes.lark"))["text"] == "yes"
    assert main([*ask, "--regex", "[0-9]{5}", "--logprobs", "1"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.strip()) == 5
    assert captured.err.count("-") >= 5


@pytest.mark.parametrize(
    ("flags", "code", "why"),
    [
        (["--json-schema", "/nonexistent"], 2, "/nonexistent"),
        (["--regex", "a(b"], 1, "--regex"),
        (["--regex", "a", "--choice", "b"], 2, "not allowed"),
        (["--logit-bias", "five"], 2, "ID=NUMBER"),
        (["--logprobs", "99"], 1, "logprobs"),
    ],
)
def test_forms_that_cannot_be_kept_are_named(tiny_model, flags, code, why, capsys):
    capsys.readouterr()
    assert main(["chat", "--local", "hi", "--json", *flags]) == code
    assert why in failure(capsys)["message"]


def test_embed_prints_a_vector_per_text(tiny_model, capsys):
    data = said(capsys, "embed", "--local", "hello", "there")
    assert [len(vector) for vector in data["vectors"]] == [128, 128]
    assert data["prompt_tokens"] == 10
    assert main(["embed", "--local", "hello"]) == 0
    numbers = [float(text) for text in capsys.readouterr().out.split()]
    assert numbers == pytest.approx(data["vectors"][0], abs=1e-6)
    assert main(["embed", "--local", "", "--json"]) == 1
    assert "input 0 is empty" in failure(capsys)["message"]


def test_numbers_as_spans():
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert spans([]) == "-"


def test_the_demo_names_every_mismatch():
    node = {"peer_id": "p", "expert_rows": 0}
    ledger = {"verified": {"p": False}, "sum_ok": False, "certificates": 0}
    outcome = Outcome(answer="Lyon", reference_answer="Paris", answer_after_kill="", nodes=[node], ledger=ledger)
    assert len(outcome.faults()) == 7


def written(home):
    return tomllib.loads((home / "config" / "rios" / "rios.toml").read_text())


def failure(capsys):
    """The one JSON value on stdout; stderr says the same to people and never shows a traceback."""
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["message"] in captured.err
    assert "Traceback" not in captured.err
    return error


def test_init_writes_what_was_set_wherever_the_flag_stands(home, capsys):
    assert main(["--set", "node.name=a", "init", "--set", "node.region=b", "--seed", SEED]) == 0
    assert written(home) == {
        "node": {"name": "a", "region": "b"}, "p2p": {"seeds": [SEED]}, "dmoe": {}, "ledger": {}, "gateway": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        ["--seed", "127.0.0.1:4701"],
        ["--seed", SEED.replace("4701", "70000")],
        ["--set", "node.nome=x"],
        ["--genesis", "/nonexistent/genesis.json"],
        ["--genesis", os.devnull],
        ["--genesis", "x", "--new-network"],
        ["--force", "--keep-config"],
    ],
)
def test_init_checks_everything_before_it_writes_anything(home, wrong, capsys):
    assert main(["init", "--json", *wrong]) == 2
    failure(capsys)
    assert not (home / "config").exists()
    assert not (home / "data").exists()


def test_a_node_does_not_change_its_network_by_accident(home, capsys):
    assert main(["init", "--new-network"]) == 0
    mine = home / "data" / "rios" / "genesis.json"
    other = home / "other.json"
    other.write_text(mine.read_text().replace('"min_amount": 1', '"min_amount": 2'))
    before = mine.read_text()
    capsys.readouterr()
    assert main(["init", "--keep-config", "--genesis", str(other), "--json"]) == 2
    assert "another network" in failure(capsys)["message"]
    assert mine.read_text() == before
    assert main(["init", "--force", "--genesis", str(other)]) == 0
    assert mine.read_text() == other.read_text()


def test_keeping_the_config_and_changing_it_exclude_each_other(home, capsys):
    assert main(["init"]) == 0
    capsys.readouterr()
    assert main(["init", "--keep-config", "--gateway", "--json"]) == 2
    assert "--keep-config" in failure(capsys)["message"]


def test_a_config_file_that_was_named_must_exist(home, monkeypatch, capsys):
    monkeypatch.setenv("RIOS_CONFIG", str(home / "nowhere.toml"))
    assert main(["paths", "--json"]) == 2
    assert "nowhere.toml" in failure(capsys)["message"]


@pytest.mark.parametrize("setting", ["p2p.listen=0.0.0.0:4701", "p2p.announce=/ip4/1.2.3.4/tcp/99999"])
def test_wrong_addresses_are_found_by_config_check_and_doctor(home, setting, capsys):
    assert main(["init"]) == 0
    capsys.readouterr()
    assert main(["config", "check", "--set", setting, "--json"]) == 2
    assert "TCP multiaddr" in failure(capsys)["message"]
    if "listen" in setting:
        assert main(["doctor", "--set", setting, "--json"]) == 1
        findings = json.loads(capsys.readouterr().out)
        assert any("TCP multiaddr" in each["what"] for each in findings if each["level"] == "fail")


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (ExceptionGroup("g", [ExceptionGroup("h", [LocalError("port_taken", "taken", "free it")])]), 1, "taken"),
        (BaseExceptionGroup("g", [ValueError("x"), KeyboardInterrupt()]), 130, "interrupted"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("a bug"), 1, "a bug"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 1, "the disk is full: /data/x"),
        (ExceptionGroup("g", [PermissionError(errno.EACCES, "Permission denied", "/data/x")]), 1, "denied: /data/x"),
    ],
)
def test_whatever_happens_is_a_message_and_one_json_value(home, monkeypatch, capsys, raised, code, says):
    def command(_context):
        raise raised

    monkeypatch.setattr(local, "version", command)
    assert main(["version", "--json"]) == code
    assert says in failure(capsys)["message"]


def test_a_closed_or_full_stdout_ends_a_command_quietly(home):
    command = [sys.executable, "-P", "-m", "node", "config", "show"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr.splitlines()[0]) == (1, "rios: the disk is full")


def test_text_that_stdout_cannot_encode_is_still_printed(home, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(local, "version", lambda _context: Output({}, "42 °C"))
    assert main(["version"]) == 0
    assert ascii_only.buffer.getvalue() == b"42 \\xb0C\n"


@pytest.mark.parametrize("piped", [b"", b" \n", b"\xff\xfe"])
def test_chat_needs_a_question_in_text(home, piped, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
    assert main(["chat", "--local", "--json"]) == 2
    assert "question" in failure(capsys)["message"]


def test_importing_a_key_keeps_the_old_one_and_survives_a_wrong_file(home, capsys):
    assert main(["init"]) == 0
    key = home / "data" / "rios" / "identity.key"
    before = key.read_bytes()
    wrong = home / "wrong.key"
    wrong.write_bytes(before[:30])
    wrong.chmod(0o600)
    assert main(["id", "import", str(wrong), "--force"]) == 1
    assert key.read_bytes() == before
    assert main(["id", "export", str(home / "copy.key")]) == 0
    assert main(["id", "import", str(home / "copy.key")]) == 2
    assert main(["id", "import", str(home / "copy.key"), "--force"]) == 0
    assert [old.read_bytes() for old in key.parent.glob("identity.replaced-*")] == [before]
    assert not list(key.parent.glob("*.new-*"))


def test_closed_standard_streams_are_no_fault(home):
    command = [sys.executable, "-P", "-m", "node", "chat", "--local"]
    with subprocess.Popen(["sh", "-c", '"$@" <&- >&-', "sh", *command], stderr=subprocess.PIPE, text=True) as process:
        assert "no question" in process.communicate()[1]
    assert process.returncode == 2


def test_pause_and_resume_wait_for_a_node_that_is_not_running(home, capsys):
    assert main(["init"]) == 0
    mark = home / "data" / "rios" / "paused"
    assert main(["pause"]) == 0
    assert "will start paused" in capsys.readouterr().out
    assert mark.exists()
    assert main(["resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"paused": False}
    assert not mark.exists()
