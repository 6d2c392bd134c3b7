"""One HTTP exchange, whatever its route: the ASGI layer between server and routes.

Owns the request id, the body cap, the client's disconnect, the access log and the request metrics; knows no route.

Invariants:
1. A client that leaves before the end of its answer cancels the route's work at once.
2. No more than ``body_bytes_max`` of a body is given to a route, whatever Content-Length says.
3. Somebody always receives, the route or :meth:`_Exchange._heard`: without that, the connection's reader blocks on its
   full inbox and the connection hangs.
4. Whether a request came over TLS is known to all behind: from the server, or a believed proxy.
5. Every answer carries ``x-request-id``, and what keeps browsers careful with it.
6. Bodies that are still coming take at most ``BODIES_BYTES_MAX`` together (or twice what one may have, if that is
   more), besides the first ``BODY_BYTES_FREE`` of each: who sends much and never ends cannot fill the memory. No sender
   has more of it than is left for others.
"""

import logging
import re
import secrets
import time
from collections.abc import Iterable

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config.errors import BusyError
from gateway.address import client_scheme
from gateway.errors import ApiError, error_body, internal_error
from gateway.inbox import WATCH
from gateway.metrics import Metrics
from p2p import trace

_logger = logging.getLogger("rios.gateway")
_access = logging.getLogger("rios.gateway.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_LINGER_SECONDS = 1.0
_SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"rios-version", b"1"),
)
"""For browsers: nothing is guessed, framed, told to other sites, or read by them. And which API this is."""
_STRICT = (b"strict-transport-security", b"max-age=31536000")
"""Where TLS is spoken: browsers come back by nothing else."""
_CSP = b"content-security-policy"
_NO_PAGE = b"default-src 'none'; frame-ancestors 'none'"
"""Of what is no page; pages say themselves what they may load."""
_SMALL_BODY_SECONDS = 0.05
_LOGGED_BYTES_MAX = 300
BODIES_BYTES_MAX = 32 << 20
BODY_BYTES_FREE = 16 << 10
"""Small bodies come in whatever large ones take."""


class Exchanges:
    """ASGI middleware: runs ``app`` for each request under the invariants above."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, *, body_bytes_max: int, proxies: frozenset[str] = frozenset()
    ) -> None:
        self._app = app
        self._proxies = proxies
        self._metrics = metrics
        self._body_bytes_max = body_bytes_max
        self._bodies = Bodies(max(BODIES_BYTES_MAX, 2 * body_bytes_max))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] in ("http", "websocket"):
            scope["scheme"] = client_scheme(scope, self._proxies)
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, receive, send, self._body_bytes_max, self._bodies)
        start = time.perf_counter()
        self._metrics.running.inc()
        span = trace.begin_trace("http", exchange.header(b"traceparent"), method=scope["method"])
        try:
            with span.here():
                await exchange.run(self._app)
        finally:
            route = scope["state"].get("route", "other")
            span.set(route=route, status=exchange.status, request_id=exchange.request_id)
            span.end()
            exchange.let_go()
            seconds = time.perf_counter() - start
            self._metrics.running.dec()
            self._metrics.observe_request(route, exchange.status, seconds)
            _access.info(
                "%s %s %d %.1f ms %s",
                scope["method"],
                _logged_path(scope),
                exchange.status,
                seconds * 1000,
                exchange.request_id,
            )

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A WebSocket: its route sees to its messages, and to its client's leaving."""
        request_id = _request_id(scope["headers"])
        scope["state"] = {"request_id": request_id}
        start = time.perf_counter()
        self._metrics.running.inc()
        try:
            await self._app(scope, receive, send)
        except Exception:
            _logger.exception("WebSocket %s failed", request_id)
            await send({"type": "websocket.close", "code": 1011})
        finally:
            self._metrics.running.dec()
            _access.info("WEBSOCKET %s %.1f s %s", _logged_path(scope), time.perf_counter() - start, request_id)


class Bodies:
    """The bytes of all bodies that are still coming."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes_held = 0
        self._by_sender: dict[str, int] = {}

    def take(self, size: int, sender: str) -> None:
        """Hold more of a sender's body. Raises BusyError if less would be left for all others than this one has."""
        held = self._by_sender.get(sender, 0) + size
        if held > self._bytes_max - self._bytes_held - size:
            hint = "send large requests one after the other"
            raise BusyError("too many large request bodies are on their way", hint, retry_after_ms=1000)
        self._bytes_held += size
        self._by_sender[sender] = held

    def give_back(self, size: int, sender: str) -> None:
        """Hold so much less."""
        self._bytes_held -= size
        self._by_sender[sender] -= size
        if not self._by_sender[sender]:
            del self._by_sender[sender]


