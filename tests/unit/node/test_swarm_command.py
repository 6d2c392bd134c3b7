"""``rios swarm``: new, invite, join, show, and what they refuse."""

import io
import json

import pytest

from node.cli import main

ANNOUNCE = "p2p.announce=/ip4/203.0.113.7/tcp/4701"


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """Switch to the home of one of several nodes by calling it with a name."""
    monkeypatch.delenv("RIOS_CONFIG", raising=False)

    def enter(name: str):
        home = tmp_path / name
        monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
        return home / "data" / "rios"

    return enter


@pytest.fixture
def run(capsys):
    def run(*args: str, code: int = 0):
        assert main([*args, "--json"]) == code
        out = capsys.readouterr()
        run.stderr = out.err
        return json.loads(out.out)

    return run


@pytest.fixture
def founder(homes, run):
    data = homes("founder")
    made = run("swarm", "new", "--name", "home", "--set", ANNOUNCE)
    return data, made, run("swarm", "invite")


def test_new_makes_what_a_private_swarm_needs(founder, run):
    data, made, invite = founder
    assert {path.name for path in data.iterdir()} == {"identity.key", "genesis.json", "swarm.json"}
    assert (data / "swarm.json").stat().st_mode & 0o777 == 0o600
    key = json.loads((data / "swarm.json").read_text())["key"]
    assert invite["seeds"] == [f"/ip4/203.0.113.7/tcp/4701/p2p/{made['peer_id']}"]
    assert "contains the swarm's key" in run.stderr
    shown = run("swarm", "show")
    assert (shown["private"], shown["name"], shown["id"]) == (True, "home", made["swarm"])
    for text in (json.dumps(made), json.dumps(shown), run.stderr):
        assert key not in text
    assert "already" in run("swarm", "new", code=2)["error"]["message"]
    assert json.loads((data / "swarm.json").read_text())["key"] == key


def test_join_writes_everything_a_member_needs(founder, homes, run, monkeypatch):
    founder_data, made, invite = founder
    data = homes("member")
    monkeypatch.setattr("sys.stdin", io.StringIO(invite["invite"] + "\n"))
    joined = run("swarm", "join", "-", "--set", "node.name=member")
    assert invite["invite"] not in run.stderr
    assert (joined["swarm"], joined["seeds"]) == (made["swarm"], invite["seeds"])
    assert joined["peer_id"] != made["peer_id"]
    assert (data / "genesis.json").read_text() == (founder_data / "genesis.json").read_text()
    assert run("swarm", "show")["seeds"] == invite["seeds"]
    assert run("config", "check")["ok"]
    assert (
        json.loads((data / "swarm.json").read_text())["key"]
        == json.loads((founder_data / "swarm.json").read_text())["key"]
    )
    again = run("swarm", "join", invite["invite"])
    assert again["peer_id"] == joined["peer_id"]
    assert "history" in run.stderr
    passed_on = run("swarm", "invite")  # a member may invite too, through the seeds it knows
    assert passed_on["seeds"] == invite["seeds"]


def test_join_replaces_no_other_swarm_or_network_by_accident(founder, homes, run):
    invite = founder[2]["invite"]
    data = homes("other")
    run("swarm", "new")
    before = {path: path.read_bytes() for path in data.iterdir()}
    assert "private swarm already" in run("swarm", "join", invite, code=2)["error"]["message"]
    assert {path: path.read_bytes() for path in data.iterdir()} == before
    assert run("swarm", "join", invite, "--force")["swarm"] == founder[1]["swarm"]
    kept = [path for path in data.iterdir() if path.name.startswith("swarm.replaced-")]
    assert [path.read_bytes() for path in kept] == [before[data / "swarm.json"]]
    assert kept[0].stat().st_mode & 0o777 == 0o600

    data = homes("third")
    run("init", "--new-network")
    refused = run("swarm", "join", invite, code=2)["error"]
    assert "another network already" in refused["message"]
    assert not (data / "swarm.json").exists()


@pytest.mark.parametrize("damage", [lambda t: t[:-30], lambda t: t[:90] + "AAAA" + t[94:], lambda t: "hello"])
def test_a_damaged_invite_writes_nothing(founder, homes, run, damage):
    data = homes("member")
    error = run("swarm", "join", damage(founder[2]["invite"]), code=2)["error"]
    assert "no invite" in error["message"]
    assert "ask for the invite again" in error["hint"]
    assert not data.exists()
    assert not data.parent.parent.joinpath("config").exists()


def test_a_public_swarm_has_nothing_to_invite_to(homes, run):
    homes("public")
    run("init", "--new-network")
    assert run("swarm", "show") == {"private": False, "name": "", "id": "", "seeds": [], "allow": []}
    assert "no private swarm" in run("swarm", "invite", code=2)["error"]["message"]


def test_an_invite_needs_a_way_in(homes, run):
    homes("alone")
    run("swarm", "new")
    assert "no address" in run("swarm", "invite", code=2)["error"]["message"]
    seed = "/ip4/203.0.113.9/tcp/1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    assert run("swarm", "invite", "--seed", seed)["seeds"] == [seed]


@pytest.mark.parametrize("founding", [True, False])
def test_a_named_config_file_need_not_be_there_yet(founder, tmp_path, run, founding):
    file = tmp_path / "named" / "rios.toml"
    named = ("--config", str(file), "--set", f"node.data_dir={tmp_path / 'named' / 'data'}")
    run(*named, "swarm", *(("new",) if founding else ("join", founder[2]["invite"])))
    assert str(tmp_path / "named" / "data") in file.read_text()
    assert run("--config", str(file), "swarm", "show")["private"]
    missing = tmp_path / "nothing.toml"
    assert f"--config {missing} init" in run("--config", str(missing), "swarm", "show", code=2)["error"]["hint"]


def test_settings_that_are_not_written_down_are_named(founder, capsys):
    assert main(["init", "--keep-config", "--set", "p2p.upnp=false"]) == 0
    assert "--set p2p.upnp=false: for this command only" in capsys.readouterr().out
