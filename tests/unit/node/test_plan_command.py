"""``rios plan``: what is asked is checked, what comes out says who serves what, in JSON and for people."""

import json
from types import SimpleNamespace

import pytest

from config.errors import ConfigError
from config.settings import Settings
from dmoe.core.privacy import privacy_of
from dmoe.core.spans import Ask
from dmoe.planning import wishes_of
from node import plan as command
from node.commands import build_parser
from tests.unit.dmoe.test_planning import forget_experts, node


async def asked(models, network, manifest, **args):
    running = SimpleNamespace(
        store=SimpleNamespace(find=lambda name: manifest),
        planner=models.planner,
        identity=network.identity,
        settings=Settings(),
    )
    data = await command.answer(running, {"model": "tiny", **args}, None)
    return json.loads(json.dumps(data, allow_nan=False))


async def test_the_table_names_routes_hosts_and_reasons(tmp_path):
    async with node(tmp_path) as (models, networks, manifest, _):
        data = await asked(models, networks[0], manifest, prompt_tokens=30, answer_tokens=20, batch=4)
        text = command.rendered(data)
    assert data["chosen"] == "fused"
    assert data["ask"] == {"prompt_tokens": 30, "answer_tokens": 20, "batch": 4}
    (remote,) = (each for each in data["candidates"] if each["route"] == "experts")
    assert remote["spans"][0]["peers"] == [networks[0].peer_id, networks[1].peer_id]
    assert remote["spans"][0]["microcredits_per_tflop"] == 700
    lines = text.splitlines()
    assert lines[0] == "tiny: a prompt of 30 tokens, an answer of 20, batch 4; dmoe.route = auto"
    rows = {line.split()[0]: line for line in lines[2:8]}
    assert "chosen: " in rows["fused"]
    assert "times slower" in rows["experts"]
    assert "impossible: " in rows["stages"]
    assert f"this node, {networks[1].peer_id[:16]}" in text


async def test_where_nothing_is_possible_every_route_says_why(tmp_path):
    async with node(tmp_path) as (models, networks, manifest, store):
        forget_experts(store, manifest)
        models.planner._runs = frozenset({"local", "fused"})
        text = command.rendered(await asked(models, networks[0], manifest))
    assert "No route is possible now." in text
    assert text.count("impossible: ") == 5
    assert f"{manifest.expert_shards()[0].id}, " in text


async def test_the_rule_of_privacy_is_shown_and_why_it_leaves_a_route_out(tmp_path):
    async with node(tmp_path) as (models, networks, manifest, _):
        models.planner.wishes = wishes_of("auto", privacy=privacy_of([networks[1].peer_id], True, (1, 0)))
        data = await asked(models, networks[0], manifest)
        text = command.rendered(data)
        assert (
            "privacy: dmoe.trusted_peers_only allows this node and the 1 of dmoe.trusted_peers; "
            "dmoe.local_layers = [1, 0] stay on this node" in text.splitlines()[1]
        )
        assert "that is allowed: " in text
        tight = await asked(models, networks[0], manifest, privacy="local")
        peers = {peer for each in tight["candidates"] if each["possible"] for s in each["spans"] for peer in s["peers"]}
        assert peers == {networks[0].peer_id}
        assert tight["privacy"] == "privacy local: nothing of this request may leave this node"
    assert vars(build_parser().parse_args(["plan", "m", "--privacy", "local"]))["privacy"] == "local"


def test_impossible_sizes_are_refused():
    parsed = build_parser().parse_args(["plan", "m", "--batch", "4"])
    assert command.ask_of(vars(parsed)) == Ask(prompt_tokens=256, answer_tokens=128, batch=4)
    for name, value in (("batch", 0), ("prompt_tokens", -1), ("answer_tokens", 1 << 40), ("batch", "4")):
        with pytest.raises(ConfigError, match="is not possible"):
            command.ask_of({name: value})
