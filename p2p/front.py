"""The one listening port: admits every socket, looks at its first byte and passes it on.

Owns: which protocol an accepted socket speaks, how long it may take to say so. Does not own: any protocol; who may come
in, and how many may be undecided (``doors``).

A socket that begins with multistream's length byte goes to libp2p. One that begins with :data:`MAGIC` says what it
wants in an 8-byte preamble (magic, version u8, kind u8, number u16; big-endian) and goes to the handler of that kind.
One of another version, or of a kind that nobody takes here, is answered with this node's own preamble of kind 0: the
peer learns which version to speak, and is not blamed for asking.

Invariants:
1. Nothing is read from a socket that the doors did not admit; a socket says what it is within :data:`PEEK_SECONDS`.
2. Every visit is left exactly once, when its socket is done, however that came.
"""

import logging
import socket as plain_socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct
from weakref import WeakKeyDictionary

import trio

from config.vocabulary import PeerId
from p2p.doors import Doors, Visit
from p2p.sieve import unfiltered

log = logging.getLogger(__name__)

PEEK_SECONDS = 10.0
MULTISTREAM = 0x13
MAGIC = b"rios"
VERSION = 1
PREAMBLE = Struct("!4sBBH")
REFUSED, LANE, SPLICE, PROBE = 0, 1, 2, 3
"""Kinds: the answer to what is not spoken here; the handshake of a direct lane; the way through a relay (its token
follows, then what the ends say to each other); a dial-back (the secret of the question follows)."""
_LIBP2P, _UNKNOWN = 0, -1
LIBP2P_COST = 4.0
"""What a connection of libp2p costs to set up, in handshakes of a lane."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A socket whose preamble has been read. Its handler returns when the socket is done; it is closed then."""

    socket: trio.socket.SocketType
    visit: Visit
    number: int
    host: str


Handler = Callable[[Arrival], Awaitable[None]]


class Front:
    """Sorts accepted sockets."""

    def __init__(self, doors: Doors) -> None:
        self.doors = doors
        self.strange = 0
        """Sockets that spoke no protocol of ours, or none in time."""
        self.refused = 0
        """Preambles of versions and kinds that are not spoken here."""
        self._handlers: dict[int, Handler] = {}
        self._visits: WeakKeyDictionary[trio.socket.SocketType, tuple[Visit, Callable[[], None]]] = WeakKeyDictionary()
        """Of libp2p's sockets, and what ends their task here."""

    def accept(self, kind: int, handler: Handler) -> None:
        """Give sockets whose preamble names ``kind`` to ``handler``."""
        assert kind not in self._handlers, f"kind {kind} is taken"
        self._handlers[kind] = handler

    async def receive(self, socket: trio.socket.SocketType, libp2p: Callable[[], Awaitable[None]]) -> None:
        """See an accepted socket through. The caller closes it when this returns."""
        try:
            host = str(socket.getpeername()[0])
        except OSError:
            return  # gone already
        if self.doors.sieve.times:
            unfiltered(socket)
        visit = self.doors.enter(host)
        if visit is None:
            return
        with trio.CancelScope() as scope:
            visit.on_hang_up(scope.cancel)
            try:
                await self._sort(socket, visit, host, libp2p)
            except Exception:
                log.exception("a connection from %s ends: a fault in its handler", host)
            finally:
                visit.leave()

    async def _sort(
        self, socket: trio.socket.SocketType, visit: Visit, host: str, libp2p: Callable[[], Awaitable[None]]
    ) -> None:
        preamble = await self._ask(socket)
        if preamble is None:
            self.strange += 1
            visit.blame("handshake")
            log.debug("a socket from %s said nothing we know", host)
        elif preamble[0] == _UNKNOWN:
            self.refused += 1
            with suppress(OSError):
                await socket.send(PREAMBLE.pack(MAGIC, VERSION, REFUSED, 0))
        elif preamble[0] == _LIBP2P:
            with trio.CancelScope() as scope:
                self._visits[socket] = visit, scope.cancel
                if await visit.turn(LIBP2P_COST):
                    await libp2p()
            if not visit.proven and not visit.hung_up:
                visit.blame("handshake")
        else:
            try:
                if preamble[0] != LANE or await visit.turn(1):
                    await self._handlers[preamble[0]](Arrival(socket, visit, preamble[1], host))
            except OSError as error:
                log.debug("a socket from %s broke: %s", host, error)

    async def _ask(self, socket: trio.socket.SocketType) -> tuple[int, int] | None:
        """Kind and number of the preamble (or ``_LIBP2P``, ``_UNKNOWN``), or None."""
        with trio.move_on_after(PEEK_SECONDS):
            try:
                first = await socket.recv(1, plain_socket.MSG_PEEK)
                if first and first[0] == MULTISTREAM:
                    return _LIBP2P, 0
                return await self._preamble(socket) if first == MAGIC[:1] else None
            except OSError:
                return None
        return None

    async def _preamble(self, socket: trio.socket.SocketType) -> tuple[int, int] | None:
        data = b""
        while len(data) < PREAMBLE.size:
            part = await socket.recv(PREAMBLE.size - len(data))
            if not part:
                return None
            data += part
        magic, version, kind, number = PREAMBLE.unpack(data)
        if magic != MAGIC:
            return None
        return (kind, number) if version == VERSION and kind in self._handlers else (_UNKNOWN, 0)

    # -- libp2p's own handshake and its end happen in ``p2p/secure``

    def proven(self, socket: trio.socket.SocketType) -> None:
        """libp2p's handshake on an accepted socket succeeded: nobody is to blame for it, whoever it is."""
        visit = self._visits.get(socket)
        if visit is not None:
            visit[0].proven = True

    def known(self, socket: trio.socket.SocketType, peer_id: PeerId) -> bool:
        """libp2p's handshake on an accepted socket proved who it is: whether that peer may stay."""
        visit = self._visits.get(socket)
        return visit is None or visit[0].known(peer_id)

    def dialled(self, socket: trio.socket.SocketType, peer_id: PeerId, close: Callable[[], None]) -> bool:
        """libp2p dialled a peer: whether it may stay. ``close`` ends the connection when the doors want it."""
        try:
            host = str(socket.getpeername()[0])
        except OSError:
            return False  # gone already
        visit = self.doors.dialled(peer_id, host)
        if visit is None:
            return False
        visit.on_hang_up(close)
        self._visits[socket] = visit, visit.leave
        return True

    def ended(self, socket: trio.socket.SocketType) -> None:
        """libp2p's connection on this socket is over; the library itself would keep its task for ever."""
        visit = self._visits.pop(socket, None)
        if visit is not None:
            visit[1]()

    def statistics(self) -> dict[str, int]:
        """Numbers for people."""
        return {"strange": self.strange, "refused": self.refused}


def preamble(kind: int, number: int = 0) -> bytes:
    """What a dialled socket says first."""
    return PREAMBLE.pack(MAGIC, VERSION, kind, number)


async def hear(socket: trio.socket.SocketType) -> int:
    """The kind in the preamble of who is at the other end of a socket that this node dialled; 0 if there is none."""
    data = b""
    with trio.move_on_after(PEEK_SECONDS):
        try:
            while len(data) < PREAMBLE.size and (part := await socket.recv(PREAMBLE.size - len(data))):
                data += part
        except OSError as error:
            log.debug("no preamble: %s", error)
    if len(data) < PREAMBLE.size:
        return 0
    magic, version, kind, _ = PREAMBLE.unpack(data)
    return int(kind) if magic == MAGIC and version == VERSION else 0
