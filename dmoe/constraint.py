"""Constraints on answers: what users' schemas, expressions and grammars allow, found out in processes of their own.

Owns: a walled process per model and a copy of it per constraint (``dmoe/grammarwork``), their deadlines, what users are
told. Does not own: the library (``dmoe/grammar``), what a mask does to logits (``dmoe/core/constraint.py``).

Invariants:

1. A constraint is checked as a whole before an answer begins: what cannot be read, is not supported, takes too long or
   too much memory, or can never be satisfied, is refused then, by name. Other answers go on meanwhile.
2. A step is asked for as soon as its token stands, so that the next mask is made while the model computes; whoever
   looks at it waits for :data:`STEP_SECONDS` at most, and then the answer ends, and its process.
3. What a process says is bounded, and believed only about its own constraint.

Fails with RequestError ``invalid_request`` that quotes what the library says; BusyError where no process can be had.
"""

import socket
import threading
import weakref
from collections import deque
from collections.abc import Collection
from time import monotonic
from typing import Any, Final

import msgspec
import numpy as np
import trio

from config import generation
from config.errors import BusyError, LocalError, RequestError
from dmoe.aside import NO_WALLS_HINT
from dmoe.cells import launch
from dmoe.cells.frames import frame, receive
from dmoe.cells.sandbox import Wall
from dmoe.core.constraint import FloatRow, masked
from dmoe.grammarwork import (
    ACCEPT,
    BEGIN,
    COPY_BYTES,
    DONE,
    DROP,
    MEMORY_BYTES,
    NO_MEMORY,
    SECONDS_MAX,
    STEP,
)
from dmoe.text import Tokenizer

CHARACTERS_MAX: Final = 256 << 10
COMPILES_MAX: Final = 4
"""At once: those that were given up run on for a while, and must not take the threads that passes need."""
STEP_SECONDS: Final = 1.0
START_SECONDS: Final = 30.0
VOCABULARY_SECONDS: Final = 60.0
GROUP_BYTES: Final = MEMORY_BYTES + 8 * COPY_BYTES
"""Of the process and its copies together, where control groups are to be had: few of them need much."""
_MORE_SECONDS = 2.0
"""What is waited for a constraint longer than its process's own alarm."""
_ANSWER_BYTES_MAX = 1 << 20
_MESSAGE_BYTES_MAX = 1 << 11
_HEAD_BYTES, _READ_BYTES = 4, 40 << 10
_NAMES: Final = {"json": "JSON schema", "regex": "regular expression", "choice": "choice", "grammar": "grammar"}
_BOOT = launch.boot("dmoe.grammarwork")


class Constraints:
    """The constraints of one model. Make it in a thread: a process starts, and takes about 0.1 s per 50,000 tokens.
    ``demanded``: not without walls; then raises LocalError where there are none."""

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Collection[int], *, demanded: bool = False) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._setup = msgspec.msgpack.encode((tokenizer.source, tuple(stop_tokens)))
        self._demanded = demanded
        self._threads = trio.CapacityLimiter(COMPILES_MAX)
        self._lock = threading.Lock()
        self._host = _Host(self._setup, self._vocabulary, demanded=demanded)

    @property
    def walls(self) -> tuple[Wall, ...]:
        """What is in force around their processes."""
        return self._host.walls

    async def compile(self, wanted: generation.Constraint) -> "Compiled":
        """Check a constraint and make it ready. Raises RequestError, BusyError, LocalError."""
        return await trio.to_thread.run_sync(self.compile_here, wanted, abandon_on_cancel=True, limiter=self._threads)

    def compile_here(self, wanted: generation.Constraint) -> "Compiled":
        """The same in this thread."""
        if len(wanted.text) > CHARACTERS_MAX:
            raise _refused(wanted, f"it has {len(wanted.text)} characters, at most {CHARACTERS_MAX} are read")
        try:
            said = frame(msgspec.msgpack.encode((wanted.kind, wanted.text)))
        except UnicodeEncodeError as error:
            raise _refused(wanted, "it is not Unicode: half a surrogate pair") from error
        with self._lock:
            if self._host.is_lost:
                self._host = _Host(self._setup, self._vocabulary, demanded=self._demanded)
            host = self._host
            copy = host.copy()
        begun = monotonic()
        try:
            copy.line.settimeout(SECONDS_MAX + _MORE_SECONDS)
            copy.line.sendall(said)
            verdict = copy.answer()
            copy.line.settimeout(STEP_SECONDS)
        except (OSError, EOFError) as error:
            copy.end()
            late = monotonic() - begun >= SECONDS_MAX
            why = f"takes longer than {SECONDS_MAX:g} s" if late else "ended its process (memory, or a library's fault)"
            raise _refused(wanted, f"reading it {why}") from error
        if verdict[0] != DONE:
            copy.end()
            raise _said(wanted, verdict)
        return Compiled(copy, wanted, self._vocabulary, host.mask_bytes)

    def close(self) -> None:
        """End the process. Constraints that are in use go on."""
        self._host.end()


