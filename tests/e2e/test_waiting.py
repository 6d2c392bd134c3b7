"""Requests that wait for the engine: fair, told that they are not forgotten, and turned away in time."""

import json
import socket
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
from fake_engine import FakeEngine
from gateway_rig import Rig, eventually, read_all, read_until, request_bytes, serving

from gateway import turns as turns_module
from gateway.openai import stream as stream_module

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi there"}], "max_tokens": 5}


async def key_of(rig: Rig, name: str) -> str:
    def make() -> str:
        rig.accounts.create_user(name)
        rig.accounts.credit(name, 100_000)
        return rig.accounts.create_key(name, "test").secret

    return await trio.to_thread.run_sync(make)


async def settled(rig: Rig) -> None:
    """What ended is charged, and nothing is held back for it any more."""
    with trio.fail_after(10):
        while (await rig.balance()).reserved:  # noqa: ASYNC110 - the till tells nobody
            await trio.sleep(0.01)


async def test_a_user_with_one_request_does_not_wait_behind_anothers_twenty(tmp_path: Path) -> None:
    engine, ended = FakeEngine(pause_seconds=0.02), []
    async with serving(tmp_path, engine=engine, slots=2) as rig, rig.http() as http:
        other = {"authorization": f"Bearer {await key_of(rig, 'bob')}"}

        async def ask(name: str, **more: object) -> None:
            assert (await http.post(CHAT, json=BODY, **more)).status_code == 200
            ended.append(name)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask, "ada")
            await eventually(lambda: engine.running == 2)
            await ask("bob", headers=other)
        assert ended.index("bob") < 8, ended
        assert engine.running == 0
        balance = await rig.balance()
        assert balance.reserved == 0


async def test_a_batch_goes_on_only_while_nobody_else_waits(tmp_path: Path, database: str) -> None:
    """One slot, a batch of twenty lines, and requests that never let the line of those who wait get empty."""
    line = {"method": "POST", "url": CHAT, "body": {**BODY, "messages": [{"role": "user", "content": "a line"}]}}
    lines = "".join(json.dumps({**line, "custom_id": str(number)}) + "\n" for number in range(20)).encode()
    engine, told = FakeEngine(pause_seconds=0.02), []
    async with serving(tmp_path, engine=engine, database=database, slots=1) as rig, rig.http() as http:
        file = (await http.post("/v1/files", files={"file": ("in.jsonl", lines)}, data={"purpose": "batch"})).json()
        body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        batch = (await http.post("/v1/batches", json=body)).json()["id"]
        waiting = partial(rig.registry.get_sample_value, "rios_gateway_waiting_requests")
        await eventually(lambda: engine.running == 1 and (waiting() or 0) >= 2)

        async def ask() -> None:
            assert (await http.post(CHAT, json=BODY)).status_code == 200
            told.append(engine.answered.count("a line"))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(ask)
        before, after = told[0], told[-1]
        assert after - before <= 1, "no line was begun while somebody waited"
        with trio.fail_after(20):
            while (await http.get(f"/v1/batches/{batch}")).json()["status"] != "completed":  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert engine.answered.count("a line") == 20


async def test_who_is_over_the_line_is_told_when_to_come_back(tmp_path: Path) -> None:
    engine = FakeEngine(hang_at=1)
    bounds = {"queue_max": 3, "queue_per_user": 2, "queue_seconds": 1}
    async with serving(tmp_path, engine=engine, slots=1, **bounds) as rig, rig.http() as http:
        answers: list[httpx.Response] = []

        async def ask(**more: object) -> None:
            answers.append(await http.post(CHAT, json=BODY, **more))

        async with trio.open_nursery() as nursery:
            hanging = await rig.raw(CHAT, {**BODY, "stream": True})
            await read_until(hanging, b"data:")
            for _ in range(3):
                nursery.start_soon(ask)
            await eventually(lambda: bool(answers))
            assert answers[0].status_code == 429
            assert answers[0].json()["error"]["code"] == "rate_limit_exceeded"
            began = time.monotonic()
        assert time.monotonic() - began < 10
        assert [answer.status_code for answer in answers] == [429, 503, 503]
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
        await hanging.aclose()
        await eventually(lambda: engine.running == 0)
        await settled(rig)


async def test_a_stream_that_waits_is_kept_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "KEEP_ALIVE_SECONDS", 0.2)
    engine = FakeEngine(hang_at=1)
    async with serving(tmp_path, engine=engine, slots=1, queue_seconds=1) as rig:
        hanging = await rig.raw(CHAT, {**BODY, "stream": True})
        async with hanging:
            await read_until(hanging, b"data:")
            waiting = await rig.raw(CHAT, {**BODY, "stream": True}, connection="close")
            async with waiting:
                await read_until(waiting, b": keep-alive")
                assert b'"error"' in await read_all(waiting)


async def test_a_client_that_reads_slowly_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    """It reads, so no single write takes long; all of them together do."""
    monkeypatch.setattr(turns_module, "BLOCKED_SECONDS_MAX", 1.0)
    engine = FakeEngine(endless=True)
    async with (
        serving(tmp_path, engine=engine, slots=1, queue_seconds=15, database=database) as rig,
        rig.http() as http,
    ):
        other = {"authorization": f"Bearer {await key_of(rig, 'bob')}"}
        with trio.socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            await slow.connect((rig.gateway.host, rig.gateway.port))
            body = json.dumps({**BODY, "stream": True, "max_tokens": 4000}).encode()
            await slow.send(request_bytes(CHAT, body, rig.key))

            async def drip() -> None:
                with suppress(OSError):
                    while await slow.recv(200):  # noqa: ASYNC110 - it is slow
                        await trio.sleep(0.1)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(drip)
                await trio.sleep(3)
                assert engine.running == 1, "nobody waits, so it may go on"
                assert (await http.post(CHAT, json=BODY, headers=other)).status_code == 200
                await eventually(lambda: engine.running == 0)
                await settled(rig)
                nursery.cancel_scope.cancel()
        (usage,) = await trio.to_thread.run_sync(rig.accounts.usage, "ada")
        assert usage.outcome == "cancelled"
        assert 0 < usage.completion_tokens < 4000, "it pays for what was made"
        assert rig.registry.get_sample_value("rios_gateway_refused_connections_total", {"reason": "slow"}) == 1
