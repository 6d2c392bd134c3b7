"""HTTP/1.1 on one connection: what arrives becomes calls of the application, one after the other, and what it says goes
out framed (RFC 9112).

Owns what of a request the application is told when, the framing of answers and whether the connection is used again.
Does not own: what is a request (``gateway/reader``); the socket, its deadlines and writes (``gateway/server``); bodies
(``gateway/exchange``); WebSockets, whose connection is Hypercorn's from their head on.

Invariants:
1. One request is answered at a time; what a client sends ahead of that waits, unread but for what came with it (and so
   does the news that it left, which is first noticed in a write then). Behind nonsense little more is read.
2. An answer that is not whole never looks whole: the connection ends instead.
3. No header of an answer makes lines of its own.
"""

import re
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from time import time
from typing import Any, cast
from urllib.parse import unquote
from wsgiref.handlers import format_date_time

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Response
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, Scope
from hypercorn.typing import ConnectionState as State
from wsproto.connection import ConnectionState

from gateway.inbox import Tasks
from gateway.reader import END, HEAD_BYTES_MAX, Bad, End, Head, Reader

REQUESTS_MAX = 1000
"""After so many a connection ends, so that a new one may be sent to another gateway."""
_REFUSED = frozenset((400, 401, 413, 431))
"""What a client has nothing of, and costs."""
_LINE_ENDS = re.compile(rb"[\r\n\0]")
_SHAKE = b"GET %b HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n%b\r\n"
_NOT_HANDED_OVER = frozenset((b"connection", b"upgrade", b"sec-websocket-extensions"))
"""Compression would make much of a few bytes before anybody counts them."""
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES = {each.value: b"HTTP/1.1 %d %s\r\n" % (each, each.phrase.encode()) for each in HTTPStatus}

Address = tuple[str, int] | None
Message = dict[str, Any]


