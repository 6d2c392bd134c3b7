"""Who may do what, over every route there is: what each role, key and stranger gets, and what nobody gets of others."""

import hmac
import re
import time
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
import trio
from fake_swarm import FakeLedger, FakeSwarm
from gateway_rig import Rig, serving

from config.errors import IntegrityError
from config.settings import GatewaySettings
from gateway import audit
from gateway.accounts import open_accounts
from gateway.app import ENDPOINTS
from gateway.db.audit import audit_log
from gateway.endpoint import Endpoint
from gateway.roles import PERMISSIONS, ROLES, Reach, reach_of

GUARDED = [each for each in ENDPOINTS if each.needs is not None]
LACKS = "needs the permission"


async def key_of(rig: Rig, name: str, role: str = "developer", **more: object) -> str:
    """The secret of a fresh key of a user, who is made if need be."""

    def make() -> str:
        if not any(user.name == name for user in rig.accounts.list_users()):
            rig.accounts.create_user(name, role=role)  # type: ignore[arg-type]
        return rig.accounts.create_key(name, "test", **more).secret  # type: ignore[arg-type]

    return await trio.to_thread.run_sync(make)


async def user_id(rig: Rig, name: str) -> str:
    return (await trio.to_thread.run_sync(rig.accounts.find_user, name)).id


def client(rig: Rig, key: str = "") -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=rig.gateway.url, headers=headers, timeout=20)


async def ask(http: httpx.AsyncClient, endpoint: Endpoint) -> httpx.Response | None:
    """A request with nothing in it; None if the answer is a stream."""
    path = re.sub(r"\{\w+\}", "0", endpoint.template)
    request = http.build_request(endpoint.method, path, json={} if endpoint.body is not None else None)
    answer = await http.send(request, stream=True)
    streams = answer.headers.get("content-type", "").startswith("text/event-stream")
    if not streams:
        await answer.aread()
    await answer.aclose()
    return None if streams else answer


@asynccontextmanager
async def with_admin(tmp_path: Path, database: str = ""):
    settings = {"database": database, "requests_per_minute": 1 << 20}
    async with serving(tmp_path, **settings) as rig, client(rig, await key_of(rig, "root", "admin")) as http:
        yield rig, http


@pytest.mark.parametrize("role", ROLES)
async def test_every_route_keeps_to_the_table_of_roles(tmp_path: Path, role: str) -> None:
    plenty = 1 << 20
    async with (
        serving(tmp_path, requests_per_minute=plenty, swarm=FakeSwarm(), ledger_view=FakeLedger()) as rig,
        client(rig, await key_of(rig, "who", role)) as http,
    ):
        for endpoint in GUARDED:
            answer = await ask(http, endpoint)
            lacks = answer is not None and answer.status_code == 403 and LACKS in answer.text
            assert lacks == (reach_of(role, endpoint.needs) is Reach.NONE), endpoint  # type: ignore[arg-type]
            assert answer is None or answer.status_code < 500, (endpoint, answer.text)


async def test_strangers_get_nothing_that_is_not_open(tmp_path: Path) -> None:
    wrong = "rios_" + "0" * 16 + "_" + "A" * 43
    async with serving(tmp_path) as rig:
        for key in ("", wrong, "sk-somebody-elses", "eyJhbGciOiJub25lIn0.e30."):
            async with client(rig, key) as http:
                for endpoint in GUARDED:
                    answer = await ask(http, endpoint)
                    assert answer is not None
                    assert answer.status_code == 401, endpoint
                    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_keys_scopes_narrow_what_its_users_role_allows(tmp_path: Path) -> None:
    async with serving(tmp_path, requests_per_minute=1 << 20) as rig:
        narrow = await key_of(rig, "root", "admin", scopes=["models:read", "keys:write"])
        async with client(rig, narrow) as http:
            for endpoint in GUARDED:
                answer = await ask(http, endpoint)
                lacks = answer is not None and answer.status_code == 403 and LACKS in answer.text
                assert lacks == (endpoint.needs not in ("models:read", "keys:write")), endpoint
            # nor can it make itself a key with more
            more = await http.post("/v1/api-keys", json={"scopes": ["users:manage"]})
            assert (more.status_code, more.json()["error"]["code"]) == (403, "forbidden")
            same = await http.post("/v1/api-keys", json={})
            assert same.json()["scopes"] == ["keys:write", "models:read"]


