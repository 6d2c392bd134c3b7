"""The seccomp filter of a cell: a list of the calls that computing needs; everything else is refused.

Owns: the list and the filter program. Does not own: when it is loaded (``sandbox``).

Three answers. What is listed runs. What is not gets EPERM: libraries try things (a CPU's name, a thread's affinity) and
go on without. What no library ever tries after its imports (exec, ptrace, mount, another architecture's calls) kills
the process: there somebody else is at work, and the parent sees SIGSYS.

Invariants:
1. No call on the list names a path, makes a socket, or reaches another process.
2. Memory never becomes executable. Shared memory comes from the parent, already sealed.
3. New threads, yes; new processes and namespaces, no.

Some kinds of processes need a few calls more (:data:`MORE`, by name): a timer of their own, files by descriptors that
they were given, or copies of themselves, which then load the plain list on top.
"""

import ctypes
import errno
from collections.abc import Collection, Mapping
from typing import NamedTuple

from dmoe.cells import kernel

_X86_64: Mapping[str, int] = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25, "madvise": 28,
    "nanosleep": 35, "getpid": 39, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "exit": 60,
    "gettimeofday": 96, "getrusage": 98, "getppid": 110, "sigaltstack": 131, "gettid": 186, "futex": 202,
    "sched_getaffinity": 204, "restart_syscall": 219, "clock_gettime": 228, "clock_nanosleep": 230, "exit_group": 231,
    "ppoll": 271, "set_robust_list": 273, "getcpu": 309, "getrandom": 318, "membarrier": 324, "rseq": 334,
    # with conditions
    "mmap": 9, "mprotect": 10, "clone": 56, "fcntl": 72, "prctl": 157, "clone3": 435,
    # deadly
    "execve": 59, "execveat": 322, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321,
    "unshare": 272, "setns": 308, "mount": 165, "pivot_root": 155, "chroot": 161, "reboot": 169, "kexec_load": 246,
    "init_module": 175, "finit_module": 313, "keyctl": 250, "add_key": 248, "request_key": 249,
    "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "open_by_handle_at": 304,
}  # fmt: skip
_AARCH64: Mapping[str, int] = {
    "read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "munmap": 215, "brk": 214,
    "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "sched_yield": 124, "mremap": 216,
    "madvise": 233, "nanosleep": 101, "getpid": 172, "sendto": 206, "recvfrom": 207, "sendmsg": 211, "recvmsg": 212,
    "exit": 93, "gettimeofday": 169, "getrusage": 165, "getppid": 173, "sigaltstack": 132, "gettid": 178, "futex": 98,
    "sched_getaffinity": 123, "restart_syscall": 128, "clock_gettime": 113, "clock_nanosleep": 115, "exit_group": 94,
    "ppoll": 73, "set_robust_list": 99, "getcpu": 168, "getrandom": 278, "membarrier": 283, "rseq": 293,
    "mmap": 222, "mprotect": 226, "clone": 220, "fcntl": 25, "prctl": 167, "clone3": 435,
    "execve": 221, "execveat": 281, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280,
    "unshare": 97, "setns": 268, "mount": 40, "pivot_root": 41, "chroot": 51, "reboot": 142, "kexec_load": 104,
    "init_module": 105, "finit_module": 273, "keyctl": 219, "add_key": 217, "request_key": 218,
    "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425, "open_by_handle_at": 265,
}  # fmt: skip
NUMBERS: Mapping[str, Mapping[str, int]] = {"x86_64": _X86_64, "aarch64": _AARCH64}

MORE: Mapping[str, Mapping[str, int]] = {
    "x86_64": {
        "setitimer": 38, "kill": 62, "wait4": 61, "seccomp": 317, "pread64": 17, "pwrite64": 18, "epoll_create1": 291,
        "epoll_ctl": 233, "epoll_wait": 232, "epoll_pwait": 281, "eventfd2": 290, "socketpair": 53,
        "prlimit64": 302,
    },
    "aarch64": {
        "setitimer": 103, "kill": 129, "wait4": 260, "seccomp": 277, "pread64": 67, "pwrite64": 68, "epoll_create1": 20,
        "epoll_ctl": 21, "epoll_pwait": 22, "eventfd2": 19, "socketpair": 199,
        "prlimit64": 261,
    },
}  # fmt: skip
"""What :func:`program` can allow on top, all of it beside :data:`FORK`."""
FORK = "fork"
"""New processes, without namespaces of their own."""

CONDITIONAL = ("mmap", "mprotect", "clone", "fcntl", "prctl", "clone3", "prlimit64")
DEADLY = (
    "execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "bpf", "unshare", "setns", "mount",
    "pivot_root", "chroot", "reboot", "kexec_load", "init_module", "finit_module", "keyctl", "add_key", "request_key",
    "perf_event_open", "userfaultfd", "io_uring_setup", "open_by_handle_at",
)  # fmt: skip