class Http11:
    """A connection's requests and answers. ``send`` takes bytes, the wish to close, and whether it rests."""

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        tasks: Tasks,
        send: Callable[[Event], Awaitable[None]],
        *,
        tls: bool,
        client: Address,
        server: Address,
        arrived: Callable[[], None],
    ) -> None:
        self.app, self.config, self.context, self.tasks, self.send = app, config, context, tasks, send
        self.arrived = arrived
        """Called when all of a request is here."""
        self.is_sour = False
        """Whether all that was answered were refusals that cost its client."""
        self.was_served = False
        self.requests = 0
        self.tls, self.client, self.server = tls, client, server
        """Whether TLS is spoken, and both ends."""
        self._reader = Reader()
        self._answer: _Answer | None = None
        self._socket: _Socket | None = None
        self._is_closing = False
        """Whether no more requests are answered."""
        self._refused = 0
        """With what, when the answer under way is over."""
        self._behind = 0
        """Bytes that came behind that."""

    @property
    def is_socket(self) -> bool:
        """Whether it is a WebSocket by now."""
        return self._socket is not None

    async def handle(self, event: Event) -> None:
        """What the connection has to tell: bytes, or its end."""
        if self._socket is not None:
            await self._on_socket(self._socket, event)
        elif isinstance(event, RawData):
            await self._read(event.data)
        elif isinstance(event, Closed):
            self._is_closing = True
            if self._answer is not None:
                await self._answer.leave()

    async def _on_socket(self, socket: "_Socket", event: Event) -> None:
        comes = isinstance(event, RawData) and bool(event.data)
        if not comes or socket.is_accepted:
            await socket.handle(event)
        else:  # who does not wait for the answer is not waited for
            self.is_sour = not self.was_served
        if comes and not socket.is_open:
            await self.send(Closed())

    async def _read(self, data: bytes) -> None:
        if self._refused:
            self._behind += len(data)
            if self._behind > HEAD_BYTES_MAX:
                await self.send(Closed())
            return
        while data and not self._is_closing:
            found, data = self._reader.read(data)
            last = len(found) - 1
            for place, each in enumerate(found):
                if self._is_closing:
                    return
                if isinstance(each, Bad):
                    await self._refuse(each.status)
                elif isinstance(each, Head):
                    if self._answer is not None:  # it was sent ahead
                        await self._answer.over.wait()
                    if self._is_closing:
                        return
                    if each.is_websocket:
                        await self._hand_over(each, data)
                        return
                    await self._begin(each)
                    if place == last and b"100-continue" in each.value(b"expect") and each.version == "1.1":
                        await self.send(RawData(_CONTINUE))
                elif isinstance(each, End):
                    self.arrived()
                    if self._answer is not None:
                        await self._answer.tell_end()
                elif self._answer is not None:
                    ends = place < last and found[place + 1] is END
                    await self._answer.tell(each, ends=ends)

    async def _begin(self, head: Head) -> None:
        path, _, query = head.target.partition(b"?")
        scope = {
            "type": "http",
            "http_version": head.version,
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "method": head.method,
            "scheme": "https" if self.tls else "http",
            "path": unquote(path.decode("ascii")),  # the parser lets nothing else through
            "raw_path": path,
            "query_string": query,
            "root_path": self.config.root_path,
            "headers": head.headers,
            "client": self.client,
            "server": self.server,
            "state": {},
            "extensions": {},
        }
        self.requests += 1
        await self.send(Updated(idle=False))
        answer = self._answer = _Answer(self, head)
        answer.put = await self.tasks.spawn_app(self.app, self.config, cast("Scope", scope), answer.say)

    async def _refuse(self, status: int) -> None:
        """What came is no request, or not the rest of one: nothing more can be read here."""
        answer = self._answer
        if answer is not None and answer.is_read:  # it was sent ahead
            self._refused = status
            return
        self.is_sour, self._is_closing = not self.was_served, True
        if answer is not None:
            await answer.leave()
        if answer is None or not answer.is_sent:
            lines = [(b"content-length", b"0"), (b"connection", b"close")]
            await self.send(RawData(head_bytes(status, lines)))
        await self.send(Closed())

    async def _hand_over(self, head: Head, rest: bytes) -> None:
        """From here on Hypercorn sees to it, beginning with the head, in which it finds no other wish than this one."""
        self.arrived()
        if rest or not _is_handshake(head):
            await self._refuse(400)
            return
        self._socket = _Socket(self)
        given = ((name, value) for name, value in head.headers if name not in _NOT_HANDED_OVER)
        lines = b"".join(b"%b: %b\r\n" % line for line in given)
        await self._socket.handle(RawData(_SHAKE % (head.target, lines)))
        if not isinstance(self._socket.stream, WSStream) or self._socket.stream.closed:
            await self.send(Closed())

    def answered(self, status: int) -> None:
        """An answer begins."""
        self.was_served = self.was_served or status not in _REFUSED
        self.is_sour = not self.was_served

    def ends(self, *, keeps: bool) -> bool:
        """An answer ends; whether another request may come, if the answer lets one."""
        self._is_closing = self._is_closing or not keeps or self.context.terminated.is_set()
        return not self._is_closing

    async def done(self, *, keeps: bool) -> None:
        """It is over."""
        self._answer = None
        if self._refused and keeps:
            await self._refuse(self._refused)
        else:
            await self.send(Updated(idle=True) if keeps else Closed())


class _Socket(H11Protocol):
    """A WebSocket's connection. (Its wish is the only one for another protocol that is heard, as RFC 9110 lets one.)"""

    def __init__(self, owner: Http11) -> None:
        ends = owner.tls, owner.client, owner.server
        super().__init__(owner.app, owner.config, owner.context, owner.tasks, State({}), *ends, owner.send)
        self._owner = owner
        self.is_accepted = False

    @property
    def is_open(self) -> bool:
        """Whether something may come; not any more once either side closes, or too much came."""
        if not self.is_accepted or not isinstance(self.stream, WSStream) or self.stream.closed:
            return False
        return self.stream.connection.state is ConnectionState.OPEN

    async def _check_protocol(self, event: h11.Request) -> None:
        pass  # it is checked already

    async def stream_send(self, event: StreamEvent) -> None:
        """See Hypercorn."""
        if isinstance(event, Response):
            self._owner.answered(event.status_code)
            self.is_accepted = event.status_code == 101
        await super().stream_send(event)


