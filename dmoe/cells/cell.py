"""A cell's life, seen from its node: started, loaded, called, killed past a deadline, started again.

Owns: one process at a time, what is loaded in it, who waits how long. Does not own: how a process is made (``link``)
and gets a shard (``content``), what happens inside (``program``), which shard goes into which cell (``cells``).

A thread of its own starts the process and waits for its end: the kernel ends a child with the *thread* that started it,
and nobody else has to look after zombies.

Invariants:
1. A call ends by its deadline: with an answer, or with RemoteError ``unavailable`` and the cell killed. On the event
   loop nobody waits longer than ``call.LOOP_SECONDS``; the cell may have the rest of its time.
2. A cell that ended is started again with the same shards, ever later if it keeps ending; meanwhile its calls fail at
   once, so that callers go elsewhere. Shards that keep ending it (``blame``) are withdrawn: its owner is told.
3. A cell gets three kinds of descriptors: its sockets, sealed memory, and files of its own shards, open for reading
   (and for a dense stage a nameless one to write to, of a fixed size). One it opens itself before its walls are up:
   the list of its own memory.
"""

import logging
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

import trio
from numpy.typing import NDArray

from config.errors import LocalError, RemoteError, RiosError
from dmoe.cells import sandbox
from dmoe.cells.blame import ENDS_MAX, WINDOW_SECONDS, Blame
from dmoe.cells.call import Answer, Call, Late
from dmoe.cells.content import Content, Store
from dmoe.cells.lanes import LaneLost, ParentLane
from dmoe.cells.launch import Process
from dmoe.cells.link import START_SECONDS_MAX, Asked, Link, Options, Starting
from dmoe.core.manifest import Manifest, Shard

log = logging.getLogger("rios.security.cells")

LANE_POLL_SECONDS = 0.0005
LATE_LOOK_SECONDS = 0.05
"""So often the lanes of calls that were given up are looked after."""
PAUSE_FIRST_SECONDS, PAUSE_SECONDS_MAX = 0.1, 60.0
"""Before a cell that ended is started again; doubled each time."""
END_SECONDS = 1.0
"""A process that hung up may take so long to be gone."""
CALM_SECONDS = 60.0
"""A cell that lived so long has mended its ways: the next pause is the first one again."""
IDLE_CHECK_SECONDS, IDLE_SHARE_MAX = 10.0, 0.2
"""A cell that nobody waits for may use this share of one core: waking up, looking for the next call."""
CACHE_SPACE = 8
"""Address space for caches, times the memory that they may take: slots and positions grow by doubling, and while they
move both places are there. Pages exist once they are written."""


Making = Callable[[int, Manifest, Shard, Store], Content]
"""How a shard with a number is brought into a cell."""


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
    withdrawn: int = 0
    """Shards that were withdrawn because they keep ending their cell."""
    ram_bytes: int = 0
    """What a cell takes without a shard: the most that was measured."""


class _Idleness:
    """Whether a process computes more than it was asked for: it might work for somebody else."""

    def __init__(self, link: Link, threads: int) -> None:
        self.due = monotonic() + IDLE_CHECK_SECONDS
        self._link = link
        self._threads = threads
        self._used, self._asked = self._figures()

    def is_busy(self, now: float) -> bool:
        """Looks every :data:`IDLE_CHECK_SECONDS`; else False."""
        if now < self.due:
            return False
        self.due = now + IDLE_CHECK_SECONDS
        used, asked = self._figures()
        spent = used - self._used - (1 + self._threads) * (asked - self._asked)
        self._used, self._asked = used, asked
        return spent > IDLE_SHARE_MAX * IDLE_CHECK_SECONDS

    def _figures(self) -> tuple[float, float]:
        try:
            return self._link.cpu_seconds(), self._link.asked_seconds()
        except OSError:
            return 0.0, 0.0  # it has ended, and that is noticed elsewhere


