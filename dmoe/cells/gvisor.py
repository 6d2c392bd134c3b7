"""gVisor around a cell, for operators who want another kernel between a stranger and theirs (opt-in, ``dmoe.gvisor``).

Owns: finding ``runsc`` and its command line (gvisor.dev, ``runsc do``). Does not own: the cell.

``runsc do`` runs a command over the host's files, read-only, without network; the cell's own descriptors are passed on
under their numbers. Inside, the cell walls itself in as elsewhere, with what gVisor's kernel offers; its memory limit
is kept by gVisor's kernel and by the control group of the whole, as the host cannot limit address space there.

Fails with LocalError if there is no ``runsc``: who asked for this wall is not served without it.
"""

import os
import shutil
from collections.abc import Mapping, Sequence

from config.errors import LocalError

BINARY = "runsc"
MARK = "RIOS_IN_GVISOR"
"""Set for what runs inside: it is told what the system there lacks."""


def binary() -> str:
    """Where ``runsc`` is; empty if it is nowhere."""
    return shutil.which(BINARY) or ""


def check() -> None:
    """Raise LocalError if there is none."""
    if not binary():
        message = f"dmoe.gvisor is on, and there is no {BINARY} in PATH"
        raise LocalError(
            "local", message, "install gVisor (gvisor.dev/docs/user_guide/install), or set dmoe.gvisor = false"
        )


def wrapped(
    command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]
) -> tuple[list[str], dict[str, str]]:
    """The command and its environment, to be run inside. Raises LocalError if there is no ``runsc``."""
    check()
    rootless = ["--rootless"] if os.geteuid() else []
    passed = [f"--pass-fd={number}:{number}" for number in descriptors]
    inside = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), f"{MARK}=1"]
    # --host-uds: sockets that come in may be talked on, none can be opened
    options = ["--network=none", "--host-uds=none", "--ignore-cgroups", *rootless]
    return [binary(), *options, "do", *passed, *inside, *command], {"PATH": os.environ.get("PATH", os.defpath)}


def is_inside() -> bool:
    """Whether this process runs in it."""
    return MARK in os.environ
