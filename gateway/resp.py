"""A Redis client of what the limits need: commands on one connection, answered in order (RESP2), many under way.

Owns: the connection, and coming back after it broke. A call made while there is none fails at once, so nobody waits
for a Redis that is away. (The usual client library takes 14 MB and most of a second to import, for one command.)
https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import logging
import os
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import trio

from config.errors import ConfigError

PASSWORD_VARIABLE = "REDISCLI_AUTH"
_CALL_SECONDS = 0.5
_CONNECT_SECONDS = 2.0
_RETRY_SECONDS = 0.5
_RETRY_SECONDS_MAX = 4.0
_STEADY_SECONDS = 10.0
"""A connection that lasted so long was a good one."""
_ELSEWHERE = re.compile(r"(?:^|-)(?:READONLY|LOADING|MASTERDOWN)\b")
"""A Redis that does not serve now: its name may mean another by now. (Before version 7 a script's error has the code
further behind.)"""
_WAITING_MAX = 8192
_REPLY_BYTES_MAX = 1 << 16
_READ_BYTES = 1 << 16

_logger = logging.getLogger("rios.gateway")

Reply = int | bytes | list[Any] | None


class RedisAway(Exception):
    """Redis is not there, does not answer, or says something else than Redis would."""


class Unsent(RedisAway):
    """The command was not sent: nothing comes of it."""


class RedisRefused(Exception):
    """Redis answered with an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where Redis is: ``redis[s]://[user@]host[:port][/database]``."""

    host: str
    port: int
    user: str
    database: int
    tls: bool

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Raises ConfigError."""
        parts = urlsplit(url)
        if parts.password:
            hint = f"leave it out and set the environment variable {PASSWORD_VARIABLE}"
            raise ConfigError("config", "gateway.redis holds a password", hint)
        try:
            if parts.scheme not in ("redis", "rediss") or not parts.hostname:
                raise ValueError
            port, database = parts.port or 6379, int(parts.path.strip("/") or 0)
        except ValueError:
            hint = "write redis://host:6379/0, or rediss:// for TLS"
            raise ConfigError("config", f"gateway.redis {url!r:.100} is not a Redis URL", hint) from None
        return cls(
            host=parts.hostname,
            port=port,
            user=unquote(parts.username or ""),
            database=database,
            tls=parts.scheme == "rediss",
        )


@dataclass(slots=True, eq=False)
class _Waiting:
    done: trio.Event = field(default_factory=trio.Event)
    reply: Reply | RedisRefused = None
    came: bool = False
    heard: Callable[[], None] | None = None


class Redis:
    """Commands to one Redis. :meth:`run` must run."""

    def __init__(self, address: Address) -> None:
        self.greet: Callable[[], None] = lambda: None
        """Called when there is a connection: what it posts comes before all else."""
        self._address = address
        self._stream: trio.abc.Stream | None = None
        self._waiting: deque[_Waiting] = deque()
        self._unsent = bytearray()
        self._more = trio.Event()

    @property
    def connected(self) -> bool:
        """Whether a call has somebody to go to."""
        return self._stream is not None

    async def call(self, *parts: str | int | bytes) -> Reply:
        """A command's answer. Raises RedisAway (but for Unsent, Redis may have done it, or do it yet), RedisRefused."""
        waiting = self._submit(parts)
        with trio.move_on_after(_CALL_SECONDS) as patience:
            await waiting.done.wait()
        if patience.cancelled_caught:
            await self._break()  # what comes after it would not come either
        if not waiting.came:
            raise RedisAway(str(waiting.reply or ""))
        if isinstance(waiting.reply, RedisRefused):
            raise waiting.reply
        return waiting.reply

    def post(self, *parts: str | int | bytes, heard: Callable[[], None] | None = None) -> None:
        """A command whose answer nobody waits for; ``heard`` is called when it comes. Raises Unsent."""
        self._submit(parts, heard)

    def _submit(self, parts: tuple[str | int | bytes, ...], heard: Callable[[], None] | None = None) -> _Waiting:
        if self._stream is None or len(self._waiting) >= _WAITING_MAX:
            raise Unsent
        waiting = _Waiting(heard=heard)
        self._waiting.append(waiting)
        self._unsent += encode(parts)
        self._more.set()
        return waiting

    async def run(self) -> None:
        """Connect, and again whenever the connection breaks, each time later; until cancelled."""
        pause = _RETRY_SECONDS
        while True:
            began = trio.current_time()
            try:
                await self._serve()
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, RedisAway, RedisRefused) as error:
                _logger.debug("redis: %r", error)
            if trio.current_time() - began > _STEADY_SECONDS:
                pause = _RETRY_SECONDS
            await trio.sleep(pause)
            pause = min(2 * pause, _RETRY_SECONDS_MAX)

    async def _serve(self) -> None:
        stream: trio.abc.Stream | None = None
        with trio.move_on_after(_CONNECT_SECONDS):
            stream = await self._connect()
        if stream is None:
            raise RedisAway
        try:
            async with trio.open_nursery() as nursery:
                self._stream = stream
                self.greet()
                nursery.start_soon(self._write, stream)
                await self._read(stream)
                nursery.cancel_scope.cancel()
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError, RedisAway):
            pass
        finally:
            self._stream = None
            self._unsent.clear()
            for waiting in self._waiting:
                waiting.done.set()
            self._waiting.clear()
            await trio.aclose_forcefully(stream)

    async def _connect(self) -> trio.abc.Stream:
        """A connection that is signed in, has its database chosen, and is answered in the time that a call has."""
        address = self._address
        plain = await trio.open_tcp_stream(address.host, address.port)
        stream: trio.abc.Stream = plain
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.tls:
                context = await trio.to_thread.run_sync(ssl.create_default_context)
                stream = trio.SSLStream(plain, context, server_hostname=address.host)
            reader = Replies()
            password = os.environ.get(PASSWORD_VARIABLE, "")
            if password:
                await _ask(stream, reader, "AUTH", *([address.user] if address.user else []), password)
            if address.database:
                await _ask(stream, reader, "SELECT", address.database)
            with trio.move_on_after(_CALL_SECONDS) as patience:
                await _ask(stream, reader, "PING")  # the kernel accepts for a Redis that is stopped
            if patience.cancelled_caught:
                raise RedisAway
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    async def _write(self, stream: trio.abc.Stream) -> None:
        while True:
            if not self._unsent:
                self._more = trio.Event()
                await self._more.wait()
            data, self._unsent = bytes(self._unsent), bytearray()
            await stream.send_all(data)

    async def _read(self, stream: trio.abc.Stream) -> None:
        replies = Replies()
        while True:
            data = await stream.receive_some(_READ_BYTES)
            if not data:
                return
            for reply in replies.feed(bytes(data)):
                if not self._waiting:
                    raise RedisAway  # it answers what nobody asked
                waiting = self._waiting.popleft()
                waiting.reply = reply
                waiting.came = not (isinstance(reply, RedisRefused) and _ELSEWHERE.search(str(reply)))
                waiting.done.set()
                if not waiting.came:
                    raise RedisAway
                if waiting.heard is not None:
                    waiting.heard()

    async def _break(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await trio.aclose_forcefully(stream)


async def _ask(stream: trio.abc.Stream, replies: "Replies", *parts: str | int | bytes) -> None:
    await stream.send_all(encode(parts))
    while True:
        data = await stream.receive_some(_READ_BYTES)
        if not data:
            raise RedisAway
        for reply in replies.feed(bytes(data)):
            if isinstance(reply, RedisRefused):
                _logger.warning("redis refused %s: %s", parts[0], reply)
                raise reply
            return


def encode(parts: Sequence[str | int | bytes]) -> bytes:
    """A command as Redis reads it."""
    pieces = [b"*%d\r\n" % len(parts)]
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        pieces.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(pieces)


class Replies:
    """Bytes in, replies out. Raises RedisAway for what is none, and for more than a reply here can be."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Reply | RedisRefused]:
        """The replies that are complete now."""
        self._data += data
        while self._data:
            try:
                reply, end = self._parse(0)
            except IndexError:
                if len(self._data) > _REPLY_BYTES_MAX:
                    raise RedisAway from None
                return
            except ValueError:
                raise RedisAway from None
            del self._data[:end]
            yield reply

    def _parse(self, at: int, depth: int = 0) -> tuple[Any, int]:
        end = self._data.find(b"\r\n", at)
        if end < 0:
            raise IndexError
        kind, line, end = bytes(self._data[at : at + 1]), bytes(self._data[at + 1 : end]), end + 2
        if kind == b"+":
            return line, end
        if kind == b"-":
            return RedisRefused(line.decode("utf-8", "replace")), end
        count = int(line)
        if kind == b":":
            return count, end
        if count == -1 and kind in (b"$", b"*"):
            return None, end
        if not 0 <= count <= _REPLY_BYTES_MAX or depth > 1:
            raise ValueError
        if kind == b"$":
            if len(self._data) < end + count + 2:
                raise IndexError
            return bytes(self._data[end : end + count]), end + count + 2
        if kind != b"*":
            raise ValueError
        items = []
        for _ in range(count):
            item, end = self._parse(end, depth + 1)
            items.append(item)
        return items, end
