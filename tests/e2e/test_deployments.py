"""Deployments have owners, and usage adds up, on both databases."""

from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
import trio
from fake_swarm import MODEL, FakeSwarm
from gateway_rig import Rig, serving
from test_rights import client, key_of, user_id

from config.swarm import Deployment, DeploymentMode
from gateway import books
from gateway.billing import usage

TINY = "a" * 64
T = TypeVar("T")


async def test_who_may_change_a_deployment(tmp_path: Path, database: str) -> None:
    swarm = FakeSwarm()
    async with (
        serving(tmp_path, database=database, swarm=swarm) as rig,
        rig.http() as ada,
        client(rig, await key_of(rig, "bob")) as bob,
        client(rig, await key_of(rig, "root", "admin")) as root,
    ):
        made = await ada.post("/v1/deployments", json={"model": "tiny", "replicas": 3})
        assert (made.status_code, made.json()["owner"]) == (201, await user_id(rig, "ada"))
        assert made.json()["mine"] is True
        for path in (TINY, "tiny"):
            assert (await bob.get(f"/v1/deployments/{path}")).json()["mine"] is False
            assert (await bob.patch(f"/v1/deployments/{path}", json={"replicas": 1})).status_code == 403
            assert (await bob.delete(f"/v1/deployments/{path}")).status_code == 403
        assert (await ada.delete(f"/v1/deployments/{MODEL}")).status_code == 403, "made on the command line"
        assert (await bob.post("/v1/deployments", json={"model": TINY})).status_code == 409, "no taking over"
        assert swarm.wanted == {MODEL: 2, TINY: 3}
        assert (await ada.patch("/v1/deployments/tiny", json={"replicas": 4})).json()["replicas"] == 4
        assert (await root.patch(f"/v1/deployments/{MODEL}", json={"replicas": 5})).json()["replicas"] == 5
        assert (await ada.delete("/v1/deployments/tiny")).status_code == 204
        assert (await ada.get("/v1/deployments/tiny")).status_code == 404
        rows = (await root.get("/v1/audit")).json()["data"]
        assert [row["action"] for row in rows] == [
            "deployment.deleted",
            "deployment.scaled",
            "deployment.scaled",
            "deployment.created",
        ]
        # taken back on the command line and deployed by another: the old owner has no say
        await ada.post("/v1/deployments", json={"model": "tiny"})
        await swarm.undeploy(TINY)
        assert (await bob.post("/v1/deployments", json={"model": "tiny"})).status_code == 201
        assert (await ada.delete("/v1/deployments/tiny")).status_code == 403


class SlowSwarm(FakeSwarm):
    """Answers a moment after it did what it was told."""

    told: trio.Event

    async def deploy(self, model: str, replicas: int | None, mode: DeploymentMode) -> Deployment:
        return await self._later(await super().deploy(model, replicas, mode))

    async def scale(self, model_id: str, replicas: int) -> Deployment:
        return await self._later(await super().scale(model_id, replicas))

    async def undeploy(self, model_id: str) -> None:
        await self._later(await super().undeploy(model_id))

    async def _later(self, done: T) -> T:
        self.told.set()
        await trio.sleep(0.5)
        return done


async def test_a_client_that_leaves_is_noted_all_the_same(tmp_path: Path, database: str) -> None:
    swarm = SlowSwarm()
    async with serving(tmp_path, database=database, swarm=swarm) as rig, rig.http() as ada:
        changes: list[tuple[str, str, dict[str, object] | None]] = [
            ("POST", "/v1/deployments", {"model": "tiny", "replicas": 3}),
            ("PATCH", "/v1/deployments/tiny", {"replicas": 4}),
            ("DELETE", "/v1/deployments/tiny", None),
        ]
        for method, path, body in changes:
            swarm.told = trio.Event()
            async with trio.open_nursery() as nursery, rig.http() as leaving:
                nursery.start_soon(partial(leaving.request, method, path, json=body))
                await swarm.told.wait()
                nursery.cancel_scope.cancel()
            await trio.sleep(1)
            owners = [each["owner"] for each in (await ada.get("/v1/deployments")).json()["data"] if each["id"] == TINY]
            assert owners == ([] if method == "DELETE" else [await user_id(rig, "ada")]), method
        rows = (await ada.get("/v1/audit")).json()["data"]
        assert [row["action"] for row in rows] == ["deployment.deleted", "deployment.scaled", "deployment.created"]


async def test_lists_of_workers_come_in_pages(tmp_path: Path) -> None:
    async with serving(tmp_path, swarm=FakeSwarm(dead={3})) as rig, rig.http() as http:
        seen: list[str] = []
        page = {"has_more": True, "last_id": ""}
        while page["has_more"]:
            page = (await http.get("/v1/workers", params={"limit": 3, "after": page["last_id"]})).json()
            seen += [worker["peer_id"] for worker in page["data"]]
        assert len(seen) == len(set(seen)) == 8
        assert [each["health"] for each in (await _list(http, health="gone"))] == ["gone"]
        assert await _list(http, model="nothing") == []
        assert await _list(http, after="nobody") == []


async def _list(http: httpx.AsyncClient, **wanted: str) -> list[dict[str, str]]:
    return (await http.get("/v1/workers", params=wanted)).json()["data"]  # type: ignore[no-any-return]


async def test_usage_adds_up_by_day_and_by_model(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, rig.http() as ada:
        async with client(rig, await key_of(rig, "bob")) as bob:
            await trio.to_thread.run_sync(rig.accounts.credit, "bob", 1000)
            for http, tokens in ((ada, 3), (ada, 5), (bob, 2)):
                body = {"model": "tiny", "prompt": "one two", "max_tokens": tokens}
                assert (await http.post("/v1/completions", json=body)).status_code == 200
        await trio.to_thread.run_sync(_check_sums, rig, await user_id(rig, "ada"))


def _check_sums(rig: Rig, ada: str) -> None:
    database, now = rig.accounts.database, books.now_ms()
    period = (now - usage.DAY_MS, now + usage.DAY_MS)
    (mine,) = usage.by_day(database, ada, *period)
    assert (mine.requests, mine.prompt_tokens, mine.completion_tokens) == (2, 4, 8)
    assert int(mine.name) in (now // usage.DAY_MS, now // usage.DAY_MS - 1)
    (model,) = usage.by_model(database, None, *period)
    assert (model.name, model.requests, model.completion_tokens) == ("tiny", 3, 10)
    assert [name for _, name in usage.newest(database, None, 2)] == ["bob", "ada"]
    assert usage.by_day(database, ada, now + usage.DAY_MS, now + 2 * usage.DAY_MS) == []
