"""GraphQL: what each caller sees, what a document may cost, and what does not get in."""

import threading
import time
from pathlib import Path

import pytest
import trio
from gateway_rig import serving
from graphql import get_introspection_query
from test_rights import client, key_of, user_id, with_admin

EVERYTHING = """
{ me { userId name role scopes } users { data { id name role apiKeys(limit: 2) { data { id userId name scopes } } } }
  apiKeys { data { id revokedAtMs } hasMore lastId } models { id ready contextTokens }
  balance { available reserved } usage { data { microcredits createdAtMs model } }
  audit(limit: 5) { data { action target ownerId hash } hasMore } }
"""


async def ask(http, query: str, **more):
    answer = await http.post("/graphql", json={"query": query, **more})
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


def codes(answer) -> list[str]:
    return [error["extensions"]["code"] for error in answer["errors"]]


async def test_each_caller_sees_what_the_routes_would_show(tmp_path: Path, database: str) -> None:
    async with with_admin(tmp_path, database) as (rig, root), rig.http() as ada:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        assert (await ada.post("/v1/chat/completions", json=body)).status_code == 200
        bob = await key_of(rig, "bob")
        made = (await ada.post("/v1/api-keys", json={"name": "laptop", "scopes": ["inference"]})).json()
        for http in (ada, root):
            data = (await ask(http, EVERYTHING))["data"]
            routes = (await http.get("/v1/users")).json()["data"]
            assert [row["id"] for row in data["users"]["data"]] == [row["id"] for row in routes]
            keys = (await http.get("/v1/api-keys")).json()["data"]
            assert [row["id"] for row in data["apiKeys"]["data"]] == [row["id"] for row in keys]
            rows = (await http.get("/v1/audit")).json()["data"]
            assert [row["hash"] for row in data["audit"]["data"]] == [row["hash"] for row in rows]
            assert data["models"][0]["id"] == "tiny"
        data = (await ask(ada, EVERYTHING))["data"]
        assert data["me"]["name"] == "ada"
        assert data["users"]["data"][0]["apiKeys"]["data"][0] == {
            "id": made["id"],
            "userId": await user_id(rig, "ada"),
            "name": "laptop",
            "scopes": ["inference"],
        }
        spent = (await ada.get("/v1/billing/balance")).json()
        assert data["balance"] == {"available": spent["available"], "reserved": spent["reserved"]}
        assert data["usage"]["data"][0]["microcredits"] == 1_000_000 - spent["balance"]
        # bob is neither in ada's lists, nor found by his id
        assert bob.split("_")[1] not in str(data)
        hidden = await ask(
            ada, "query($id: ID!) { user(id: $id) { name } }", variables={"id": await user_id(rig, "bob")}
        )
        assert (hidden["data"], codes(hidden)) == ({"user": None}, ["not_found"])
        assert hidden["errors"][0]["path"] == ["user"]


async def test_pages_go_on_after_the_last_row(tmp_path: Path) -> None:
    async with with_admin(tmp_path) as (_rig, root):
        for number in range(5):
            await root.post("/v1/users", json={"name": f"user {number}"})
        query = "query($after: ID) { users(limit: 3, after: $after) { data { name } lastId hasMore } }"
        seen, after = [], None
        while True:
            part = (await ask(root, query, variables={"after": after}))["data"]["users"]
            seen += [row["name"] for row in part["data"]]
            after = part["lastId"]
            if not part["hasMore"]:
                break
        assert len(seen) == len(set(seen)) == 7
        assert codes(await ask(root, "{ users(limit: 101) { lastId } }")) == ["invalid_value"]
        assert codes(await ask(root, '{ audit(after: "x") { lastId } }')) == ["invalid_value"]


