"""Settings: precedence, and what an operator is told when something is wrong."""

from dataclasses import fields
from pathlib import Path

import pytest

from config.errors import ConfigError
from config.load import load, render_file, render_reference
from config.settings import sections

ROOT = Path(__file__).parents[3]


def write(folder: Path, text: str) -> Path:
    path = folder / "rios.toml"
    path.write_text(text)
    return path


def test_later_sources_win_and_say_so(tmp_path):
    file = write(tmp_path, '[node]\nname = "file"\nregion = "file"\nlog_level = "warning"\n')
    loaded = load(file, {"RIOS_NODE_NAME": "env", "RIOS_NODE_REGION": "env"}, ["node.name=flag"])
    assert (loaded.settings.node.name, loaded.settings.node.region, loaded.settings.node.log_level) == (
        "flag",
        "env",
        "warning",
    )
    assert loaded.origin["node.name"].startswith("--set")
    assert loaded.origin["node.region"] == "environment RIOS_NODE_REGION"
    assert loaded.origin["node.log_level"] == str(file)
    assert loaded.origin["p2p.listen"] == "default"


def test_lists_and_switches_from_the_environment():
    environ = {"RIOS_P2P_SEEDS": "/a, /b", "RIOS_GATEWAY_ENABLED": "yes", "RIOS_DMOE_RAM_BYTES_MAX": "1_000"}
    settings = load(None, environ).settings
    assert settings.p2p.seeds == ("/a", "/b")
    assert settings.gateway.enabled is True
    assert settings.dmoe.ram_bytes_max == 1000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[p2p]\nlissten = ["/x"]', "did you mean 'listen'"),
        ("[dmo]\nthreads = 1", "did you mean 'dmoe'"),
        ("[node]\nport = 1", "it belongs to [gateway] port"),
        ('[dmoe]\nthreads = "two"', "is not a whole number"),
        ("[dmoe]\nthreads = true", "is not a whole number"),
        ("[dmoe]\nthreads = -1", "out of range"),
        ('[dmoe]\ndevice = "tpu"', "one of auto, cpu, cuda"),
        ("[p2p]\nseeds = [1]", "is not a list of texts"),
        ('[gateway]\ndatabase = "postgresql://me:hunter2@db/x"', "holds a password"),
        ('[node]\npassword = "x"', "secrets do not belong"),
        ("node = 1", "must be a section"),
        ("[node", "not valid TOML"),
        ("[node]\nmetrics_port = " + "9" * 5000, "not valid TOML"),
    ],
)
def test_a_wrong_file_names_the_fault(tmp_path, text, says):
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    assert says in str(caught.value)
    assert str(file) in caught.value.message


@pytest.mark.parametrize("flag", ["node.name", "name=x", "node.nome=x", "nod.name=x", "dmoe.threads=x"])
def test_wrong_flags_are_refused(flag):
    with pytest.raises(ConfigError):
        load(None, {}, [flag])


def test_an_unknown_environment_name_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'listen'"):
        load(None, {"RIOS_P2P_LISTN": "x"})


def test_the_written_file_loads_to_what_was_asked(tmp_path):
    changes = {"p2p.listen": ("/ip4/127.0.0.1/tcp/0",), "gateway.enabled": True, "node.name": 'a "quoted"\nname\x7f°\\'}
    settings = load(write(tmp_path, render_file(changes)), {}).settings
    assert settings.p2p.listen == changes["p2p.listen"]
    assert settings.gateway.enabled is True
    assert settings.node.name == changes["node.name"]


def test_the_written_file_shows_every_setting_with_its_help():
    text = render_file()
    for kind in sections().values():
        for each in fields(kind):
            assert f"# {each.name} = " in text
            assert each.metadata["help"] in text


def test_the_reference_page_is_the_one_in_the_docs():
    assert (ROOT / "docs" / "settings.md").read_text() == render_reference()


def test_a_required_file_must_exist_and_be_readable(tmp_path):
    missing = tmp_path / "rios.toml"
    assert load(missing, {}).origin["node.name"] == "default"
    with pytest.raises(ConfigError, match="there is no config file"):
        load(missing, {}, required=True)
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path, {})


def test_a_list_of_whole_numbers(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("[dmoe]\nlocal_layers = [2, 1]\n")
    assert load(file, {}).settings.dmoe.local_layers == (2, 1)
    assert load(None, {"RIOS_DMOE_LOCAL_LAYERS": "3, 0"}).settings.dmoe.local_layers == (3, 0)
    assert load(None, {}, ["dmoe.local_layers=[0,4]"]).settings.dmoe.local_layers == (0, 4)
    for wrong, why in (
        ("[1]", "list of 2"),
        ("2", "list of 2"),
        ("[1, true]", "list of 2"),
        ("[1, -1]", "each from 0"),
    ):
        file.write_text(f"[dmoe]\nlocal_layers = {wrong}\n")
        with pytest.raises(ConfigError, match="local_layers") as refused:
            load(file, {})
        assert why in str(refused.value)
    with pytest.raises(ConfigError, match="not a list of whole numbers"):
        load(None, {"RIOS_DMOE_LOCAL_LAYERS": "two,one"})
