"""A cell's life, seen from its node: started, loaded, called, killed past a deadline, started again.

Owns: one process at a time, what is loaded in it, its limits. Does not own: what happens inside (``program``), which
shard goes into which cell (``cells``).

A thread of its own starts the process and waits for its end: the kernel ends a child with the *thread* that started it,
and nobody else has to look after zombies.

Invariants:
1. A call ends by its deadline: with an answer, or with RemoteError ``unavailable`` and the cell killed. On the event
   loop it ends after :data:`LOOP_SECONDS` at the latest; the cell may have the rest of its time.
2. A cell that ended is started again with the same shards, ever later if it keeps ending; meanwhile its calls fail at
   once, so that callers go elsewhere.
3. A cell gets three kinds of descriptors: its sockets, sealed memory, and files of its own shards, open for reading.
"""

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import msgspec
import trio
from numpy.typing import NDArray

from config.errors import IntegrityError, LocalError, RemoteError, RiosError
from config.vocabulary import MIB
from dmoe.cells import lanes, sandbox
from dmoe.cells.lanes import ANSWERED, LaneLost, ParentLane, lane_bytes
from dmoe.core.manifest import Manifest, ModelFile, Shard
from dmoe.store import disk_errors

log = logging.getLogger("rios.security.cells")

START_SECONDS_MAX = 30.0
LOAD_SECONDS_MAX = 30.0
LOAD_BYTES_PER_SECOND = 20 * MIB
"""A load may take so long on top, by its size: packing weights on a busy machine."""
LOOP_SECONDS = 0.25
"""For so long a call may hold up the event loop."""
PAUSE_FIRST_SECONDS, PAUSE_SECONDS_MAX = 0.1, 60.0
"""Before a cell that ended is started again; doubled each time."""
CALM_SECONDS = 60.0
"""A cell that lived so long has mended its ways: the next pause is the first one again."""
SLACK_BYTES = 256 * MIB
"""Address space per shard beyond its files and twice its memory."""
SPOOL_SLACK_BYTES = 4 * MIB
CACHE_SPACE = 8
"""Address space for caches, times the memory that they may take: slots and positions grow by doubling, and while they
move both places are there. Pages exist once they are written."""
MESSAGE_BYTES_MAX = 64 << 10
SPARE_LANES = 2
"""More than there are threads: for the event loop, and for one whose call was given up."""

BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from dmoe.cells.program import main; main(sys.argv[2:])"
)
"""What the interpreter runs, isolated: no environment, no user's folder, the parent's import path."""
ENVIRONMENT = {
    "ORT_DISABLE_TELEMETRY": "1",
    "ORT_GQA_DISABLE_FLASH_ATTENTION": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}
"""Nothing of the parent's; the second one decides about bits, as in ``dmoe/runtime``. One thread until the walls are
up; few arenas, each of which takes address space."""

_ERRORS = {"IntegrityError": IntegrityError, "LocalError": LocalError}


@dataclass(slots=True)
class Counters:
    """What happened to all cells of a node."""

    started: int = 0
    restarted: int = 0
    killed: int = 0
    """Past a deadline, or for breaking the rules."""
    died: int = 0
    """By themselves: limits, signals."""
    calls: int = 0
    refused: int = 0
    """Shards that were not loaded for want of a sandbox."""


@dataclass(frozen=True, slots=True)
class Options:
    """How cells are made. ``boot``: see :data:`BOOT`. ``call_seconds_max``: a call's deadline at most."""

    threads: int = 1
    call_seconds_max: float = 10.0
    kv_bytes_max: int = 0
    asked_bytes: int = lanes.ASKED_BYTES
    answer_bytes: int = lanes.ANSWER_BYTES
    boot: str = BOOT


class Store(Protocol):
    """Where shards lie: :class:`dmoe.store.ModelStore`."""

    def verify_shard(self, model_id: str, shard_id: str) -> None:
        """Raises IntegrityError or LocalError unless its files are here, whole and unaltered."""

    def path(self, model_id: str, file: ModelFile) -> Path:
        """Where a file of a model is."""


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """A shard that a cell holds."""

    number: int
    manifest: Manifest
    shard: Shard
    files: Store

    @property
    def memory_bytes(self) -> int:
        """Address space it may take: its files, maybe joined once more, and twice its memory."""
        return 2 * self.shard.size_bytes + 2 * self.shard.ram_bytes + SLACK_BYTES


