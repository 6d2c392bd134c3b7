"""Deployments have owners, and usage adds up, on both databases."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
import sqlalchemy as sa
import trio
from fake_swarm import MODEL, FakeSwarm
from gateway_rig import Rig, serving
from test_rights import client, key_of, user_id

from config.errors import LocalError
from config.swarm import Deployment, DeploymentMode
from gateway import audit
from gateway.billing import usage
from gateway.db import stamps

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


async def test_what_the_operator_deployed_is_nobodys_whoever_had_it_before(tmp_path: Path, database: str) -> None:
    swarm = FakeSwarm()
    async with serving(tmp_path, database=database, swarm=swarm) as rig, rig.http() as ada:
        assert (await ada.post("/v1/deployments", json={"model": "tiny"})).status_code == 201
        assert (await ada.patch("/v1/deployments/tiny", json={"replicas": 3})).json()["mine"] is True
        assert (await ada.get("/v1/deployments/tiny")).json()["mine"] is True
        await swarm.undeploy(TINY)
        await swarm.deploy("tiny", 2, "experts")
        found = (await ada.get("/v1/deployments/tiny")).json()
        assert (found["owner"], found["mine"]) == (None, False)
        assert (await ada.delete("/v1/deployments/tiny")).status_code == 403
        assert (await ada.patch("/v1/deployments/tiny", json={"replicas": 1})).status_code == 403
        assert swarm.wanted[TINY] == 2


async def test_of_two_who_deploy_a_model_at_once_one_has_it(tmp_path: Path, database: str) -> None:
    class Slow(FakeSwarm):
        async def deploy(self, model: str, replicas: int | None, mode: DeploymentMode) -> Deployment:
            await trio.sleep(0.2)
            return await super().deploy(model, replicas, mode)

    async with (
        serving(tmp_path, database=database, swarm=Slow()) as rig,
        rig.http() as ada,
        client(rig, await key_of(rig, "bob")) as bob,
    ):
        answers: dict[str, httpx.Response] = {}

        async def deploy(name: str, http: httpx.AsyncClient, model: str) -> None:
            answers[name] = await http.post("/v1/deployments", json={"model": model})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(deploy, "ada", ada, "tiny")
            nursery.start_soon(deploy, "bob", bob, TINY)
        assert sorted(answer.status_code for answer in answers.values()) == [201, 409]
        (winner,) = (name for name, answer in answers.items() if answer.status_code == 201)
        assert (await ada.get("/v1/deployments/tiny")).json()["owner"] == await user_id(rig, winner)


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


CHANGES: list[tuple[str, str, dict[str, object] | None]] = [
    ("POST", "/v1/deployments", {"model": "tiny", "replicas": 3}),
    ("PATCH", "/v1/deployments/tiny", {"replicas": 4}),
    ("DELETE", "/v1/deployments/tiny", None),
]


async def told(ada: httpx.AsyncClient) -> list[str]:
    return [row["action"] for row in (await ada.get("/v1/audit")).json()["data"]]


async def test_a_deployment_that_spreads_slowly_is_its_users_all_the_same(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spreading(SlowSwarm):
        """Does what it is told, and does not come to an end with telling others."""

        async def _later(self, done: T) -> T:
            await trio.sleep_forever()
            return done

    monkeypatch.setattr("gateway.deployments._CHANGE_SECONDS", 0.5)
    swarm = Spreading()
    async with serving(tmp_path, database=database, swarm=swarm) as rig, rig.http() as ada:
        for method, path, body in CHANGES:
            answer = await ada.request(method, path, json=body)
            assert answer.is_success, (method, answer.text)
            mine = [each["mine"] for each in (await ada.get("/v1/deployments")).json()["data"] if each["id"] == TINY]
            assert mine == ([] if method == "DELETE" else [True]), method
        assert await told(ada) == ["deployment.deleted", "deployment.scaled", "deployment.created"]


async def test_what_the_swarm_did_not_do_in_time_is_not_noted(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(FakeSwarm):
        async def scale(self, model_id: str, replicas: int) -> Deployment:
            await trio.sleep_forever()
            raise AssertionError

    monkeypatch.setattr("gateway.deployments._CHANGE_SECONDS", 0.5)
    async with serving(tmp_path, database=database, swarm=Stuck()) as rig, rig.http() as ada:
        assert (await ada.post("/v1/deployments", json={"model": "tiny"})).status_code == 201
        assert (await ada.patch("/v1/deployments/tiny", json={"replicas": 4})).status_code == 503
        found = (await ada.get("/v1/deployments/tiny")).json()
        assert (found["replicas"], found["mine"]) == (2, True)
        assert await told(ada) == ["deployment.created"]


def fail() -> None:
    raise LocalError("unavailable", "the database is away")


@pytest.mark.parametrize("trouble", [fail, partial(time.sleep, 0.8)], ids=["away", "slow"])
async def test_a_deployment_that_could_not_be_noted_is_noted_later(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, trouble: Callable[[], None]
) -> None:
    record, troubles = audit.record, 0

    def recording(*arguments: object, **more: object) -> None:
        nonlocal troubles
        if troubles:
            troubles -= 1
            trouble()
        record(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("gateway.deployments.record", recording)
    monkeypatch.setattr("gateway.deployments._CHANGE_SECONDS", 0.5)
    swarm = FakeSwarm()
    async with (
        serving(tmp_path, database=database, swarm=swarm) as rig,
        rig.http() as ada,
        client(rig, await key_of(rig, "bob")) as bob,
    ):
        for number, (method, path, body) in enumerate(CHANGES):
            troubles = 2 if trouble is fail else 1
            assert (await ada.request(method, path, json=body)).status_code == 503
            if number != 1:  # then a change comes before a look
                everybodys = (await ada.get("/v1/deployments")).json()["data"]
                mine = [each["mine"] for each in everybodys if each["id"] == TINY]
                assert mine == ([] if method == "DELETE" else [True]), method
            troubles = 0
            if method != "DELETE":
                assert (await bob.delete("/v1/deployments/tiny")).status_code == 403
        assert TINY not in swarm.wanted
        assert (await ada.get("/v1/deployments")).status_code == 200
        assert await told(ada) == ["deployment.deleted", "deployment.scaled", "deployment.created"]


async def test_a_note_that_the_database_never_takes_stops_nobody(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_arguments: object, **_more: object) -> None:
        raise sa.exc.IntegrityError("INSERT", None, Exception("there is no such user"))

    async with serving(tmp_path, database=database, swarm=FakeSwarm()) as rig, rig.http() as ada:
        with monkeypatch.context() as patched:
            patched.setattr("gateway.deployments.record", never)
            assert (await ada.post("/v1/deployments", json={"model": "tiny"})).status_code == 500
        assert (await ada.get("/v1/deployments/tiny")).json()["owner"] is None
        assert (await ada.patch("/v1/deployments/tiny", json={"replicas": 4})).status_code == 403


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
    database, now = rig.accounts.database, stamps.now_ms()
    period = (now - usage.DAY_MS, now + usage.DAY_MS)
    (mine,) = usage.by_day(database, ada, *period)
    assert (mine.requests, mine.prompt_tokens, mine.completion_tokens) == (2, 4, 8)
    assert int(mine.name) in (now // usage.DAY_MS, now // usage.DAY_MS - 1)
    (model,) = usage.by_model(database, None, *period)
    assert (model.name, model.requests, model.completion_tokens) == ("tiny", 3, 10)
    assert [name for _, name in usage.newest(database, None, 2)] == ["bob", "ada"]
    assert usage.by_day(database, ada, now + usage.DAY_MS, now + 2 * usage.DAY_MS) == []
