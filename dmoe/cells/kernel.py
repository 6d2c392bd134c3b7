"""System calls that Python does not offer, by ctypes: numbers per architecture, errors as OSError.

Owns: how the kernel is asked. Does not own: what for.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

IS_LINUX: Final = sys.platform == "linux"
MACHINE: Final = platform.machine()

AUDIT_ARCH: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""What a seccomp filter sees as the architecture of a call (linux/audit.h)."""

_X86_64 = {
    "seccomp": 317,
    "capset": 126,
    "unshare": 272,
    "setresuid": 117,
    "setresgid": 119,
    "mount": 165,
    "umount2": 166,
    "pivot_root": 155,
}
_AARCH64 = {
    "seccomp": 277,
    "capset": 91,
    "unshare": 97,
    "setresuid": 147,
    "setresgid": 149,
    "mount": 40,
    "umount2": 39,
    "pivot_root": 41,
}
_BOTH = {"landlock_create_ruleset": 444, "landlock_restrict_self": 446}
_NUMBERS: Mapping[str, Mapping[str, int]] = {"x86_64": {**_X86_64, **_BOTH}, "aarch64": {**_AARCH64, **_BOTH}}

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38

CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 1 << 14, 1 << 18
MNT_DETACH = 2

_CAPABILITY_VERSION_3 = 0x20080522
_UNCHANGED = -1

_libc = ctypes.CDLL(None, use_errno=True) if IS_LINUX else None


def is_known() -> bool:
    """Whether this system's calls are known here: Linux on x86_64 or aarch64, 64 bits, little endian."""
    return IS_LINUX and MACHINE in _NUMBERS and sys.maxsize > 1 << 32 and sys.byteorder == "little"


def call(name: str, *arguments: int) -> int:
    """A system call by name; pointers as integers. Raises OSError."""
    assert _libc is not None
    numbers = [ctypes.c_long(argument) for argument in (_NUMBERS[MACHINE][name], *arguments)]
    return _checked(_libc.syscall(*numbers), name)


def mount(source: bytes, target: bytes, kind: bytes, flags: int) -> None:
    """``mount(2)``, without data. Raises OSError."""
    texts = [ctypes.create_string_buffer(text) for text in (source, target, kind)]
    call("mount", *(ctypes.addressof(text) for text in texts), flags, 0)


def empty_root() -> None:
    """Nothing but an empty folder that nobody can write to is the whole file system, for this process, in a mount
    namespace of its own. Raises OSError."""
    here = ctypes.create_string_buffer(b".")
    mount(b"none", b"/", b"", MS_REC | MS_PRIVATE)
    mount(b"none", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir("/tmp")
    call("pivot_root", ctypes.addressof(here), ctypes.addressof(here))
    call("umount2", ctypes.addressof(here), MNT_DETACH)
    os.chdir("/")
    mount(b"none", b"/", b"", MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def prctl(option: int, value: int) -> None:
    """``prctl(option, value, 0, 0, 0)``. Raises OSError."""
    assert _libc is not None
    _checked(_libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(each) for each in (value, 0, 0, 0))), "prctl")


def drop_capabilities() -> None:
    """Give up every capability, also those that a new user namespace brought. Raises OSError."""
    head = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    call("capset", ctypes.addressof(head), ctypes.addressof(none))


@contextmanager
def real_user(user: int) -> Iterator[None]:
    """This thread's real user and group are others for a moment, its rights the same. (The C library's calls would
    change every thread.) Raises OSError."""
    call("setresgid", user, _UNCHANGED, _UNCHANGED)
    call("setresuid", user, _UNCHANGED, _UNCHANGED)
    try:
        yield
    finally:
        call("setresuid", os.geteuid(), _UNCHANGED, _UNCHANGED)
        call("setresgid", os.getegid(), _UNCHANGED, _UNCHANGED)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