class _Answer:
    """One request, from its head on, and its answer."""

    put: Callable[[Any], Awaitable[None]]
    """Tells the application."""

    def __init__(self, connection: Http11, head: Head) -> None:
        self._connection, self._head = connection, head
        self.over = trio.Event()
        self.is_read = False
        """Whether all of the request is here."""
        self.is_sent = False
        """Whether anything of the answer is."""
        self._is_begun = self._told_end = False
        self._keeps = head.keeps and connection.requests < REQUESTS_MAX
        self._held = b""
        """The head of an answer whose length is known goes out with the body: that is there already."""
        self._left: int | None = None
        """Bytes of the body still to come, if its length is known."""
        self._in_chunks = self._has_body = False

    async def tell(self, part: bytes, *, ends: bool) -> None:
        """A part of the body."""
        self._told_end = self.is_read = ends
        await self._put({"type": "http.request", "body": part, "more_body": not ends})

    async def tell_end(self) -> None:
        """That was all of the body."""
        self.is_read = True
        if not self._told_end:
            await self._put({"type": "http.request", "body": b"", "more_body": False})

    async def leave(self) -> None:
        """The client has."""
        if not self.over.is_set():
            self.over.set()
            await self.put({"type": "http.disconnect"})

    async def _put(self, message: Message) -> None:
        if not self.over.is_set():
            await self.put(message)

    async def say(self, message: Any | None) -> None:  # noqa: ANN401 - ASGI
        """ASGI's send; None when the application has ended."""
        if self.over.is_set():
            return
        if message is None:
            await self._abandon()
        elif message["type"] == "http.response.start" and not self._is_begun:
            await self._begin(int(message["status"]), message.get("headers", ()))
        elif message["type"] == "http.response.body" and self._is_begun:
            await self._write(bytes(message.get("body", b"")), more=message.get("more_body", False))
        else:
            raise RuntimeError(f"{message['type']} has no place here")

    async def _begin(self, status: int, given: Iterable[tuple[bytes, bytes]]) -> None:
        headers = [(bytes(name).lower(), bytes(value)) for name, value in given]
        has_body = self._head.method != "HEAD" and status not in (204, 304)
        length, keeps, in_chunks = None, self._keeps and self.is_read, False
        for name, value in headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"connection" and value.lower() == b"close":
                keeps = False
        if has_body and length is None:
            in_chunks = self._head.version == "1.1"
            keeps = keeps and in_chunks  # else its end is the connection's
        if in_chunks:
            headers.append((b"transfer-encoding", b"chunked"))
        if not keeps and (b"connection", b"close") not in headers:
            headers.append((b"connection", b"close"))
        self._held = head_bytes(status, headers)
        self._is_begun, self._keeps, self._has_body, self._in_chunks = True, keeps, has_body, in_chunks
        self._left = length if has_body else None
        self._connection.answered(status)
        if has_body and length is None:
            await self._flush(b"")

    async def _write(self, data: bytes, *, more: bool) -> None:
        if not self._has_body:
            data = b""
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                await self._abandon()
                raise RuntimeError("the body is longer than the answer said")
        if self._in_chunks:
            data = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            if not more:
                data += b"0\r\n\r\n"
        await self._flush(data)
        if not more and not self.over.is_set():
            await self._end(keeps=self._keeps and self.is_read and not self._left)

    async def _flush(self, data: bytes) -> None:
        data, self._held = self._held + data, b""
        if data:
            self.is_sent = True
            await self._connection.send(RawData(data))

    async def _abandon(self) -> None:
        """No more comes of it."""
        self._connection.ends(keeps=False)
        self.over.set()
        if not self.is_sent:
            lines = [(b"content-length", b"0"), (b"connection", b"close")]
            self._connection.answered(500)
            await self._connection.send(RawData(head_bytes(500, lines)))
        await self.put({"type": "http.disconnect"})
        await self._connection.done(keeps=False)

    async def _end(self, *, keeps: bool) -> None:
        keeps = self._connection.ends(keeps=keeps)
        self.over.set()
        await self.put({"type": "http.disconnect"})
        await self._connection.done(keeps=keeps)


def _is_handshake(head: Head) -> bool:
    """Whether Hypercorn can make something of what a WebSocket's client says."""
    said = [value for name, value in head.headers if name.startswith(b"sec-websocket-")]
    keys = [value for name, value in head.headers if name == b"sec-websocket-key" and value]
    return len(keys) == 1 and head.value(b"sec-websocket-version") == b"13" and all(map(bytes.isascii, said))


def head_bytes(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """An answer's head, with the date. Raises ValueError for headers that would make lines of their own."""
    lines = [b"%b: %b" % line for line in headers]
    if _LINE_ENDS.search(b"".join(lines)):
        raise ValueError("a header of an answer holds line ends")
    first = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    lines.append(b"date: " + _date(int(time())))
    return b"%b%b\r\n\r\n" % (first, b"\r\n".join(lines))


_dates: dict[int, bytes] = {}


def _date(seconds: int) -> bytes:
    """As headers have it; made once a second."""
    found = _dates.get(seconds)
    if found is None:
        _dates.clear()
        found = _dates[seconds] = format_date_time(seconds).encode("ascii")
    return found
