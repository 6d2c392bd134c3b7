"""The control socket: how the command line talks to the running daemon on the same machine.

A request is one JSON line ``{"command": ..., "args": {...}}``; the daemon answers with any number of
``{"event": ...}`` lines and ends with ``{"result": ...}`` or ``{"error": {"code", "message", "hint"}}``.

Invariants:
1. The socket is mode 0600: who may open it may do everything the operator may.
2. A request line is bounded; a client that goes away cancels its command; a failing command never ends the daemon.
"""

import hashlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from config.errors import CODES, LocalError, RequestError, RiosError

log = logging.getLogger("rios.control")

LINE_BYTES_MAX = 1 << 20
_SUN_PATH_MAX = 100  # sockaddr_un holds 108 bytes on Linux, 104 on macOS

Send = Callable[[Any], Awaitable[None]]
Command = Callable[[Mapping[str, Any], Send], Awaitable[Any]]
"""A command: its arguments, a way to send events while it runs; returns the JSON-able result."""


def socket_path(path: Path) -> Path:
    """``path``, or a short stand-in when a socket could not be bound there.

    It stands below ``/tmp`` whatever ``TMPDIR`` says: the daemon and the command line must agree.
    """
    if len(os.fsencode(path)) <= _SUN_PATH_MAX:
        return path
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return Path("/tmp") / f"rios-{os.getuid()}-{name}.sock"


async def serve(
    path: Path,
    commands: Mapping[str, Command],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve commands until cancelled. The caller holds the daemon's lock, so a socket that exists is stale."""
    path = socket_path(path)
    path.unlink(missing_ok=True)
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        await listener.bind(str(path))
    except OSError as error:
        raise LocalError("local", f"cannot create the control socket {path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    listener.listen(16)
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                connection, _ = await listener.accept()
                nursery.start_soon(_guarded, trio.SocketStream(connection), commands)
    finally:
        listener.close()
        path.unlink(missing_ok=True)


async def _guarded(stream: trio.SocketStream, commands: Mapping[str, Command]) -> None:
    async with stream:
        try:
            await _serve_one(stream, commands)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client went away
        except* Exception:
            log.exception("a control command failed")


async def _serve_one(stream: trio.SocketStream, commands: Mapping[str, Command]) -> None:
    lines = _lines(stream)
    request = await anext(lines, None)
    if request is None:
        return

    async def send(message: Mapping[str, Any]) -> None:
        await stream.send_all(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def event(value: Any) -> None:  # noqa: ANN401 - any JSON value
        await send({"event": value})

    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            # nothing more is expected from the client: any end of its stream cancels the command
            await anext(lines, None)
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        await send(await _answer(request, commands, event))
        nursery.cancel_scope.cancel()


async def _answer(request: bytes, commands: Mapping[str, Command], event: Send) -> Mapping[str, Any]:
    try:
        message = json.loads(request)
        name, args = message["command"], message.get("args", {})
        if not isinstance(name, str) or not isinstance(args, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        return _error("usage", "not a control request", "")
    command = commands.get(name)
    if command is None:
        return _error("usage", f"unknown command {name!r}", "is the daemon of another version? restart it")
    try:
        return {"result": await command(args, event)}
    except RiosError as error:
        return _error(error.code, error.message, error.hint)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise
    except Exception as error:
        log.exception("control command %s failed", name)
        return _error("internal", f"{name} failed: {error!r}", "see the daemon's log")


def _error(code: str, message: str, hint: str) -> Mapping[str, Any]:
    return {"error": {"code": code, "message": message, "hint": hint}}


async def _lines(stream: trio.SocketStream) -> AsyncIterator[bytes]:
    buffer = bytearray()
    while True:
        while (end := buffer.find(b"\n")) >= 0:
            yield bytes(buffer[:end])
            del buffer[: end + 1]
        if len(buffer) > LINE_BYTES_MAX:
            return
        try:
            data = await stream.receive_some(65536)
        except trio.BrokenResourceError:
            return
        if not data:
            return
        buffer += data


def request(
    path: Path, command: str, args: Mapping[str, Any] | None = None, *, seconds: float | None = None
) -> Iterator[tuple[str, Any]]:
    """Ask the running daemon; yields ``("event", value)`` any number of times, then ``("result", value)``.

    Blocking; ``seconds`` is the longest silence. Raises :class:`RiosError` with the daemon's code, ``not_running`` if
    nobody listens or the daemon dies, ``deadline`` if it is silent, ``too_large`` for a request it would not read.
    """
    line = json.dumps({"command": command, "args": dict(args or {})}).encode() + b"\n"
    if len(line) > LINE_BYTES_MAX:
        message = f"{command}: the request has {len(line)} bytes, a node takes {LINE_BYTES_MAX}"
        raise RequestError("too_large", message, "shorten it")
    with _connected(socket_path(path), path.parent, seconds) as connection:
        try:
            connection.sendall(line)
            with connection.makefile("rb") as lines:
                for answer in lines:
                    kind, value = _parsed(answer)
                    yield kind, value
                    if kind == "result":
                        return
        except TimeoutError as error:
            message = f"the node did not answer {command} within {seconds:.0f} s"
            raise LocalError("deadline", message, "see its log; restart it if this lasts") from error
        except (ConnectionError, json.JSONDecodeError):
            pass  # it died, maybe in the middle of a line
    raise LocalError("not_running", "the node stopped while it was answering", "see its log")


@contextmanager
def _connected(path: Path, data_dir: Path, seconds: float | None) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            message = f"no RiOS node is running with the data folder {data_dir}"
            raise LocalError("not_running", message, "start it: rios run") from error
        except OSError as error:
            reason = error.strerror or error
            raise LocalError("local", f"cannot open the control socket {path}: {reason}") from error
        yield connection


def _parsed(line: bytes) -> tuple[str, Any]:
    message = json.loads(line)
    if error := message.get("error"):
        code = error["code"] if error["code"] in CODES else "internal"  # a newer daemon may know more codes
        raise RiosError(code, error["message"], error["hint"])
    kind = "event" if "event" in message else "result"
    return kind, message[kind]


def ask(path: Path, command: str, args: Mapping[str, Any] | None = None, *, seconds: float | None = None) -> Any:  # noqa: ANN401 - JSON
    """The result of a command that sends no events."""
    return [value for _, value in request(path, command, args, seconds=seconds)][-1]
