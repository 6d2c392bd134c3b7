"""Landlock: no path, no TCP port, no abstract socket and no signal beyond the process (docs.kernel.org, landlock).

Owns: the ruleset. It names everything that the running kernel can deny and allows nothing.
"""

import ctypes
import os

from dmoe.cells import kernel

_VERSION_FLAG = 1
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights to files there are, by ABI version: execute, write, read, and so on up to truncate; from 5 on also
ioctl on devices."""
_FS_BITS_MAX = 16
_NET_BITS, _NET_ABI = 2, 4
"""Bind and connect."""
_SCOPED_BITS, _SCOPED_ABI = 2, 6
"""Abstract unix sockets, signals."""


def abi() -> int:
    """The kernel's Landlock ABI version. Raises OSError where there is none or it is switched off."""
    return kernel.call("landlock_create_ruleset", 0, 0, _VERSION_FLAG)


def restrict() -> str:
    """Deny all of it to this thread and those it starts, for good; ``PR_SET_NO_NEW_PRIVS`` must be set. Tells what is
    denied. Raises OSError."""
    version = abi()
    files = (1 << _FS_BITS.get(version, _FS_BITS_MAX)) - 1
    network = (1 << _NET_BITS) - 1 if version >= _NET_ABI else 0
    scoped = (1 << _SCOPED_BITS) - 1 if version >= _SCOPED_ABI else 0
    fields = [files, *([network] if network else []), *([scoped] if scoped else [])]
    attributes = (ctypes.c_uint64 * len(fields))(*fields)
    ruleset = kernel.call("landlock_create_ruleset", ctypes.addressof(attributes), ctypes.sizeof(attributes), 0)
    try:
        kernel.call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
    return ", ".join(["files", *(["TCP"] if network else []), *(["unix sockets, signals"] if scoped else [])])
