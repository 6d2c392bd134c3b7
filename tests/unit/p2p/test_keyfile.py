"""Key files: what an operator meets."""

import json
import os
import stat

import pytest

from config.errors import ConfigError, IntegrityError, LocalError
from p2p import keyfile


def test_create_and_load(tmp_path):
    path = tmp_path / "sub" / "key.json"
    identity = keyfile.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keyfile.load(path).peer_id == identity.peer_id
    assert os.listdir(path.parent) == ["key.json"]


def test_passphrase(tmp_path):
    path = tmp_path / "key"
    identity = keyfile.create(path, passphrase="correct horse")
    assert identity.seed.hex() not in path.read_text()
    assert keyfile.load(path, passphrase="correct horse").seed == identity.seed
    with pytest.raises(ConfigError, match="passphrase is wrong"):
        keyfile.load(path, passphrase="battery")
    with pytest.raises(ConfigError, match="no passphrase"):
        keyfile.load(path)


def test_an_existing_key_is_never_overwritten(tmp_path):
    path = tmp_path / "key"
    first = keyfile.create(path)
    with pytest.raises(LocalError) as error:
        keyfile.create(path)
    assert error.value.code == "conflict"
    assert keyfile.load(path).seed == first.seed


def test_export_and_import(tmp_path):
    identity = keyfile.create(tmp_path / "a")
    data = keyfile.dumps(identity, passphrase="x")
    keyfile.save(tmp_path / "b", keyfile.loads(data, passphrase="x"))
    assert keyfile.load(tmp_path / "b").seed == identity.seed


def test_open_permissions_are_refused(tmp_path):
    path = tmp_path / "key"
    keyfile.create(path)
    path.chmod(0o644)
    with pytest.raises(LocalError, match="read by others") as error:
        keyfile.load(path)
    assert "chmod 600" in error.value.hint


@pytest.mark.parametrize(
    "damage", [lambda b: b[:40], lambda b: b"", lambda b: b"{}", lambda b: b"[]", lambda b: b"\xff"]
)
def test_damage_is_told(tmp_path, damage):
    path = tmp_path / "key"
    keyfile.create(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(IntegrityError, match="truncated or damaged"):
        keyfile.load(path)


def test_an_altered_seed_is_told(tmp_path):
    path = tmp_path / "key"
    keyfile.create(path)
    fields = json.loads(path.read_text())
    fields["seed"] = "00" * 32
    path.write_text(json.dumps(fields))
    with pytest.raises(IntegrityError):
        keyfile.load(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(LocalError, match="no key file"):
        keyfile.load(tmp_path / "none")
    with pytest.raises(LocalError, match="cannot read"):
        keyfile.load(tmp_path)
