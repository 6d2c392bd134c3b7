"""A cell's program that does harm when it is asked to: what a stranger's code would do if it got control of a cell.

It stands behind the product's own walls. What to do is the first number of a call's rows; 0 is an honest call.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from dmoe.cells import launch, program

HONEST, ATTEMPTS, LOOP, BOMB, LEAVE, CRASH, EXEC, TRACE, SCRIBBLE, RING, NAN, LIE = range(12)
SHARED_BOMB, MINE, DEAF, LONG = range(12, 16)
BOOT = launch.boot("tests.unit.dmoe.hostile_cell")


def _fork():
    if os.fork() == 0:
        os._exit(0)


def _executable_memory():
    import mmap

    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


def _limits():
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))


def _raw(number, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")


DEEDS = {
    "open": lambda: Path("/etc/passwd").read_text(),
    "write": lambda: Path("/tmp/rios-cell-was-here").write_text("x"),
    "environ": lambda: Path("/proc/self/environ").read_bytes(),
    "parent": lambda: Path(f"/proc/{os.getppid()}/mem").read_bytes(),
    "list": lambda: os.listdir("/"),
    "stat": lambda: os.stat("/etc/passwd"),
    "unlink": lambda: os.unlink("/tmp/rios-cell-was-here"),
    "tcp": lambda: socket.socket(),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "pair": socket.socketpair,
    "fork": _fork,
    "spawn": lambda: subprocess.run(["/bin/true"], check=False),
    "kill": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "kill itself": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "memfd": lambda: os.memfd_create("x"),
    "executable memory": _executable_memory,
    "limits": _limits,
    "priority": lambda: os.nice(-5),
    "user": lambda: os.setuid(0),
    "raw open": lambda: _raw(257, -100, b"/etc/passwd", 0),
}


class Hostile(program.ExpertsInside):
    """Experts, and worse."""

    def ready(self, lane, numbers, shards):
        return None

    def answer(self, lane, numbers, shards):
        _, rows, width, _ = numbers[:4]
        deed = int(np.frombuffer(lane.asked, np.float32, 1)[0])
        if deed == HONEST:
            super().answer(lane, numbers, shards)
        elif deed == ATTEMPTS:
            lane.fail(json.dumps({name: tried(do) for name, do in DEEDS.items()}))
        elif deed == LOOP:
            while True:
                pass
        elif deed == BOMB:
            kept = []
            while True:
                kept.append(np.ones(1 << 24, np.uint8))
        elif deed == SHARED_BOMB:
            import mmap

            mmap.mmap(-1, 1 << 20)
        elif deed == LEAVE:
            os._exit(3)
        elif deed == CRASH:
            ctypes.string_at(0)
        elif deed == EXEC:
            os.execv("/bin/true", ["true"])
        elif deed == TRACE:
            ctypes.CDLL(None).ptrace(0, 0, 0, 0)
        elif deed == SCRIBBLE:
            threading.Thread(target=_scribble, args=[lane], daemon=True).start()
            super().answer(lane, numbers, shards)
        elif deed == MINE:
            threading.Thread(target=_mine, daemon=True).start()
            super().answer(lane, numbers, shards)
        elif deed == LONG:
            end = time.process_time() + 2.5
            while time.process_time() < end:
                pass
            super().answer(lane, numbers, shards)
        elif deed == RING:
            for _ in range(200):
                lane._bell.send(b"\0" * 8)
        elif deed == DEAF:
            _answer_unheard(lane, rows, width)
        elif deed == NAN:
            lane.give(np.full((rows, width), np.nan, np.float32))
        elif deed == LIE:
            lane.reply(2, 1 << 40, -1, 1 << 62)
        else:
            raise RuntimeError(f"no such deed: {deed}")


class Mortal(program.ExpertsInside):
    """Ends its cell while it is loaded."""

    def __init__(self, *_):
        os._exit(7)


def _scribble(lane):
    whole = np.frombuffer(lane._memory, np.uint8)
    random = np.random.default_rng(0)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        whole[: 1 << 20] = random.integers(0, 255, 1 << 20, np.uint8)


def _answer_unheard(lane, rows, width):
    """Answer every call from now on, and never take a bell out of the socket."""
    while True:
        lane.give(np.zeros((rows, width), np.float32))
        while lane._asked_rang[0] == lane._number:
            time.sleep(0)
        lane._number = lane._asked_rang[0]


def _mine():
    while True:
        pass


def tried(do):
    try:
        do()
    except Exception as error:  # noqa: BLE001 - its name is the result
        return type(error).__name__
    return "DID"


def main(arguments):
    program.main(arguments, {"expert": Hostile})


def main_mortal(arguments):
    program.main(arguments, {"expert": Mortal})


if __name__ == "__main__":
    main(sys.argv[1:])