def test_every_permission_is_needed_somewhere_or_listed() -> None:
    later = {"settings:read"}
    assert {each.needs for each in GUARDED} | later >= set(PERMISSIONS)


async def test_nobody_sees_or_changes_what_is_anothers(tmp_path: Path, database: str) -> None:
    async with with_admin(tmp_path, database) as (rig, root), rig.http() as ada:
        bobs = await key_of(rig, "bob")
        bob, key = await user_id(rig, "bob"), bobs.split("_")[1]
        for method, path in (
            ("GET", f"/v1/users/{bob}"),
            ("PATCH", f"/v1/users/{bob}"),
            ("GET", f"/v1/users/{bob}/identities"),
            ("GET", f"/v1/api-keys/{key}"),
            ("PATCH", f"/v1/api-keys/{key}"),
            ("DELETE", f"/v1/api-keys/{key}"),
        ):
            hidden = await ada.request(method, path, json={"name": "mine"} if method == "PATCH" else None)
            missing = await ada.request(method, path.replace(bob, "0" * 32).replace(key, "0" * 16), json={})
            assert hidden.status_code == 404, (method, path)
            if method != "PATCH":  # and it looks as if it did not exist
                assert hidden.text.replace(bob, "").replace(key, "") == missing.text.replace("0" * 32, "").replace(
                    "0" * 16, ""
                )
            assert (await root.request("GET", path)).status_code == 200
        assert bob not in (await ada.get("/v1/users")).text
        assert key not in (await ada.get("/v1/api-keys")).text
        assert key not in (await ada.get("/v1/api-keys", params={"user_id": bob})).text
        assert key in (await root.get("/v1/api-keys", params={"user_id": bob})).text
        made = await ada.post("/v1/api-keys", json={"user_id": bob})
        assert made.status_code == 404


async def test_nobody_raises_their_own_role_and_the_last_admin_stays(tmp_path: Path, database: str) -> None:
    async with with_admin(tmp_path, database) as (rig, root), rig.http() as ada:
        me, admin = await user_id(rig, "ada"), await user_id(rig, "root")
        for change in ({"role": "admin"}, {"disabled": False}):
            refused = await ada.patch(f"/v1/users/{me}", json=change)
            assert refused.status_code == 403
        assert (await ada.patch(f"/v1/users/{me}", json={"name": "Ada L."})).json()["name"] == "Ada L."
        for method, change in (("PATCH", {"role": "viewer"}), ("PATCH", {"disabled": True}), ("DELETE", None)):
            last = await root.request(method, f"/v1/users/{admin}", json=change)
            assert (last.status_code, last.json()["error"]["code"]) == (409, "conflict"), (method, change)
        assert (await root.patch(f"/v1/users/{me}", json={"role": "admin"})).json()["role"] == "admin"
        assert (await root.delete(f"/v1/users/{admin}")).json()["disabled"] is True
        assert (await root.get("/v1/users")).status_code == 401


