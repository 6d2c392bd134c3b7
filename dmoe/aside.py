"""A process beside this one for work on a stranger's text: walled in, limited in memory and time, killed where it
exceeds them.

Owns: starting, asking, killing and restarting it; the frames between both. Does not own: what it does
(``dmoe/asidework.py``), its walls (``dmoe/cells/sandbox``: those of the cells).

The process has no key, no file, no network and no descriptor but the one it is asked through. It walls itself in before
it touches anything of a stranger. An alarm of the kernel ends it even in the middle of a library's loop; beside that
the asking side kills it at its own deadline.

Invariants:
1. An answer comes within the deadline, or the process is killed and an IntegrityError says so; the next question starts
   another one.
2. One question at a time; safe to ask from several threads. Blocking: ask in a thread.
3. Where it is ``demanded``, nothing is asked of a process without walls: LocalError says what is missing.
"""

import contextlib
import socket
import threading
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import msgspec

from config.errors import IntegrityError, LocalError, RequestError
from config.vocabulary import MIB
from dmoe.cells import launch
from dmoe.cells.sandbox import Wall

FRAME_BYTES_MAX = 512 * MIB
BOOT = launch.boot("dmoe.asidework")
NO_WALLS_HINT = 'rios doctor says what is missing; sandbox = "auto" or "off" does without'
START_SECONDS = 30.0
"""For the interpreter and its imports, on a busy machine."""
INTERPRETER_BYTES = 256 * MIB
"""For the interpreter and what it imports, where all of a process's memory is counted."""
_MORE_SECONDS = 2.0
"""What the asking side waits longer than the process's own alarm."""


class Aside:
    """The process, started when first asked. ``about``: what it works on, for messages; ``setup``: the first question
    to every process that is started, and how many seconds it may take; ``stopped`` is told when one was killed."""

    def __init__(
        self,
        about: str,
        setup: Sequence[Any],
        setup_seconds: float,
        *,
        memory_bytes: int,
        demanded: bool = False,
        stopped: Callable[[IntegrityError], None] = lambda error: None,
    ) -> None:
        self.about = about
        self._setup = setup
        self._setup_seconds = setup_seconds
        self._memory_bytes = memory_bytes
        self._demanded = demanded
        self._stopped = stopped
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self.ready: Any = None
        """What the setup was answered with."""
        self.walls: tuple[Wall, ...] = ()
        """What is in force around the process that was started last."""

    def ask(self, question: Sequence[Any], seconds: float) -> Any:  # noqa: ANN401 - msgpack
        """The answer to a question. Raises IntegrityError if the process exceeded its limits or died, and what the work
        itself raises: RequestError, IntegrityError."""
        with self._lock:
            return self._told(self._started(), question, seconds)

    def start(self) -> Any:  # noqa: ANN401 - msgpack
        """Start it now, and what its setup was answered with. Raises as :meth:`ask`."""
        with self._lock:
            self._started()
            return self.ready

    def close(self) -> None:
        """End the process; a later question starts another one."""
        with self._lock:
            if self._process is not None:
                self._process.end()
                self._process = None

    def _told(self, process: "_Process", question: Sequence[Any], seconds: float) -> Any:  # noqa: ANN401 - msgpack
        try:
            return process.ask(question, seconds)
        except IntegrityError as error:
            if process.ended:
                self._stopped(error)
            raise

    def _started(self) -> "_Process":
        if self._process is None or self._process.ended:
            process = _Process(self.about, self._memory_bytes, demanded=self._demanded)
            self.walls = process.walls
            try:
                self.ready = self._told(process, self._setup, self._setup_seconds)
            except BaseException:
                process.end()
                raise
            self._process = process
        return self._process


class _Process:
    def __init__(self, about: str, memory_bytes: int, *, demanded: bool) -> None:
        self._about = about
        self.ended = False
        self._socket, theirs = socket.socketpair()
        try:
            self._popen = launch.start(
                BOOT,
                [theirs.fileno(), memory_bytes, int(demanded)],
                [theirs.fileno()],
                memory_bytes=memory_bytes + INTERPRETER_BYTES,
                cpus=1,
            )
        except OSError as error:
            self._socket.close()
            raise LocalError("local", f"cannot start a process for {about}: {error.strerror}") from error
        finally:
            theirs.close()
        self.end = weakref.finalize(self, _end, self._popen, self._socket)
        try:
            self.walls = self._hello()
        except BaseException:
            self.end()
            raise

    def _hello(self) -> tuple[Wall, ...]:
        """Its first word: which walls are up. Raises LocalError."""
        try:
            said = msgspec.msgpack.decode(self._read(START_SECONDS), type=dict[str, Any])
        except (OSError, EOFError) as error:
            message = f"the process for {self._about} did not start"
            raise LocalError("local", message, "see that there is memory") from error
        if "error" in said:
            raise LocalError("local", f"{self._about} is not read: {said['error']}", NO_WALLS_HINT)
        return (*self._popen.outer_walls, *(Wall(**wall) for wall in said["walls"]))

    def ask(self, question: Sequence[Any], seconds: float) -> Any:  # noqa: ANN401 - msgpack
        data = msgspec.msgpack.encode((seconds, *question))
        try:
            self._socket.settimeout(seconds + _MORE_SECONDS)
            self._socket.sendall(len(data).to_bytes(8, "little") + data)
            kind, *answer = msgspec.msgpack.decode(self._read(seconds + _MORE_SECONDS))
        except BaseException as error:
            self.ended = True
            self.end()
            if isinstance(error, OSError | EOFError):
                raise self._gone(error, seconds) from error
            raise
        if kind == "done":
            return answer[0]
        code, message, hint = answer
        if kind == "memory":  # what is left of it may be in any state
            self.ended = True
            self.end()
        raise (RequestError if kind == "request" else IntegrityError)(code, message, hint)

    def _gone(self, error: Exception, seconds: float) -> IntegrityError:
        late = isinstance(error, TimeoutError) or self._popen.returncode == -_SIGALRM
        what = f"took longer than {seconds:.0f} s" if late else "ended its process (memory, or a fault in a library)"
        return IntegrityError(
            "integrity", f"{self._about} {what} and was stopped", "get the model from another publisher"
        )

    def _read(self, seconds: float) -> bytes:
        until = monotonic() + seconds
        size = int.from_bytes(self._exactly(8, until), "little")
        if size > FRAME_BYTES_MAX:
            raise EOFError
        return self._exactly(size, until)

    def _exactly(self, count: int, until: float) -> bytes:
        parts, missing = [], count
        while missing:
            self._socket.settimeout(max(0.001, until - monotonic()))
            part = self._socket.recv(min(missing, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


_SIGALRM = 14


def _end(popen: launch.Process, own: socket.socket) -> None:
    """Whatever state it is in."""
    with contextlib.suppress(ProcessLookupError):
        popen.kill()
    popen.wait()
    own.close()
