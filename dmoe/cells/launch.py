"""How a walled process is started: by exec, isolated, with an environment of its own.

Owns: the interpreter's command line and environment. Does not own: what runs then and how it walls itself in
(``sandbox``), what is said to it.

Invariants:
1. Nothing of the parent's environment is passed on (an interpreter that was built beside its libraries is told where
   they are), no user's folder, no site; the parent's import path is.
2. It gets the descriptors that are named, and no others; input and outputs are /dev/null.
3. One thread starts them all and lives as long as this process: walled processes end with the *thread* that started
   them, by a signal of the kernel, and other threads may end at any time.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

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


def boot(module: str) -> str:
    """What the interpreter runs: the module's ``main`` with the arguments."""
    return f"import sys, json; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main(sys.argv[2:])"


def start(program: str, arguments: Sequence[object], descriptors: Sequence[int]) -> "subprocess.Popen[bytes]":
    """Start ``program`` (:func:`boot`) with these descriptors, under their own numbers. Raises OSError if there is no
    process to be had."""
    paths = json.dumps([os.path.abspath(path) for path in sys.path])
    return _starter.submit(
        subprocess.Popen,
        [sys.executable, "-I", "-S", "-c", program, paths, *map(str, arguments)],
        env={**ENVIRONMENT, **{name: os.environ[name] for name in _KEPT if name in os.environ}},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=list(descriptors),
        cwd="/",
    ).result()
