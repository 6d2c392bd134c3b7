"""Control groups for walled processes: memory, threads, processor time, where this node may make its own (cgroup v2,
docs.kernel.org, admin-guide/cgroup-v2).

Owns: finding the part of the tree that was delegated to this node, one group per process, its limits. Does not own:
processes. It is a second wall: address space and thread limits hold without it, but they do not bound what several
processes take together, nor processor time.

The kernel lets a group either hold processes or pass controllers on to groups below it. So this node moves itself into
a group ``node`` below its own, once, and only if nobody else is in it: what a service manager made for it
(``Delegate=yes``), or a container. A session that it shares with a shell is left alone.

Invariants:
1. Nothing outside the node's own group is touched; what was done is undone where the next step fails.
2. A process without a group runs all the same; the wall that it lacks is named.
"""

import os
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path

from dmoe.cells.sandbox import THREADS_MAX, Wall

WANTED = ("memory", "pids", "cpu")
NODE, PREFIX = "node", "cell-"
_PERIOD_US = 100_000
_NAME = "cgroup"
_numbers = count(1)


class Unavailable(Exception):
    """No group can be made here; why."""


class Tree:
    """The node's own group, ready for groups below it. Raises Unavailable."""

    def __init__(self, own: Path, pid: int) -> None:
        self._own = own
        if not os.access(own, os.W_OK) or not os.access(own / "cgroup.procs", os.W_OK):
            raise Unavailable(f"{own} is not delegated to this node")
        there = (own / "cgroup.controllers").read_text().split()
        self.controllers = [name for name in WANTED if name in there]
        if "memory" not in self.controllers:
            raise Unavailable(f"{own} has no memory controller, only: {', '.join(there) or 'none'}")
        others = set(self._processes()) - {pid} - _below(pid)
        if others:
            raise Unavailable(f"{own} is shared with {len(others)} other processes")
        self._move_in()
        self._sweep()

    def _processes(self) -> list[int]:
        return [int(line) for line in (self._own / "cgroup.procs").read_text().split()]

    def _move_in(self) -> None:
        """This node into a leaf, the controllers to the groups beside it."""
        leaf = self._own / NODE
        leaf.mkdir(exist_ok=True)
        moved = []
        try:
            for pid in self._processes():
                (leaf / "cgroup.procs").write_text(str(pid))
                moved.append(pid)
            (self._own / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in self.controllers))
        except OSError as error:
            for pid in moved:
                with suppress(OSError):
                    (self._own / "cgroup.procs").write_text(str(pid))
            with suppress(OSError):
                leaf.rmdir()
            raise Unavailable(f"{self._own}: {error.strerror}") from error

    def _sweep(self) -> None:
        """Groups of processes that ended while nobody looked; one that is in use stays."""
        for path in self._own.glob(f"{PREFIX}*"):
            with suppress(OSError):
                path.rmdir()

    def join(self, pid: int, memory_bytes: int, cpus: int) -> "Group":
        """A new group with this process in it. Raises OSError."""
        group = Group(self._own / f"{PREFIX}{os.getpid()}-{next(_numbers)}", self.controllers)
        try:
            group.limit(memory_bytes, cpus)
            group.add(pid)
        except OSError:
            group.remove()
            raise
        return group


class Group:
    """The group of one process. Raises OSError."""

    def __init__(self, path: Path, controllers: list[str]) -> None:
        self._path = path
        self._controllers = controllers
        path.mkdir()

    @property
    def wall(self) -> Wall:
        """What it bounds."""
        return Wall(_NAME, True, ", ".join(self._controllers))

    def limit(self, memory_bytes: int, cpus: int) -> None:
        """Set its limits; 0: none."""
        if memory_bytes:
            self.allow_memory(memory_bytes)
        if "pids" in self._controllers:
            (self._path / "pids.max").write_text(str(THREADS_MAX))
        if "cpu" in self._controllers and cpus:
            (self._path / "cpu.max").write_text(f"{cpus * _PERIOD_US} {_PERIOD_US}")

    def allow_memory(self, size: int) -> None:
        """How much memory it may take."""
        (self._path / "memory.max").write_text(str(size))

    def add(self, pid: int) -> None:
        """Move a process in; those that it starts follow."""
        (self._path / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Once it is empty."""
        with suppress(OSError):  # the next node sweeps it
            self._path.rmdir()


def own_group(cgroup: str, mountinfo: str) -> Path:
    """Where this process's group is, from ``/proc/self/cgroup`` and ``/proc/self/mountinfo``. Raises Unavailable."""
    inside = next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), None)
    fields = [line.split() for line in mountinfo.splitlines()]
    mounts = [each for each in fields if "-" in each and each[each.index("-") + 1] == "cgroup2"]
    if inside is None or not mounts:
        raise Unavailable("this system has no cgroup v2")
    root, point = mounts[0][3], mounts[0][4]
    below = inside.removeprefix(root) if root != "/" else inside
    return Path(point) / below.lstrip("/")


@cache
def _tree() -> Tree | Unavailable:
    """Looked at once: it moves this process."""
    try:
        own = own_group(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())
        return Tree(own, os.getpid())
    except Unavailable as why:
        return why
    except (OSError, ValueError) as error:
        return Unavailable(f"cannot be used: {error}")


def available() -> Wall:
    """Whether walled processes get groups of their own here."""
    tree = _tree()
    if isinstance(tree, Unavailable):
        return Wall(_NAME, False, str(tree))
    return Wall(_NAME, True, ", ".join(tree.controllers))


def join(pid: int, memory_bytes: int, cpus: int) -> Group | None:
    """A group for a process; None where there is none to be had."""
    tree = _tree()
    if isinstance(tree, Unavailable):
        return None
    try:
        return tree.join(pid, memory_bytes, cpus)
    except OSError:
        return None


def _below(pid: int) -> set[int]:
    """The processes that this one started, and theirs."""
    found: set[int] = set()
    new = [pid]
    while new:
        parent = new.pop()
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError, ValueError):
                children = {int(child) for child in file.read_text().split()} - found
                found |= children
                new += children
    return found
