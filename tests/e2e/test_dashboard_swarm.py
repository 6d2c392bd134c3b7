"""The dashboard, and the API under it, over a real swarm of three processes: a worker is killed, and comes back.

One orchestrator with the gateway and the ledger, two workers that each hold every shard of a tiny model.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from browser_rig import NEEDED, Browser, chromium

from node.rig import rios
from tests.faults.rig import Rig, swarm_of

PASSWORD = "correct horse battery staple"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with swarm_of(tmp_path_factory.mktemp("board"), layers_per_shard=2) as made:
        yield made


@pytest.fixture(scope="module")
def http(rig: Rig) -> Iterator[httpx.Client]:
    """As an admin who chose a password through an invite."""
    url = rig.url(rig.first)
    with httpx.Client(base_url=url, timeout=20) as client:
        rios(rig.first, "gateway", "user", "create", "root", "--role", "admin", "--email", "root@example.com")
        rios(rig.first, "gateway", "user", "credit", "root", "10")
        token = json.loads(rios(rig.first, "gateway", "user", "invite", "root", "--json"))["token"]
        assert client.post("/v1/auth/accept", json={"token": token, "password": PASSWORD}).status_code == 204
        body = {"email": "root@example.com", "password": PASSWORD}
        client.headers["authorization"] = f"Bearer {client.post('/v1/auth/login', json=body).json()['access_token']}"
        yield client


def eventually(look: Callable[[], Any], wanted: Callable[[Any], bool], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not wanted(seen := look()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)
    return seen


def deployment(http: httpx.Client, model: str) -> Any:
    return http.get(f"/v1/deployments/{model}").json()


def test_the_swarm_is_what_it_is(rig: Rig, http: httpx.Client) -> None:
    workers = http.get("/v1/workers").json()["data"]
    assert workers[0]["peer_id"] == rig.first.peer_id
    assert {worker["peer_id"] for worker in workers} == {node.peer_id for node in (rig.first, *rig.workers)}
    eventually(
        lambda: http.get("/v1/workers").json()["data"],
        lambda rows: all(row["health"] == "healthy" and row["round_trip_ms"] is not None for row in rows),
    )
    one = http.get(f"/v1/workers/{rig.workers[0].peer_id}").json()
    assert one["shards"] == len(rig.held(rig.workers[0])) + 1, "its experts, and the trunk on its disk"
    assert one["hardware"]["cores"] >= 1
    assert one["microcredits_per_tflop"] > 0
    assert http.get("/v1/workers/12D3nobody").status_code == 404
    (map_,) = http.get("/v1/swarm/map").json()["data"]
    assert (map_["id"], map_["layers"], map_["wanted"]) == (rig.model, 3, 2)
    place = map_["workers"].index(rig.workers[0].peer_id)
    held = {shard["id"] for shard in map_["shards"] if place in shard["holders"]}
    assert held == {*rig.held(rig.workers[0]), "trunk"}
    ready = eventually(lambda: deployment(http, rig.model), lambda seen: seen["state"] == "ready")
    assert (ready["replicas"], ready["replicas_min"], ready["owner"], ready["mine"]) == (2, 2, None, True)
    assert all(shard["healthy"] >= shard["wanted"] for shard in ready["shards"])


def test_the_ledger_is_read(rig: Rig, http: httpx.Client) -> None:
    with rig.client() as client:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=8, extra_body={"min_tokens": 8}
        )
    summary = http.get("/v1/ledger").json()
    assert summary["account"] == rig.first.peer_id
    balance = http.get("/v1/ledger/balance").json()
    assert balance["balance"] + balance["locked"] <= summary["supply"] == 10_000_000_000
    entries = http.get("/v1/ledger/entries", params={"limit": 1}).json()
    assert (len(entries["data"]), entries["has_more"]) == (1, True)
    older = http.get("/v1/ledger/entries", params={"limit": 500, "after": entries["last_id"]}).json()["data"]
    assert all(row["place"] < entries["data"][0]["place"] for row in older)
    grant = http.get(f"/v1/ledger/entry/{older[-1]['id']}").json()
    assert grant["certificate"]["valid"] is True
    statement = http.get("/v1/ledger/statement").json()["data"]
    assert statement[0]["balance"] == http.get("/v1/ledger/balance").json()["balance"]
    (witness,) = http.get("/v1/ledger/witnesses").json()["witnesses"]
    assert (witness["node"], witness["is_self"]) == (rig.first.peer_id, True)
    channels = http.get("/v1/ledger/channels").json()["data"]
    assert {row["payee"] for row in channels} <= {worker.peer_id for worker in rig.workers}
    assert channels
    for path in ("entry/nonsense", "balance?account=nobody", "statement?account=nobody", "entries?after=x"):
        assert http.get(f"/v1/ledger/{path}").status_code == 400, path
    assert http.get(f"/v1/ledger/entry/{'0' * 64}").status_code == 404


def test_scaled_and_taken_back_over_the_api(rig: Rig, http: httpx.Client) -> None:
    scaled = http.patch(f"/v1/deployments/{rig.model}", json={"replicas": 1}).json()
    assert scaled["replicas"] == 1
    assert rig.first.ask("model.list")[0]["replicas_wanted"] == 1
    assert http.delete(f"/v1/deployments/{rig.model}").status_code == 204
    assert deployment(http, rig.model)["error"]["code"] == "not_found"
    assert http.post("/v1/deployments", json={"model": "nothing"}).status_code == 404
    assert http.post("/v1/deployments", json={"model": "tiny", "replicas": 0}).status_code == 400
    made = http.post("/v1/deployments", json={"model": "tiny", "replicas": 2})
    assert made.status_code == 201
    assert made.json()["owner"]
    assert http.post("/v1/deployments", json={"model": "tiny"}).status_code == 409
    with httpx.Client(base_url=http.base_url, headers={"authorization": f"Bearer {rig.keys[rig.first.name]}"}) as other:
        assert other.delete(f"/v1/deployments/{rig.model}").status_code == 403
        assert other.get(f"/v1/deployments/{rig.model}").json()["mine"] is False
    actions = [row["action"] for row in http.get("/v1/audit", params={"limit": 3}).json()["data"]]
    assert actions == ["deployment.created", "deployment.deleted", "deployment.scaled"]
    eventually(lambda: deployment(http, rig.model), lambda seen: seen["state"] == "ready")


@NEEDED
def test_a_killed_worker_pales_on_the_map_and_comes_back(rig: Rig, http: httpx.Client) -> None:
    victim = rig.workers[0]

    def use(seen: Browser) -> None:
        page = seen.page
        page.set_default_timeout(90_000)
        seen.sign_in("root")
        seen.open("/swarm")
        node = f"#sky [data-peer='{victim.peer_id}']"
        page.locator(f"{node}[data-health=healthy]").wait_for()
        assert page.locator("#list tr").count() == 3
        twice = page.locator("#heat rect.h2").count()
        assert twice > 0
        victim.kill()
        page.locator(f"{node}[data-health=gone]").wait_for()
        page.wait_for_function("document.querySelectorAll('#heat rect.h2').length === 0")
        eventually(lambda: deployment(http, rig.model), lambda seen: seen["state"] == "degraded")
        seen.open("/deployments")
        page.locator(".badge[data-state=degraded]").wait_for()
        rig.start(victim)
        page.locator(".badge[data-state=ready]").wait_for()
        seen.open("/swarm")
        page.locator(f"{node}[data-health=healthy]").wait_for()
        page.wait_for_function(f"document.querySelectorAll('#heat rect.h2').length === {twice}")
        # and the swarm answers in the playground
        seen.open("/chat")
        page.locator("#max_tokens").evaluate("e => (e.value = 16)")
        page.get_by_label("Message", exact=True).fill("hello")
        page.keyboard.press("Enter")
        page.locator(".assistant .figures, .assistant.bad").wait_for()
        seen.open("/ledger")
        assert page.get_by_role("heading", name="Final entries").is_visible()
        page.locator("table a code").first.click()
        page.get_by_text("Its certificate holds").wait_for()

    chromium().look(rig.url(rig.first), use, {})
