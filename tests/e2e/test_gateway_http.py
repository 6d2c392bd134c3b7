"""What clients can do to the gateway below the level of a well-behaved client library."""

import json
import socket
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio
from fake_engine import FakeEngine
from fake_swarm import ME, FakeLedger
from gateway_rig import eventually, read_all, read_until, request_bytes, serving
from prometheus_client import CollectorRegistry

from config.errors import ConfigError, LocalError, RiosError
from config.settings import GatewaySettings
from gateway import exchange as exchange_module
from gateway.gateway import open_gateway
from gateway.openai import stream as stream_module

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi there"}]}
STREAM = {**BODY, "stream": True}


async def test_order_of_a_stream(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        answer = await http.post(CHAT, json={**STREAM, "stream_options": {"include_usage": True}})
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert chunks[1]["choices"][0]["delta"] == {"content": "Paris"}
        assert chunks[8]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
        assert chunks[8]["rios"]["route"] == "experts"
        assert chunks[9]["choices"] == []
        assert chunks[9]["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 7,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert len(chunks) == 10


async def test_usage_is_durable_before_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        connection = await rig.raw(CHAT, STREAM)
        async with connection:
            await read_until(connection, b"[DONE]")
            assert rig.accounts.usage("ada")[0].outcome == "stop"


async def test_a_client_that_leaves_stops_the_generation_and_pays_for_what_was_produced(tmp_path: Path) -> None:
    engine = FakeEngine(hang_at=3)
    async with serving(tmp_path, engine=engine) as rig:
        for body in (STREAM, BODY):
            connection = await rig.raw(CHAT, body)
            await eventually(lambda: engine.produced == 3)
            assert engine.running == 1
            await connection.aclose()
            await eventually(lambda: engine.running == 0)
            await eventually(lambda: rig.accounts.balance("ada").reserved == 0)
            engine.produced = 0
        rows = rig.accounts.usage("ada")
        assert [(row.outcome, row.completion_tokens) for row in rows] == [("cancelled", 3)] * 2
        assert (await rig.balance()).balance == 1_000_000 - 2 * (2 + 2 * 3)


async def test_leaving_before_the_first_token_costs_nothing(tmp_path: Path) -> None:
    engine = FakeEngine(hang_at=0)
    async with serving(tmp_path, engine=engine) as rig:
        connection = await rig.raw(CHAT, STREAM)
        await eventually(lambda: engine.running == 1)
        await connection.aclose()
        await eventually(lambda: rig.accounts.balance("ada").reserved == 0)
        assert (await rig.balance()).balance == 1_000_000


async def test_keep_alive_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "KEEP_ALIVE_SECONDS", 0.05)
    engine = FakeEngine(hang_at=1)
    async with serving(tmp_path, engine=engine) as rig:
        connection = await rig.raw(CHAT, STREAM)
        async with connection:
            await read_until(connection, b"Paris")
            await read_until(connection, b": keep-alive\n\n")
        engine.hang_at = 0
        connection = await rig.raw(CHAT, STREAM)
        async with connection:
            data = await read_until(connection, b": keep-alive\n\n")
            assert data.startswith(b"HTTP/1.1 200")


async def test_error_after_a_keep_alive_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "KEEP_ALIVE_SECONDS", 0.02)
    engine = FakeEngine(pause_seconds=0.5, fail_at=1)
    async with serving(tmp_path, engine=engine) as rig, rig.http() as http:
        answer = await http.post(CHAT, json=STREAM)
        assert answer.status_code == 200
        assert answer.text.startswith(": keep-alive\n\n")
        last = answer.text.rstrip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "no_replica"


async def test_stopped_reader_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    """A client that asks for a long stream and never reads: the gateway stops anyway, and the money is settled."""
    engine = FakeEngine(endless=True)
    with trio.fail_after(10):
        async with serving(tmp_path, engine=engine) as rig:
            connection = await rig.raw(CHAT, {**STREAM, "max_tokens": 4000})
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            flooder = await rig.raw(CHAT, {**STREAM, "max_tokens": 4000})
            await eventually(lambda: engine.produced > 100)
    assert engine.running == 0
    await connection.aclose()
    await flooder.aclose()
    async with serving(tmp_path) as rig:
        assert (await rig.balance()).reserved == 0
        assert len(rig.accounts.usage("ada")) == 2