async def test_a_users_keys_are_made_changed_and_ended(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, rig.http() as http:
        made = await http.post("/v1/api-keys", json={"name": "laptop", "scopes": ["inference", "models:read"]})
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        key = made.json()
        async with client(rig, key["secret"]) as other:
            assert (await other.get("/v1/models")).status_code == 200
            assert (await other.get("/v1/api-keys")).status_code == 403
            changed = await http.patch(f"/v1/api-keys/{key['id']}", json={"scopes": ["keys:read"]})
            assert changed.json()["scopes"] == ["keys:read"]
            assert (await other.get("/v1/models")).status_code == 403
            assert "secret" not in (await other.get(f"/v1/api-keys/{key['id']}")).json()
            ended = await http.delete(f"/v1/api-keys/{key['id']}")
            assert ended.json()["revoked_at_ms"] > 0
            assert (await other.get("/v1/api-keys")).status_code == 401
        again = await http.patch(f"/v1/api-keys/{key['id']}", json={"name": "x"})
        assert again.status_code == 409
        past = await http.post("/v1/api-keys", json={"expires_at_ms": 1000})
        assert (past.status_code, past.json()["error"]["param"]) == (400, "expires_at_ms")


async def test_a_key_gives_no_more_time_than_it_has(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, rig.http() as http:
        end = int(time.time() * 1000) + 3_600_000
        short = (await http.post("/v1/api-keys", json={"expires_at_ms": end})).json()
        async with client(rig, short["secret"]) as other:
            assert (await other.post("/v1/api-keys", json={})).json()["expires_at_ms"] == end
            for later in (
                await other.post("/v1/api-keys", json={"expires_at_ms": end + 1}),
                await other.patch(f"/v1/api-keys/{short['id']}", json={"expires_at_ms": end + 1}),
            ):
                assert (later.status_code, later.json()["error"]["param"]) == (403, "expires_at_ms")
            sooner = await other.patch(f"/v1/api-keys/{short['id']}", json={"expires_at_ms": end - 1000})
            assert sooner.json()["expires_at_ms"] == end - 1000
        assert (await http.get(f"/v1/api-keys/{short['id']}")).json()["expires_at_ms"] == end - 1000


async def test_a_key_gives_its_rights_to_no_key_that_outlives_it(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, rig.http() as http:
        end = int(time.time() * 1000) + 3_600_000
        short = (await http.post("/v1/api-keys", json={"expires_at_ms": end})).json()
        narrow = {"scopes": ["models:read", "inference"]}
        made = [{}, {"expires_at_ms": end + 1}, {"expires_at_ms": end}]
        never, later, same = [(await http.post("/v1/api-keys", json={**narrow, **each})).json()["id"] for each in made]
        async with client(rig, short["secret"]) as other:
            for key in (never, later):
                for scopes in (["models:read", "keys:write"], []):
                    refused = await other.patch(f"/v1/api-keys/{key}", json={"scopes": scopes})
                    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "expires_at_ms")
                fewer = await other.patch(f"/v1/api-keys/{key}", json={"scopes": ["models:read"]})
                assert fewer.json()["scopes"] == ["models:read"]
            more = {"scopes": ["models:read", "keys:write"]}
            assert (await other.patch(f"/v1/api-keys/{same}", json=more)).status_code == 200
            both = await other.patch(f"/v1/api-keys/{never}", json={**more, "expires_at_ms": end})
            assert (both.status_code, both.json()["expires_at_ms"]) == (200, end)
        assert (await http.patch(f"/v1/api-keys/{later}", json=more)).status_code == 200, "its own key never ends"


async def test_a_key_does_not_change_what_its_user_signs_in_with(tmp_path: Path) -> None:
    async with with_admin(tmp_path) as (rig, root), rig.http() as ada:
        me = await user_id(rig, "ada")
        refused = await ada.patch(f"/v1/users/{me}", json={"email": "thief@example.com"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert (await root.patch(f"/v1/users/{me}", json={"email": "ada@example.com"})).status_code == 200


async def test_users_are_added_and_shut_out(tmp_path: Path, database: str) -> None:
    async with with_admin(tmp_path, database) as (rig, root):
        made = await root.post("/v1/users", json={"name": "eve", "email": "Eve@Example.com", "role": "viewer"})
        assert (made.status_code, made.json()["email"], made.json()["role"]) == (201, "eve@example.com", "viewer")
        for twice in ({"name": "eve"}, {"name": "eva", "email": "eve@example.com"}):
            assert (await root.post("/v1/users", json=twice)).status_code == 409
        key = (await root.post("/v1/api-keys", json={"user_id": made.json()["id"]})).json()["secret"]
        async with client(rig, key) as eve:
            assert (await eve.get("/v1/users")).json()["data"][0]["name"] == "eve"
            assert (await root.delete(f"/v1/users/{made.json()['id']}")).status_code == 200
            assert (await eve.get("/v1/users")).status_code in (401, 403)


async def test_the_audit_log_tells_who_did_what_and_shows_a_forgery(tmp_path: Path, database: str) -> None:
    async with with_admin(tmp_path, database) as (rig, root), rig.http() as ada:
        key = (await ada.post("/v1/api-keys", json={"name": "<script>alert(1)</script>"})).json()
        eve = (await root.post("/v1/users", json={"name": "eve"})).json()
        await root.delete(f"/v1/api-keys/{key['id']}")
        rows = (await root.get("/v1/audit")).json()["data"]
        assert [row["action"] for row in rows] == ["key.revoked", "user.created", "key.created"]
        assert key["secret"].split("_", 2)[2] not in str(rows)
        own = (await ada.get("/v1/audit")).json()["data"]
        assert [row["action"] for row in own] == ["key.revoked", "key.created"]
        assert eve["id"] not in str(own)
        page = (await root.get("/v1/audit", params={"limit": 1, "after": rows[0]["id"]})).json()
        assert ([row["action"] for row in page["data"]], page["has_more"]) == (["user.created"], True)
        place, _ = await trio.to_thread.run_sync(audit.verify, rig.accounts.database)
        assert place == 3
        await trio.to_thread.run_sync(_forge, rig)


async def test_many_writers_make_one_chain(tmp_path: Path, database: str) -> None:
    """Each thread with a connection pool of its own, as several gateways on one database have."""

    def write(number: int) -> None:
        with open_accounts(GatewaySettings(database=database), tmp_path) as accounts:
            for turn in range(20):
                with accounts.database.write() as connection:
                    audit.record(connection, audit.OPERATOR, "test", f"{number}/{turn}")

    with open_accounts(GatewaySettings(database=database), tmp_path) as accounts:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(trio.to_thread.run_sync, write, number)
        place, _ = audit.verify(accounts.database)
    assert place == 80


async def test_two_admins_who_shut_each_other_out_leave_one(tmp_path: Path, database: str) -> None:
    async with with_admin(tmp_path, database) as (rig, root), client(rig, await key_of(rig, "boss", "admin")) as boss:
        ids = {"root": await user_id(rig, "root"), "boss": await user_id(rig, "boss")}
        answers: list[int] = []

        async def shut_out(http: httpx.AsyncClient, name: str) -> None:
            answers.append((await http.delete(f"/v1/users/{ids[name]}")).status_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(shut_out, root, "boss")
            nursery.start_soon(shut_out, boss, "root")
        assert 200 in answers
        assert set(answers) <= {200, 401, 403, 409}
        users = await trio.to_thread.run_sync(rig.accounts.list_users)
        assert sum(user.role == "admin" and not user.disabled for user in users) == 1


def _forge(rig: Rig) -> None:
    database = rig.accounts.database
    change = sa.update(audit_log).where(audit_log.c.place == 2).values(detail="{}")
    with pytest.raises(Exception, match="append-only"), database.write() as connection:
        connection.execute(change)
    with database.write() as connection:
        if database.is_postgresql:
            connection.execute(sa.text("ALTER TABLE audit_log DISABLE TRIGGER ALL"))
        else:
            connection.execute(sa.text("DROP TRIGGER audit_log_no_update"))
        connection.execute(change)
    with pytest.raises(IntegrityError, match="row 2 of the audit log was changed"):
        audit.verify(database)


async def test_lists_come_in_pages_with_the_fields_asked_for(tmp_path: Path) -> None:
    async with with_admin(tmp_path) as (_rig, root):
        for number in range(5):
            await root.post("/v1/users", json={"name": f"user {number}"})
        seen, after = [], ""
        while True:
            page = (await root.get("/v1/users", params={"limit": 3, "after": after})).json()
            seen += [row["name"] for row in page["data"]]
            if not page["has_more"]:
                break
            after = page["last_id"]
        assert seen[:5] == [f"user {number}" for number in reversed(range(5))]
        assert len(seen) == len(set(seen)) == 7
        thin = (await root.get("/v1/users", params={"fields": "name"})).json()
        assert set(thin["data"][0]) == {"object", "id", "name"}
        for wrong in ({"limit": "0"}, {"limit": "x"}, {"limit": "1001"}, {"fields": ""}, {"after": "\x00"}):
            assert (await root.get("/v1/users", params=wrong)).status_code == 400, wrong
        for hostile in ("' OR 1=1 --", "%", "'; DROP TABLE users; --", "\u0000x", "9" * 128):
            assert (await root.get("/v1/users", params={"after": hostile})).status_code in (200, 400)
        assert (await root.get("/v1/users")).json()["data"]


async def test_lists_go_both_ways(tmp_path: Path, database: str) -> None:
    async with with_admin(tmp_path, database) as (_rig, root):
        for number in range(6):
            assert (await root.post("/v1/api-keys", json={"name": f"key {number}"})).status_code == 201
        for path in ("/v1/api-keys", "/v1/audit"):
            rows = (await root.get(path)).json()["data"]
            ids = [row["id"] for row in rows]
            back = (await root.get(path, params={"before": ids[4], "limit": 2})).json()
            assert ([row["id"] for row in back["data"]], back["has_more"]) == (ids[2:4], True)
            first = (await root.get(path, params={"before": ids[2], "limit": 2})).json()
            assert ([row["id"] for row in first["data"]], first["has_more"]) == (ids[:2], False)
            both = await root.get(path, params={"before": ids[2], "after": ids[2]})
            assert both.status_code == 400


async def test_usage_is_paged_like_other_lists_and_as_before(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        for number in range(4):
            body = {"model": "tiny", "messages": [{"role": "user", "content": str(number)}]}
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        ids = [row["id"] for row in (await http.get("/v1/billing/usage")).json()["data"]]
        for name in ("after", "before"):
            page = (await http.get("/v1/billing/usage", params={name: ids[0], "limit": 2})).json()
            assert ([row["id"] for row in page["data"]], page["has_more"]) == (ids[1:3], True)
            assert (page["first_id"], page["last_id"]) == (ids[1], ids[2])


async def test_what_is_made_under_an_idempotency_key_is_made_once(tmp_path: Path, database: str) -> None:
    async with with_admin(tmp_path, database) as (rig, root), rig.http() as ada:
        key, eve = {"idempotency-key": "order-1"}, {"name": "eve"}
        answers: list[httpx.Response] = []

        async def post() -> None:
            answers.append(await root.post("/v1/users", json=eve, headers=key))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(post)
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert sum("idempotency-replayed" in answer.headers for answer in answers) == 3
        other = await root.post("/v1/users", json={"name": "eva"}, headers=key)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
        # a secret is shown once, and another user's key of the same name is another key
        made = await ada.post("/v1/api-keys", json={"name": "x"}, headers=key)
        again = await ada.post("/v1/api-keys", json={"name": "x"}, headers=key)
        assert (made.status_code, again.status_code) == (201, 409)
        assert again.json()["error"]["code"] == "idempotency_key_used"
        assert made.json()["id"] in again.json()["error"]["message"]
        assert made.json()["secret"] not in again.text
        assert [row["name"] for row in (await ada.get("/v1/api-keys")).json()["data"]].count("x") == 1
        # what failed holds no key
        assert (await root.post("/v1/users", json=eve, headers={"idempotency-key": "2"})).status_code == 409
        assert (await root.post("/v1/users", json=eve, headers={"idempotency-key": "2"})).status_code == 409


async def test_unchanged_answers_are_not_sent_again_and_large_ones_are_packed(tmp_path: Path) -> None:
    async with with_admin(tmp_path) as (_rig, root):
        for number in range(20):
            await root.post("/v1/users", json={"name": f"user {number}"})
        first = await root.get("/v1/users")
        assert first.headers["content-encoding"] == "gzip"
        assert first.headers["etag"].startswith('W/"')
        again = await root.get("/v1/users", headers={"if-none-match": f'"x", {first.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        plain = await root.get("/v1/users", headers={"accept-encoding": "gzip;q=0"})
        assert "content-encoding" not in plain.headers
        assert plain.json() == first.json()
        await root.post("/v1/users", json={"name": "another"})
        changed = await root.get("/v1/users", headers={"if-none-match": first.headers["etag"]})
        assert changed.status_code == 200


async def test_what_people_type_comes_back_as_json_alone(tmp_path: Path) -> None:
    async with with_admin(tmp_path) as (_rig, root):
        name = "<img src=x onerror=alert(1)>"
        await root.post("/v1/users", json={"name": name})
        for path in ("/v1/users", f"/v1/users/{name}", f"/v1/models/{name}", f"/{name}"):
            answer = await root.get(path)
            assert answer.headers["content-type"] == "application/json", path
            assert answer.headers["x-content-type-options"] == "nosniff", path


async def test_keys_are_found_by_their_id_and_compared_in_constant_time(tmp_path: Path, monkeypatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("gateway.accounts.hmac.compare_digest", lambda a, b: compared.append(len(a)) or real(a, b))
    async with serving(tmp_path) as rig:
        wrong = rig.key[:-4] + "AAAA"
        async with client(rig, wrong) as http:
            assert (await http.get("/v1/models")).status_code == 401
    assert compared == [32]