async def test_scopes_narrow_fields_and_the_rest_is_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        async with client(rig, await key_of(rig, "ada", scopes=["graphql", "models:read"])) as http:
            answer = await ask(http, "{ models { id } balance { balance } audit { lastId } }")
            assert answer["data"]["models"][0] == {"id": "tiny"}
            assert (answer["data"]["balance"], answer["data"]["audit"]) == (None, None)
            assert codes(answer) == ["forbidden", "forbidden"]
        async with client(rig, await key_of(rig, "ada", scopes=["models:read"])) as http:
            assert (await http.post("/graphql", json={"query": "{ models { id } }"})).status_code == 403
        async with client(rig) as http:
            refused = await http.post("/graphql", json={"query": get_introspection_query()})
            assert refused.status_code == 401
            assert "ApiKey" not in refused.text


async def test_introspection_is_for_callers(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        schema = (await ask(http, get_introspection_query()))["data"]["__schema"]
        fields = {each["name"] for kind in schema["types"] if kind["name"] == "Query" for each in kind["fields"]}
        assert fields >= {"me", "users", "user", "apiKeys", "models", "balance", "usage", "audit"}


HOSTILE = {
    "too deep": "{ __type(name: \"Q\") " + "{ ofType " * 20 + "{ name }" + "}" * 20 + " }",
    "too costly": "{ users(limit: 100) { data { apiKeys(limit: 100) { data { id name } } } } }",
    "aliases": "{" + "".join(f" a{n}: balance {{ balance }}" for n in range(300)) + "}",
    "aliases of lists": "{" + "".join(f" a{n}: users(limit: 100) {{ data {{ id name }} }}" for n in range(20)) + "}",
    "fragments that double": "{ ...f0 } " + " ".join(
        f"fragment f{n} on Query {{ ...f{n + 1} ...f{n + 1} }}" for n in range(30)
    ) + " fragment f30 on Query { me { name } }",
    "a circle": "{ ...f } fragment f on Query { ...g } fragment g on Query { ...f }",
    "a circle of fields": "{ users { ...f } } fragment f on Users { data { apiKeys { data { id } } } ...f }",
    "nested a thousand times": "{ me " * 400 + "}" * 400,
    "nested lists": "{ user(id: " + "[" * 600 + "]" * 600 + ") { id } }",
    "many words": "{" + " me" * 1600 + "}",
    "the same again and again": "{" + "me{name} " * 370 + "}",
    "the same in a fragment that nobody spreads": "{ me { name } } fragment f on Query {" + "me{name} " * 360 + "}",
    "the same in many fragments": "{" + " ".join(f"...f{n}" for n in range(100)) + "}" + " ".join(
        f"fragment f{n} on Query{{me{{name}}}}" for n in range(100)
    ),
    "the schema again and again": "{" + " ".join(f"a{n}: __schema {{ ...f }}" for n in range(160)) + "}"
    "fragment f on __Schema { types { fields { args { name type { name } } type { name } description } } }",
    "the schema twice": "{ ...f b: __schema { types { name } } } fragment f on Query { __schema { __typename } }",
    "many types": "{" + " ".join(f'a{n}: __type(name: "Usage") {{ name }}' for n in range(9)) + "}",
    "types of fields of types": "{ __schema { types {" + "fields { type { ofType {" * 3 + "name" + "}}}" * 3 + "}}}",
    "the fields of one type": '{ __type(name: "__Type") { fields {' + "type { fields { args { name } } } " + " ".join(
        f"a{n}: type {{ ofType {{ fields {{ type {{ fields {{ name }} }} }} }} }}" for n in range(60)
    ) + "} } }",
    "not GraphQL": "{ users(",
    "an unknown field": "{ users { data { passwordHash secret } } }",
    "a change": "mutation { createUser(name: \"x\") { id } }",
    "several operations": "query a { me { name } } query b { me { name } }",
    "an overflow": "{ users(limit: 99999999999999999999) { lastId } }",
    "control characters": "{ user(id: \"\\u0000'; DROP TABLE users; --\") { id } }",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_costs_too_much_or_is_wrong_is_an_error(tmp_path: Path, name: str) -> None:
    async with with_admin(tmp_path) as (_rig, root):
        answer = await ask(root, HOSTILE[name])
        assert answer["errors"]
        assert not answer.get("data") or not any(answer["data"].values()), answer
        assert all(error["extensions"]["code"] != "internal" for error in answer["errors"]), answer
        assert (await ask(root, "{ me { name } }"))["data"]["me"]["name"] == "root"


async def test_a_limit_in_a_variable_costs_as_much(tmp_path: Path) -> None:
    query = "query($n: Int! = 100) { users(limit: $n) { data { apiKeys(limit: $n) { data { id name } } } } }"
    async with with_admin(tmp_path) as (_rig, root):
        for variables in ({}, {"n": 100}, {"n": 100.0}, {"n": "100"}, {"n": None}):
            assert "costs more" in (await ask(root, query, variables=variables))["errors"][0]["message"]
        assert (await ask(root, query, variables={"n": 3}))["data"]["users"]["data"]


async def test_slow_documents_hold_up_nobody_else(tmp_path: Path, monkeypatch) -> None:
    """They run beside what lets callers in and what reserves money, and one user has few under way."""
    go_on, asked = threading.Event(), []

    def slow(*_args: object, **_more: object) -> list[object]:
        asked.append(go_on.wait(20))
        return []

    monkeypatch.setattr("gateway.managing.list_users", slow)
    answers = []

    async def send(http) -> None:
        answers.append(await http.post("/graphql", json={"query": "{ users { lastId } }"}))

    async with serving(tmp_path) as rig, rig.http() as ada, client(rig, await key_of(rig, "bob")) as bob:
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(send, ada)
                with trio.fail_after(10):
                    while len(answers) < 4:  # noqa: ASYNC110 - it tells nobody
                        await trio.sleep(0.01)
                    assert (await bob.get("/v1/billing/balance")).status_code == 200
                    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
                    assert (await ada.post("/v1/chat/completions", json=body)).status_code == 200
                for answer in answers:
                    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
                    assert answer.headers["retry-after"] == "1"
                nursery.start_soon(send, bob)
                await trio.sleep(0.2)
                go_on.set()
        finally:
            go_on.set()
        assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 4
        await send(ada)
        assert answers[-1].status_code == 200


async def test_documents_are_bounded_in_all(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.api.graphql._UNDER_WAY_MAX", 0)
    async with serving(tmp_path) as rig, rig.http() as http:
        refused = await http.post("/graphql", json={"query": "{ me { name } }"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")


async def test_nobody_works_for_who_has_left(tmp_path: Path, monkeypatch) -> None:
    looked = []

    def slow(*_args: object, **_more: object) -> list[object]:
        looked.append(time.sleep(0.3))
        return []

    monkeypatch.setattr("gateway.managing.list_users", slow)
    async with serving(tmp_path) as rig, rig.http() as http:
        with trio.move_on_after(0.15):
            await ask(http, "{" + " ".join(f"a{n}: users {{ lastId }}" for n in range(9)) + "}")
        await trio.sleep(1)
        assert len(looked) <= 2
        assert (await ask(http, "{ me { name } }"))["data"]["me"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_no_form_of_another_site_gets_in(tmp_path: Path, kind: str) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        refused = await http.post("/graphql", content=b'{"query": "{ me { name } }"}', headers={"content-type": kind})
        assert (refused.status_code, refused.json()["error"]["type"]) == (415, "invalid_request_error")
        assert (await http.get("/graphql", params={"query": "{ me { name } }"})).status_code == 405


async def test_a_bug_behind_a_field_tells_nothing(tmp_path: Path, monkeypatch) -> None:
    def broken(*_args: object, **_more: object) -> None:
        raise ZeroDivisionError("a secret of the server")

    monkeypatch.setattr("gateway.managing.list_users", broken)
    async with serving(tmp_path) as rig, rig.http() as http:
        answer = await ask(http, "{ users { lastId } me { name } }")
        assert codes(answer) == ["internal"]
        assert "secret" not in str(answer)
        assert answer["data"]["me"]["name"] == "ada"
