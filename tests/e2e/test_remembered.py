"""Answers that are given again: only where asked for, only what is always the same, only to who asked."""

import json
from pathlib import Path

import pytest
import trio
from fake_engine import FakeEngine
from gateway_rig import Rig, serving

from gateway.openai.remembered import Remembered

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi there"}], "max_tokens": 5, "temperature": 0}
USE = {"x-rios-cache": "use"}


def _dashed(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_hit_is_the_same_answer_for_nothing(tmp_path: Path, stream: bool) -> None:
    engine, body = FakeEngine(), {**BODY, "stream": stream}
    async with serving(tmp_path, engine=engine) as rig, rig.http() as http:
        first = await http.post(CHAT, json=body, headers=USE)
        paid = await rig.balance()
        again = await http.post(CHAT, json=body, headers=USE)
        assert (first.headers["x-rios-cache"], again.headers["x-rios-cache"]) == ("miss", "hit")
        assert again.content == first.content
        assert again.headers["content-type"] == first.headers["content-type"]
        assert await rig.balance() == paid
        assert len(engine.requests) == 1
        assert int(again.headers["x-ratelimit-remaining-requests"]) < int(
            first.headers["x-ratelimit-remaining-requests"]
        )
        other = await http.post(CHAT, json={**body, "max_tokens": 4}, headers=USE)
        assert other.headers["x-rios-cache"] == "miss"


async def test_completions_too(tmp_path: Path) -> None:
    body = {"model": "tiny", "prompt": "hi there", "max_tokens": 5, "temperature": 0}
    async with serving(tmp_path) as rig, rig.http() as http:
        answers = [await http.post(COMPLETIONS, json=body, headers=USE) for _ in range(2)]
        assert [answer.headers["x-rios-cache"] for answer in answers] == ["miss", "hit"]


async def test_who_does_not_ask_for_it_or_draws_gets_a_new_answer(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with serving(tmp_path, engine=engine) as rig, rig.http() as http:
        for body, headers in (
            (BODY, {}),
            (BODY, {}),
            ({**BODY, "temperature": 1}, USE),
            ({**BODY, "temperature": 1}, USE),
        ):
            answer = await http.post(CHAT, json=body, headers=headers)
            assert "x-rios-cache" not in answer.headers
        assert len(engine.requests) == 4
        wrong = await http.post(CHAT, json=BODY, headers={"x-rios-cache": "please"})
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "x-rios-cache"


async def test_a_key_may_ask_for_it_and_a_request_may_not(tmp_path: Path, database: str) -> None:
    engine = FakeEngine()
    async with serving(tmp_path, engine=engine, database=database) as rig, rig.http() as http:
        made = (await http.post("/v1/api-keys", json={"cache": True})).json()
        assert made["cache"] is True
        key = {"authorization": f"Bearer {made['secret']}"}

        async def ask(**headers: str) -> tuple[str | None, int]:
            """What the answer says, and how often the engine worked by then."""
            answer = await http.post(CHAT, json=BODY, headers={**key, **_dashed(headers)})
            assert answer.status_code == 200
            return answer.headers.get("x-rios-cache"), len(engine.requests)

        assert await ask(cache_control="no-store") == (None, 1)
        assert await ask() == ("miss", 2), "nothing was kept"
        assert await ask() == ("hit", 2)
        kept = (await http.post(CHAT, json=BODY, headers=key)).json()["id"]
        assert await ask(cache_control="max-stale, No-Cache") == ("miss", 3)
        assert await ask() == ("hit", 3)
        assert (await http.post(CHAT, json=BODY, headers=key)).json()["id"] != kept, "the new answer is the one kept"
        assert await ask(cache_control="no-store", x_rios_cache="use") == (None, 4)
        drawn = await http.post(CHAT, json={**BODY, "temperature": 1}, headers=key)
        assert "x-rios-cache" not in drawn.headers
        # another key of the same user that did not ask, then this one changed
        assert "x-rios-cache" not in (await http.post(CHAT, json=BODY)).headers
        path = f"/v1/api-keys/{made['id']}"
        assert (await http.patch(path, json={"cache": False})).json()["cache"] is False
        assert await ask() == (None, 7)
        assert (await http.get(path)).json()["cache"] is False
        listed = {each["id"]: each["cache"] for each in (await http.get("/v1/api-keys")).json()["data"]}
        assert listed[made["id"]] is False


async def test_another_user_gets_an_answer_of_their_own(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        await http.post(CHAT, json=BODY, headers=USE)
        key = await trio.to_thread.run_sync(bobs_key, rig)
        theirs = await http.post(CHAT, json=BODY, headers={**USE, "authorization": f"Bearer {key}"})
        assert theirs.headers["x-rios-cache"] == "miss"


def bobs_key(rig: Rig) -> str:
    rig.accounts.create_user("bob")
    rig.accounts.credit("bob", 1000)
    return rig.accounts.create_key("bob", "test").secret


async def test_what_failed_is_not_kept(tmp_path: Path) -> None:
    engine = FakeEngine(fail_at=2)
    async with serving(tmp_path, engine=engine) as rig, rig.http() as http:
        for stream in (False, True):
            body = {**BODY, "stream": stream}
            await http.post(CHAT, json=body, headers=USE)
            engine.fail_at = None
            good = await http.post(CHAT, json=body, headers=USE)
            assert good.headers["x-rios-cache"] == "miss"
            assert "error" not in (json.loads(good.content) if not stream else good.text)
            engine.fail_at = 2


async def test_the_store_is_bounded_and_forgets(autojump_clock: trio.testing.MockClock) -> None:
    store = Remembered(bytes_max=1000, seconds=60)
    for number in range(20):
        store.keep(bytes([number]), bytes(100), "x")
        assert store.find(b"\x00") is not None, "it is used all the time"
    assert store.size == 1000
    assert store.find(b"\x01") is None
    assert store.find(bytes([19])) is not None
    store.keep(b"long", bytes(1001), "x")
    assert store.find(b"long") is None
    store.keep(b"\x00", bytes(7), "x")
    assert store.size == 907
    await trio.sleep(61)
    assert store.find(b"\x00") is None
    assert store.size == 900
    nothing = Remembered(bytes_max=0, seconds=60)
    nothing.keep(b"a", b"b", "x")
    assert nothing.find(b"a") is None