class Compilers:
    """The constraints of the models in use, each made once."""

    def __init__(self, models_max: int = 8, *, demanded: bool = False) -> None:
        self._models_max = models_max
        self._demanded = demanded
        self._known: dict[str, Constraints] = {}
        self._lock = trio.Lock()

    async def compile(
        self, wanted: generation.Constraint, model: str, tokenizer: Tokenizer, stop_tokens: Collection[int]
    ) -> "Compiled":
        """A constraint over the tokens of the model with this id. Raises RequestError, BusyError, LocalError."""
        async with self._lock:
            if model not in self._known:
                if len(self._known) == self._models_max:
                    self._known.pop(next(iter(self._known))).close()
                self._known[model] = await trio.to_thread.run_sync(
                    lambda: Constraints(tokenizer, stop_tokens, demanded=self._demanded)
                )
            found = self._known[model]
        return await found.compile(wanted)

    def walls(self) -> list[tuple[Wall, ...]]:
        """What is in force around each model's process."""
        return [made.walls for made in self._known.values()]

    def close(self) -> None:
        """End all processes."""
        for made in self._known.values():
            made.close()
        self._known.clear()


class _Host:
    """The process of one model, with its vocabulary. Blocking. One order at a time."""

    def __init__(self, setup: bytes, vocabulary: int, *, demanded: bool) -> None:
        self.is_lost = False
        self._line, theirs = socket.socketpair()
        try:
            self._process = launch.start(
                _BOOT, [theirs.fileno(), int(demanded)], [theirs.fileno()], memory_bytes=GROUP_BYTES, cpus=2
            )
        except OSError as error:
            self._line.close()
            raise LocalError("local", f"cannot start a process for grammars: {error.strerror}") from error
        finally:
            theirs.close()
        self.end = weakref.finalize(self, _end, self._process, self._line)
        try:
            said = self._answer(START_SECONDS)
            self.walls = (*self._process.outer_walls, *(Wall(**wall) for wall in said["walls"]))
            self._line.settimeout(VOCABULARY_SECONDS)
            self._line.sendall(frame(setup))
            self.mask_bytes = int(self._answer(VOCABULARY_SECONDS)["mask_bytes"])
            if not vocabulary <= 8 * self.mask_bytes <= 8 * _ANSWER_BYTES_MAX:
                raise EOFError
        except (OSError, EOFError) as error:
            self.end()
            message = "the process for users' grammars did not start"
            raise LocalError("local", message, "see that there is memory") from error
        except BaseException:
            self.end()
            raise

    def copy(self) -> "_Copy":
        """A process for one constraint. Raises BusyError, LocalError."""
        line, theirs = socket.socketpair()
        try:
            socket.send_fds(self._line, [frame(msgspec.msgpack.encode(("copy", 0)))], [theirs.fileno()])
            return _Copy(self, int(self._answer(START_SECONDS)["pid"]), line)
        except (OSError, EOFError) as error:
            line.close()
            self.is_lost = True
            self.end()
            raise LocalError("unavailable", "the process for users' grammars ended", "ask again") from error
        except LocalError as error:
            line.close()
            raise BusyError(f"no process for a grammar: {error.message}", "ask again", retry_after_ms=1000) from error
        finally:
            theirs.close()

    def kill(self, pid: int) -> None:
        """End a copy; does not wait."""
        try:
            self._line.send(frame(msgspec.msgpack.encode(("kill", pid))))
        except OSError:
            return  # it ended, and its copies with it

    def _answer(self, seconds: float) -> dict[str, Any]:
        self._line.settimeout(seconds)
        try:
            said = msgspec.msgpack.decode(receive(self._line)[0], type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise EOFError from error
        if "error" in said:
            raise LocalError("local", f"a grammar cannot be read: {said['error']}", NO_WALLS_HINT)
        return said


class _Copy:
    """The process of one constraint. Its answers come in the order of the questions."""

    def __init__(self, host: _Host, pid: int, line: socket.socket) -> None:
        self._host = host
        self._pid = pid
        self.line = line
        self._waiting: deque[Constrained] = deque()
        self._heard = bytearray()
        self.end = weakref.finalize(self, _end_copy, host, pid, line)

    def ask(self, what: int, state: "Constrained", token: int = 0) -> None:
        """Send a step. Raises OSError."""
        self._waiting.append(state)
        self.line.send(STEP.pack(what, state.number, token))

    def drop(self, number: int) -> None:
        """Forget a state."""
        try:
            self.line.send(STEP.pack(DROP, number, 0))
        except OSError:
            return  # it has ended

    def settle(self, state: "Constrained") -> None:
        """Hear answers until this state's is there. Raises OSError, EOFError."""
        while state in self._waiting:
            self._waiting[0].heard(self.answer())
            self._waiting.popleft()

    def answer(self) -> bytes:
        """The next answer. Raises OSError, EOFError."""
        while (size := self._size()) is None or len(self._heard) < _HEAD_BYTES + size:
            part = self.line.recv(_READ_BYTES)
            if not part:
                raise EOFError
            self._heard += part
        answer = bytes(self._heard[_HEAD_BYTES : _HEAD_BYTES + size])
        del self._heard[: _HEAD_BYTES + size]  # the beginning of another may have come with it
        return answer

    def _size(self) -> int | None:
        """Of the answer that has begun to come."""
        if len(self._heard) < _HEAD_BYTES:
            return None
        size = int.from_bytes(self._heard[:_HEAD_BYTES], "little")
        if not 0 < size <= _ANSWER_BYTES_MAX:
            raise EOFError
        return size


class Compiled:
    """A constraint that was checked; every answer gets a state of its own."""

    def __init__(self, copy: _Copy, wanted: generation.Constraint, vocabulary: int, mask_bytes: int) -> None:
        self._copy = copy
        self._wanted = wanted
        self._vocabulary = vocabulary
        self._mask_bytes = mask_bytes
        self._count = 0

    def begin(self) -> "Constrained":
        """The state of a new answer."""
        self._count += 1
        return Constrained(self._copy, self._count, self._wanted, self._vocabulary, self._mask_bytes)


class Constrained:
    """The state of one answer (:class:`dmoe.core.constraint.Constraint`): steps go to the constraint's process."""

    def __init__(
        self, copy: _Copy, number: int, wanted: generation.Constraint, vocabulary: int, mask_bytes: int
    ) -> None:
        self.number = number
        self._copy = copy
        self._wanted = wanted
        self._vocabulary = vocabulary
        self._mask_bytes = mask_bytes
        self._answer = b""
        self._ask(BEGIN)
        weakref.finalize(self, copy.drop, number)

    @property
    def done(self) -> bool:
        """See the Protocol."""
        return bool(self._settled()[1])

    def mask(self, logits: FloatRow) -> FloatRow:
        """See the Protocol."""
        bits = np.frombuffer(self._settled(), np.uint8, self._mask_bytes, 2)
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocabulary].view(np.bool_)
        if not allowed.any():
            raise _refused(self._wanted, "no token of this model continues the answer")
        return masked(logits, allowed)

    def accept(self, token: int) -> None:
        """See the Protocol."""
        self._settled()
        self._ask(ACCEPT, token)

    def heard(self, answer: bytes) -> None:
        """What the process says of the last step."""
        self._answer = answer

    def _ask(self, what: int, token: int = 0) -> None:
        try:
            self._copy.ask(what, self, token)
        except OSError as error:
            raise self._lost() from error

    def _settled(self) -> bytes:
        try:
            self._copy.settle(self)
        except TimeoutError as error:
            raise self._lost(f"its next step takes longer than {STEP_SECONDS:g} s") from error
        except (OSError, EOFError) as error:
            raise self._lost() from error
        answer = self._answer
        if answer[0] != DONE:
            raise _said(self._wanted, answer)
        if len(answer) != 2 + self._mask_bytes:
            raise self._lost("its process says nonsense")
        return answer

    def _lost(self, why: str = "its process ended (time, memory, or a library's fault)") -> RequestError:
        self._copy.end()
        return _refused(self._wanted, why)


def _said(wanted: generation.Constraint, answer: bytes) -> RequestError:
    if answer[0] == NO_MEMORY:
        return _refused(wanted, f"it needs more than {COPY_BYTES >> 20} MiB of memory")
    return _refused(wanted, answer[1:_MESSAGE_BYTES_MAX].decode(errors="replace"))


def _refused(wanted: generation.Constraint, why: str) -> RequestError:
    name = _NAMES[wanted.kind]
    where = f"{wanted.where}: " if wanted.where else ""
    message = f"{where}the {name} cannot be used: {why}"
    return RequestError("invalid_request", message, f"change the {name}", param=wanted.where or None)


def _end(process: launch.Process, line: socket.socket) -> None:
    process.kill()
    process.wait()
    line.close()


def _end_copy(host: _Host, pid: int, line: socket.socket) -> None:
    host.kill(pid)
    line.close()
