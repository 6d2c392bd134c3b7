"""Walls around a process: namespaces, another user, limits, Landlock, seccomp.

Owns: their order, what is demanded, what is told about each. Does not own: the process (``program``, ``cell``).

A cell imports everything it needs first, then calls :func:`enter`, then looks at what a stranger made. seccomp is
demanded: alone it keeps a process from files, network and other processes. The others are second walls; one that this
system lacks is named.

Invariants:
1. :func:`enter` either puts up every demanded wall or raises; nothing in here takes one down.
2. It runs while the process has one thread: Landlock and namespaces hold for the caller's and later threads only.
"""

import errno
import os
import resource
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from config.errors import LocalError
from config.vocabulary import MIB
from dmoe.cells import kernel, landlock, seccomp

NOBODY = 65534
THREADS_MAX = 256
FILES_MAX = 512
OOM_SCORE = "500"
"""If memory runs out, a cell goes before its node does."""
START_BYTES = 512 * MIB
"""Address space beyond that of the imports, until the parent allows more for a shard."""


@dataclass(frozen=True, slots=True)
class Wall:
    """One mechanism: whether it is (or can be) in force, and what it keeps out or why it is missing."""

    name: str
    in_force: bool
    why: str


def available() -> tuple[Wall, ...]:
    """What this system offers, without doing any of it."""
    if not kernel.is_known():
        why = f"cells need Linux on x86_64 or aarch64, this is {os.uname().sysname} on {kernel.MACHINE}"
        return tuple(Wall(name, False, why) for name in ("seccomp", "landlock", "namespaces"))
    return (
        _asked("seccomp", seccomp.check_available),
        _asked("landlock", lambda: f"ABI {landlock.abi()}"),
        _namespaces_available(),
    )


def missing() -> str:
    """Why no cell can run here; empty if one can."""
    return next(
        (f"{wall.name}: {wall.why}" for wall in available() if wall.name == "seccomp" and not wall.in_force), ""
    )


def enter(keep: Collection[int]) -> list[Wall]:
    """Put up all walls around this process; of its descriptors only ``keep`` stay (0 to 2 become /dev/null).

    Raises LocalError if a demanded wall cannot be put up: the process must end then.
    """
    if lacks := missing():
        raise LocalError("local", f"this system has no sandbox for cells ({lacks})", "see: rios doctor")
    if len(os.listdir("/proc/self/task")) != 1:
        raise LocalError("local", "a cell had several threads before its sandbox was up")
    try:
        return _enter(keep)
    except OSError as error:
        raise LocalError("local", f"the sandbox of a cell could not be put up: {error}", "see: rios doctor") from error


def _enter(keep: Collection[int]) -> list[Wall]:
    _close_descriptors(keep)
    os.chdir("/")
    os.umask(0o077)
    _prefer_to_be_killed()
    user = os.geteuid()
    walls = [_leave_namespaces(user), _become_nobody(user)]
    own_count = walls[0].in_force or walls[1].in_force
    _limit(count_threads=own_count)
    walls.append(Wall("limits", True, "memory, files, no core dump" + (", threads" if own_count else "")))
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    walls.append(_asked("landlock", landlock.restrict))
    seccomp.load()
    walls.append(Wall("seccomp", True, seccomp.MEANING))
    return walls


def _close_descriptors(keep: Collection[int]) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number > 2 and number not in keep:
            try:
                os.close(number)
            except OSError as error:  # the listing's own
                if error.errno != errno.EBADF:
                    raise


def _prefer_to_be_killed() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    except OSError:
        return  # a container may forbid it: the system's own choice stands


def _leave_namespaces(user: int) -> Wall:
    """No network device, not even loopback; no System V memory. Root needs no user namespace for that, and could not
    become nobody in one."""
    flags = kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP
    if user:
        flags |= kernel.CLONE_NEWUSER
    return _asked("namespaces", lambda: "own network and IPC" if not kernel.call("unshare", flags) else "")


def _become_nobody(user: int) -> Wall:
    """Root's cell is nobody's process: it owns nothing and may signal nobody."""
    if user:
        return Wall("user", False, f"the cell runs as user {user}, like its node: only root can change that")
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        return Wall("user", False, f"the cell runs as root: {error.strerror}")
    return Wall("user", True, f"runs as user {NOBODY}")


def _limit(*, count_threads: bool) -> None:
    """Hard limits, except for memory: the parent raises that one as shards come (the filter forbids it in here)."""
    hard = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_MSGQUEUE: 0}
    if count_threads:  # else those of the whole user would be counted
        hard[resource.RLIMIT_NPROC] = THREADS_MAX
    hard[resource.RLIMIT_NOFILE] = FILES_MAX
    for what, value in hard.items():
        allowed = resource.getrlimit(what)[1]
        value = value if allowed == resource.RLIM_INFINITY else min(value, allowed)
        resource.setrlimit(what, (value, value))
    _, top = resource.getrlimit(resource.RLIMIT_AS)
    wanted = address_space_bytes() + START_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if top == resource.RLIM_INFINITY else min(wanted, top), top))


def address_space_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def memory_allowed(pid: int) -> int:
    """The address space that a cell may have. Raises OSError."""
    return _limits(pid)[0]


def allow_memory(pid: int, size: int) -> None:
    """Let a cell have so much address space. Raises OSError."""
    _, top = _limits(pid)
    _limits(pid, (size if top == resource.RLIM_INFINITY else min(size, top), top))


def _limits(pid: int, *new: tuple[int, int]) -> tuple[int, int]:
    """Read or set them. Root in a container often may not do that to another's process, nobody may to its own."""
    try:
        return resource.prlimit(pid, resource.RLIMIT_AS, *new)
    except PermissionError:
        if os.geteuid():
            raise
        with kernel.real_user(NOBODY):
            return resource.prlimit(pid, resource.RLIMIT_AS, *new)


def _namespaces_available() -> Wall:
    """Whether they are likely to be had: only trying tells, and that changes the process."""
    if not os.geteuid():
        return Wall("namespaces", True, "as root, unless a container forbids it")
    for path, bad in (
        ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
        ("/proc/sys/user/max_user_namespaces", "0"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        try:
            value = Path(path).read_text().strip()
        except OSError:
            continue  # this kernel has no such switch
        if value == bad:
            return Wall("namespaces", False, f"{path} is {value}")
    return Wall("namespaces", True, "user namespaces are allowed")


def _asked(name: str, ask: Callable[[], str]) -> Wall:
    try:
        return Wall(name, True, ask())
    except OSError as error:
        known = {errno.ENOSYS: "this kernel has none", errno.EOPNOTSUPP: "it is switched off at boot"}
        return Wall(name, False, known.get(error.errno or 0, error.strerror or str(error)))
