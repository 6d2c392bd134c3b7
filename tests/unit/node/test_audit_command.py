"""``rios audit``: evidence is judged with the shards on this disk, without a daemon."""

import json
import shutil

import msgspec
import pytest
import trio

from dmoe.core import evidence
from node.cli import main
from tests.unit.dmoe.model_kit import tiny
from tests.unit.dmoe.trust_kit import calls, trust_swarm


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A store, evidence against a liar in it, and true evidence of an honest answer."""
    folder = tmp_path_factory.mktemp("case")
    store, manifest = tiny(folder / "model", quantisation="int8", kind="F32")

    async def run():
        async with trust_swarm(folder, store, manifest) as swarm:
            await swarm.node(serves=False)
            liar, _ = await swarm.node(lie="nudge"), await swarm.node()
            caller = await swarm.caller(share=1.0)
            await calls(caller, manifest, 40, until=lambda: not caller.audit.trust.trusted(liar))
            with trio.fail_after(20):
                while not swarm.blamed:  # noqa: ASYNC110
                    await trio.sleep(0.02)

    trio.run(run)
    (file,) = (folder / "evidence-0").iterdir()
    return store, file


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RIOS_CONFIG", raising=False)
    (tmp_path / "data" / "rios").mkdir(parents=True)
    return tmp_path / "data" / "rios"


def test_guilty_with_the_shard_cannot_tell_without_it(case, home, capsys):
    store, file = case
    assert main(["audit", "verify", str(file), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["outcome"] == "cannot tell"
    assert "is not here" in told["why"]
    shutil.copytree(store.root, home / "models", dirs_exist_ok=True)
    assert main(["audit", "verify", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["outcome"] == "guilty"
    assert told["worst"] > 1
    assert main(["audit", "verify", str(file)]) == 0
    assert "guilty: layer" in capsys.readouterr().out


def test_evidence_that_is_not_what_was_signed_is_refused_by_the_rule_s_name(case, home, tmp_path, capsys):
    _, file = case
    true = evidence.read(file.read_bytes())
    wrong = tmp_path / "wrong.evidence"
    for change, rule in (
        ({"answered": bytes(len(true.answered))}, "path: "),
        ({"worker": "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"}, "signature: "),
        ({"model_id": bytes(32)}, "path: "),
    ):
        wrong.write_bytes(evidence.write(msgspec.structs.replace(true, **change)))
        assert main(["audit", "verify", str(wrong)]) == 1
        assert f"rios: {rule}" in capsys.readouterr().err
    wrong.write_bytes(b"\x90")
    assert main(["audit", "verify", str(wrong)]) == 1
    assert "malformed Evidence" in capsys.readouterr().err
    assert main(["audit", "verify", str(tmp_path / "none")]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_a_damaged_shard_cannot_tell(case, home, capsys):
    store, file = case
    shutil.copytree(store.root, home / "models", dirs_exist_ok=True)
    for path in (home / "models").rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert main(["audit", "verify", str(file)]) == 1
    captured = capsys.readouterr()
    assert "altered" in captured.err + captured.out


def test_the_list_names_who_was_found_out(case, home, capsys):
    from dmoe.trust import Trust

    _, file = case
    Trust(home / "trust.json").guilty("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp", "layer 3")
    (home / "evidence").mkdir()
    shutil.copy(file, home / "evidence")
    assert main(["audit", "ls"]) == 0
    shown = capsys.readouterr().out
    assert "layer 3" in shown
    assert file.name in shown