async def test_stopped_reader_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.server._SEND_SECONDS", 0.2)
    engine = FakeEngine(endless=True)
    async with serving(tmp_path, engine=engine) as rig, rig.http() as http:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((rig.gateway.host, rig.gateway.port))
            body = json.dumps({**STREAM, "max_tokens": 4000, "user": "x" * 3000, "model": "tiny"}).encode()
            for _ in range(8):  # Enough pipelined streams to fill every buffer on the way.
                client.sendall(request_bytes(CHAT, body, rig.key))
            await eventually(lambda: any(row.outcome == "cancelled" for row in rig.accounts.usage("ada")))
        assert (await http.get("/healthz")).status_code == 200


async def test_stop_while_answering_ends_the_connection(tmp_path: Path) -> None:
    engine = FakeEngine(hang_at=2)
    async with serving(tmp_path, engine=engine) as rig:
        connection = await rig.raw(CHAT, STREAM)
        await read_until(connection, b" is")
    async with connection:
        assert b"[DONE]" not in await read_all(connection)
    assert engine.running == 0


async def test_connection_close_closes_after_a_stream(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        connection = await rig.raw(CHAT, STREAM, connection="close")
        async with connection:
            assert b"[DONE]" in await read_all(connection)


async def test_a_connection_is_kept_between_requests(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        connection = await rig.raw(CHAT, STREAM)
        async with connection:
            await read_until(connection, b"0\r\n\r\n")
            await connection.send_all(request_bytes("/v1/nothing", b"{}", rig.key))
            assert b"404" in await read_until(connection, b"}}")
            await connection.send_all(request_bytes(CHAT, json.dumps(BODY).encode(), ""))
            assert b" 401 " in await read_until(connection, b"}}")
            await connection.send_all(request_bytes(CHAT, json.dumps(BODY).encode(), rig.key))
            assert b" 200 " in await read_until(connection, b'"rios"')


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "the body"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "UTF-8"),
        (b'{"model": "t\\ud800", "messages": [{"role": "user", "content": "a"}]}', ""),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', ""),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "not valid JSON"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": 1e400}', "seed"),
        (b'{"model": "tiny", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "model is required"),
        (b"\x00" * 100, "not valid JSON"),
    ],
)
async def test_bad_bodies(tmp_path: Path, body: bytes, text: str) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        answer = await http.post(CHAT, content=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert text in error["message"]
        assert (await http.post(CHAT, json=BODY)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_the_privacy_header_reaches_the_engine_or_is_refused(tmp_path: Path, path: str) -> None:
    body = BODY if path == CHAT else {"model": "tiny", "prompt": "hi there"}
    async with serving(tmp_path) as rig, rig.http() as http:
        for said, meant in (("", ""), ("trusted", "trusted"), ("Local", "local")):
            assert (await http.post(path, json=body, headers={"x-rios-privacy": said})).status_code == 200
            assert rig.engine.requests[-1].privacy == meant
        for wrong in ("none", "trusted, local", "anybody"):
            refused = await http.post(path, json=body, headers={"x-rios-privacy": wrong})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "x-rios-privacy"
        twice = await http.post(path, json=body, headers=[("x-rios-privacy", "local"), ("x-rios-privacy", "trusted")])
        assert twice.status_code == 400


async def test_huge_body(tmp_path: Path) -> None:
    async with serving(tmp_path, body_bytes_max=10_000) as rig, rig.http() as http:
        huge = {**BODY, "user": "x" * 3_000_000}
        answer = await http.post(CHAT, json=huge)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "too_large"

        async with await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as connection:
            head = request_bytes(CHAT, b"", rig.key, content_length="", transfer_encoding="chunked")
            await connection.send_all(head + 300 * (b"2710\r\n" + b"x" * 10_000 + b"\r\n"))
            assert b" 413 " in await read_until(connection, b"}}")
        assert (await http.post(CHAT, json=BODY)).status_code == 200


async def test_content_length_that_lies(tmp_path: Path) -> None:
    async with serving(tmp_path, body_bytes_max=10_000) as rig, rig.http() as http:
        data = json.dumps(BODY).encode()
        # Announces too much, and never sends it: refused at once.
        async with await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as connection:
            await connection.send_all(request_bytes(CHAT, data, rig.key, content_length="99999999999"))
            assert b" 413 " in await read_until(connection, b"}}")
        # Announces more than it sends, then leaves.
        async with await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as connection:
            await connection.send_all(request_bytes(CHAT, data, rig.key, content_length=str(len(data) + 50)))
        # Announces less: the rest is no request.
        async with await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as connection:
            await connection.send_all(request_bytes(CHAT, data, rig.key, content_length="10"))
            assert b" 400 " in await read_until(connection, b"}}")
        async with await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as connection:
            await connection.send_all(request_bytes(CHAT, data, rig.key, content_length="-5"))
            assert b" 400 " in await read_all(connection)
        assert (await http.post(CHAT, json=BODY)).status_code == 200
        assert rig.engine.running == 0


async def test_junk_on_the_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    junk = [b"\x16\x03\x01" + b"\x00" * 300, b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"A" * 100_000]
    upgrade = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n\r\n"
    websocket = (
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    async with serving(tmp_path) as rig, rig.http() as http:
        for data in (*junk, websocket):
            async with await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as connection:
                try:
                    await connection.send_all(data)
                    await connection.send_eof()
                    assert b" 200 " not in await read_all(connection)
                except trio.BrokenResourceError:
                    pass
        async with await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as connection:
            await connection.send_all(upgrade)
            assert b'{"status":"ok"}' in await read_until(connection, b"}")
        assert (await http.get("/healthz")).status_code == 200
    assert "Traceback" not in caplog.text


async def test_request_ids(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        for path in ("/healthz", "/nothing", "/v1/models"):
            answer = await http.get(path, headers={"x-request-id": "abc-1.2"})
            assert answer.headers["x-request-id"] == "abc-1.2"
        for bad in ("x" * 200, 'a"b', "ä"):
            answer = await http.get("/healthz", headers={"x-request-id": bad.encode()})
            assert answer.headers["x-request-id"].startswith("req_")


async def test_wrong_paths_and_methods(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        answer = await http.get("/v1/nothing")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        answer = await http.get(CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"


async def test_readiness(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        assert (await http.get("/readyz")).json() == {"ready": True, "reasons": []}
        rig.health.reasons = ("no model is loaded",)
        answer = await http.get("/readyz")
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["no model is loaded"])
        assert "no model is loaded" in (await http.get("/")).text
        assert (await http.get("/healthz")).status_code == 200


async def test_home_page_and_openapi(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        page = await http.get("/")
        assert f"{rig.gateway.url}/v1" in page.text
        assert "tiny" in page.text
        assert "no replica" in page.text
        document = (await http.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        schema = document["components"]["schemas"]["ChatBody"]["properties"]
        assert schema["temperature"]["anyOf"][0]["maximum"] == 2
        parts = ("ledger", "oidc", "workers", "swarm", "deployments", "payments")  # what this gateway does not have
        for path, operations in document["paths"].items():
            for method in operations:
                if "{" in path.replace("{model}", "") or path == "/v1/events":
                    continue  # what does not exist is not found; what tells of events does not end
                answer = await http.request(method, path.replace("{model}", "tiny"))
                assert answer.status_code not in (404, 405) or any(part in path for part in parts), path


async def test_ledger_balance(tmp_path: Path) -> None:
    async with serving(tmp_path / "a", ledger_view=FakeLedger()) as rig, rig.http() as http:
        answer = (await http.get("/v1/ledger/balance")).json()
        assert answer == {"account": ME, "balance": 1_284_500_000, "locked": 92_000_000, "seq": 41}
    async with serving(tmp_path / "b") as rig, rig.http() as http:
        assert (await http.get("/v1/ledger/balance")).status_code == 404


async def test_metrics_have_bounded_labels(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        await http.post(CHAT, json=STREAM)
        for index in range(5):
            await http.get(f"/v1/models/m{index}")
            await http.get(f"/random/{index}")
        text = (await http.get("/metrics")).text
        assert 'rios_gateway_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
        assert 'rios_gateway_requests_total{route="/v1/models/{model}",status="404"} 5.0' in text
        assert 'rios_gateway_requests_total{route="other",status="404"} 5.0' in text
        assert 'rios_gateway_tokens_total{kind="completion"} 7.0' in text
        assert rig.registry.get_sample_value("rios_gateway_first_token_seconds_count") == 1
        assert "random" not in text


async def test_concurrency_limit(tmp_path: Path) -> None:
    engine = FakeEngine(hang_at=1)
    async with serving(tmp_path, engine=engine, concurrent_per_key=1) as rig, rig.http() as http:
        connection = await rig.raw(CHAT, STREAM)
        async with connection:
            await read_until(connection, b"Paris")
            answer = await http.post(CHAT, json=BODY)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        engine.hang_at = None
        for _ in range(200):  # The place is free once the first one is settled.
            if (await http.post(CHAT, json=BODY)).status_code == 200:
                return
            await trio.sleep(0.02)
        pytest.fail("the place was never given back")


async def test_token_limit_gives_back_what_was_not_used(tmp_path: Path) -> None:
    async with serving(tmp_path, tokens_per_minute=1000) as rig, rig.http() as http:
        for _ in range(5):
            answer = await http.post(CHAT, json={**BODY, "max_tokens": 900})
            assert answer.status_code == 200
        rig.engine.hang_at = 1
        connection = await rig.raw(CHAT, {**STREAM, "max_tokens": 900})
        async with connection:
            await read_until(connection, b"Paris")
            answer = await http.post(CHAT, json={**BODY, "max_tokens": 900})
            assert answer.status_code == 429
            assert "tokens per minute" in answer.json()["error"]["message"]


async def test_taken_port(tmp_path: Path) -> None:
    async with serving(tmp_path / "a") as rig:
        with pytest.raises(LocalError) as caught:
            async with serving(tmp_path / "b", port=rig.gateway.port):
                pass
        assert caught.value.code == "port_taken"
        assert str(rig.gateway.port) in caught.value.message
        assert "gateway.port" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"host": "no.such.host.invalid"}, "not an address"),
        ({"host": "192.0.2.1"}, "not an address of this machine"),
        ({"database": "postgresql://u:secret@localhost/x"}, "must not hold secrets"),
        ({"database": "postgresql://localhost/x?password=secret"}, "must not hold secrets"),
        ({"database": "mysql://localhost/x"}, "not PostgreSQL"),
        ({"database": "nonsense"}, "not a database address"),
    ],
)
async def test_wrong_settings(tmp_path: Path, settings: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with serving(tmp_path, **settings):
            pass
    assert text in str(caught.value)
    assert "secret@" not in str(caught.value)
    assert "=secret" not in str(caught.value)


async def test_database_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(RiosError) as caught:
        async with open_gateway(
            settings=GatewaySettings(port=0, database="postgresql://nobody@127.0.0.1:1/none"),
            data_dir=tmp_path,
            engine=FakeEngine(),
            health=None,
            registry=CollectorRegistry(),
        ):
            pass
    assert caught.value.code == "unavailable"
    assert "127.0.0.1:1" in caught.value.message


async def test_data_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LocalError, match=r"cannot (open|use)"):
        async with serving(tmp_path / "file"):
            pass


async def test_connections_that_were_closed_do_not_count_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.doorway.CONNECTIONS_MAX", 10)
    async with serving(tmp_path) as rig:
        key = {"silent": b"", "head": b"GET / HTTP/1.1\r\nx-a: a", "body": b"POST " + CHAT.encode() + b" HTTP/1.1\r\n"}
        key["body"] += f"host: a\r\nauthorization: Bearer {rig.key}\r\ncontent-length: 99\r\n\r\n{{".encode()
        for first in key.values():
            for _ in range(2):
                streams = [await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) for _ in range(9)]
                for stream in streams:
                    await stream.send_all(first)
                await trio.sleep(0.1)
                for stream in streams:
                    await trio.aclose_forcefully(stream)
                await trio.sleep(0.5)
        async with rig.http() as http:
            assert (await http.get("/healthz")).status_code == 200


async def test_bodies_that_never_end_do_not_fill_the_memory_and_small_ones_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "BODIES_BYTES_MAX", 1 << 20)
    async with serving(tmp_path, body_bytes_max=1 << 20) as rig, AsyncExitStack() as stack:
        part = b" " * 400_000
        for _ in range(2):
            stream = await stack.enter_async_context(await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port))
            await stream.send_all(request_bytes(CHAT, part, rig.key, content_length=str(len(part) + 1)))
        await trio.sleep(0.2)
        large = {**BODY, "messages": [{"role": "user", "content": "a" * 500_000}]}
        async with rig.http() as http:
            refused = await http.post(CHAT, json=large)
            assert refused.status_code == 503
            assert "request bodies" in refused.json()["error"]["message"]
            assert refused.headers["retry-after"]
            assert (await http.post(CHAT, json=BODY)).status_code == 200
            await stack.aclose()
            with trio.fail_after(10):
                while (await http.post(CHAT, json=large)).status_code == 503:  # noqa: ASYNC110
                    await trio.sleep(0.1)


async def test_who_makes_too_many_connections_is_shut_out_for_a_moment_and_others_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, connections_per_second=5) as rig:

        async def asked(source: str) -> bytes:
            made = trio.socket.socket()
            await made.bind((source, 0))
            await made.connect((rig.gateway.host, rig.gateway.port))
            async with trio.SocketStream(made) as stream:
                try:
                    await stream.send_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
                    return await read_all(stream)
                except trio.BrokenResourceError:
                    return b""

        answers = [await asked("127.9.9.9") for _ in range(40)]
        assert 10 <= sum(answer.startswith(b"HTTP/1.1 200") for answer in answers) < 40
        assert (await asked("127.9.9.10")).startswith(b"HTTP/1.1 200"), "another address"
        assert caplog.text.count("127.9.9.9 makes more than 5 connections a second") == 1
        await trio.sleep(0.5)
        assert (await asked("127.9.9.9")).startswith(b"HTTP/1.1 200"), "only for a moment"


async def test_a_head_that_trickles_in_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, the head's end never: the connection has one deadline for all of it."""
    monkeypatch.setattr("gateway.server._KEEP_ALIVE_SECONDS", 1.0)
    async with (
        serving(tmp_path) as rig,
        await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as stream,
    ):
        began = trio.current_time()
        with trio.fail_after(10), suppress(trio.BrokenResourceError):
            async with trio.open_nursery() as nursery:

                async def trickle() -> None:
                    with suppress(trio.BrokenResourceError):
                        for letter in b"GET /healthz HTTP/1.1\r\n" * 10:
                            await stream.send_all(bytes([letter]))
                            await trio.sleep(0.2)

                nursery.start_soon(trickle)
                assert await stream.receive_some() == b""
                nursery.cancel_scope.cancel()
        assert trio.current_time() - began < 5


async def test_a_connection_may_rest_between_requests_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.server._KEEP_ALIVE_SECONDS", 1.0)
    engine = FakeEngine(pause_seconds=0.4)
    async with serving(tmp_path, engine=engine) as rig:
        stream = await rig.raw(CHAT, {**STREAM, "max_tokens": 5})
        async with stream:
            await read_until(stream, b"[DONE]")  # longer than a rest may be
            await trio.sleep(0.5)
            await stream.send_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            await read_until(stream, b"200")
            with trio.fail_after(5), suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass
