"""HTTP/1.1 on one connection: what becomes a request, what goes out for an answer, and when the connection ends."""

from collections.abc import Awaitable, Callable
from typing import Any

import h11
import pytest
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.worker_context import WorkerContext
from trio.testing import wait_all_tasks_blocked

from gateway.http11 import REQUESTS_MAX, Http11, head_bytes
from gateway.inbox import Tasks
from gateway.reader import HEAD_BYTES_MAX

App = Callable[[Any, Any, Any], Awaitable[None]]
SHAKE = (
    b"GET /w HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nConnection: keep-alive\r\nUpgrade: WebSocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
GET = b"GET /a?b=c HTTP/1.1\r\nhost: x\r\n\r\n"


class Rig:
    """A protocol without a socket."""

    def __init__(self, app: App, tasks: Tasks) -> None:
        self.out, self.closed, self.idle, self.arrived = b"", False, True, 0

        async def wrapped(scope: Any, receive: Any, send: Any, *_: Any) -> None:
            await app(scope, receive, send)

        def count() -> None:
            self.arrived += 1

        ends = {"tls": False, "client": ("10.0.0.1", 5), "server": ("10.0.0.2", 80)}
        context = WorkerContext(None)
        self.context = context
        self.protocol = Http11(wrapped, Config(), context, tasks, self._send, **ends, arrived=count)  # type: ignore

    async def _send(self, event: Event) -> None:
        if isinstance(event, RawData):
            assert not self.closed, "written after the end"
            self.out += event.data
            await trio.lowlevel.checkpoint()
        elif isinstance(event, Updated):
            self.idle = event.idle
        elif isinstance(event, Closed):
            self.closed = True
            await self.protocol.handle(Closed())

    async def come(self, data: bytes) -> bytes:
        """What goes out for it."""
        before = len(self.out)
        await self.protocol.handle(RawData(data))
        await wait_all_tasks_blocked()
        return self.out[before:]


class Reader:
    blocked_seconds = staticmethod(lambda: 0.0)
    give_up = staticmethod(lambda: None)


class Ran:
    """Runs ``work`` with a rig around ``app``."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._tasks = Tasks(Reader())  # type: ignore[arg-type]

    async def __aenter__(self) -> Rig:
        await self._tasks.__aenter__()
        return Rig(self._app, self._tasks)

    async def __aexit__(self, *error: Any) -> None:
        self._tasks._nursery.cancel_scope.cancel()  # what an application still waits for
        await self._tasks.__aexit__(*error)


async def body_of(receive: Any) -> bytes:
    data, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return data + b" LEFT"
        data, more = data + message["body"], message["more_body"]
    return data


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Says what it was asked, with a length."""
    text = f"{scope['method']} {scope['path']} {scope['query_string'].decode()} ".encode() + await body_of(receive)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


async def pieces(scope: Any, receive: Any, send: Any) -> None:
    """Does not say how long it is."""
    await body_of(receive)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for part in (b"one", b"", b"two"):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body"})


def answers_of(data: bytes, *, method: bytes = b"GET", count: int = 1) -> list[tuple[int, dict[bytes, bytes], bytes]]:
    """As h11's client reads them."""
    client, found = h11.Connection(h11.CLIENT), []
    client.receive_data(data)
    for _ in range(count):
        client.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        client.send(h11.EndOfMessage())
        head, body = None, b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                assert isinstance(event, h11.InformationalResponse), event
        assert head is not None
        found.append((head.status_code, dict(head.headers), body))
        if client.our_state is h11.DONE and client.their_state is h11.DONE:
            client.start_next_cycle()
    return found


async def test_a_request_is_answered_and_the_connection_goes_on() -> None:
    async with Ran(echo) as rig:
        for turn in range(3):
            ((status, headers, body),) = answers_of(await rig.come(GET))
            assert (status, body) == (200, b"GET /a b=c ")
            assert b"date" in headers
            assert b"connection" not in headers
            assert (rig.idle, rig.closed, rig.arrived) == (True, False, turn + 1)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_it_does_not_matter_how_a_request_is_cut(size: int) -> None:
    request = (
        b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;a=b\r\nabc\r\n5\r\ndefgh\r\n0\r\nT: u\r\n\r\n"
        b"POST /y HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n1234"
    )
    async with Ran(echo) as rig:
        for place in range(0, len(request), size):
            await rig.come(request[place : place + size])
        assert [each[2] for each in answers_of(rig.out, count=2)] == [b"POST /x  abcdefgh", b"POST /y  1234"]
        assert not rig.closed


async def test_what_is_sent_ahead_waits_for_its_turn() -> None:
    go, running = trio.Event(), []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        running.append(scope["path"])
        if scope["path"] == "/1":
            await go.wait()
        await echo(scope, receive, send)

    async with Ran(slow) as rig, trio.open_nursery() as nursery:
        three = b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % n for n in (1, 2, 3))
        nursery.start_soon(rig.protocol.handle, RawData(three))
        await wait_all_tasks_blocked()
        assert (running, rig.out) == (["/1"], b"")
        go.set()
        await wait_all_tasks_blocked()
        assert running == ["/1", "/2", "/3"]
        assert [status for status, _, _ in answers_of(rig.out, count=3)] == [200] * 3


