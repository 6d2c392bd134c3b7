"""Hole punching: two nodes behind routers dial each other at the same time, so that each router takes the other's
packets for answers.

Owns: the dial from the listening port, the agreement on when. Does not own: the relayed link over which it is agreed on
(``reach.punch``), the lane that is made of the socket.

The source port must be the one the router shows to the outside: the listening port, which routers keep where they can
(Linux masquerade does). Routers that give every connection another port cannot be passed this way.

Invariants:
1. Only the very host that the relay saw the other end come from is dialled, for :data:`PUNCH_S` at most, and for one
   peer once in :data:`AGAIN_S`.
"""

import logging
import socket as plain_socket
from collections.abc import Callable
from typing import Protocol

import trio

from config.errors import BusyError, IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from p2p.face import Call, Header, Reply
from p2p.guarded import Nursery

log = logging.getLogger(__name__)

PUNCH_S = 4.0
RETRY_S = 0.1
AGAIN_S = 20.0
ASK_MS = 5000
KEPT_MAX = 1024


class Ends(Protocol):
    """What is needed of links."""

    def far_host(self, peer_id: PeerId) -> str:
        """Where the relay of the only link to a peer saw that peer come from; empty if the link is direct."""

    async def adopt(
        self, socket: trio.socket.SocketType, peer_id: PeerId, relay: PeerId, far: str, *, initiator: bool
    ) -> None:
        """Make a link of a socket that leads to a peer; owns it from now on."""

    async def call(self, peer_id: PeerId, method: str, header: Header, *, deadline_ms: int) -> Reply:
        """Call one."""


class Punch:
    """Both parts."""

    def __init__(self, ends: Ends, nursery: Nursery, port: Callable[[], int]) -> None:
        self._ends = ends
        self._nursery = nursery
        self._port = port
        self._tried: dict[PeerId, float] = {}
        self.tried = self.opened = 0

    async def serve(self, call: Call) -> Reply:
        """``reach.punch``: the caller dials from now on; dial it, too."""
        await trio.lowlevel.checkpoint()
        port = call.header.get("port")
        if not isinstance(port, int) or not 0 < port < 65536:
            raise IntegrityError("protocol", "reach.punch: 'port' must be a TCP port")
        host = self._ends.far_host(call.peer_id)
        if not host:
            raise RemoteError("forbidden", "reach.punch is for relayed links")
        if not self._due(call.peer_id):
            raise BusyError("it was tried just now (limit: one hole punched per peer in 20 s)", retry_after_ms=20_000)
        self._nursery.start_soon(self._meet, call.peer_id, host, port, False)
        return Reply({"port": self._port()})

    async def to(self, peer_id: PeerId) -> bool:
        """Try to have a direct link beside a relayed one; whether there is one now."""
        host = self._ends.far_host(peer_id)
        if not host or not self._due(peer_id):
            return False
        try:
            answer = await self._ends.call(peer_id, "reach.punch", {"port": self._port()}, deadline_ms=ASK_MS)
        except RiosError as error:
            log.debug("no hole to %s: %s", peer_id, error)
            return False
        port = answer.header.get("port")
        return isinstance(port, int) and 0 < port < 65536 and await self._meet(peer_id, host, port, True)

    def _due(self, peer_id: PeerId) -> bool:
        now = trio.current_time()
        if self._tried.get(peer_id, float("-inf")) + AGAIN_S > now:
            return False
        self._tried.pop(peer_id, None)
        self._tried[peer_id] = now
        while len(self._tried) > KEPT_MAX:
            del self._tried[next(iter(self._tried))]
        return True

    async def _meet(self, peer_id: PeerId, host: str, port: int, initiator: bool) -> bool:
        self.tried += 1
        try:
            socket = await dial_through(self._port(), host, port)
            await self._ends.adopt(socket, peer_id, PeerId(""), "", initiator=initiator)
        except RiosError as error:
            log.debug("no hole to %s: %s", peer_id, error)
            return False
        self.opened += 1
        log.info("a direct way to %s was opened", peer_id)
        return True


async def dial_through(own_port: int, host: str, port: int) -> trio.socket.SocketType:
    """A connection from the listening port, tried again and again. Raises RemoteError ``unavailable``."""
    family = plain_socket.AF_INET6 if ":" in host else plain_socket.AF_INET
    problem: OSError | None = None
    with trio.move_on_after(PUNCH_S):
        while True:
            socket = trio.socket.socket(family, plain_socket.SOCK_STREAM)
            try:
                # the listener set both options as well
                socket.setsockopt(plain_socket.SOL_SOCKET, plain_socket.SO_REUSEADDR, 1)
                socket.setsockopt(plain_socket.SOL_SOCKET, plain_socket.SO_REUSEPORT, 1)
                socket.setsockopt(plain_socket.IPPROTO_TCP, plain_socket.TCP_NODELAY, 1)
                await socket.bind(("::" if ":" in host else "0.0.0.0", own_port))
                await socket.connect((host, port))
                return socket
            except OSError as error:
                problem = error
                socket.close()
            except BaseException:
                socket.close()
                raise
            await trio.sleep(RETRY_S)
    raise RemoteError("unavailable", f"{host}:{port} from port {own_port}: {problem or 'no answer'}")
