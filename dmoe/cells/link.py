"""One process of a cell and the ways to it: how it is started, spoken to, limited and ended.

Owns: the interpreter's command line and environment, the control socket, the lanes. Does not own: when (``cell``), or
which shards (``content``).

Invariants:
1. The process starts by exec, with an environment of its own and one descriptor; everything else comes through that.
2. A message on the control socket that is not answered in time is the process's end.
3. What a process says is data: bounded, decoded into plain types, and believed only about itself.
"""

import os
import re
import signal
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import msgspec

from config.errors import IntegrityError, LocalError, RemoteError
from config.vocabulary import KIB, MIB
from dmoe.cells import lanes, launch, sandbox
from dmoe.cells.lanes import ANSWERER_SPIN_SECONDS, ParentLane, lane_bytes
from dmoe.loaded import Away

START_SECONDS_MAX = 30.0
TOLD_SECONDS_MAX = 30.0
"""For an answer on the control socket: a pass of a stage may be under way."""
MESSAGE_BYTES_MAX = 64 << 10
SPARE_LANES = 2
"""More than there are threads: for the event loop, and for one whose call was given up."""
PRIVATE_BYTES_GUESS = 48 * MIB
"""Of a process that nobody has looked at: the interpreter, numpy and ONNX Runtime."""

BOOT = launch.boot("dmoe.cells.program")

_ERRORS = {"IntegrityError": IntegrityError, "LocalError": LocalError}


@dataclass(frozen=True, slots=True)
class Options:
    """How cells are made. ``call_seconds_max``: a call's deadline at most; ``kv_bytes_max``: caches of stages;
    ``asked_bytes`` and ``answer_bytes``: a lane's places; ``boot``: see :data:`BOOT`."""

    threads: int = 1
    call_seconds_max: float = 10.0
    kv_bytes_max: int = 0
    asked_bytes: int = lanes.ASKED_BYTES
    answer_bytes: int = lanes.ANSWER_BYTES
    boot: str = BOOT
    gvisor: bool = False
    """In gVisor's sandbox (:mod:`dmoe.cells.gvisor`)."""

    @property
    def lane_count(self) -> int:
        """Calls at the same time, at most."""
        return self.threads + SPARE_LANES

    @property
    def ram_bytes_guess(self) -> int:
        """What a cell takes without a shard, before one was measured."""
        return PRIVATE_BYTES_GUESS + self.lane_count * lane_bytes(self.asked_bytes, self.answer_bytes)


class Asked(NamedTuple):
    """A call under way: the shards that it is for, and since when."""

    shards: Sequence[int]
    since: float