@dataclass(slots=True, eq=False)
class _Link:
    """One process and the ways to it."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    lanes: list[ParentLane]
    free: deque[ParentLane]
    base_bytes: int
    walls: tuple[sandbox.Wall, ...]
    begun: float = field(default_factory=monotonic)
    late: dict[ParentLane, float] = field(default_factory=dict)
    """Calls that were given up on the event loop, and until when the cell may still answer them."""
    reason: str = ""
    """Why it was killed."""
    gone: bool = False
    """It hung up."""


class Answer:
    """A lane with an answer in it; it is given back at the end of the ``with`` block."""

    __slots__ = ("_free", "lane")

    def __init__(self, lane: ParentLane, free: deque[ParentLane]) -> None:
        self.lane = lane
        self._free = free

    def __enter__(self) -> ParentLane:
        return self.lane

    def __exit__(self, *_: object) -> None:
        self._free.append(self.lane)


class Cell:
    """The cell of a publisher. Every method may be called from any thread."""

    def __init__(self, name: str, options: Options, counters: Counters) -> None:
        self.name = name
        self.expected = 0
        """Shards that are in it, or on their way (kept by its owner)."""
        self.restarts = 0
        self.last_end = ""
        """How the last process ended; empty if none did."""
        self.options = options
        self._counters = counters
        self._contents: dict[int, Content] = {}
        self.generation = 0
        """Counts its processes: what one of them kept is gone in the next."""
        self._said: deque[dict[str, Any]] = deque()
        self._numbers = 0
        self._link: _Link | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control = threading.RLock()
        self._up = threading.Condition()
        self._start_error: RiosError | None = None
        self._closing = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._live, name=f"cell-{name[-8:]}", daemon=True)

    # --- life

    def start(self) -> None:
        """Begin to start it; does not block."""
        self._thread.start()

    def wait_up(self) -> None:
        """Wait until its walls are up. Raises RiosError if it cannot be started."""
        with self._up:
            self._up.wait_for(lambda: self._link is not None or self._start_error is not None, START_SECONDS_MAX)
            if self._link is None:
                raise self._start_error or LocalError("local", f"a cell did not start in {START_SECONDS_MAX:.0f} s")

    def stop(self) -> None:
        """End it for good, soon; does not block."""
        self._closing = True
        if self._process is not None:
            self._process.kill()
        self._wake()

    def close(self) -> None:
        """End it for good, and wait for that."""
        self.stop()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def walls(self) -> tuple[sandbox.Wall, ...]:
        """What is in force around the process that runs; none if none does."""
        link = self._link
        return link.walls if link else ()

    @property
    def pid(self) -> int:
        """Of the process that runs; 0 if none does."""
        link = self._link
        return link.process.pid if link else 0

    @property
    def shards(self) -> int:
        """How many it holds."""
        return len(self._contents)

    def _live(self) -> None:
        """The cell's thread: one process after the other."""
        failures = 0
        try:
            while not self._closing:
                try:
                    link = self._begin()
                except (RiosError, OSError) as error:
                    failures += 1
                    self._tell(None, error if isinstance(error, RiosError) else LocalError("local", str(error)))
                    log.error("the cell of %s does not start: %s", self.name, error)
                else:
                    self._tell(link, None)
                    in_force = ", ".join(wall.name for wall in link.walls if wall.in_force)
                    log.info("a cell for %s is up, process %d: %s", self.name, link.process.pid, in_force)
                    self._watch(link)
                    failures = 1 if monotonic() - link.begun >= CALM_SECONDS else failures + 1
                    self._end(link, failures)
                self._rest(min(PAUSE_SECONDS_MAX, PAUSE_FIRST_SECONDS * 2 ** min(failures - 1, 20)))
        finally:
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _tell(self, link: _Link | None, error: RiosError | None) -> None:
        """The state that others see."""
        with self._up:
            self._link, self._start_error = link, error
            self._up.notify_all()

    def _begin(self) -> _Link:
        """A process with everything loaded that it should hold. Raises RiosError or OSError."""
        link = self._spawn()
        try:
            with self._control:
                self._said.clear()  # what it was about is gone
                self.generation += 1
                for content in list(self._contents.values()):
                    self._load_again(link, content)
        except BaseException:
            self._destroy(link)
            raise
        self._counters.started += 1
        if self.last_end:
            self.restarts += 1
            self._counters.restarted += 1
        return link

    def _load_again(self, link: _Link, content: Content) -> None:
        """One shard that cannot be read any more is not to keep the others away. Raises RiosError if the process is
        lost."""
        try:
            self._load(link, content)
        except RiosError as error:
            if link.reason or link.process.poll() is not None:
                raise
            log.error("%s is not served any more by the cell of %s: %s", content.shard.id, self.name, error)

    def _spawn(self) -> _Link:
        options = self.options
        count = options.threads + SPARE_LANES
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        numbers = (far.fileno(), os.getpid(), options.threads, count, options.asked_bytes, options.answer_bytes)
        command = [sys.executable, "-I", "-S", "-c", options.boot, json.dumps(sys.path), *map(str, numbers)]
        with far:
            process = self._process = subprocess.Popen(
                command,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[far.fileno()],
                cwd="/",
            )
        try:
            near.settimeout(START_SECONDS_MAX)
            made = self._send_lanes(near, count)
            walls = tuple(sandbox.Wall(**wall) for wall in _answer(near, self.name)["walls"])
            return _Link(process, near, made, deque(made), sandbox.memory_allowed(process.pid), walls)
        except BaseException:
            near.close()
            _reap(process)
            raise

    def _send_lanes(self, control: socket.socket, count: int) -> list[ParentLane]:
        asked, answer = self.options.asked_bytes, self.options.answer_bytes
        size = lane_bytes(asked, answer) * count
        descriptor = lanes.sealed_memory(size, "rios-cell")
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
        try:
            memory = mmap(descriptor, size)
            made = [
                ParentLane(memory, index * lane_bytes(asked, answer), asked, answer, near)
                for index, (near, _) in enumerate(pairs)
            ]
            socket.send_fds(control, [b"lanes"], [descriptor, *(far.fileno() for _, far in pairs)])
        finally:
            os.close(descriptor)
            for _, far in pairs:
                far.close()
        return made

    def _watch(self, link: _Link) -> None:
        """Until the process has ended, should end, or is late. A closed control socket is an end, too."""
        poll = select.poll()
        poll.register(link.control, 0)  # only whether it hung up
        poll.register(self._wake_read, select.POLLIN)
        while True:
            due = min(link.late.values(), default=None)
            ready = poll.poll(None if due is None else max(0.0, due - monotonic()) * 1000 + 1)
            for descriptor, _ in ready:
                if descriptor != self._wake_read:
                    return
                os.read(self._wake_read, 64)
            if self._closing or link.reason or link.gone:
                return
            self._look_after(link)
            if self._said:
                self._pass_on(link)

    def _look_after(self, link: _Link) -> None:
        """Calls that were given up: their lanes come back, or the cell has had its time."""
        for lane, due in list(link.late.items()):
            try:
                if lane.is_answered():
                    del link.late[lane]
                    link.free.append(lane)
                elif monotonic() >= due:
                    self._kill(link, "it did not answer a call in time")
            except LaneLost as lost:
                self._lost(link, lost)

    def _end(self, link: _Link, failures: int) -> None:
        self._tell(None, None)
        self._destroy(link)
        if self._closing:
            return
        self.last_end = link.reason or _how(link.process.returncode)
        if link.reason:
            self._counters.killed += 1
        else:
            self._counters.died += 1
        log.warning(
            "the cell of %s ended (%s; %d shards, end %d in a row); it is started again in %.1f s",
            self.name,
            self.last_end,
            len(self._contents),
            failures,
            min(PAUSE_SECONDS_MAX, PAUSE_FIRST_SECONDS * 2 ** min(failures - 1, 20)),
        )

    def _destroy(self, link: _Link) -> None:
        """Kill and reap the process, hang up."""
        _reap(link.process)
        with self._control:
            link.control.close()
        for lane in link.lanes:
            lane.close()

    def _kill(self, link: _Link, reason: str) -> None:
        """End this process; the cell's thread sees to the rest. Done once."""
        with self._up:
            if link.reason:
                return
            link.reason = reason
        self._wake()

    def _lost(self, link: _Link, lost: LaneLost) -> None:
        """It cannot be called any more. If it hung up, its exit code says why."""
        if lost.gone:
            link.gone = True
            self._wake()
        else:
            self._kill(link, f"in a call: {lost}")

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b".")
        except OSError:
            return  # it is awake, or gone

    def _rest(self, seconds: float) -> None:
        end = monotonic() + seconds
        while not self._closing and (left := end - monotonic()) > 0:
            if select.select([self._wake_read], [], [], left)[0]:
                os.read(self._wake_read, 64)

    # --- shards

    def load(self, manifest: Manifest, shard: Shard, files: Store) -> int:
        """Bring a shard into it: the shard's number for calls. Blocking. Raises IntegrityError for files that are not
        what they should be, LocalError if it cannot be loaded or the cell is down."""
        with self._control:
            link = self._running()
            self._numbers += 1
            content = Content(self._numbers, manifest, shard, files)
            self._contents[content.number] = content
            try:
                self._load(link, content)
            except BaseException:
                del self._contents[content.number]
                raise
        return content.number

    def drop(self, number: int) -> None:
        """Free a shard, soon; does not block."""
        if self._contents.pop(number, None) is not None:
            self.say({"do": "drop", "number": number})

    def say(self, message: dict[str, Any]) -> None:
        """Tell the process something, soon, if it still is the one that knows of it; does not block."""
        self._said.append(message)
        self._wake()

    def _pass_on(self, link: _Link) -> None:
        """In the cell's thread: what is to be said."""
        with self._control:
            try:
                while self._said:
                    self._tell_cell(link, self._said.popleft())
                self._allow_memory(link)
            except RiosError as error:
                self._kill(link, f"it does not obey: {error.message}")

    def _load(self, link: _Link, content: Content) -> None:
        manifest, shard = content.manifest, content.shard
        self._allow_memory(link)
        content.files.verify_shard(manifest.model_id, shard.id)
        for file in shard.files:
            with content.files.path(manifest.model_id, file).open("rb") as opened:
                message = {"do": "file", "path": file.path, "size": file.size_bytes}
                self._tell_cell(link, message, [opened.fileno()])
        if shard.kind == "stage" and manifest.architecture.router.kind == "all":
            self._send_spool(link, content)
        text = manifest.to_json()
        descriptor = lanes.sealed_copy(text, "rios-manifest")
        try:
            seconds = LOAD_SECONDS_MAX + (shard.size_bytes + shard.ram_bytes) / LOAD_BYTES_PER_SECOND
            index = manifest.shard_index(shard.id)
            message = {"do": "load", "number": content.number, "shard": index, "size": len(text)}
            self._tell_cell(link, message, [descriptor], seconds)
        except RiosError as error:
            if error.code == "unavailable":
                self._kill(link, f"it ended while it loaded {shard.id}")
                why = f"{shard.id}: the cell ended while it loaded ({error.message})"
                raise LocalError("local", why, "the shard may be made to harm, or memory is short") from error
            raise
        finally:
            os.close(descriptor)

    def _send_spool(self, link: _Link, content: Content) -> None:
        """A nameless file for weights that are joined: their pages can be given back, unlike a process's own."""
        folder = content.files.path(content.manifest.model_id, content.shard.files[0]).parent
        size = content.shard.size_bytes + SPOOL_SLACK_BYTES
        with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is met here, not by a signal in the cell
            self._tell_cell(link, {"do": "spool", "size": size}, [file.fileno()])

    def _allow_memory(self, link: _Link) -> None:
        contents = list(self._contents.values())
        caches = self.options.kv_bytes_max if any(each.shard.kind == "stage" for each in contents) else 0
        size = link.base_bytes + sum(each.memory_bytes for each in contents) + CACHE_SPACE * caches
        try:
            sandbox.allow_memory(link.process.pid, size)
        except OSError as error:
            raise LocalError("local", f"a cell's memory limit cannot be set: {error.strerror}") from error

    def _tell_cell(
        self, link: _Link, message: dict[str, Any], descriptors: Sequence[int] = (), seconds: float = LOAD_SECONDS_MAX
    ) -> None:
        """Say something on the control socket and wait for its answer. Raises what the cell says, RemoteError
        ``unavailable`` if it does not answer."""
        link.control.settimeout(seconds)
        try:
            socket.send_fds(link.control, [msgspec.json.encode(message)], list(descriptors))
        except OSError as error:
            raise RemoteError("unavailable", f"the cell of {self.name} ended: {error}") from error
        _answer(link.control, self.name)

    # --- calls

    def _running(self) -> _Link:
        link = self._link
        if link is None or link.reason or link.gone:
            raise RemoteError("unavailable", f"the cell of {self.name} is being restarted", "ask another replica")
        return link

    def ask(self, numbers: Sequence[int], parts: Sequence[NDArray[Any]], seconds: float) -> "Answer":
        """Ask and wait: a lane with the answer, to be given back. Raises RemoteError ``unavailable`` if the cell ends,
        is late or is down, or what it says of its failure."""
        link = self._running()
        on_loop = trio.lowlevel.in_trio_run()
        if on_loop and link.late:
            raise self._unavailable("it is late with another call")
        try:
            lane = link.free.pop()
        except IndexError:
            raise self._unavailable("every way to it is in use") from None
        seconds = min(seconds, self.options.call_seconds_max)
        due = monotonic() + seconds
        try:
            lane.ask(numbers, parts)
            lane.wait(min(LOOP_SECONDS, seconds) if on_loop else seconds)
        except LaneLost as lost:
            if lost.late and on_loop:
                link.late[lane] = due
                self._wake()
            else:
                self._lost(link, lost)
            raise self._unavailable(str(lost)) from lost
        except BaseException:
            link.free.append(lane)
            raise
        answer = Answer(lane, link.free)
        self._counters.calls += 1
        status, size, *_ = lane.numbers()
        if status != ANSWERED:
            with answer:
                raise RemoteError("unavailable", f"in the cell of {self.name}: {lane.error_text(size)}")
        return answer

    def _unavailable(self, why: str) -> RemoteError:
        return RemoteError("unavailable", f"the cell of {self.name}: {why}", "ask another replica")

    def statistics(self) -> dict[str, Any]:
        """JSON-able."""
        link = self._link
        return {
            "publisher": self.name,
            "running": link is not None,
            "pid": self.pid,
            "shards": self.shards,
            "restarts": self.restarts,
            "last_end": self.last_end,
            "walls": [f"{wall.name}: {wall.why}" for wall in self.walls if wall.in_force],
            "missing": [f"{wall.name}: {wall.why}" for wall in self.walls if not wall.in_force],
        }


def _environment() -> dict[str, str]:
    """An interpreter that was built beside its libraries needs to be told where they are."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**ENVIRONMENT, **kept}


def _answer(control: socket.socket, name: str) -> dict[str, Any]:
    """The cell's next message. Raises the error it tells of, RemoteError ``unavailable`` if none comes."""
    try:
        data = control.recv(MESSAGE_BYTES_MAX)
    except OSError as error:  # a timeout is one
        raise RemoteError("unavailable", f"the cell of {name} does not answer: {error}") from error
    if not data:
        raise RemoteError("unavailable", f"the cell of {name} ended")
    try:
        answer: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        if answer.get("ok") is True:
            return answer
        kind, code, text = (str(answer[key]) for key in ("kind", "code", "error"))
    except (msgspec.DecodeError, KeyError) as error:
        raise RemoteError("unavailable", f"the cell of {name} says nonsense") from error
    raise _ERRORS.get(kind, LocalError)(code if code in ("integrity", "local") else "local", text[:1000])


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"killed by {name}" + (": a forbidden system call" if -code == signal.SIGSYS else "")
    return f"it ended by itself, exit code {code}"
