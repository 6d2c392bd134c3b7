"""How a walled process is started: by exec, isolated, with an environment of its own, in a control group of its own.

Owns: the interpreter's command line and environment, the opt-in wrapper (``gvisor``), which process is the one inside.
Does not own: what runs then and how it walls itself in (``apart``, ``sandbox``), what is said to it.

Invariants:
1. Nothing of the parent's environment is passed on (an interpreter that was built beside its libraries is told where
   they are), no user's folder, no site; the parent's import path is.
2. It gets the descriptors that are named, and no others; input and outputs are /dev/null.
3. One thread starts them all and lives as long as this process: walled processes end with the *thread* that started
   them, by a signal of the kernel, and other threads may end at any time.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from dmoe.cells import apart, cgroups, gvisor, sandbox
from dmoe.cells.sandbox import Wall

ENVIRONMENT: Mapping[str, str] = {
    "ORT_DISABLE_TELEMETRY": "1",
    "ORT_GQA_DISABLE_FLASH_ATTENTION": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "TOKENIZERS_PARALLELISM": "false",
}
"""The second one decides about bits, as in ``dmoe/runtime``. One thread until the walls are up; few arenas, each of
which takes address space."""
_KEPT = ("LD_LIBRARY_PATH",)

_starter = ThreadPoolExecutor(1, "walled")


class Process(subprocess.Popen[bytes]):
    """A started process. ``pid`` is the one that was started, :attr:`walled_pid` the one behind the walls. ``group``:
    its control group, if it has one; ``wrapped``: gVisor's kernel is between."""

    group: "cgroups.Group | None" = None
    wrapped = False
    _walled_pid = 0

    @property
    def walled_pid(self) -> int:
        """The process inside; asked once it has said that its walls are up."""
        if not self._walled_pid:
            self._walled_pid = self.pid if self.wrapped else apart.inside_of(self.pid)
        return self._walled_pid

    @property
    def outer_walls(self) -> tuple[Wall, ...]:
        """Those that it has from outside."""
        return (self.group.wall,) if self.group else (cgroups.available(),)

    def memory_allowed(self) -> int:
        """The address space that it may have; 0: the host does not bound it. Raises OSError."""
        return 0 if self.wrapped else sandbox.memory_allowed(self.walled_pid)

    def allow_memory(self, size: int) -> None:
        """Let it have so much address space, and its group so much memory. Raises OSError."""
        if not self.wrapped:
            sandbox.allow_memory(self.walled_pid, size)
        if self.group is not None:
            self.group.allow_memory(size)

    def kill(self) -> None:
        """The process inside first: the one outside then ends by itself, and leaves no orphan to anybody."""
        if self.returncode is None and not self.wrapped and self._kill_inside():
            return
        super().kill()

    def _kill_inside(self) -> bool:
        inside = apart.inside_of(self.pid)
        if inside == self.pid:
            return False
        try:
            descriptor = os.pidfd_open(inside)
        except OSError:
            return False
        try:
            if apart.inside_of(self.pid) != inside:  # it ended, and its number may be another's
                return False
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def ended_within(self, seconds: float) -> bool:
        """Wait so long for it to end by itself."""
        try:
            self.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self, timeout: float | None = None) -> int:
        """See :class:`subprocess.Popen`."""
        code = super().wait(timeout)
        if self.group is not None:
            self.group.remove()
        return code


def boot(module: str) -> str:
    """What the interpreter runs: the module's ``main`` with the arguments."""
    return (
        "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from dmoe.cells import apart; apart.leave(); "
        f"from {module} import main; main(sys.argv[2:])"
    )


def start(
    program: str,
    arguments: Sequence[object],
    descriptors: Sequence[int],
    *,
    memory_bytes: int = 0,
    cpus: int = 0,
    wrapped: bool = False,
) -> Process:
    """Start ``program`` (:func:`boot`) with these descriptors, under their own numbers. ``memory_bytes`` and ``cpus``:
    what its control group may use, where it has one; 0: as much as there is. ``wrapped``: in gVisor's sandbox. Raises
    OSError if there is no process to be had, LocalError if it cannot be wrapped."""
    paths = json.dumps([os.path.abspath(path) for path in sys.path])
    environment = {**ENVIRONMENT, **{name: os.environ[name] for name in _KEPT if name in os.environ}}
    command = [sys.executable, "-I", "-S", "-c", program, paths, *map(str, arguments)]
    if wrapped:
        command, environment = gvisor.wrapped(command, environment, descriptors)
    process = _starter.submit(_start, command, environment, list(descriptors), memory_bytes, cpus).result()
    process.wrapped = wrapped
    return process


def _start(
    command: list[str], environment: dict[str, str], descriptors: list[int], memory_bytes: int, cpus: int
) -> Process:
    process = Process(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=descriptors,
        cwd="/",
    )
    process.group = cgroups.join(process.pid, memory_bytes, cpus)
    return process