async def test_an_answer_of_unknown_length_is_in_chunks_and_for_an_old_client_ends_with_the_connection() -> None:
    async with Ran(pieces) as rig:
        ((_, headers, body),) = answers_of(await rig.come(GET))
        assert (headers[b"transfer-encoding"], body, rig.closed) == (b"chunked", b"onetwo", False)
        assert rig.out.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
    async with Ran(pieces) as rig:
        out = await rig.come(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert out.endswith(b"\r\n\r\nonetwo")
        assert b"connection: close" in out
        assert b"chunked" not in out
        assert rig.closed


async def test_what_has_no_body_is_sent_without_one() -> None:
    async def empty(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": int(scope["path"][1:]), "headers": []})
        await send({"type": "http.response.body", "body": b"never"})

    async with Ran(empty) as rig:
        for status in (204, 304):
            out = await rig.come(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % status)
            ((code, headers, body),) = answers_of(out)
            assert (code, list(headers), body) == (status, [b"date"], b"")
            assert out.count(b"\r\n\r\n") == 1
        assert not rig.closed
    async with Ran(echo) as rig:
        out = await rig.come(b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"content-length: " in out
        assert out.endswith(b"\r\n\r\n")
        assert not rig.closed


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 505),
        (b"GET / HTTP/2.0\r\nhost: x\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nhost: x\n\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: b\x00c\r\n\r\n", 400),
        (b"GET /\xc3\xa9 HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: +3\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"0" * 5000 + b"\r\n\r\n", 400),
        (b"CONNECT a:80 HTTP/1.1\r\nhost: x\r\n\r\n", 501),
        (b"DESCRIBE /a RTSP/1.0\r\nhost: x\r\n\r\n", 501),
        (b"GET http://x/a HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", 400),
        (SHAKE.replace(b"13", b"12"), 400),
        (SHAKE.replace(b"Host: x", b"Host: x\r\nSec-WebSocket-Protocol: \xff"), 400),
        (SHAKE.replace(b"Host: x", b"Host: x\r\nSec-WebSocket-Key: b"), 400),
        (b"GET * HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (SHAKE + b"\x81\x83\0\0\0\0you", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"b" * HEAD_BYTES_MAX + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"b" * (HEAD_BYTES_MAX + 64), 431),
        (b"GET /" + b"b" * HEAD_BYTES_MAX, 431),
    ],
)
async def test_what_is_no_request_is_refused_and_ends_the_connection(request_: bytes, status: int) -> None:
    asked = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope)

    async with Ran(app) as rig:
        out = await rig.come(request_)
        assert out.startswith(b"HTTP/1.1 %d " % status)
        assert out.endswith(b"\r\n\r\n")
        assert rig.closed
        assert rig.protocol.is_sour
        assert await rig.come(GET) == b""
        assert not asked


async def test_what_follows_a_request_and_is_none_is_refused_after_its_answer() -> None:
    async with Ran(echo) as rig:
        out = await rig.come(GET + b"garbage\r\n\r\n")
        assert [status for status, _, _ in answers_of(out, count=2)] == [200, 400]
        assert rig.closed
        assert not rig.protocol.is_sour


async def test_nonsense_behind_a_request_does_not_hide_that_its_client_left() -> None:
    heard = []

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        await body_of(receive)
        heard.append((await receive())["type"])

    for head in (GET, GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")):
        heard.clear()
        async with Ran(app) as rig:
            await rig.come(head + b"X")
            await rig.protocol.handle(Closed())
            await wait_all_tasks_blocked()
            assert heard == ["http.disconnect"]
    async with Ran(app) as rig:
        await rig.come(GET + b"X")
        await rig.come(b"X" * HEAD_BYTES_MAX)
        assert not rig.closed
        await rig.come(b"X")
        assert rig.closed, "it would be read for as long as the answer takes"


async def test_a_websocket_that_says_too_much_is_ended_and_none_is_compressed() -> None:
    heard = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        heard.append((await receive())["type"])

    wish = b"Host: x\r\nSec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=abc"
    async with Ran(app) as rig:
        rig.protocol.config.websocket_max_message_size = 4096
        out = await rig.come(SHAKE.replace(b"Host: x", wish))
        assert out.startswith(b"HTTP/1.1 101 ")
        assert b"extensions" not in out
        await rig.come(b"\x81\xfe\x20\x00\0\0\0\0" + b"a" * 0x2000)
        assert rig.closed
        assert heard == ["websocket.disconnect"]


async def test_who_does_not_wait_for_a_websocket_to_be_accepted_gets_none() -> None:
    heard, go = [], trio.Event()

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await go.wait()
        heard.append((await receive())["type"])
        await send({"type": "websocket.accept"})

    async with Ran(app) as rig:
        assert await rig.come(SHAKE) == b""
        assert await rig.come(b"\x81\x83\0\0\0\0you") == b""
        assert rig.closed
        assert rig.protocol.is_sour
        go.set()
        await wait_all_tasks_blocked()
        assert heard == ["websocket.disconnect"]
        assert rig.out == b""


async def test_who_left_is_not_answered_what_they_sent_ahead() -> None:
    asked = []

    async def app(scope: Any, receive: Any, _send: Any) -> None:
        asked.append(scope["path"])
        await body_of(receive)
        await receive()

    async with Ran(app) as rig, trio.open_nursery() as nursery:
        nursery.start_soon(rig.protocol.handle, RawData(3 * GET))
        await wait_all_tasks_blocked()
        await rig.protocol.handle(Closed())
        await wait_all_tasks_blocked()
        assert asked == ["/a"]


async def test_a_body_that_breaks_off_in_nonsense_is_refused_and_its_application_told() -> None:
    heard = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        heard.append(await body_of(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"too late"})

    async with Ran(app) as rig:
        head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"
        assert await rig.come(head) == b""
        out = await rig.come(b"zz\r\n")
        assert out.startswith(b"HTTP/1.1 400 ")
        assert b"too late" not in rig.out
        assert (heard, rig.closed) == ([b"abc LEFT"], True)


async def test_sizes_and_trailers_without_end_are_not_read_for_ever() -> None:
    for more in (b"1;" + b"a" * 100, b"0\r\nx: " + b"a" * 100):
        async with Ran(echo) as rig:
            await rig.come(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + more)
            for _ in range(HEAD_BYTES_MAX // 1000 + 2):
                await rig.come(b"a" * 1000)
            assert rig.out.startswith(b"HTTP/1.1 400 ")
            assert rig.closed


async def test_a_client_that_waits_to_be_asked_for_its_body_is_asked_once() -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
    async with Ran(echo) as rig:
        assert await rig.come(head) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await rig.come(b"abc")).startswith(b"HTTP/1.1 200 OK\r\n")
        assert (await rig.come(head + b"abc")).startswith(b"HTTP/1.1 200 OK\r\n"), "it did not wait"


async def test_an_answer_before_the_body_is_there_ends_the_connection() -> None:
    async def hasty(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async with Ran(hasty) as rig:
        out = await rig.come(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 30\r\n\r\nabc")
        assert out.startswith(b"HTTP/1.1 413 ")
        assert rig.closed


@pytest.mark.parametrize("sent", [b"", b"abc"])
async def test_an_answer_that_breaks_off_never_looks_whole(sent: bytes) -> None:
    async def short(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": sent, "more_body": True})

    async def shorter(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": sent})

    for app in (short, shorter):
        async with Ran(app) as rig:
            out = await rig.come(GET)
            assert not out.endswith(b"0\r\n\r\n")
            assert rig.closed


async def test_an_application_that_says_nothing_is_a_failure_and_one_that_says_too_much_is_cut_off() -> None:
    async def silent(_scope: Any, _receive: Any, _send: Any) -> None:
        return

    async def long(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"abc"})

    async with Ran(silent) as rig:
        assert answers_of(await rig.come(GET))[0][0] == 500
        assert rig.closed
    async with Ran(long) as rig:
        assert b"abc" not in await rig.come(GET)
        assert rig.closed


async def test_headers_make_no_lines_of_their_own() -> None:
    for name, value in ((b"a", b"b\r\nset-cookie: c"), (b"a\nb", b"c"), (b"a", b"b\0c")):
        with pytest.raises(ValueError, match="line ends"):
            head_bytes(200, [(name, value)])


async def test_an_answer_that_could_not_begin_begins_anew() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        with pytest.raises(ValueError, match="line ends"):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"\n")]})
        await send({"type": "http.response.start", "status": 500, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"error"})

    async with Ran(app) as rig:
        ((status, headers, body),) = answers_of(await rig.come(GET))
        assert (status, body, headers.get(b"transfer-encoding")) == (500, b"error", None)


async def test_who_leaves_is_told_to_the_application_and_nothing_is_written_any_more() -> None:
    heard = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await body_of(receive)
        heard.append((await receive())["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async with Ran(app) as rig:
        await rig.come(GET)
        await rig.protocol.handle(Closed())
        await wait_all_tasks_blocked()
        assert heard == ["http.disconnect"]
        assert rig.out == b""


async def test_a_connection_ends_after_many_requests_and_when_the_server_stops() -> None:
    async with Ran(echo) as rig:
        for _ in range(REQUESTS_MAX - 1):
            await rig.protocol.handle(RawData(GET))
            await wait_all_tasks_blocked()
        assert not rig.closed
        assert b"connection: close" in await rig.come(GET)
        assert rig.closed
    async with Ran(echo) as rig:
        await rig.context.terminated.set()
        assert (await rig.come(GET)).startswith(b"HTTP/1.1 200 ")
        assert rig.closed
    async with Ran(echo) as rig:
        assert b"connection: close" in await rig.come(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert rig.closed


async def test_the_wish_for_another_protocol_is_ignored_but_for_websockets() -> None:
    wish = b"GET /z HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n\r\n"
    async with Ran(echo) as rig:
        answers = answers_of(await rig.come(wish + GET), count=2)
        assert [body for _, _, body in answers] == [b"GET /z  ", b"GET /a b=c "]
    inner = b"GET /hidden HTTP/1.1\r\nhost: x\r\n\r\n"
    for size in (1, 5, 1000):
        for wishes in (
            b"connection: upgrade\r\nupgrade: h2c\r\n",
            b"upgrade: websocket\r\nconnection: upgrade\r\n",
            b"proxy-connection: upgrade\r\nupgrade: x\r\n",
        ):
            framed = b"content-length: %d\r\n\r\n%b" % (len(inner), inner)
            chunked = b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner)
            async with Ran(echo) as rig:
                for body in (framed, chunked):
                    data = b"GET /q HTTP/1.1\r\nhost: x\r\n" + wishes + body + GET
                    for place in range(0, len(data), size):
                        await rig.come(data[place : place + size])
                seen = [text for _, _, text in answers_of(rig.out, count=4)]
                assert seen == [b"GET /q  " + inner, b"GET /a b=c "] * 2

    kinds = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        kinds.append((scope["type"], scope["path"]))
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "hello"})
        assert (await receive())["text"] == "you"
        await send({"type": "websocket.close"})

    masked = b"\x81\x83\0\0\0\0you"
    async with Ran(app) as rig:
        out = await rig.come(SHAKE)
        assert out.startswith(b"HTTP/1.1 101 ")
        await rig.come(masked)
        assert b"\x81\x05hello" in out
        assert kinds == [("websocket", "/w")]
        assert rig.protocol.is_socket
        assert not rig.protocol.is_sour
