"""What runs for a key, a session or a user ends with it: soon, on every gateway, billed for what was produced."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
import trio
from fake_engine import FakeEngine
from gateway_rig import Rig, eventually, read_until, serving
from identity_rig import add_user, bearer, sign_in
from test_gateway_accounts import books_balance
from test_rights import client

from config.errors import LocalError
from config.settings import GatewaySettings
from gateway import managing, standing
from gateway.accounts import LOCAL, Principal, Usage, open_accounts
from gateway.audit import OPERATOR
from gateway.db.models import api_keys
from gateway.identity import sessions, tokens

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = {"model": "tiny", "messages": [{"role": "user", "content": "hi there"}], "max_tokens": 4000}
STREAM = {**WORDS, "stream": True}
PROMPT = {"model": "tiny", "prompt": "hi there", "max_tokens": 4000, "stream": True}
SOON_SECONDS = 10.0
"""Ample for machines that do much at once: without an end, these answers take minutes."""


def endless() -> FakeEngine:
    return FakeEngine(endless=True, pause_seconds=0.05)


async def chunks(http: httpx.AsyncClient, path: str, body: dict, **headers: str) -> AsyncIterator[dict]:
    async with http.stream("POST", path, json=body, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


async def ended(
    http: httpx.AsyncClient, end: Callable[[], Awaitable[object]], path: str = CHAT, body: dict = STREAM, **headers: str
) -> dict:
    """The error that ends a stream after its caller's end."""
    with trio.fail_after(SOON_SECONDS):
        async with aclosing(chunks(http, path, body, **headers)) as found:
            for _ in range(4):
                assert "error" not in await anext(found)
            await end()
            return [each async for each in found][-1]["error"]


async def paid(rig: Rig, user: str = "ada") -> Usage:
    """The one request, which was charged for what was produced; all books balance."""

    def look() -> Usage:
        (row,) = rig.accounts.usage(user)
        balance = rig.accounts.balance(user)
        assert (balance.balance, balance.reserved) == (1_000_000 - row.microcredits, 0)
        books_balance(rig.accounts)
        return row

    with trio.fail_after(SOON_SECONDS):
        while (await rig.balance(user)).reserved:  # noqa: ASYNC110 - it is settled a moment after the stream's end
            await trio.sleep(0.05)
    row = await trio.to_thread.run_sync(look)
    assert row.completion_tokens >= 3
    assert row.microcredits == row.prompt_tokens + 2 * row.completion_tokens
    return row


async def change(rig: Rig, **values: object) -> None:
    """Of ada's key, in the database: as another gateway or the command line does it."""
    query = sa.update(api_keys).where(api_keys.c.id == rig.key.split("_")[1]).values(**values)

    def write() -> None:
        with rig.accounts.database.write() as connection:
            connection.execute(query)

    await trio.to_thread.run_sync(write)


async def revoke(rig: Rig) -> None:
    await trio.to_thread.run_sync(rig.accounts.revoke_key, rig.key.split("_")[1])


async def disable(rig: Rig) -> None:
    user = await trio.to_thread.run_sync(rig.accounts.find_user, "ada")
    work = partial(managing.change_user, rig.accounts, OPERATOR, user.id, None, managing.UserChange(disabled=True))
    await trio.to_thread.run_sync(work)


async def demote(rig: Rig) -> None:
    user = await trio.to_thread.run_sync(rig.accounts.find_user, "ada")
    work = partial(managing.change_user, rig.accounts, OPERATOR, user.id, None, managing.UserChange(role="viewer"))
    await trio.to_thread.run_sync(work)


ENDS = {
    "revoked": (revoke, "invalid_api_key", "this API key has ended"),
    "expired": (lambda rig: change(rig, expires_at_ms=1), "invalid_api_key", "this API key has ended"),
    "disabled": (disable, "forbidden", "'ada' is disabled"),
    "narrowed": (lambda rig: change(rig, scopes="models:read"), "forbidden", "the permission inference"),
    "demoted": (demote, "forbidden", "the permission inference"),
}


@pytest.mark.parametrize("how", ENDS)
async def test_a_stream_ends_with_its_key_and_is_billed_for_what_was_produced(
    tmp_path: Path, database: str, how: str
) -> None:
    end, code, says = ENDS[how]
    async with serving(tmp_path, engine=endless(), database=database) as rig, rig.http() as http:
        error = await ended(http, partial(end, rig))
        assert (error["code"], says in error["message"]) == (code, True), error
        row = await paid(rig)
        assert row.outcome == "cancelled"
        assert row.completion_tokens == rig.engine.produced
        await eventually(lambda: rig.engine.running == 0)


