"""The sieve of a listening socket: the kernel drops what shunned sources send it, before a connection comes to be.

Owns: the sockets' filters and the clock. Does not own: who is shunned (``core/sieve``), why a connection was refused.
Where the kernel has no such filters (other systems than Linux, some sandboxes) nobody is shunned.

Invariant: while :meth:`Sieve.run` runs, nobody is kept out for longer than ``core/sieve`` says.
"""

import ctypes
import logging
import socket as plain_socket
import sys
from contextlib import suppress
from struct import pack

import trio

from p2p.core.sieve import INSTRUCTION, Shunned, program

log = logging.getLogger("rios.security.doors")

_ATTACH, _DETACH = 26, 27
"""``SO_ATTACH_FILTER``, ``SO_DETACH_FILTER``."""

TOLD_SECONDS = 10.0
"""The log tells of one that is shunned at most so often."""


class Sieve:
    """Of the listening sockets that it is given."""

    def __init__(self) -> None:
        self._shunned = Shunned()
        self._sockets: list[trio.socket.SocketType] = []
        self._changed = trio.Event()
        self._told_at = float("-inf")
        self.times = 0
        """How often a source was shunned."""

    def watch(self, socket: trio.socket.SocketType) -> None:
        """Keep this one's sources out, too."""
        self._sockets.append(socket)

    def refuse(self, host: str) -> bool:
        """A connection from this IP address was refused; whether it is shunned from now on."""
        now = trio.current_time()
        if not self._sockets or not self._shunned.refuse(host, now):
            return False
        self.times += 1
        self._apply()
        self._changed.set()
        if now - self._told_at >= TOLD_SECONDS:
            self._told_at = now
            log.warning("%s is not listened to for some seconds: it goes on connecting although refused", host)
        return True

    async def run(self) -> None:
        """Listen again to those whose time is over, forever."""
        while True:
            self._changed = trio.Event()
            with trio.move_on_at(self._shunned.next_end()) as waiting:
                await self._changed.wait()
            if waiting.cancelled_caught:
                self._apply()

    def _apply(self) -> None:
        hosts = self._shunned.out(trio.current_time())
        instructions = program(hosts) if hosts else b""
        for socket in list(self._sockets):
            try:
                _filter(socket, instructions)
            except OSError as error:  # closed, or no such filters here, or no memory for this one
                log.debug("a listener without a sieve: %s", error)
                unfiltered(socket)  # the old one would keep somebody out for ever
                if socket.fileno() < 0:
                    self._sockets.remove(socket)


def unfiltered(socket: trio.socket.SocketType) -> None:
    """An accepted socket inherits its listener's filter as it was: it must not lose its own peer by that."""
    if sys.platform == "linux":
        try:
            _filter(socket, b"")
        except OSError as error:  # gone already
            log.debug("its filter stays: %s", error)


def _filter(socket: trio.socket.SocketType, instructions: bytes) -> None:
    if sys.platform != "linux":
        raise OSError("this system has no socket filters")
    if not instructions:
        with suppress(FileNotFoundError):  # it had none
            socket.setsockopt(plain_socket.SOL_SOCKET, _DETACH, 0)
        return
    kept = ctypes.create_string_buffer(instructions, len(instructions))
    told = pack("@HP", len(instructions) // INSTRUCTION.size, ctypes.addressof(kept))
    socket.setsockopt(plain_socket.SOL_SOCKET, _ATTACH, told)
