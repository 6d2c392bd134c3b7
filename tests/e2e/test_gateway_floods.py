"""One address floods a gateway's server, on real sockets; an honest client beside it, at another address or the same,
is answered."""

import json
import socket
import ssl
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from gateway import doorway
from gateway import server as server_module
from gateway.address import neighbourhood
from gateway.arrivals import ARRIVING_MAX, GRACE_SECONDS
from gateway.certificate import Certificate
from gateway.server import HttpServer, open_listener
from tests.tls import make_certificate

FLOODER, HONEST = "127.8.1.1", "127.8.1.2"
HEAD = b"POST / HTTP/1.1\r\nhost: here\r\n"


async def app(scope, receive, send) -> None:
    """Answers with the length of the body; 401 to who asks for /no."""
    if scope["type"] != "http":
        return
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = json.dumps(size).encode()
    status = 401 if scope["path"] == "/no" else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(served=app, **settings: object) -> AsyncIterator[HttpServer]:
    server = HttpServer(served, await open_listener("127.0.0.1", 0), connections_per_second=100, **settings)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        yield server
        await server.stop()
        nursery.cancel_scope.cancel()


async def dial(server: HttpServer, source: str, *, receive_bytes: int = 0) -> trio.SocketStream:
    made = trio.socket.socket()
    if receive_bytes:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    await made.bind((source, 0))
    await made.connect(server.address)
    return trio.SocketStream(made)


async def answer(stream: trio.SocketStream) -> bytes:
    """The first bytes of an answer; nothing if the connection ended without one."""
    try:
        return bytes(await stream.receive_some(4096))
    except trio.BrokenResourceError:
        return b""


async def asked(server: HttpServer, source: str, path: bytes = b"/") -> bytes:
    async with await dial(server, source) as stream:
        await stream.send_all(b"GET " + path + b" HTTP/1.1\r\nhost: here\r\n\r\n")
        return await answer(stream)


async def is_closed(stream: trio.SocketStream, seconds: float) -> bool:
    with trio.move_on_after(seconds):
        return not await answer(stream)
    return False


async def test_heads_that_never_end_have_so_many_places():
    async with serving() as server:
        held = []
        for _ in range(ARRIVING_MAX):
            held.append(await dial(server, FLOODER))
            await held[-1].send_all(HEAD)
        await trio.sleep(0.2)
        more = await dial(server, FLOODER)
        assert await is_closed(more, 1.0), "no place is left"
        assert (await asked(server, HONEST)).startswith(b"HTTP/1.1 200"), "its neighbour has places of its own"
        await trio.sleep(GRACE_SECONDS)
        assert (await asked(server, FLOODER)).startswith(b"HTTP/1.1 200"), "whoever is quick gets an idle one's place"
        closed = [await is_closed(stream, 0.05) for stream in held]
        assert sum(closed) == 1
        assert closed[0], "the one that waited longest"
        for stream in (*held, more):
            await stream.aclose()


async def test_a_connection_that_was_served_stays_while_its_address_is_full():
    async with serving() as server, await dial(server, FLOODER) as old:
        await old.send_all(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        assert await answer(old)
        held = [await dial(server, FLOODER) for _ in range(ARRIVING_MAX)]
        await trio.sleep(0.2)
        await old.send_all(HEAD + b"content-length: 3\r\n\r\n")
        await trio.sleep(0.1)
        await old.send_all(b"abc")
        assert (await answer(old)).endswith(b"3")
        for stream in held:
            await stream.aclose()


async def test_drips_are_read_ever_less_often_and_a_request_in_pieces_is_answered(monkeypatch):
    reads: list[int] = []
    came = server_module._Connection._came
    monkeypatch.setattr(
        server_module._Connection, "_came", lambda self, size: (reads.append(size), came(self, size))[1]
    )
    async with serving() as server, await dial(server, HONEST) as stream:
        body, head = b"x" * 60, HEAD + b"content-length: 60\r\n\r\n"
        await stream.send_all(head)
        for byte in body:
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.02)
        assert (await answer(stream)).endswith(b"60")
    assert sum(reads) == len(head) + len(body)
    assert len(reads) < 20, "61 pieces came"


@pytest.mark.parametrize("tls", [False, True])
async def test_an_upload_with_small_parts_among_large_ones_is_read_at_full_speed(monkeypatch, tmp_path, tls):
    """As forms and chunked bodies are: a client sends each part's few bytes by themselves."""
    pauses: list[float] = []
    pause_s = server_module._pause_s
    monkeypatch.setattr(server_module, "_pause_s", lambda times: (pauses.append(0), pause_s(times))[1])
    chain, key = make_certificate(tmp_path)
    large, small = b"x" * (64 << 10), b"y" * 20
    async with serving(certificate=Certificate(chain, key) if tls else None) as server:
        stream: trio.abc.Stream = await dial(server, HONEST)
        if tls:
            trusting = ssl.create_default_context(cafile=chain)
            stream = trio.SSLStream(stream, trusting, server_hostname="localhost", https_compatible=True)
        body = [*[small] * 10, *[large, small, small, small] * 20]
        await stream.send_all(HEAD + b"content-length: %d\r\n\r\n" % sum(map(len, body)))
        for part in body:
            await stream.send_all(part)
            await trio.sleep(0.002)
        assert (await answer(stream)).endswith(b"%d" % sum(map(len, body)))
        await stream.aclose()
    assert len(pauses) < 10


