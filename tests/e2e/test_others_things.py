"""What is another user's, and hostile text, over every route there is: also those that are added later.

``owned_things`` makes one of bob's things of every kind; ada tries their ids on every route that takes one. A route
that takes an id of a kind without a maker fails here.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from fake_swarm import FakeSwarm
from gateway_rig import Rig, serving
from owned_things import BODIES, MAKERS, SEEN_BY_ALL
from test_rights import GUARDED, client, key_of, user_id

from gateway.endpoint import Endpoint
from gateway.roles import Reach, reach_of

OWN = [each for each in GUARDED if reach_of("developer", each.needs) is Reach.OWN]  # type: ignore[arg-type]
TAKE_AN_ID = [each for each in OWN if "{" in each.template]
LISTS = [each for each in OWN if each.method == "GET" and "{" not in each.template]
HOSTILE = (
    "' OR '1'='1",
    "'; DROP TABLE users; --",
    "1) UNION SELECT secret_sha256 FROM api_keys --",
    "\\x00\\' OR 1=1",
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "{{7*7}}${7*7}",
    "../../../../etc/passwd",
    "%00%0d%0aset-cookie:x=1",
    "\u202e\U0001f600",
    "9" * 300,
)  # fmt: skip


@asynccontextmanager
async def two_users(
    tmp_path: Path, database: str = ""
) -> AsyncIterator[tuple[Rig, httpx.AsyncClient, httpx.AsyncClient, dict[str, str]]]:
    """A gateway, ada, bob, and the ids of bob's things by the paths in front of them."""
    async with (
        serving(tmp_path, database=database, requests_per_minute=1 << 20, swarm=FakeSwarm()) as rig,
        rig.http() as ada,
        client(rig, await key_of(rig, "bob")) as bob,
    ):
        yield rig, ada, bob, {path: await make(rig, bob) for path, make in MAKERS.items()}


def collection(endpoint: Endpoint) -> str:
    """The path in front of the id."""
    return endpoint.template.partition("/{")[0]


def test_every_kind_of_thing_that_has_an_owner_is_tried() -> None:
    missing = "make one in owned_things.py, so that it is tried whether others can get at it"
    assert {collection(each) for each in TAKE_AN_ID} == set(MAKERS), missing
    assert {(each.method, each.template) for each in TAKE_AN_ID if each.body is not None} == set(BODIES), missing
    deep = {each.template for each in TAKE_AN_ID if each.template.count("{") > 1}
    assert deep == {"/v1/users/{user}/identities/{identity}"}, "elsewhere the id is the only thing that is filled in"


async def seen_by(http: httpx.AsyncClient, endpoint: Endpoint) -> httpx.Response | None:
    """What a list shows; None for a stream."""
    async with http.stream("GET", endpoint.template) as answer:
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            return None
        await answer.aread()
    return answer


async def ids_in_lists(http: httpx.AsyncClient) -> dict[str, list[str]]:
    """The ids in each list that a caller sees."""
    found = {}
    for endpoint in LISTS:
        answer = await seen_by(http, endpoint)
        if answer is not None and answer.is_success and answer.headers["content-type"] == "application/json":
            rows = answer.json().get("data", [])
            found[endpoint.template] = [row["id"] for row in rows if isinstance(row, dict) and "id" in row]
    return found


async def test_a_users_things_are_in_nobody_elses_lists(tmp_path: Path, database: str) -> None:
    async with two_users(tmp_path, database) as (_rig, ada, bob, things):
        bobs = await ids_in_lists(bob)
        ids = {*things.values(), *(each for found in bobs.values() for each in found)}
        for endpoint in LISTS:
            answer = await seen_by(ada, endpoint)
            if answer is None:
                continue
            mine = (await bob.get(endpoint.template)).json()
            assert mine.get("data", True), f"bob has nothing in {endpoint.template}: make something in owned_things.py"
            assert "bobs-own" not in answer.text, endpoint
            for each in {each for each in ids if len(each) >= 12}:
                assert each not in answer.text, endpoint


