"""The first thing that a walled process does: namespaces of its own, before it imports anything.

Owns: leaving the node's network, IPC, host name and process numbers, and the small process that stays outside and ends
as the one inside did. Does not own: the other walls (``sandbox``).

A process gets other process numbers only by being born with them, so this one makes a copy of itself that goes on, and
waits for it. Neither has imported more than this package's few modules then. Where the system refuses, everything goes
on in one process, and ``sandbox`` names what is missing.

Invariants:
1. The process outside reads nothing, holds no descriptor, and has the walls' list of system calls too.
2. If it ends, the kernel ends the one inside; if that ends, it ends the same way, so that its parent sees why.
"""

import os
import signal
from contextlib import suppress

from dmoe.cells import kernel, seccomp

OWN = kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP


def leave() -> None:
    """Go on in a process of its own numbers, if the system lets it."""
    if not kernel.is_known() or not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        return  # else nobody outside could tell which process is inside
    flags = OWN | kernel.CLONE_NEWPID | kernel.CLONE_NEWNS
    if os.geteuid():
        flags |= kernel.CLONE_NEWUSER
    try:
        kernel.call("unshare", flags)
        inside = os.fork()
    except OSError:
        return
    if inside:
        _wait(inside)


def is_inside() -> bool:
    """Whether this process is the first of its own numbers."""
    return os.getpid() == 1


def inside_of(pid: int) -> int:
    """The process that a started one went on in: its child, or itself."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/task/{pid}/children") as file:
        return int(file.read().split()[0])
    return pid


def _wait(inside: int) -> None:
    """Stay outside until the process inside has ended, and end like it."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(OSError):
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.load(("wait4", "kill"))
    _, status = os.waitpid(inside, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)
