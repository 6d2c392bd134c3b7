"""What the processes for text, grammars and imports would do if a stranger got control of them, behind the product's
own walls. ``*_text``, ``*_grammars`` and so on are entries of their own, so that each can be booted."""

import ctypes
import json
import os
import signal
import time

import numpy as np

from tests.unit.dmoe.hostile_cell import DEEDS, tried

HOST = os.getppid()


def attempts():
    return {name: tried(do) for name, do in DEEDS.items()}


def spin():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    while True:
        pass


def bomb():
    kept = []
    while True:
        kept.append(np.ones(1 << 24, np.uint8))


def trace():
    ctypes.CDLL(None).ptrace(0, 0, 0, 0)


def execute():
    os.execv("/bin/true", ["true"])


def sleep():
    time.sleep(1000)


def report():
    return json.dumps(attempts())