class _Exchange:
    def __init__(self, scope: Scope, receive: Receive, send: Send, body_bytes_max: int, bodies: Bodies) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body_bytes_max = body_bytes_max
        self._body_bytes = 0
        self._bodies = bodies
        self._bytes_held, self._sender = 0, ""
        self._body_ended = trio.Event()
        if not _has_body(scope["headers"]):
            self._body_ended.set()
        self._work = trio.CancelScope()
        self._watching = False
        self._ended = False
        self.request_id = _request_id(scope["headers"])
        self.status = 499  # The client left before an answer began.
        # A route may put here its "meter" (the limits' headers for the answer), its path's "route" for the metrics, the
        # "sender" that its body counts for, a "body_bytes_max" below that of all, and "upload_bytes_max" if it passes
        # its body on as it comes, instead of keeping it in memory.
        scope["state"] = {"request_id": self.request_id}

    def header(self, wanted: bytes) -> str:
        """A request header; empty if it is not there."""
        return next((value.decode("latin1") for name, value in self._scope["headers"] if name == wanted), "")

    async def run(self, app: ASGIApp) -> None:
        with self._work:
            try:
                await app(self._scope, self.receive, self.send)
            except Exception:
                _logger.exception("request %s failed", self.request_id)
                await self._answer_failure()

    async def receive(self) -> Message:
        """The route's receive: body parts, counted. Raises ApiError ``too_large``."""
        if self._watching:
            # What is left is heard there; a route that asks again has had all of the body.
            return {"type": "http.disconnect"}
        if self._body_ended.is_set():
            self._watch()
            return {"type": "http.request", "body": b"", "more_body": False}
        state = self._scope["state"]
        uploads: int = state.get("upload_bytes_max", 0)
        bytes_max = uploads or min(state.get("body_bytes_max", self._body_bytes_max), self._body_bytes_max)
        if self._body_bytes == 0 and _content_length(self._scope["headers"]) > bytes_max:
            raise _too_large(bytes_max)
        message = await self._receive()
        if message["type"] == "http.request":
            self._body_bytes += len(message.get("body", b""))
            if self._body_bytes > bytes_max:
                raise _too_large(bytes_max)
            if not message.get("more_body", False):
                self._body_ended.set()
                self.let_go()  # all of it is here, and becomes what it says at once
                self._watch()
            elif not uploads:
                self._hold(max(0, self._body_bytes - BODY_BYTES_FREE) - self._bytes_held, state.get("sender", ""))
        else:  # the client has left: nothing more is coming
            self._body_ended.set()
            self.let_go()
        return message

    def _hold(self, size: int, sender: str) -> None:
        if size:
            self._bodies.take(size, sender)
            self._bytes_held, self._sender = self._bytes_held + size, sender

    def let_go(self) -> None:
        """Its body takes no memory any more, or is not coming any more."""
        if self._bytes_held:
            self._bodies.give_back(self._bytes_held, self._sender)
            self._bytes_held = 0

    async def send(self, message: Message) -> None:
        """The route's send: adds headers, and lets a body that is still coming in run out before the end."""
        self._watch()
        if message["type"] == "http.response.start":
            if not self._body_ended.is_set():
                # An early answer. A small body is here in a moment, and then the connection can be kept.
                with trio.move_on_after(_SMALL_BODY_SECONDS):
                    await self._body_ended.wait()
            self.status = message["status"]
            given = message.get("headers", ())
            message["headers"] = [*given, *self._own_headers()]
            if not any(name == _CSP for name, _ in given):
                message["headers"].append((_CSP, _NO_PAGE))
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            if not self._body_ended.is_set():
                message = await self._linger(message)
            # From here on the server itself tells of a disconnect, and that must not cut its closing short.
            self._ended = True
        await self._send(message)

    async def _linger(self, message: Message) -> Message:
        """Send the whole answer, wait for the body to run out, and return the empty end.

        Closing on unread bytes resets the connection, and the client may never see the answer.
        """
        await self._send({**message, "more_body": True})
        with trio.move_on_after(_LINGER_SECONDS):
            await self._body_ended.wait()
        return {"type": "http.response.body", "body": b"", "more_body": False}

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._scope["extensions"][WATCH](self._heard)

    def _heard(self, message: Message) -> None:
        """What comes when the route asks for nothing more."""
        if message["type"] == "http.disconnect":
            self._body_ended.set()
            if not self._ended:
                self._work.cancel()
        elif not message.get("more_body", False):
            self._body_ended.set()

    async def _answer_failure(self) -> None:
        if self.status != 499:
            return  # The answer is under way; it ends here, incomplete, and the client can tell.
        headers = [(b"content-type", b"application/json")]
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": error_body(internal_error(self.request_id))})

    def _own_headers(self) -> Iterable[tuple[bytes, bytes]]:
        yield b"x-request-id", self.request_id.encode("ascii")
        yield from _SAFE_HEADERS
        if self._scope["scheme"] == "https":
            yield _STRICT
        meter = self._scope["state"].get("meter")
        if meter is not None:
            for name, value in meter.headers().items():
                yield name.encode("ascii"), value.encode("ascii")
        if not self._body_ended.is_set():
            yield b"connection", b"close"


def _too_large(bytes_max: int) -> ApiError:
    return ApiError("too_large", f"the request body is larger than {bytes_max} bytes")


def _logged_path(scope: Scope) -> str:
    """As it was sent: ``path`` is unquoted, so it may hold line ends, or what terminals obey.

    The query is left out: secrets may stand in it.
    """
    path: bytes = scope["raw_path"]
    return path[:_LOGGED_BYTES_MAX].decode("latin-1")


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own id if it is a harmless one, else a fresh one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return f"req_{secrets.token_hex(12)}"


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and int(value)) for name, value in headers)


def _content_length(headers: Iterable[tuple[bytes, bytes]]) -> int:
    # h11 has checked that it is a number.
    return next((int(value) for name, value in headers if name == b"content-length"), 0)
