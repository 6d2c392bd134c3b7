"""What callers without an account can cost a gateway, learn from it and write into its log."""

from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa
import trio
from gateway_rig import Rig, read_until, request_bytes, serving

from gateway import app as app_module
from gateway import exchange as exchange_module
from gateway import metrics as metrics_module
from gateway.db.session import open_database
from gateway.errors import StoreError, error_object
from gateway.exchange import BODY_BYTES_FREE

CHAT, LOGIN = "/v1/chat/completions", "/v1/auth/login"


async def begun(rig: Rig, stack: AsyncExitStack, path: str, key: str, sent: int) -> trio.SocketStream:
    """A body that is one byte short of its end."""
    stream = await stack.enter_async_context(await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port))
    await stream.send_all(request_bytes(path, b" " * sent, key, content_length=str(sent + 1)))
    return stream


def chat(characters: int) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "a" * characters}]}


@pytest.mark.parametrize("path", [LOGIN, "/v1/auth/refresh", "/v1/auth/register", "/v1/auth/accept"])
async def test_who_is_not_known_sends_no_large_bodies(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path) as rig, rig.http() as http, AsyncExitStack() as stack:
        assert (await http.post(path, content=b" " * BODY_BYTES_FREE)).status_code == 400, "so much is taken"
        stream = await begun(rig, stack, path, "", BODY_BYTES_FREE)
        assert b" 413 " in await read_until(stream, b"}}")


async def test_one_user_leaves_room_for_the_large_bodies_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "BODIES_BYTES_MAX", 1 << 20)
    async with serving(tmp_path, body_bytes_max=500_000) as rig, AsyncExitStack() as stack:

        def another_user() -> str:
            rig.accounts.create_user("bob")
            rig.accounts.credit("bob", 1_000_000)
            return rig.accounts.create_key("bob", "test").secret

        bobs = await trio.to_thread.run_sync(another_user)
        for _ in range(6):
            await begun(rig, stack, CHAT, rig.key, 180_000)
        await trio.sleep(0.3)
        async with rig.http() as http:
            assert (await http.post(CHAT, json=chat(180_000))).status_code == 503
            headers = {"authorization": f"Bearer {bobs}"}
            large = await http.post(CHAT, json=chat(180_000), headers=headers)
            assert large.status_code != 503, large.text
            await stack.aclose()
            with trio.fail_after(10):
                while (await http.post(CHAT, json=chat(180_000))).status_code == 503:  # noqa: ASYNC110
                    await trio.sleep(0.1)


async def test_what_is_costly_to_make_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()
    for module, name in ((app_module, "document"), (metrics_module, "generate_latest")):
        make: Callable[..., object] = getattr(module, name)

        def counted(*values: object, _make: Callable[..., object] = make, _name: str = name) -> object:
            made[_name] += 1
            return _make(*values)

        monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(metrics_module, "TEXT_SECONDS", 100.0)
    app_module._encoded.cache_clear()
    async with serving(tmp_path) as rig, rig.http() as http:
        for path in ("/openapi.json", "/metrics"):
            for _ in range(3):
                assert (await http.head(path)).status_code == 200
            assert (await http.get(path)).content
        tag = (await http.get("/openapi.json")).headers["etag"]
        again = await http.get("/openapi.json", headers={"if-none-match": tag})
        assert (again.status_code, again.content) == (304, b"")
    assert made == {"document": 1, "generate_latest": 1}


async def test_metrics_are_hardly_older_than_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "TEXT_SECONDS", 0.05)
    async with serving(tmp_path) as rig, rig.http() as http:
        await http.get("/metrics")
        await http.get("/healthz")
        await trio.sleep(0.06)
        assert 'route="/healthz"' in (await http.get("/metrics")).text


