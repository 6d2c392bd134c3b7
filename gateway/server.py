"""Connections of HTTP/1.1 on trio that cannot hang, crash the node or outlive it.

Owns the listening socket and every connection: its deadlines, its writes and its end. What is said on it is
``gateway/http11``'s. The connection is Hypercorn's class, run inside the caller's nursery, with these parts replaced:

1. Its write is shielded without a bound; a client that stops reading would block a shutdown for ever. Here the shield
   ends after ``_SEND_SECONDS`` (sooner while stopping, and for who reads too slowly while others wait:
   ``gateway/turns.py``), and the connection with it.
2. ``_close`` runs in the task that ends a response, which is cancelled by the disconnect that closing causes, so a
   ``Connection: close`` stream was never closed. Here it is shielded and bounded.
3. ``is_disconnected()`` never becomes true, and waiting for ``http.disconnect`` takes a task: ``gateway.inbox`` calls
   ``gateway.exchange``.
4. Its idle clock is a task, started and cancelled for every request, and it outlived a connection that its client
   closed, so that a thousand short ones shut everybody out for half a minute. Here it is the deadline of the read under
   way. A WebSocket's pings, a task too, end with the connection.

Against those who only cost: who may connect, and who makes room, is up to ``gateway/doorway``; a request that comes in
drips is read less and less often; of what comes in large pieces one is taken at each turn of the event loop, whosever
it is, so that many uploads hold nobody up.

HTTP/2 is not offered: a reverse proxy does it better, and one protocol is half the attack surface.
"""

import errno
import logging
import math
import socket
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import cast

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app
from starlette.types import ASGIApp

from config.errors import ConfigError, LocalError
from gateway.certificate import Certificate
from gateway.doorway import Doorway
from gateway.http11 import Http11
from gateway.inbox import Tasks
from gateway.wire import Wire

_logger = logging.getLogger("rios.gateway")

_KEEP_ALIVE_SECONDS = 30
_READ_BYTES = 1 << 16
_LARGE_BYTES = 1 << 14
"""A read that brings as much waits for its turn."""
_SEND_SECONDS = 30.0
_CLOSE_SECONDS = 0.5
_MESSAGE_BYTES_MAX = 4096
"""Of WebSockets: clients only listen."""
_PING_SECONDS = 20.0
_HURRY_SECONDS = 0.2
_READ_IS_WORTH_BYTES, _DRIPS_FREE = 256, 12
"""A read of a request is a drip as far as it brings less than the first; after so many drips it is read less often.
What one brings above that makes up for others: part heads and single TLS records are small among large ones."""
_PAUSE_SECONDS, _PAUSE_SECONDS_MAX = 0.05, 1.0
"""The first pause, and the longest; each is twice as long as the one before."""
_DRIPS_MAX = _DRIPS_FREE + 6
"""More are not remembered; the pause is the longest then."""
_TCP_NOTSENT_LOWAT, _UNSENT_BYTES = 25, 4096
"""What the kernel keeps for a client that does not read: an answer is not made much faster than it is read."""
GRACE_SECONDS = 0.7
"""How long running answers may go on after :meth:`HttpServer.stop`."""


