"""What the swarm is paid, request by request: a gateway with two paid workers, and every nanocredit of it explained."""

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import httpx
import openai
import pytest

from config.errors import LocalError
from config.vocabulary import KFLOP_PER_TFLOP as NANO
from node.rig import NodeProcess, rios
from tests.faults.rig import MODEL, Rig, swarm_of

TOKENS, LONG_TOKENS = 40, 150
PROBED_SECONDS = 60
"""Replicas are tried out now and then, not at once."""
SETTINGS = {
    "dmoe.call_timeout_ms": 2000,
    "dmoe.audit_share": 0.2,
    "gateway.microcredits_per_million_output_tokens": 200_000_000,
}


@pytest.fixture(scope="module", params=["experts", "stages"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    route = request.param
    folder = tmp_path_factory.mktemp(f"costs-{route}")
    with swarm_of(folder, settings=SETTINGS, layers_per_shard=3, mode=route, routes=(route,)) as made:
        if route == "stages":  # the node that asks has the files too, and would run them itself
            made.first.stop()
            manifest = json.loads((made.first.data / "models" / made.model / "manifest.json").read_text())
            layers = [shard["layers"] for shard in manifest["shards"] if shard["kind"] == "stage"]
            hosts = [worker.peer_id for worker in made.workers]
            pins = [f"{first}-{last}={hosts[number % 2]}" for number, (first, last) in enumerate(layers)]
            text = made.first.config_file.read_text()
            made.first.config_file.write_text(text.replace("[dmoe]\n", f"[dmoe]\nplan_pins = {json.dumps(pins)}\n"))
            made.start(made.first)
            made.wait_replicas()
        yield made


def question(words: str, tokens: int = TOKENS) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": words}],
        "temperature": 0,
        "max_tokens": tokens,
        "extra_body": {"min_tokens": tokens},
    }


def reconciled(rig: Rig, *more: str) -> dict[str, Any]:
    """What the command says while the node runs; exit code 1 would raise."""
    found: dict[str, Any] = json.loads(rios(rig.first, "billing", "reconcile", "--json", *more))
    return found


@contextmanager
def stopped(*nodes: NodeProcess) -> Iterator[None]:
    """Processes that do not answer for a while."""
    for node in nodes:
        assert node.process is not None
        os.kill(node.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for node in nodes:
            assert node.process is not None
            os.kill(node.process.pid, signal.SIGCONT)


def answer_whole(rig: Rig, words: str) -> None:
    with rig.client() as client:
        client.chat.completions.create(**question(words))


def answer_cut_off(rig: Rig, words: str) -> None:
    with rig.client() as client, client.chat.completions.create(**question(words, LONG_TOKENS), stream=True) as stream:
        for count, _ in enumerate(stream):
            if count == 5:
                return


def answer_that_fails(rig: Rig, words: str) -> None:
    """All workers stop in the middle of it, for longer than a call may take."""
    with rig.client() as client, suppress(openai.APIError):
        stream = client.chat.completions.create(**question(words, LONG_TOKENS), stream=True)
        for count, _ in enumerate(stream):
            if count == 5:
                with stopped(*rig.workers):
                    for _ in stream:
                        pass


def test_every_nanocredit_is_some_requests_or_is_named(rig: Rig) -> None:
    together = [
        threading.Thread(target=ask, args=(rig, f"{ask.__name__} {number}"))
        for number, ask in enumerate([answer_whole, answer_whole, answer_whole, answer_cut_off])
    ]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    answer_that_fails(rig, "and this one fails")
    answer_whole(rig, "after it")
    end = time.monotonic() + PROBED_SECONDS
    while "probe" not in reconciled(rig)["swarm_nano"] and time.monotonic() < end:
        time.sleep(1)
    found = reconciled(rig, "--by", "request")
    assert found["ties"], found
    assert found["in_flight_nano"] == 0
    assert sum(found["swarm_nano"].values()) == found["counted_nano"]
    assert found["swarm_cost"] == found["counted_nano"] // NANO
    assert found["margin"] == found["charges"] - found["swarm_cost"]
    assert found["swarm_nano"]["probe"] > 0
    rows = found["by"]
    assert sorted(row["outcome"] for row in rows) == ["cancelled", "failed", "length", "length", "length", "length"]
    assert all(row["swarm_nano"] > 0 for row in rows)
    assert sum(row["swarm_nano"] for row in rows) == found["swarm_nano"]["request"]
    assert all(row["margin"] == row["microcredits"] - row["swarm_nano"] // NANO for row in rows)
    paid = {each["channel"]: each for each in rig.first.ask("ledger.channels") if each["side"] == "buy"}
    one = reconciled(rig, "--request", rows[0]["id"])["request"]
    assert sum(line["nano"] for line in one["channels"]) == rows[0]["swarm_nano"]
    assert all(line["peer_id"] == paid[line["channel"]]["peer_id"] for line in one["channels"])
    assert all(0 < line["calls"] <= paid[line["channel"]]["calls"] for line in one["channels"])


def test_only_an_admin_sees_what_it_cost(rig: Rig) -> None:
    row = reconciled(rig, "--by", "request")["by"][0]
    with rig.client() as mine:
        headers = {"authorization": f"Bearer {mine.api_key}"}
    url = rig.url(rig.first)
    users = json.dumps(httpx.get(f"{url}/v1/billing/usage", headers=headers).json())
    users += json.dumps(httpx.get(f"{url}/v1/billing/usage/summary", headers=headers).json())
    assert row["id"] in users
    assert "swarm" not in users
    assert "margin" not in users
    assert httpx.get(f"{url}/v1/billing/usage/{row['id']}/cost", headers=headers).status_code == 403
    key = json.loads(rios(rig.first, "gateway", "key", "create", "--user", "boss", "--json"))["secret"]
    rios(rig.first, "gateway", "user", "role", "boss", "admin")
    headers = {"authorization": f"Bearer {key}"}
    found = httpx.get(f"{url}/v1/billing/usage/{row['id']}/cost", headers=headers).json()
    assert (found["swarm_nano"], found["margin"]) == (row["swarm_nano"], row["margin"])
    assert sum(line["nano"] for line in found["channels"]) == row["swarm_nano"]
    summed = httpx.get(f"{url}/v1/billing/usage/summary?by=user", headers=headers).json()["data"]
    assert sum(each["swarm_nano"] for each in summed) == reconciled(rig)["swarm_nano"]["request"]
    assert httpx.get(f"{url}/v1/billing/usage/nothing/cost", headers=headers).status_code == 404


def test_a_restart_leaves_nothing_unexplained(rig: Rig) -> None:
    before = reconciled(rig)
    rig.first.kill()
    rig.start(rig.first)
    rig.wait_replicas()
    answer_whole(rig, "after the restart")
    found = reconciled(rig)
    assert found["in_flight_nano"] == 0
    assert found["swarm_nano"]["request"] > before["swarm_nano"]["request"]


def test_a_usage_row_that_was_tampered_with_is_named(rig: Rig) -> None:
    row = reconciled(rig, "--by", "request")["by"][0]
    with closing(sqlite3.connect(rig.first.data / "gateway.db", timeout=20)) as database:

        def change(by: int) -> None:
            with database:
                database.execute("UPDATE usages SET swarm_nano = swarm_nano + ? WHERE id = ?", (by, row["id"]))

        change(1)
        with pytest.raises(LocalError):
            rios(rig.first, "billing", "reconcile", "--json")
        change(-1)
        assert reconciled(rig)["ties"]