class Cell:
    """The cell of a publisher. Every method may be called from any thread."""

    def __init__(
        self, name: str, options: Options, counters: Counters, on_withdrawn: Callable[[], None] | None = lambda: None
    ) -> None:
        """``on_withdrawn`` is called in the cell's thread when there is something new in :attr:`withdrawn`. None: what
        keeps ending it stays, and is asked ever later: its node has nobody else to ask."""
        self.name = name
        self.expected = 0
        """Shards that are in it, or on their way (kept by its owner)."""
        self.restarts = 0
        self.last_end = ""
        """How the last process ended; empty if none did."""
        self.options = options
        self._counters = counters
        self._contents: dict[int, Content] = {}
        self.withdrawn: dict[int, str] = {}
        """Shards that are not served any more, by number, and why."""
        self._on_withdrawn = on_withdrawn
        self._blame = Blame()
        self.generation = 0
        """Counts its processes: what one of them kept is gone in the next."""
        self._said: deque[dict[str, Any]] = deque()
        self._numbers = 0
        self._link: Link | None = None
        self._process: Process | None = None
        self._control = threading.RLock()
        self._up = threading.Condition()
        self._start_error: RiosError | None = None
        self._closing = False
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
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
        self.wake()

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
        return link.process.walled_pid if link else 0

    @property
    def is_up(self) -> bool:
        """Whether a process runs that may be asked."""
        link = self._link
        return link is not None and not link.is_lost

    @property
    def is_late(self) -> bool:
        """Whether the event loop may not wait for it now: it was late there."""
        link = self._link
        return link is not None and (bool(link.late) or not link.away.is_over(monotonic()))

    @property
    def ram_bytes(self) -> int:
        """What it takes without its shards, as measured, or as the others take."""
        link = self._link
        return link.ram_bytes if link else self._counters.ram_bytes or self.options.ram_bytes_guess

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
            self._wake_read.close()
            self._wake_write.close()

    def _tell(self, link: Link | None, error: RiosError | None) -> None:
        """The state that others see."""
        with self._up:
            self._link, self._start_error = link, error
            self._up.notify_all()

    def _begin(self) -> Link:
        """A process with everything loaded that it should hold. Raises RiosError or OSError."""
        try:
            starting = Starting(self.options)
            self._process = starting.process
            link = starting.link()
        except (RiosError, OSError) as error:
            self._count_end(list(self._contents), f"it does not start: {error}")
            raise
        self._counters.ram_bytes = max(self._counters.ram_bytes, link.ram_bytes)
        try:
            with self._control:
                self._said.clear()  # what it was about is gone
                self.generation += 1
                self._allow_memory(link)
                for content in list(self._contents.values()):
                    self._load_again(link, content)
        except BaseException:
            link.destroy()
            raise
        self._counters.started += 1
        if self.last_end:
            self.restarts += 1
            self._counters.restarted += 1
        return link

    def _load_again(self, link: Link, content: Content) -> None:
        """One shard that cannot be read any more is not to keep the others away. Raises RiosError if the process is
        lost."""
        try:
            content.give(link)
        except RiosError as error:
            if link.is_lost:
                self._count_end([content.number], "it ended while it loaded")
                raise
            self._withdraw(content.number, f"it cannot be loaded again: {error}")

    def _watch(self, link: Link) -> None:
        """Until the process has ended, should end, or is late. A closed control socket is an end, too."""
        poll = select.poll()
        poll.register(link.control, 0)  # only whether it hung up
        poll.register(self._wake_read, select.POLLIN)
        idle = _Idleness(link, self.options.threads)
        while True:
            due = min(idle.due, monotonic() + LATE_LOOK_SECONDS) if link.late else idle.due
            ready = poll.poll(max(0.0, due - monotonic()) * 1000 + 1)
            for descriptor, _ in ready:
                if descriptor != self._wake_read.fileno():
                    return
                self._wake_read.recv(64)
            if self._closing or link.is_lost:
                return
            self._look_after(link)
            if idle.is_busy(monotonic()):
                self._kill(link, "it computes without being asked")
            if self._said:
                self._pass_on(link)

    def _look_after(self, link: Link) -> None:
        """Calls that were given up: their lanes come back, or the cell has had its time."""
        for lane, due in list(link.late.items()):
            try:
                if lane.is_answered():
                    del link.late[lane]
                    link.answered(lane)
                    link.free.append(lane)
                elif monotonic() >= due:
                    self._kill(link, "it did not answer a call in time")
            except LaneLost as lost:
                self.lost(link, lost)

    def _end(self, link: Link, failures: int) -> None:
        self._tell(None, None)
        if not link.reason and not self._closing:
            link.process.ended_within(END_SECONDS)  # killed while it dies, it would not say of what
        link.process.kill()  # whoever waits for its answer stops waiting, and lets go of the control socket
        with self._control:
            link.destroy()
        if self._closing:
            return
        self.last_end = link.how_it_ended()
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
        if not link.loading:  # else whoever loads is told
            asked = {number for call in list(link.asked.values()) for number in call.shards}
            self._count_end(asked or list(self._contents), self.last_end)

    def _count_end(self, numbers: Iterable[int], how: str) -> None:
        """An end of the process, or a start that failed, counts against shards."""
        if self._on_withdrawn is None:
            return
        for number in self._blame.ended(numbers, monotonic()):
            within = f"{WINDOW_SECONDS / 60:.0f} minutes"
            self._withdraw(number, f"its cell ended {ENDS_MAX} times within {within}, at last because: {how}")

    def _withdraw(self, number: int, why: str) -> None:
        """Serve a shard no longer; its owner closes it."""
        content = self._contents.pop(number, None)
        if content is None:
            return
        self.withdrawn[number] = why
        self._counters.withdrawn += 1
        log.error("%s of %s is withdrawn: %s", content.shard.id, self.name, why)
        if self._on_withdrawn is not None:
            self._on_withdrawn()

    def _kill(self, link: Link, reason: str) -> None:
        """End this process; the cell's thread sees to the rest. Done once."""
        with self._up:
            if link.reason:
                return
            link.reason = reason
        self.wake()

    def lost(self, link: Link, lost: LaneLost) -> None:
        """A process cannot be asked any more. If it hung up, its exit code says why."""
        if lost.gone:
            link.gone = True
            self.wake()
        else:
            self._kill(link, f"in a call: {lost}")

    def wake(self) -> None:
        """Let the cell's thread look at what has changed; does not block."""
        try:
            self._wake_write.send(b".")
        except OSError:
            return  # it is awake already, or gone

    def _rest(self, seconds: float) -> None:
        end = monotonic() + seconds
        while not self._closing and (left := end - monotonic()) > 0:
            if select.select([self._wake_read], [], [], left)[0]:
                self._wake_read.recv(64)

    # --- shards

    def load(self, manifest: Manifest, shard: Shard, store: Store, made: Making = Content) -> int:
        """Bring a shard into it: the shard's number for calls. Blocking. Raises IntegrityError for files that are not
        what they should be, LocalError if it cannot be loaded or the cell is down."""
        with self._control:
            link = self._running()
            self._numbers += 1
            content = made(self._numbers, manifest, shard, store)
            self._contents[content.number] = content
            link.loading = True
            try:
                self._allow_memory(link)
                content.give(link)
                link.loading = False
            except BaseException:
                del self._contents[content.number]
                link.loading = link.is_lost
                self.wake()  # it may be lost
                raise
        return content.number

    def drop(self, number: int) -> None:
        """Free a shard, soon; does not block."""
        self.withdrawn.pop(number, None)
        self._blame.forget(number)
        if self._contents.pop(number, None) is not None:
            self.say({"do": "drop", "number": number})

    def say(self, message: dict[str, Any]) -> None:
        """Tell the process something, soon, if it still is the one that knows of it; does not block."""
        self._said.append(message)
        self.wake()

    def _pass_on(self, link: Link) -> None:
        """In the cell's thread: what is to be said."""
        with self._control:
            try:
                while self._said:
                    link.tell(self._said.popleft())
                self._allow_memory(link)
            except RiosError as error:
                self._kill(link, f"it does not obey: {error.message}")

    def _allow_memory(self, link: Link) -> None:
        contents = list(self._contents.values())
        caches = self.options.kv_bytes_max if any(each.has_caches for each in contents) else 0
        link.allow_memory(sum(each.memory_bytes for each in contents) + CACHE_SPACE * caches)

    # --- calls

    def _running(self) -> Link:
        link = self._link
        if link is None or link.is_lost:
            raise RemoteError("unavailable", f"the cell of {self.name} is being restarted", "ask another replica")
        return link

    def ask(
        self, numbers: Sequence[int], parts: Sequence[NDArray[Any]], seconds: float, also: Sequence[int] = ()
    ) -> Answer:
        """Ask the shard with the first of ``numbers`` (and those of ``also``) and wait: a lane with the answer, to be
        given back. Raises RemoteError ``unavailable`` if the cell ends, is late or is down, or what it says of its
        failure."""
        call = self.begin(numbers, parts, seconds, also)
        try:
            return call.wait()
        except Late as late:
            call.give_up()
            raise self._unavailable(str(late)) from late

    def begin(
        self, numbers: Sequence[int], parts: Sequence[NDArray[Any]], seconds: float, also: Sequence[int] = ()
    ) -> Call:
        """Ask, and let somebody wait for the answer. Raises as :meth:`ask`."""
        link = self._running()
        shards = (numbers[0], *also)
        if self.withdrawn and not self.withdrawn.keys().isdisjoint(shards):
            raise self._unavailable("a shard that keeps ending it was withdrawn")
        on_loop = trio.lowlevel.in_trio_run()
        if on_loop and link.late:
            raise self._unavailable("it is late with another call")
        due = monotonic() + min(seconds, self.options.call_seconds_max)
        lane = self._free_lane(link, 0 if on_loop else due)
        link.asked[lane] = Asked(shards, monotonic())
        call = Call(self, link, lane, due)
        call.ask(numbers, parts)
        self._counters.calls += 1
        return call

    def _free_lane(self, link: Link, due: float) -> ParentLane:
        """One that nobody uses, the last one used first: its memory is warm. A thread may wait for it."""
        while not link.is_lost:
            try:
                return link.free.pop()
            except IndexError:
                if monotonic() >= due:
                    break
                sleep(LANE_POLL_SECONDS)  # more calls than threads: rare
        raise self._unavailable("every way to it is in use")

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
            "ram_bytes": self.ram_bytes,
            "restarts": self.restarts,
            "last_end": self.last_end,
            "walls": [f"{wall.name}: {wall.why}" for wall in self.walls if wall.in_force],
            "missing": [f"{wall.name}: {wall.why}" for wall in self.walls if not wall.in_force],
        }