class Link:
    """A process that is up, with its walls."""

    def __init__(
        self,
        process: launch.Process,
        control: socket.socket,
        made: list[ParentLane],
        walls: tuple[sandbox.Wall, ...],
    ) -> None:
        self.process = process
        self.control = control
        self.lanes = made
        self.free = deque(made)
        self.walls = walls
        self.begun = monotonic()
        self.late: dict[ParentLane, float] = {}
        """Calls that were given up on the event loop, and until when they may still be answered."""
        self.asked: dict[ParentLane, Asked] = {}
        """Calls under way."""
        self.away = Away()
        """Whether the event loop may wait for it."""
        self.loading = False
        """A new shard is on its way into it."""
        self.reason = ""
        """Why it is to be killed."""
        self.gone = False
        """It hung up."""
        self._asked_seconds = 0.0
        self._told_at: float | None = None
        self._base_bytes = process.memory_allowed()
        self.ram_bytes = _private_bytes(process.walled_pid) + sum(lane.size_bytes for lane in made)
        """Memory that it takes without a shard, its lanes included."""

    @property
    def is_lost(self) -> bool:
        """Whether nothing may be asked of it any more."""
        return bool(self.reason) or self.gone

    def asked_seconds(self) -> float:
        """For how long it was asked for something, all calls together: what it may have computed in."""
        since = [asked.since for asked in list(self.asked.values())]
        if (told_at := self._told_at) is not None:
            since.append(told_at)
        now = monotonic()
        return self._asked_seconds + sum(now - each for each in since)

    def answered(self, lane: ParentLane) -> None:
        """A call is over."""
        asked = self.asked.pop(lane, None)
        if asked is not None:
            self._asked_seconds += monotonic() - asked.since + ANSWERER_SPIN_SECONDS[1]

    def cpu_seconds(self) -> float:
        """Processor time that it has used. Raises OSError if it has ended."""
        fields = Path(f"/proc/{self.process.walled_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def allow_memory(self, size: int) -> None:
        """Let it have so much address space beyond what it started with. Raises LocalError."""
        try:
            self.process.allow_memory(self._base_bytes + size)
        except OSError as error:
            raise LocalError("local", f"a cell's memory limit cannot be set: {error.strerror}") from error

    def tell(self, message: dict[str, Any], descriptors: Sequence[int] = (), seconds: float = TOLD_SECONDS_MAX) -> None:
        """Say something on the control socket and wait for the answer. Raises the error that it tells of, RemoteError
        ``unavailable`` if it does not answer: then it is lost."""
        self.control.settimeout(seconds)
        self._told_at = begun = monotonic()
        try:
            socket.send_fds(self.control, [msgspec.json.encode(message)], list(descriptors))
        except OSError as error:
            self.gone = True
            raise RemoteError("unavailable", f"a cell ended: {error}") from error
        try:
            _answer(self.control)
        except RemoteError as error:
            self.reason = self.reason or f"asked to {message['do']}: {error.message}"
            raise
        finally:
            self._told_at = None
            self._asked_seconds += monotonic() - begun

    def destroy(self) -> None:
        """Kill and reap the process, hang up."""
        _reap(self.process)
        self.control.close()
        for lane in self.lanes:
            lane.close()

    def how_it_ended(self) -> str:
        """Why it was killed, or what its exit code says."""
        code = self.process.returncode
        if self.reason:
            return self.reason
        if code is None or code >= 0:
            return f"it ended by itself, exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"killed by {name}" + (": a forbidden system call" if -code == signal.SIGSYS else "")


class Starting:
    """A process that is starting. Whoever made it calls :meth:`link` once, from the thread that shall outlive it: the
    kernel ends a child with the thread that started it."""

    def __init__(self, options: Options) -> None:
        """Raises OSError if there is no process to be had."""
        self._options = options
        self._count = options.lane_count
        self._control, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        numbers = (far.fileno(), os.getpid(), options.threads, self._count, options.asked_bytes, options.answer_bytes)
        with far:
            self.process = launch.start(
                options.boot,
                numbers,
                [far.fileno()],
                memory_bytes=sandbox.START_BYTES + lane_bytes(options.asked_bytes, options.answer_bytes) * self._count,
                cpus=options.threads + 1,
                wrapped=options.gvisor,
            )

    def link(self) -> Link:
        """Give it its lanes and wait until its walls are up. Raises RiosError or OSError, the process ended, if they
        are not."""
        try:
            self._control.settimeout(START_SECONDS_MAX)
            made = self._send_lanes()
            walls = tuple(sandbox.Wall(**wall) for wall in _answer(self._control)["walls"])
            return Link(self.process, self._control, made, (*self.process.outer_walls, *walls))
        except BaseException:
            self._control.close()
            _reap(self.process)
            raise

    def _send_lanes(self) -> list[ParentLane]:
        asked, answer = self._options.asked_bytes, self._options.answer_bytes
        size = lane_bytes(asked, answer) * self._count
        descriptor = lanes.sealed_memory(size, "rios-cell")
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(self._count)]
        try:
            memory = mmap(descriptor, size)
            made = [
                ParentLane(memory, index * lane_bytes(asked, answer), asked, answer, near)
                for index, (near, _) in enumerate(pairs)
            ]
            socket.send_fds(self._control, [b"lanes"], [descriptor, *(far.fileno() for _, far in pairs)])
        finally:
            os.close(descriptor)
            for _, far in pairs:
                far.close()
        return made


def _answer(control: socket.socket) -> dict[str, Any]:
    """The process's next message. Raises the error it tells of, RemoteError ``unavailable`` if none comes."""
    try:
        data = control.recv(MESSAGE_BYTES_MAX)
    except OSError as error:  # a timeout is one
        raise RemoteError("unavailable", f"it does not answer: {error}") from error
    if not data:
        raise RemoteError("unavailable", "it ended")
    try:
        answer: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        if answer.get("ok") is True:
            return answer
        kind, text = str(answer["kind"]), str(answer["error"])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError) as error:
        raise RemoteError("unavailable", "it says nonsense") from error
    family = _ERRORS.get(kind, LocalError)
    raise family("integrity" if family is IntegrityError else "local", lanes.printable(text[:1000]))


def _private_bytes(pid: int) -> int:
    """Memory that a process shares with nobody."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return PRIVATE_BYTES_GUESS
    found = re.search(r"^RssAnon:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * KIB if found else PRIVATE_BYTES_GUESS


def _reap(process: launch.Process) -> None:
    process.kill()
    process.wait()