async def open_listener(host: str, port: int) -> trio.SocketListener:
    """Listen; port 0 takes a free one.

    Raises LocalError ``port_taken``, or ConfigError for a host that is not one of this machine's.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except socket.gaierror as error:
        raise ConfigError("config", f"gateway.host {host!r} is not an address: {error.strerror}") from error
    except OSError as error:
        raise _bind_error(error, host, port) from error
    # A name may stand for several addresses; with port 0 each would get a port of its own.
    first, *others = listeners
    for listener in others:
        await listener.aclose()
    return first


def _bind_error(error: OSError, host: str, port: int) -> LocalError | ConfigError:
    # trio puts the errors of several addresses into a group behind the one it raises.
    cause = error.__cause__
    causes = cause.exceptions if isinstance(cause, BaseExceptionGroup) else ()
    codes = {error.errno, *(each.errno for each in causes if isinstance(each, OSError))}
    if errno.EADDRINUSE in codes:
        hint = "stop the program that uses it, or set gateway.port to another one (0 picks a free one)"
        return LocalError("port_taken", f"port {port} on {host} is already in use", hint)
    if errno.EACCES in codes:
        return LocalError("local", f"this user may not listen on port {port}", "set gateway.port above 1023")
    if errno.EADDRNOTAVAIL in codes:
        return ConfigError("config", f"gateway.host {host!r} is not an address of this machine")
    return LocalError("local", f"cannot listen on {host} port {port}: {error}")


class HttpServer:
    """Serves an ASGI app on a listener until :meth:`stop`, or until its nursery is cancelled."""

    def __init__(
        self,
        app: ASGIApp,
        listener: trio.SocketListener,
        *,
        connections_per_second: int = 0,
        proxies: Collection[str] = (),
        certificate: Certificate | None = None,
        on_refused: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self.on_refused = on_refused
        """Told why, of each connection that is not served; see :meth:`gateway.metrics.Metrics.observe_refused`."""
        self.doorway = Doorway(per_second=connections_per_second, proxies=proxies, on_refused=on_refused)
        self.doorway.sieve.watch(listener.socket)
        self.config = Config()
        self.config.accesslog = None
        self.config.errorlog = _logger
        self.config.include_server_header = False
        self.config.websocket_max_message_size = _MESSAGE_BYTES_MAX
        self.config.websocket_ping_interval = _PING_SECONDS
        self.context = WorkerContext(None)
        self.app = wrap_app(cast("ASGIFramework", app), self.config.wsgi_max_body_size, "asgi")
        self._listener = listener
        self.certificate = certificate
        self.large_reads = trio.Lock()
        """Fair: its waiters get it in their order."""
        self._connections: set[_Connection] = set()
        self._accepting = trio.CancelScope()
        self._serving = trio.CancelScope()
        self._idle = trio.Event()
        self._ended = trio.Event()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the socket really has."""
        host, port = self._listener.socket.getsockname()[:2]
        return host, port

    async def run(self) -> None:
        """Accept and serve."""
        try:
            with self._serving:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.doorway.sieve.run)
                    try:
                        with self._accepting:
                            serve = partial(trio.serve_listeners, handler_nursery=nursery)
                            await serve(self._handle, [self._listener])
                        await self._idle.wait()
                    finally:
                        self._hurry()
                        nursery.cancel_scope.cancel()
        finally:
            self._ended.set()

    async def stop(self) -> None:
        """Accept nothing more, give running answers a moment, then end them. Takes less than two seconds."""
        with trio.CancelScope(shield=True):
            self._accepting.cancel()
            await self.context.terminated.set()
            for connection in self._connections:
                connection.end_idle()
            if not self._connections:
                self._idle.set()
            with trio.move_on_after(GRACE_SECONDS):
                await self._idle.wait()
            self._hurry()
            self._serving.cancel()
            await self._ended.wait()

    def _hurry(self) -> None:
        for connection in self._connections:
            connection.hurry()

    async def _handle(self, stream: trio.SocketStream) -> None:
        connection = self.doorway.enter(stream.socket, partial(_Connection, self, stream))
        if connection is None:
            await trio.aclose_forcefully(stream)
            return
        self._connections.add(connection)
        try:
            await connection.run()
        except Exception:
            # One connection must never take the node down.
            _logger.exception("a connection failed")
        finally:
            self.doorway.leave(connection)
            self._connections.discard(connection)
            if not self._connections and self.context.terminated.is_set():
                self._idle.set()