async def test_an_id_of_anothers_opens_nothing(tmp_path: Path, database: str) -> None:
    async with two_users(tmp_path, database) as (_rig, ada, bob, things):
        before = await _state(bob, things)
        for endpoint in TAKE_AN_ID:
            each = things[collection(endpoint)]
            answer = await _try(ada, endpoint, each)
            if collection(endpoint) in SEEN_BY_ALL:
                assert answer.status_code == 403, (endpoint, answer.text)
                continue
            missing = await _try(ada, endpoint, re.sub(r"[0-9a-f]", "0", each))
            assert (answer.status_code, missing.status_code) == (404, 404), (endpoint, answer.text)
            assert answer.json()["error"]["code"] == missing.json()["error"]["code"]
            assert "bobs-own" not in answer.text
        assert await _state(bob, things) == before


async def _state(http: httpx.AsyncClient, things: dict[str, str]) -> list[object]:
    """What bob sees of his things: each of them, and the lists they stand in."""
    paths = [path for thing, each in things.items() for path in (thing, f"{thing}/{each}")]
    answers = [await http.get(path) for path in paths]
    assert all(answer.status_code in (200, 404, 405) for answer in answers)
    return [answer.json() for answer in answers if answer.status_code == 200]


async def _try(http: httpx.AsyncClient, endpoint: Endpoint, value: str) -> httpx.Response:
    path = re.sub(r"\{\w+\}", lambda _: value, endpoint.template)
    return await http.request(endpoint.method, path, json=BODIES.get((endpoint.method, endpoint.template)))


async def test_bobs_name_is_not_a_way_to_bobs_things(tmp_path: Path) -> None:
    """Filters do not widen what is within reach."""
    async with two_users(tmp_path) as (rig, ada, _bob, _things):
        bob = await user_id(rig, "bob")
        for value in ("bob", bob, f"user:{bob}"):
            for endpoint in LISTS:
                if endpoint.media == ("text/event-stream",):
                    continue  # it does not end
                names = {each.name for each in endpoint.parameters if each.place == "query"} - {"limit"}
                for name in names | {"user_id", "user", "owner_id"}:
                    answer = await ada.get(endpoint.template, params={name: value})
                    assert "bobs-own" not in answer.text, (endpoint, name)


async def test_hostile_text_is_answered_in_json_and_breaks_nothing(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, requests_per_minute=1 << 20, free=True) as rig,
        client(rig, await key_of(rig, "root", "admin")) as http,
    ):
        for endpoint in GUARDED:
            for text in HOSTILE:
                answer = await _send(http, endpoint, text)
                if answer is None:
                    continue
                assert answer.status_code < 500, (endpoint, text, answer.text)
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert "set-cookie" not in answer.headers
                if text in answer.text:
                    assert answer.headers["content-type"] == "application/json", (endpoint, text)
        assert (await http.get("/v1/users")).json()["data"]


async def _send(http: httpx.AsyncClient, endpoint: Endpoint, text: str) -> httpx.Response | None:
    path = re.sub(r"\{\w+\}", lambda _: httpx.URL(path="/" + text).raw_path.decode()[1:], endpoint.template)
    if endpoint.method == "GET" and "{" not in endpoint.template and not endpoint.parameters:
        return None
    query = {each.name: text for each in endpoint.parameters if each.place == "query"}
    body = dict.fromkeys(("name", "email", "model", "query", "id", "user_id"), text) if endpoint.body else None
    async with http.stream(endpoint.method, path, params=query or None, json=body) as answer:
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            return None
        await answer.aread()
    return answer


async def test_every_answer_carries_what_keeps_browsers_careful(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http, client(rig) as stranger:
        for who, path in ((http, "/v1/users"), (stranger, "/v1/users"), (http, "/nowhere"), (stranger, "/healthz")):
            headers = (await who.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert headers["referrer-policy"] == "no-referrer"
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["rios-version"] == "1"
        page = (await stranger.get("/")).headers
        assert page.get_list("content-security-policy") == [page["content-security-policy"]]
        assert (await http.get("/v1/users")).headers["cache-control"].startswith("private")
