"""``rios ledger genesis new`` and ``epoch-key``: from public keys, without a daemon."""

import json

import pytest

from ledger.core.genesis import from_json
from node.cli import main
from p2p import keyfile
from p2p.core.identity import Identity

PEERS = [Identity.from_seed(bytes([n]) * 32).peer_id for n in range(1, 6)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("RIOS_PASSPHRASE", "secret")
    monkeypatch.delenv("RIOS_CONFIG", raising=False)
    return tmp_path


def new(file, *witnesses, f, more=()):
    flags = [part for peer in witnesses for part in ("--witness", peer)]
    return main(
        ["ledger", "genesis", "new", str(file), "--issuer", PEERS[0], "--root", PEERS[4], *flags, "--f", str(f), *more]
    )


def test_a_network_is_founded_from_public_keys(home, capsys):
    file = home / "g.json"
    assert new(file, *PEERS[:4], f=1, more=["--max-supply", "1000", "--min-lock", "2.5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    made = from_json(file.read_text())
    assert (made.f, made.quorum, made.max_supply, made.min_lock) == (1, 3, 1_000_000_000, 2_500_000)
    assert said["net"] == made.net.hex()
    assert said["tolerance"] == "4 witnesses, 1 may fail or lie"
    assert new(file, *PEERS[:4], f=1) == 2, "a file that is there is kept"
    assert from_json(file.read_text()) == made


def test_one_witness_says_that_nothing_is_tolerated(home, capsys):
    assert new(home / "g.json", PEERS[1], f=0) == 0
    assert "no Byzantine tolerance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("witnesses", "f", "why"),
    [
        (PEERS[:4], 0, "needs exactly 1 witnesses"),
        (PEERS[:5], 1, "needs exactly 4 witnesses"),
        ([PEERS[0]] * 4, 1, "twice"),
        (["12D3KooWnobody"], 0, "peer id"),
        (PEERS[:1], 17, "needs exactly"),
    ],
)
def test_other_committees_are_refused_and_nothing_is_written(home, capsys, witnesses, f, why):
    assert new(home / "g.json", *witnesses, f=f) != 0
    assert why in capsys.readouterr().err
    assert not (home / "g.json").exists()


def test_an_epoch_key_is_kept_under_the_passphrase(home, capsys):
    assert main(["init"]) == 0
    capsys.readouterr()
    assert main(["ledger", "epoch-key", "--json"]) == 0
    key = json.loads(capsys.readouterr().out)["key"]
    (file,) = (home / "data" / "rios" / "epoch-keys").iterdir()
    assert file.stem == key
    assert keyfile.load(file, passphrase="secret").peer_id == key


def test_changes_need_a_daemon(home, capsys):
    assert main(["init"]) == 0
    for words in (["committee"], ["issuer", PEERS[0]], ["allow", "00" * 32]):
        assert main(["ledger", *words]) == 3
        assert "rios run" in capsys.readouterr().err