async def test_who_only_asks_what_is_refused_may_connect_less_often():
    async with serving() as server:
        refused = 0
        for _ in range(100):
            refused += not await asked(server, FLOODER, b"/no")
        assert refused, "5 times 100 connections are more than it may make in this time"
        others = [await asked(server, HONEST) for _ in range(100)]
        assert all(each.startswith(b"HTTP/1.1 200") for each in others)


async def test_a_connection_that_was_of_use_counts_once_whatever_came_last():
    """As a browser's, whose session ends."""
    async with serving() as server:
        for _ in range(100):
            async with await dial(server, FLOODER) as stream:
                for path, status in ((b"/", b"200"), (b"/no", b"401")):
                    await stream.send_all(b"GET " + path + b" HTTP/1.1\r\nhost: here\r\n\r\n")
                    assert (await answer(stream)).startswith(b"HTTP/1.1 " + status)


async def test_refused_clients_that_leave_at_once_do_not_shut_their_neighbours_out():
    async with serving() as server:
        held = []
        for _ in range(180):
            held.append(await dial(server, FLOODER))
            await held[-1].send_all(b"GET /no HTTP/1.1\r\nhost: here\r\n\r\n")
            assert await answer(held[-1])
        for stream in held:
            await stream.aclose()
        await trio.sleep(0.5)
        assert (await asked(server, FLOODER)).startswith(b"HTTP/1.1 200")


async def test_this_machines_own_clients_are_only_limited_in_their_rate():
    async with serving() as server:
        held = [await dial(server, "127.0.0.1") for _ in range(2 * ARRIVING_MAX)]
        await trio.sleep(0.2)
        for _ in range(50):
            assert (await asked(server, "127.0.0.1", b"/no")).startswith(b"HTTP/1.1 401")
        assert (await asked(server, "127.0.0.1")).startswith(b"HTTP/1.1 200")
        for stream in held:
            await stream.aclose()
        for _ in range(300):
            (await dial(server, "127.0.0.1")).socket.close()
        await trio.sleep(0.2)
        assert not server.doorway.sieve.times


async def test_an_ipv6_network_of_64_bits_is_one_client(monkeypatch):
    """The loopback has one IPv6 address only: what a peer's name is, is told otherwise here."""
    names = (f"2001:db8:1:2::{n:x}" for n in range(1000))
    monkeypatch.setattr(doorway, "neighbourhood", lambda host: neighbourhood(next(names)))
    async with serving() as server:
        held = [await dial(server, FLOODER) for _ in range(ARRIVING_MAX)]
        await trio.sleep(0.2)
        more = await dial(server, FLOODER)
        assert await is_closed(more, 1.0)
        for stream in (*held, more):
            await stream.aclose()


async def test_a_tls_handshake_that_never_ends_makes_room_too(tmp_path):
    chain, key = make_certificate(tmp_path)
    async with serving(certificate=Certificate(chain, key)) as server:
        held = [await dial(server, FLOODER) for _ in range(ARRIVING_MAX)]
        await trio.sleep(GRACE_SECONDS + 0.2)
        more = await dial(server, FLOODER)
        assert await is_closed(held[0], 1.0)
        for stream in (*held, more):
            await stream.aclose()


async def test_a_proxys_clients_are_not_counted_together():
    async with serving(proxies={FLOODER}) as server:
        held = [await dial(server, FLOODER) for _ in range(2 * ARRIVING_MAX)]
        await trio.sleep(0.2)
        assert (await asked(server, FLOODER)).startswith(b"HTTP/1.1 200")
        for stream in held:
            await stream.aclose()