MEANING = "only the system calls that computing needs"

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_X32_BIT = 0x40000000

_PROT_EXEC, _MAP_SHARED, _MAP_ANONYMOUS = 4, 1, 0x20
_CLONE_THREAD, _CLONE_NAMESPACES = 0x00010000, 0x7E020080
_FCNTL = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC."""
_PRCTL = (15, 16, 0x53564D41)
"""PR_SET_NAME, PR_GET_NAME, PR_SET_VMA: names of threads and of memory."""

_OWN = (0,)
"""A process's own limits, not another's."""

_GET_ACTION_AVAILABLE, _SET_FILTER, _SYNCHRONISE = 2, 1, 1


class Instruction(NamedTuple):
    """One of classic BPF: jumps count the instructions that are skipped if the test holds, and if not."""

    code: int
    if_true: int
    if_false: int
    value: int


def check_available() -> str:
    """What it keeps out. Raises OSError where the kernel cannot kill by a filter (before Linux 4.14, or without
    seccomp)."""
    action = ctypes.c_uint32(_KILL)
    kernel.call("seccomp", _GET_ACTION_AVAILABLE, 0, ctypes.addressof(action))
    return MEANING


def program(machine: str, more: Collection[str] = ()) -> list[Instruction]:
    """The filter for an architecture. ``more``: names of :data:`MORE`, or :data:`FORK`."""
    also = MORE[machine]
    numbers = {**NUMBERS[machine], **{name: also[name] for name in more if name in also}}
    out = [
        _load(_ARCH_AT),
        Instruction(_EQUAL, 1, 0, kernel.AUDIT_ARCH[machine]),
        _give(_KILL),
        _load(_NUMBER_AT),
    ]
    if machine == "x86_64":
        out += [Instruction(_AT_LEAST, 0, 1, _X32_BIT), _give(_KILL)]
    for name, number in numbers.items():
        body = [_give(_KILL if name in DEADLY else _ALLOW)]
        if name in CONDITIONAL:
            body = _condition(name, may_fork=FORK in more)
        out += [Instruction(_EQUAL, 0, len(body), number), *body]
    return [*out, _give(_EPERM)]


def _condition(name: str, *, may_fork: bool = False) -> list[Instruction]:
    """What decides about a call; each ends with a return."""
    if name == "clone3":  # its flags are behind a pointer: the C library falls back to clone
        return [_give(_ENOSYS)]
    if name == "mprotect":
        return [_argument(2), Instruction(_ANY_BIT, 0, 1, _PROT_EXEC), _give(_EPERM), _give(_ALLOW)]
    if name == "mmap":
        anonymous = [_argument(3), Instruction(_ANY_BIT, 0, 3, _MAP_ANONYMOUS)]
        shared = [Instruction(_ANY_BIT, 0, 1, _MAP_SHARED), _give(_EPERM), _give(_ALLOW), _give(_ALLOW)]
        return [_argument(2), Instruction(_ANY_BIT, 0, 1, _PROT_EXEC), _give(_EPERM), *anonymous, *shared]
    if name == "clone":
        namespaces = [Instruction(_ANY_BIT, 0, 1, _CLONE_NAMESPACES), _give(_EPERM)]
        if may_fork:
            return [_argument(0), *namespaces, _give(_ALLOW)]
        return [_argument(0), *namespaces, Instruction(_ANY_BIT, 0, 1, _CLONE_THREAD), _give(_ALLOW), _give(_EPERM)]
    index, values = {"fcntl": (1, _FCNTL), "prctl": (0, _PRCTL), "prlimit64": (0, _OWN)}[name]
    tests = [Instruction(_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values)]
    return [_argument(index), *tests, _give(_EPERM), _give(_ALLOW)]


def load(more: Collection[str] = ()) -> None:
    """Put the filter over every thread of this process, for good; ``PR_SET_NO_NEW_PRIVS`` must be set. Raises
    OSError."""
    code = b"".join(
        each.code.to_bytes(2, "little") + bytes([each.if_true, each.if_false]) + each.value.to_bytes(4, "little")
        for each in program(kernel.MACHINE, more)
    )
    memory = ctypes.create_string_buffer(code, len(code))
    head = (ctypes.c_uint64 * 2)(len(code) // 8, ctypes.addressof(memory))  # struct sock_fprog
    kernel.call("seccomp", _SET_FILTER, _SYNCHRONISE, ctypes.addressof(head))


def _load(offset: int) -> Instruction:
    return Instruction(_LOAD, 0, 0, offset)


def _argument(index: int) -> Instruction:
    """The low half of an argument: flags have no bits above."""
    return _load(_ARGUMENTS_AT + 8 * index)


def _give(answer: int) -> Instruction:
    return Instruction(_RETURN, 0, 0, answer)
