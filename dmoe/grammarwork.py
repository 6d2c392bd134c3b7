"""What runs users' grammars: a process per model that knows its vocabulary, and a copy of it for every constraint.

Started by ``dmoe/constraint.py``: the arguments are the descriptor of its socket and whether it must not run without
walls. It walls itself in, takes the vocabulary, and then makes a copy of itself (fork: a few milliseconds, memory is
shared) for every constraint that somebody asks for, which gets a socket of its own. So one that runs away, exhausts its
memory or breaks the library harms nobody else's answer, and none waits for another.

Frames are a length (u32, little endian) and that many bytes. To the process: msgpack lists; answers are msgpack too. To
a copy: first kind and text of the constraint, then one :data:`STEP` after the other, bare; its answers are a status and
what ``dmoe/constraint.py`` says.

Invariants:
1. The process has the walls of all kinds before it sees the tokenizer. A copy loads the list of the cells on top, of
   which no call makes another process, and less memory, before it sees the constraint.
2. A copy has a deadline for each question, kept by an alarm of the kernel; the parent may have it killed, too.
3. A copy holds its own socket and nothing else. It ends with it.
"""

import os
import resource
import signal
import socket
import struct
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import msgspec

from config.errors import LocalError, RiosError
from config.vocabulary import MIB
from dmoe import asidework
from dmoe.cells import sandbox, seccomp
from dmoe.cells.frames import frame, receive
from dmoe.grammar import Grammars, Refused, State
from dmoe.text import Tokenizer

MEMORY_BYTES: Final = 1536 * MIB
"""Of the process, beside its imports: a large vocabulary's tables, while they are made."""
COPY_BYTES: Final = 256 * MIB
"""What a copy may take on top."""
SECONDS_MAX: Final = 10.0
"""For reading a constraint."""
STEP_SECONDS_MAX: Final = 1.0
"""For a step: the library's own bounds keep the worst one near 30 ms."""
STEP: Final = struct.Struct("<BIq")
"""What to do, with which state, and a token."""
BEGIN, ACCEPT, DROP = range(3)
DONE, NOT_KEPT, NO_MEMORY = range(3)
_CALLS = (seccomp.FORK, "wait4", "kill", "seccomp", "setitimer", "prlimit64")


def main(arguments: Sequence[str]) -> None:
    """Obey until the other side is gone."""
    descriptor, demanded = map(int, arguments)
    line = socket.socket(fileno=descriptor)
    rehearse()
    profile = sandbox.Profile(calls=_CALLS, memory_bytes=MEMORY_BYTES, fixed=True, demanded=bool(demanded))
    size = sandbox.Size()
    try:
        walls = sandbox.enter([descriptor, *size.descriptors], profile)
    except LocalError as error:
        line.sendall(frame(msgspec.msgpack.encode({"error": error.message})))
        return
    line.sendall(frame(msgspec.msgpack.encode({"walls": [asdict(wall) for wall in walls]})))
    try:
        _Host(line, size, walled=any(wall.name == "seccomp" and wall.in_force for wall in walls)).run()
    except EOFError:
        return


def rehearse() -> None:
    """Use everything once: nothing can be imported behind the walls."""
    asidework.rehearse()
    grammars = Grammars(asidework.rehearsed_tokenizer(), [])
    for kind, text in (("json", '{"type":"string"}'), ("regex", "a+"), ("choice", '["a"]'), ("regex", "a(")):
        try:
            state = grammars.compile(kind, text).copy()  # type: ignore[arg-type]
            state.mask()
            state.accept(1)
        except Refused:
            continue


class _Host:
    """The process that copies itself."""

    def __init__(self, line: socket.socket, size: sandbox.Size, *, walled: bool) -> None:
        self._line = line
        self._size = size
        self._walled = walled
        self._children: set[int] = set()
        self._most = 0

    def run(self) -> None:
        """The tokenizer, then one order after the other."""
        tokenizer_json, stop_tokens = msgspec.msgpack.decode(receive(self._line)[0])
        try:
            grammars = Grammars(Tokenizer(tokenizer_json), stop_tokens)
        except (MemoryError, ValueError, RiosError) as error:
            self._line.sendall(frame(msgspec.msgpack.encode({"error": f"{type(error).__name__}: {error}"[:300]})))
            return
        self._most = self._size.bytes() + COPY_BYTES
        self._size.close()
        self._line.sendall(frame(msgspec.msgpack.encode({"mask_bytes": grammars.mask_bytes})))
        while True:
            order, descriptors = receive(self._line)
            self._reap()
            name, pid = msgspec.msgpack.decode(order)
            if name == "kill":
                if pid in self._children:  # not yet reaped: nobody else can have its number
                    os.kill(pid, signal.SIGKILL)
            else:
                self._line.sendall(frame(msgspec.msgpack.encode(self._fork(grammars, descriptors[0]))))

    def _fork(self, grammars: Grammars, descriptor: int) -> dict[str, Any]:
        try:
            child = os.fork()
        except OSError as error:
            os.close(descriptor)
            return {"error": error.strerror or str(error)}
        if child:
            self._children.add(child)
            os.close(descriptor)
            return {"pid": child}
        try:
            self._line.close()
            _copy(
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor),
                grammars,
                self._most,
                walled=self._walled,
            )
        finally:
            os._exit(0)

    def _reap(self) -> None:
        while self._children:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._children.discard(pid)


def _copy(line: socket.socket, grammars: Grammars, most: int, *, walled: bool) -> None:
    """The life of a copy: one constraint. ``most``: address space that it may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sandbox.is_linux() and (hard == resource.RLIM_INFINITY or most < hard):
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if walled:
        seccomp.load(("setitimer",))
    wanted, _ = receive(line)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_MAX)
    compiled = _Compiled(grammars, *msgspec.msgpack.decode(wanted))
    signal.setitimer(signal.ITIMER_REAL, 0)
    line.sendall(frame(compiled.verdict))
    while len(step := line.recv(STEP.size)) == STEP.size:
        what, number, token = STEP.unpack(step)
        signal.setitimer(signal.ITIMER_REAL, STEP_SECONDS_MAX)
        answer = compiled.step(what, number, token)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if answer:
            line.sendall(frame(answer))


class _Compiled:
    """A constraint and the states of answers to it. ``verdict``: whether it can be kept."""

    def __init__(self, grammars: Grammars, kind: Any, text: str) -> None:  # noqa: ANN401 - msgpack
        self._states: dict[int, State] = {}
        self._first: State | None = None
        try:
            self._first = grammars.compile(kind, text)
            self.verdict = bytes([DONE])
        except Refused as refused:
            self.verdict = bytes([NOT_KEPT]) + str(refused).encode(errors="replace")
        except MemoryError:
            self.verdict = bytes([NO_MEMORY])

    def step(self, what: int, number: int, token: int) -> bytes:
        """Status, whether the answer is complete, and the next mask; nothing for DROP."""
        assert self._first is not None
        if what == DROP:
            self._states.pop(number, None)
            return b""
        try:
            if what == BEGIN:
                self._states[number] = self._first.copy()
            else:
                self._states[number].accept(token)
            state = self._states[number]
            return bytes([DONE, state.done]) + state.mask()
        except Refused as refused:
            return bytes([NOT_KEPT]) + str(refused).encode(errors="replace")
        except MemoryError:
            return bytes([NO_MEMORY])