class _Connection(TCPServer):
    """Hypercorn's connection with the parts replaced that the file docstring lists."""

    def __init__(self, server: HttpServer, stream: trio.SocketStream, address: str) -> None:
        self._wire = Wire(stream)
        # The base class is typed for TLS streams and works with plain ones alike.
        tls = cast("trio.SSLStream[trio.SocketStream]", self._wire)
        super().__init__(server.app, server.config, server.context, ConnectionState({}), tls)
        self._socket = stream.socket
        self.address = address
        """Whom it counts for; empty: nobody."""
        self._arrivals, self._places = server.doorway.arrivals, server.doorway.places
        self._large_reads, self._on_refused = server.large_reads, server.on_refused
        self._arriving, self._ousted = True, False
        self._drips = 0.0
        self._certificate = server.certificate
        self._send_seconds = _SEND_SECONDS
        self._sending: trio.CancelScope | None = None
        self._reading = trio.CancelScope()
        self._idle = True
        """No request is being answered."""
        self._idle_until = trio.current_time() + _KEEP_ALIVE_SECONDS
        """When a request must have come, to its head's end."""

    async def run(self) -> None:
        raw = self._socket
        try:
            if self._certificate is not None:
                with trio.CancelScope(deadline=self._idle_ends()) as self._reading:
                    self.stream = await self._certificate.handshake(self._wire)  # type: ignore[assignment]
                if self._reading.cancelled_caught:
                    return
            client = parse_socket_addr(raw.family, raw.getpeername())
            server = parse_socket_addr(raw.family, raw.getsockname())
            if sys.platform == "linux":
                raw.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
            tasks = Tasks(self)
            async with tasks as task_group:
                self._task_group = task_group
                self.protocol = Http11(  # type: ignore[assignment]
                    self.app,
                    self.config,
                    self.context,
                    tasks,
                    self.protocol_send,
                    tls=self._certificate is not None,
                    client=client,
                    server=server,
                    arrived=self._arrived,
                )
                await self._read_data()
                tasks.client_left()
        except* (OSError, trio.BrokenResourceError):
            pass  # The client is gone: nobody is left to tell.
        finally:
            await self._close()

    def hurry(self) -> None:
        """The server stops: give a write that hangs only a moment more."""
        self._bound_writes(_HURRY_SECONDS)

    def blocked_seconds(self) -> float:
        """See :class:`gateway.turns.Reader`."""
        return self._wire.blocked_seconds()

    def give_up(self) -> None:
        """See :class:`gateway.turns.Reader`. The write under way, or the next one, ends the connection."""
        self._on_refused("slow")
        _logger.info("an answer is ended: others wait, and its client did not read for %.0f s", self.blocked_seconds())
        self._bound_writes(0.0)

    def _bound_writes(self, seconds: float) -> None:
        self._send_seconds = seconds
        if self._sending is not None:
            self._sending.deadline = min(self._sending.deadline, trio.current_time() + seconds)

    def end_idle(self) -> None:
        """The server stops: nothing more is read where nothing is being answered."""
        if self._idle:
            self._reading.cancel()

    async def _read_data(self) -> None:
        """Pass on what the client sends, until it is over or says nothing between two requests for too long."""
        while True:
            data = b""
            with trio.CancelScope(deadline=self._idle_ends()) as self._reading:
                try:
                    if self._drips > _DRIPS_FREE:
                        await trio.sleep(_pause_s(self._drips - _DRIPS_FREE))
                    data = bytes(await self.stream.receive_some(_READ_BYTES))
                except (trio.ClosedResourceError, trio.BrokenResourceError):
                    break
            if self._reading.cancelled_caught:
                break
            if len(data) >= _LARGE_BYTES:
                async with self._large_reads:
                    await trio.lowlevel.checkpoint()
            self._came(len(data))
            await self.protocol.handle(RawData(data))
            if not data:
                break
        await self.protocol.handle(Closed())

    def _came(self, size: int) -> None:
        """A part of a request, or of what a WebSocket's client says."""
        if not size or cast("Http11", self.protocol).is_socket:
            return
        self._drips = min(max(0.0, self._drips + 1 - size / _READ_IS_WORTH_BYTES), _DRIPS_MAX)
        if not self.address:
            return
        now = trio.current_time()
        if not self._arriving:
            self._arriving = self._arrivals.enter(self.address, self, now, known=True)
        self._arrivals.brought(self.address, self, size, now)

    def _arrived(self) -> None:
        self._arriving, self._drips = False, 0.0
        self._arrivals.leave(self.address, self)

    def oust(self) -> None:
        """See :class:`gateway.doorway.Guest`."""
        self._ousted = True
        self._on_refused("ousted")
        self._reading.cancel()

    @property
    def is_sour(self) -> bool:
        """Whether its client was refused all that it asked, or made room without having been served."""
        protocol = cast("Http11 | None", getattr(self, "protocol", None))
        if protocol is None:
            return self._ousted
        return protocol.is_sour or (self._ousted and not protocol.was_served)

    def _idle_ends(self) -> float:
        if self._ousted:
            return -math.inf
        if not self._idle:
            return math.inf
        if self.context.terminated.is_set():
            return -math.inf
        return self._idle_until

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self._idle, self._idle_until = event.idle, trio.current_time() + _KEEP_ALIVE_SECONDS
            (self._places.rest if event.idle else self._places.work)(self)
            self._reading.deadline = self._idle_ends()
            return
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        try:
            self.send_lock.acquire_nowait()  # nearly always; no turn of the loop for that
        except trio.WouldBlock:
            await self.send_lock.acquire()
        try:
            if not await self._send_bounded(event.data):
                await trio.aclose_forcefully(self.stream)
                await self.protocol.handle(Closed())
        finally:
            self.send_lock.release()

    async def _send_bounded(self, data: bytes) -> bool:
        """Write all of it, or report that the connection is of no use any more."""
        if self._certificate is None and self._send_seconds > 0:  # nearly always there is room for all of it
            try:
                left = self._wire.send_now(data)
            except trio.BrokenResourceError:
                return False
            if not left:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return True
            data = bytes(left)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._send_seconds) as self._sending:
            try:
                await self.stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False
        return not self._sending.cancelled_caught

    async def _close(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_SECONDS):
            await super()._close()


def _pause_s(drips: float) -> float:
    """How long a request that comes in drips is not read, after so many above those that are free."""
    return min(_PAUSE_SECONDS * math.pow(2.0, drips - 1), _PAUSE_SECONDS_MAX)


def url_of(host: str, port: int, *, tls: bool = False) -> str:
    """The base address for clients on this machine: a wildcard host becomes the loopback one."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if tls else 'http'}://{shown}:{port}"


__all__: Sequence[str] = ["GRACE_SECONDS", "HttpServer", "open_listener", "url_of"]