async def test_callers_do_not_learn_where_the_accounts_database_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        with rig.accounts.database.write() as connection:
            connection.execute(sa.text("ALTER TABLE sessions RENAME TO elsewhere"))
            connection.execute(sa.text("ALTER TABLE users RENAME TO others"))
        body = {"email": "a@b.example", "password": "a password"}
        for answer in (await http.post(LOGIN, json=body), await http.get("/v1/users")):
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the accounts database does not answer"
    assert any(f"{tmp_path}/gateway.db cannot be used: no such table" in line for line in caplog.messages)


def test_a_database_that_is_down_is_named_to_its_operator_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = open_database("postgresql://keeper@127.0.0.1:1/books", tmp_path)
    with pytest.raises(StoreError, match=r"keeper@127\.0\.0\.1:1/books cannot be used") as caught:
        database.ping()
    error = {"message": "the accounts database does not answer", "type": "service_unavailable", "param": None}
    assert error_object(caught.value) == {"error": {**error, "code": "unavailable"}}
    assert any("keeper@127.0.0.1:1/books" in line for line in caplog.messages)


async def test_readiness_does_not_say_where_the_accounts_database_is(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        down = open_database("postgresql://keeper@127.0.0.1:1/books", tmp_path)
        rig.accounts.database.engine, up = down.engine, rig.accounts.database.engine
        try:
            answer = await http.get("/readyz")
            page = await http.get("/")
        finally:
            rig.accounts.database.engine = up
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["the accounts database does not answer"])
        assert "does not answer" in page.text
        assert "keeper" not in page.text


async def test_nul_is_refused_wherever_it_comes_in(tmp_path: Path, database: str) -> None:
    """PostgreSQL takes none in a text."""
    async with serving(tmp_path, database=database) as rig, rig.http() as http:

        def is_admin() -> None:
            with rig.accounts.database.write() as connection:
                connection.execute(sa.text("UPDATE users SET role = 'admin'"))

        await trio.to_thread.run_sync(is_admin)
        login = {"email": "a\0@b.example", "password": "a password"}
        assert (await http.post(LOGIN, json=login)).status_code == 400
        assert (await http.post("/v1/auth/refresh", json={"refresh_token": "a\0b"})).status_code == 400
        assert (await http.post("/v1/api-keys", json={"name": "a\0b"})).status_code == 400
        assert (await http.post("/v1/billing/topups", json={"user_id": "\0", "microcredits": 1})).status_code == 400
        for path in (
            "users/a%00b",
            "api-keys/%00",
            "files/%00",
            "batches/%00",
            "webhooks/a%00",
            "billing/usage/%00/cost",
        ):
            answer = await http.get(f"/v1/{path}")
            assert answer.status_code == 404, answer.text
        for query in ("api-keys?user_id=%00", "users?after=a%00", "audit?actor=%00", "auth/oidc/callback?state=%00"):
            answer = await http.get(f"/v1/{query}")
            assert answer.status_code == 400, answer.text
        for asked in ({"query": '{ user(id: "a\\u0000") { name } }'}, {"query": '{ user(id: "a\\u{0}") { name } }'}):
            answer = await http.post("/graphql", json=asked)
            assert "NUL" in answer.json()["errors"][0]["message"], answer.text
        named = await http.post("/v1/api-keys", json={"name": "back\\u0000slash"})
        assert named.status_code in (200, 201), "a backslash and what follows is no NUL"
        said = {"model": "tiny", "messages": [{"role": "user", "content": "a\0b"}]}
        assert (await http.post(CHAT, json=said)).status_code == 200, "a prompt holds what it likes"


async def test_the_access_log_has_paths_as_they_were_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rios.gateway.access")
    async with serving(tmp_path) as rig:
        for path in ("/a%0aGET%20/forged%1b[2J?token=secret", "/" + "b" * 1000):
            stream = await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port)
            async with stream:
                await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: here\r\n\r\n".encode())
                assert b" 404 " in await read_until(stream, b"}}")
    lines = [each.getMessage() for each in caplog.records if each.name == "rios.gateway.access"]
    assert lines[0].startswith("GET /a%0aGET%20/forged%1b[2J 404 ")
    assert lines[1].startswith(f"GET /{'b' * 299} 404 ")