async def test_completions_end_too(tmp_path: Path) -> None:
    async with serving(tmp_path, engine=endless()) as rig, rig.http() as http:
        assert (await ended(http, partial(revoke, rig), COMPLETIONS, PROMPT))["code"] == "invalid_api_key"
        assert (await paid(rig)).outcome == "cancelled"


async def test_several_answers_to_one_request_end_together(tmp_path: Path) -> None:
    async with serving(tmp_path, engine=endless()) as rig, rig.http() as http:
        assert (await ended(http, partial(revoke, rig), body={**STREAM, "n": 2}))["code"] == "invalid_api_key"
        await eventually(lambda: rig.engine.running == 0)
        rows = await trio.to_thread.run_sync(rig.accounts.usage, "ada")
        assert [row.outcome for row in rows] == ["cancelled", "cancelled"]
        assert sum(row.completion_tokens for row in rows) == rig.engine.produced
        assert sorted(row.prompt_tokens for row in rows) == [0, 2]  # both to the same prompt, which is paid once


async def test_what_ends_here_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway that ends something does not wait for its next look."""
    monkeypatch.setattr(standing, "CHECK_SECONDS", 3600.0)
    async with serving(tmp_path, engine=endless()) as rig, rig.http() as http:
        key = (await http.post("/v1/api-keys", json={})).json()
        async with client(rig, key["secret"]) as other:
            error = await ended(other, lambda: http.delete(f"/v1/api-keys/{key['id']}"))
        assert error["code"] == "invalid_api_key"


async def test_what_ends_on_one_gateway_ends_on_the_other(tmp_path: Path, postgresql: str) -> None:
    from postgresql import new_database

    dsn = new_database(postgresql)
    async with (
        serving(tmp_path / "a", database=dsn) as first,
        serving(tmp_path / "b", database=dsn, engine=endless()) as second,
        first.http() as here,
    ):
        key = (await here.post("/v1/api-keys", json={})).json()
        async with client(second, key["secret"]) as there:
            assert (await ended(there, lambda: here.delete(f"/v1/api-keys/{key['id']}")))["code"] == "invalid_api_key"
        assert (await paid(second)).completion_tokens == second.engine.produced


@pytest.mark.parametrize("how", ["signed out", "token revoked", "disabled"])
async def test_a_stream_ends_with_its_session(tmp_path: Path, database: str, cheap_hashes: None, how: str) -> None:
    async with serving(tmp_path, engine=endless(), database=database) as rig, client(rig) as http:
        user_id = await trio.to_thread.run_sync(add_user, rig, "grace")
        await trio.to_thread.run_sync(rig.accounts.credit, "grace", 1_000_000)
        made = await sign_in(http, "grace")
        opened = rig.accounts.database
        ends = {
            "signed out": partial(sessions.revoke, opened, OPERATOR, user_id, made.json()["session_id"]),
            "token revoked": partial(tokens.revoke_keys, opened, OPERATOR),
            "disabled": partial(rig.accounts.set_disabled, "grace", True),
        }
        error = await ended(http, partial(trio.to_thread.run_sync, ends[how]), **bearer(made))
        says = {"signed out": "session has ended", "token revoked": "token was revoked", "disabled": "is disabled"}
        assert says[how] in error["message"]
        assert (await paid(rig, "grace")).outcome == "cancelled"


async def test_an_answer_that_is_not_streamed_ends_too(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, engine=endless(), database=database) as rig, rig.http() as http:
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await http.post(CHAT, json=WORDS))

        with trio.fail_after(SOON_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await eventually(lambda: rig.engine.produced > 3)
                await disable(rig)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (403, "forbidden")
        assert (await paid(rig)).outcome == "cancelled"


async def test_who_waits_for_a_turn_leaves_the_line(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, engine=endless(), database=database, slots=1) as rig, rig.http() as http:
        other = (await http.post("/v1/api-keys", json={})).json()
        async with (
            client(rig, other["secret"]) as waiting,
            await rig.raw(CHAT, STREAM) as running,
            trio.open_nursery() as nursery,
        ):
            await read_until(running, b"Paris")
            answers: list[httpx.Response] = []

            async def ask() -> None:
                answers.append(await waiting.post(CHAT, json=STREAM))

            nursery.start_soon(ask)
            await eventually(lambda: rig.registry.get_sample_value("rios_gateway_waiting_requests") == 1)
            await trio.to_thread.run_sync(rig.accounts.revoke_key, other["id"])
            with trio.fail_after(SOON_SECONDS):
                while not answers:  # noqa: ASYNC110 - it looks at what a task leaves
                    await trio.sleep(0.05)
            assert answers[0].status_code == 401


KEYED = {"idempotency-key": "order-66"}


async def test_an_answer_under_an_idempotency_key_is_charged_as_far_as_it_came(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, engine=endless(), database=database) as rig, rig.http() as http:
        second = (await http.post("/v1/api-keys", json={})).json()["secret"]
        assert (await ended(http, partial(revoke, rig), **KEYED))["code"] == "invalid_api_key"
        row = await paid(rig)
        assert (row.outcome, row.completion_tokens) == ("cancelled", rig.engine.produced)
        async with client(rig, second) as other:
            for body in (STREAM, STREAM):
                again = await other.post(CHAT, json=body, headers=KEYED)
                assert (again.status_code, again.json()["error"]["code"]) == (403, "forbidden")
                assert "under this idempotency key was ended" in again.text
        assert len(rig.accounts.usage("ada")) == 1


async def test_who_joined_an_answer_with_another_key_leaves_it_alone(tmp_path: Path) -> None:
    engine = endless()
    short = {**STREAM, "max_tokens": 400}
    async with serving(tmp_path, engine=engine) as rig, rig.http() as http:
        second = (await http.post("/v1/api-keys", json={})).json()["secret"]
        other = second.split("_")[1]
        heard: list[dict] = []

        async def first() -> None:
            async with aclosing(chunks(http, CHAT, short, **KEYED)) as found:
                heard.extend([each async for each in found])

        async with client(rig, second) as joined, trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await eventually(lambda: engine.produced > 1)
            error = await ended(
                joined, lambda: trio.to_thread.run_sync(rig.accounts.revoke_key, other), body=short, **KEYED
            )
            assert error["code"] == "invalid_api_key"
            engine.pause_seconds = 0.0
        assert heard[-1]["choices"][0]["finish_reason"] == "length"
        assert (await paid(rig)).completion_tokens == 400


async def test_a_line_of_a_batch_ends_with_its_user(tmp_path: Path, database: str) -> None:
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": WORDS}
    async with serving(tmp_path, engine=endless(), database=database) as rig, rig.http() as http:
        upload = {"file": ("in.jsonl", json.dumps(line).encode())}
        file = (await http.post("/v1/files", files=upload, data={"purpose": "batch"})).json()["id"]
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        (await http.post("/v1/batches", json=body)).raise_for_status()
        await eventually(lambda: rig.engine.produced > 3)
        await disable(rig)
        await eventually(lambda: rig.engine.running == 0)
        assert (await paid(rig)).outcome == "cancelled"


async def test_a_database_that_is_away_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    looks: list[object] = []

    def away(*_: object) -> None:
        looks.append(1)
        raise LocalError("unavailable", "the accounts database is away")

    monkeypatch.setattr(standing, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(standing, "_find", away)
    engine = FakeEngine(endless=True, pause_seconds=0.05)
    async with serving(tmp_path, engine=engine) as rig, rig.http() as http:
        found = [each async for each in chunks(http, CHAT, {**STREAM, "max_tokens": 20})]
    assert len(looks) > 2
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    assert "is not known yet" in caplog.text


async def test_short_requests_cost_no_look_and_many_streams_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    real = standing._find
    monkeypatch.setattr(standing, "_find", lambda database, who: looks.append(len(who)) or real(database, who))
    monkeypatch.setattr(standing, "CHECK_SECONDS", 2.0)
    engine = FakeEngine(endless=True)
    async with serving(tmp_path, engine=engine) as rig, rig.http() as http:
        for _ in range(3):
            assert [each async for each in chunks(http, CHAT, {**STREAM, "max_tokens": 5})]
        assert looks == []
        engine.pause_seconds = 0.1

        async def listen() -> None:
            assert [each async for each in chunks(http, CHAT, {**STREAM, "max_tokens": 40})]

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(listen)
        assert max(looks) == 5
        assert len(looks) < 40, "200 pieces came: a look is not asked for by each"


async def test_requests_without_a_key_are_ended_by_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(standing, "_find", lambda *_: pytest.fail("nobody is looked for"))
    engine = FakeEngine(endless=True, pause_seconds=0.05)
    async with serving(tmp_path, engine=engine, require_key=False) as rig, client(rig) as http:
        found = [each async for each in chunks(http, CHAT, {**STREAM, "max_tokens": 10})]
        assert found[-1]["choices"][0]["finish_reason"] == "length"


def test_many_at_once_are_looked_for_in_bounded_statements(tmp_path: Path, database: str) -> None:
    with open_accounts(GatewaySettings(database=database), tmp_path) as accounts:
        accounts.create_user("ada")
        made = [accounts.create_key("ada", "k").key for _ in range(3)]
        accounts.revoke_key(made[1].id)
        names = [key.id for key in made] + [f"{number:016x}" for number in range(2500)]
        who = [Principal(user_id=made[0].user_id, user_name="ada", account_id="", key_id=name) for name in names]
        found = standing._find(accounts.database, [*who, LOCAL])
        assert set(found.keys) == {made[0].id, made[2].id}
