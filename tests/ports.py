"""Ports that a test's processes may listen on, known before they start."""

import itertools
import os
import socket

_FIRST, _COUNT = 10_000, 20_000
"""Below what the kernel hands out by itself (32768 and up), so that no connection takes one in between."""
_numbers = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """A port that nobody listens on; no other process that runs tests is given the same soon."""
    for number in _numbers:
        port = _FIRST + number % _COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError
