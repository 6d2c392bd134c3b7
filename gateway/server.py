"""Hypercorn's HTTP/1.1 on trio, tamed: connections that cannot hang, crash the node or outlive it.

Owns the listening socket and every connection. Hypercorn's own server loop is not used: this file runs its connection
class inside the caller's nursery and replaces four of its parts.

1. ``protocol_send`` shields its write without a bound; a client that stops reading would block a shutdown for ever.
   Here the shield ends after ``_SEND_SECONDS`` (sooner while stopping), and the connection with it.
2. ``_close`` runs in the task that ends a response, which is cancelled by the disconnect that closing causes, so a
   ``Connection: close`` stream was never closed. Here it is shielded and bounded.
3. ``is_disconnected()`` never becomes true; ``gateway.exchange`` awaits ``http.disconnect`` in a task of its own.
4. A connection that its client closed without a request in progress was counted until its keep-alive time was over, so
   that a thousand short ones shut everybody out for half a minute. Here its idle clock stops with its reader.

HTTP/2 is not offered: a reverse proxy does it better, and one protocol is half the attack surface.
"""

import errno
import logging
import socket
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app
from starlette.types import ASGIApp

from config.errors import ConfigError, LocalError
from p2p.core.buckets import Bucket

_logger = logging.getLogger("rios.gateway")

_CONNECTIONS_MAX = 1000
_KEEP_ALIVE_SECONDS = 30
_SEND_SECONDS = 30.0
_CLOSE_SECONDS = 0.5
_HURRY_SECONDS = 0.2
_ADDRESSES_MAX = 4096
_TOLD_SECONDS = 60.0
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

    def __init__(self, app: ASGIApp, listener: trio.SocketListener, *, connections_per_second: int = 0) -> None:
        self.config = Config()
        self.config.accesslog = None
        self.config.errorlog = _logger
        self.config.keep_alive_timeout = _KEEP_ALIVE_SECONDS
        self.config.include_server_header = False
        self.context = WorkerContext(None)
        self.app = wrap_app(cast("ASGIFramework", app), self.config.wsgi_max_body_size, "asgi")
        self._listener = listener
        self._per_second = connections_per_second
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._told_at = -_TOLD_SECONDS
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
        if len(self._connections) >= _CONNECTIONS_MAX or not self._may_enter(stream):
            await trio.aclose_forcefully(stream)
            return
        connection = _Connection(self, stream)
        self._connections.add(connection)
        try:
            await connection.run()
        except Exception:
            # One connection must never take the node down.
            _logger.exception("a connection failed")
        finally:
            self._connections.discard(connection)
            if not self._connections and self.context.terminated.is_set():
                self._idle.set()

    def _may_enter(self, stream: trio.SocketStream) -> bool:
        """Whether a client's address has not made too many connections lately: each costs more than its client pays."""
        if not self._per_second:
            return True
        try:
            address = str(stream.socket.getpeername()[0])
        except OSError:
            return False  # it is gone already
        now = trio.current_time()
        bucket = self._buckets.get(address)
        if bucket is None:
            bucket = self._buckets[address] = Bucket(self._per_second, 2 * self._per_second)
            if len(self._buckets) > _ADDRESSES_MAX:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(address)
        if bucket.take(1, now):
            return True
        if now - self._told_at >= _TOLD_SECONDS:
            self._told_at = now
            _logger.warning(
                "%s makes more than %d connections a second: those above are closed", address, self._per_second
            )
        return False


class _Http11(H11Protocol):
    """Hypercorn's HTTP/1.1, which ignores the wish for HTTP/2, as RFC 9110 section 7.8 lets it."""

    async def _check_protocol(self, event: h11.Request) -> None:
        pass


class _Connection(TCPServer):
    """Hypercorn's connection with the parts replaced that the file docstring lists."""

    def __init__(self, server: HttpServer, stream: trio.SocketStream) -> None:
        # The base class is typed for TLS streams and works with plain ones alike.
        tls = cast("trio.SSLStream[trio.SocketStream]", stream)
        super().__init__(server.app, server.config, server.context, ConnectionState({}), tls)
        self._socket = stream.socket
        self._send_seconds = _SEND_SECONDS
        self._sending: trio.CancelScope | None = None
        self._over = False
        """The client will say nothing more."""

    async def run(self) -> None:
        raw = self._socket
        try:
            client = parse_socket_addr(raw.family, raw.getpeername())
            server = parse_socket_addr(raw.family, raw.getsockname())
            async with TaskGroup() as task_group:
                self._task_group = task_group
                self.protocol = _Http11(  # type: ignore[assignment]
                    self.app,
                    self.config,
                    self.context,
                    task_group,
                    ConnectionState({}),
                    False,
                    client,
                    server,
                    self.protocol_send,
                )
                await self.idle_task.restart(task_group, self._idle_timeout)
                await self._read_data()
                self._over = True
                await self.idle_task.stop()
        except* OSError:
            pass  # The client is gone: nobody is left to tell.
        finally:
            await self._close()

    def hurry(self) -> None:
        """The server stops: give a write that hangs only a moment more."""
        self._send_seconds = _HURRY_SECONDS
        if self._sending is not None:
            self._sending.deadline = min(self._sending.deadline, trio.current_time() + _HURRY_SECONDS)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated) and self._over:
            return
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            if not await self._send_bounded(event.data):
                await trio.aclose_forcefully(self.stream)
                await self.protocol.handle(Closed())

    async def _send_bounded(self, data: bytes) -> bool:
        """Write all of it, or report that the connection is of no use any more."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._send_seconds) as self._sending:
            try:
                await self.stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return False
        return not self._sending.cancelled_caught

    async def _close(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_SECONDS):
            await super()._close()


def url_of(host: str, port: int) -> str:
    """The base address for clients on this machine: a wildcard host becomes the loopback one."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


__all__: Sequence[str] = ["GRACE_SECONDS", "HttpServer", "open_listener", "url_of"]
