"""Walls around a process: namespaces, another user, limits, Landlock, seccomp.

Owns: their order, what is demanded, what is told about each. Does not own: the process (``program``, ``cell``).

A process imports everything it needs first, then calls :func:`enter`, then looks at what a stranger made. All kinds do
it here: cells, and the processes for text, grammars and imports, which differ by their :class:`Profile`. seccomp is
demanded: alone it keeps a process from files, network and other processes. The others are second walls; one that this
system lacks is named. A process that may do without says so: it has limits then, and nothing else.

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
from dmoe.cells import apart, gvisor, kernel, landlock, seccomp

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


@dataclass(frozen=True, slots=True)
class Profile:
    """What a kind of process needs. ``calls``: system calls beside those that computing needs
    (:data:`dmoe.cells.seccomp.MORE`); ``memory_bytes``: address space beyond that of its imports, for good where it is
    ``fixed``, else until its parent allows more; 0: not bounded so, ``data_bytes`` is then, in which mapped files do
    not count; ``file_bytes``: how long a file may get that it writes by a descriptor; ``demanded``: nothing runs
    without seccomp."""

    calls: tuple[str, ...] = ()
    memory_bytes: int = START_BYTES
    fixed: bool = False
    data_bytes: int = 0
    file_bytes: int = 0
    demanded: bool = True


CELL = Profile()


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


def enter(keep: Collection[int], profile: Profile = CELL) -> list[Wall]:
    """Put up all walls around this process; of its descriptors only ``keep`` stay (0 to 2 become /dev/null).

    Raises LocalError if a demanded wall cannot be put up: the process must end then.
    """
    if lacks := missing():
        if profile.demanded and not gvisor.is_inside():
            raise LocalError("local", f"this system has no sandbox for cells ({lacks})", "see: rios doctor")
        _limit(profile, address_space_bytes(), count_threads=False)
        return [*_other_kernel(), Wall("seccomp", False, lacks), Wall("limits", True, "memory, files, no core dump")]
    if len(os.listdir("/proc/self/task")) != 1:
        raise LocalError("local", "a cell had several threads before its sandbox was up")
    try:
        return _enter(keep, profile)
    except OSError as error:
        raise LocalError("local", f"the sandbox of a cell could not be put up: {error}", "see: rios doctor") from error


def _enter(keep: Collection[int], profile: Profile) -> list[Wall]:
    _close_descriptors(keep)
    os.chdir("/")
    os.umask(0o077)
    _prefer_to_be_killed()
    user = os.geteuid()
    size = address_space_bytes()
    namespaces, root, nobody = _leave_namespaces(user), _see_no_files(), _become_nobody(user)
    own_count = namespaces.in_force or nobody.in_force
    _limit(profile, size, count_threads=own_count)
    walls = [*_other_kernel(), namespaces, root, nobody]
    walls.append(Wall("limits", True, "memory, files, no core dump" + (", threads" if own_count else "")))
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    walls.append(_asked("landlock", landlock.restrict))
    seccomp.load(profile.calls)
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
    """No network device, not even loopback; no System V memory; no other process's number. Root needs no user namespace
    for that, and could not become nobody in one."""
    if apart.is_inside():
        return Wall("namespaces", True, "own network, IPC and process numbers")
    flags = apart.OWN | (kernel.CLONE_NEWUSER if user else 0)
    return _asked("namespaces", lambda: "own network and IPC" if not kernel.call("unshare", flags) else "")


def _see_no_files() -> Wall:
    """An empty file system; later than the rest, as imports read files."""
    if not apart.is_inside():
        return Wall("empty root", False, "no mount namespace of its own")

    def empty() -> str:
        kernel.empty_root()
        return "no file exists"

    return _asked("empty root", empty)


def _become_nobody(user: int) -> Wall:
    """Root's cell is nobody's process: it owns nothing and may signal nobody."""
    if user:
        return Wall("user", False, "the cell runs as its node's user: only root can change that")
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        return Wall("user", False, f"the cell runs as root: {error.strerror}")
    return Wall("user", True, f"runs as user {NOBODY}")


def _other_kernel() -> list[Wall]:
    return [Wall("gvisor", True, "a kernel of its own")] if gvisor.is_inside() else []


def _limit(profile: Profile, size: int, *, count_threads: bool) -> None:
    """Hard limits, except for a cell's memory: the parent raises that one as shards come (the filter forbids it in
    here)."""
    hard = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: profile.file_bytes, resource.RLIMIT_NOFILE: FILES_MAX}
    if count_threads:  # else those of the whole user would be counted
        hard[resource.RLIMIT_NPROC] = THREADS_MAX
    for name in ("RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE"):
        if hasattr(resource, name):  # not everywhere
            hard[getattr(resource, name)] = 0
    if profile.data_bytes:
        hard[resource.RLIMIT_DATA] = profile.data_bytes
    for what, value in hard.items():
        _set_limit(what, value)
    if profile.memory_bytes and size and not (gvisor.is_inside() and not profile.fixed):  # nobody could raise it there
        _set_limit(resource.RLIMIT_AS, size + profile.memory_bytes, soft=not profile.fixed)


def _set_limit(what: int, value: int, *, soft: bool = False) -> None:
    """For good, or ``soft``: until somebody with the right to it raises it."""
    top = resource.getrlimit(what)[1]
    value = value if top == resource.RLIM_INFINITY else min(value, top)
    resource.setrlimit(what, (value, top if soft else value))


def is_linux() -> bool:
    """Whether processes' memory is known here."""
    return kernel.IS_LINUX


def address_space_bytes() -> int:
    """Of this process; 0 where that is not known."""
    if not kernel.IS_LINUX:
        return 0
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class Size:
    """This process's address space, also behind its walls: where it stands is opened before."""

    def __init__(self) -> None:
        self.descriptors = [os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)] if kernel.IS_LINUX else []

    def bytes(self) -> int:
        """It now; 0 where it is not known. Asked once."""
        texts = [os.read(descriptor, 256) for descriptor in self.descriptors]
        return sum(int(text.split()[0]) * resource.getpagesize() for text in texts)

    def close(self) -> None:
        """It is not asked any more."""
        while self.descriptors:
            os.close(self.descriptors.pop())


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