@pytest.mark.parametrize("client_leaves", [False, True])
@pytest.mark.parametrize("messages", [1, 30])
async def test_a_websocket_that_is_over_gives_its_place_up_at_once_whatever_was_not_read(messages, client_leaves):
    async def greet(scope, receive, send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await trio.sleep(0.3)
        await send({"type": "websocket.close", "code": 1000})

    async with serving(greet) as server, await dial(server, HONEST) as client:
        await client.send_all(
            b"GET / HTTP/1.1\r\nhost: here\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
        )
        assert (await answer(client)).startswith(b"HTTP/1.1 101")
        for _ in range(messages):
            await client.send_all(b"\x81\x81\x00\x00\x00\x00x")
            await trio.sleep(0.001)
        if client_leaves:
            await client.aclose()
        with trio.fail_after(5):
            while server._connections:  # noqa: ASYNC110
                await trio.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels keep what they like")
async def test_an_answer_is_not_made_far_ahead_of_a_client_that_does_not_read():
    made = 0

    async def stream(scope, receive, send) -> None:
        nonlocal made
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2000):
            await send({"type": "http.response.body", "body": b"x" * 250, "more_body": True})
            made += 250
        await send({"type": "http.response.body", "body": b""})

    async with serving(stream) as server, await dial(server, HONEST, receive_bytes=4096) as client:
        await client.send_all(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        while True:
            before = made
            await trio.sleep(0.3)
            if before == made:
                break
        assert 0 < made < 64 << 10
        with trio.fail_after(10):
            while not (await client.receive_some(1 << 16)).endswith(b"0\r\n\r\n"):
                pass
    assert made == 500_000, "who reads late gets all of it"


async def test_uploads_take_turns_so_that_each_turn_of_the_loop_is_short(monkeypatch):
    """However many bodies come at full speed, one large piece is taken between two looks at everything else."""
    turns, taken = 0, []
    came = server_module._Connection._came

    def noted(connection, size):
        if size >= 1 << 14:
            taken.append(turns)
        came(connection, size)

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def upload(server, number: int) -> None:
        async with await dial(server, f"127.0.3.{number + 1}") as stream:
            await stream.send_all(
                b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 1000000\r\n\r\n" + bytes(1_000_000)
            )
            assert (await answer(stream)).endswith(b"1000000")

    monkeypatch.setattr(server_module._Connection, "_came", noted)
    async with serving() as server, trio.open_nursery() as nursery:
        nursery.start_soon(count)
        with trio.fail_after(30):
            async with trio.open_nursery() as uploads:
                for number in range(10):
                    uploads.start_soon(upload, server, number)
        nursery.cancel_scope.cancel()
    assert len(taken) > 100
    assert len(set(taken)) == len(taken)


async def _come_and_go(server: HttpServer) -> None:
    await (await dial(server, "127.0.0.1")).aclose()


async def test_what_was_refused_is_counted_by_its_reason(monkeypatch):
    counted: Counter[str] = Counter()
    async with serving(on_refused=lambda reason: counted.update([reason])) as server:
        with trio.fail_after(60):
            while counted["rate"] <= 50:
                async with trio.open_nursery() as dials:
                    for _ in range(300):
                        dials.start_soon(_come_and_go, server)
        assert (await asked(server, "127.0.3.2")).startswith(b"HTTP/1.1 200"), "who came before is through by now"
    assert set(counted) == {"rate"}, "this machine is not shunned"


GET = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"


async def test_who_keeps_connections_open_shuts_nobody_out(monkeypatch):
    """Each was answered once, and waits for the next request."""
    monkeypatch.setattr(doorway, "CONNECTIONS_MAX", 60)
    monkeypatch.setattr(doorway, "_SHARES", 1)
    counted: Counter[str] = Counter()
    async with serving(on_refused=lambda reason: counted.update([reason])) as server, AsyncExitStack() as stack:
        mine = await stack.enter_async_context(await dial(server, HONEST))
        await mine.send_all(GET)
        assert await answer(mine)
        held = []
        for _ in range(100):
            held.append(await stack.enter_async_context(await dial(server, FLOODER)))
            await held[-1].send_all(GET)
            assert await answer(held[-1]), "it takes its own places"
        assert (await asked(server, "127.8.1.3")).startswith(b"HTTP/1.1 200")
        await mine.send_all(GET)
        assert (await answer(mine)).startswith(b"HTTP/1.1 200"), "who has one keeps it"
        assert await is_closed(held[0], 1.0)
        assert not await is_closed(held[-1], 0.1)
    assert set(counted) == {"ousted"}
    assert counted["ousted"] >= 100 + 2 - (60 - 16)


async def _endless(scope, receive, send) -> None:
    """Begins at once, and goes on until it is told to end."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    await receive()
    await receive()


async def test_answers_under_way_are_not_ended_and_an_address_has_its_share(monkeypatch, caplog):
    monkeypatch.setattr(doorway, "CONNECTIONS_MAX", 80)
    counted: Counter[str] = Counter()
    refused = counted.update
    async with serving(_endless, on_refused=lambda why: refused([why])) as server, AsyncExitStack() as stack:

        async def streams(source: str, count: int) -> list[trio.SocketStream]:
            begun = []
            for _ in range(count):
                begun.append(await stack.enter_async_context(await dial(server, source)))
                await begun[-1].send_all(GET)
                assert await answer(begun[-1])
            return begun

        held = await streams(FLOODER, 20)
        assert await asked(server, FLOODER) == b""
        assert counted == {"share": 1}
        held += [*await streams("127.8.1.3", 20), *await streams("127.8.1.4", 20), *await streams("127.8.1.5", 4)]
        assert await asked(server, HONEST) == b""
        assert counted == {"share": 1, "full": 1}
        assert b"200" in await asked(server, "127.0.0.1"), "this machine has some places of its own"
        assert not [stream for stream in held if await is_closed(stream, 0.005)]
        assert [FLOODER in record.getMessage() for record in caplog.records] == [True, False]
