"""Direct lanes: dialled to a peer's addresses, accepted at the front door.

Owns: the way from an address or an accepted socket to a :class:`p2p.lane.Lane` with a proven peer. Does not own: which
peers are dialled, when; what a lane carries.

Invariants:
1. A lane comes to be only with the peer that was meant, and that neither side's doors keep out.
2. Each inbound handshake ends within its deadline; the doors bound how many are under way.
3. The caller of :meth:`Lanes.dial` gets RemoteError ``unavailable`` for every way in which it can fail.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from config.errors import IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from p2p import front
from p2p.core import addresses
from p2p.core.doors import Refusal
from p2p.doors import Visit
from p2p.front import Arrival, Front
from p2p.handshake import Keys, Secured, await_welcome, shake, welcome
from p2p.lane import Lane, Scratch, Spawn
from p2p.lanechannel import CLOSED_HERE

log = logging.getLogger(__name__)

PROTOCOL = "/rios/lane/1.0.0"
"""What an advert's ``lane`` says when its addresses take lanes of this version."""
CONNECT_SECONDS = 4.0
ADDRESSES_MAX = 4
NEXT_SECONDS = 1.0

Judge = Callable[[PeerId], str]
"""Why a peer that proved itself is refused all the same, or nothing."""
Serve = Callable[[Lane], Awaitable[None]]
"""Takes an accepted lane in; returns when it is over."""


class Lanes:
    """Makes lanes."""

    def __init__(
        self, keys: Keys, door: Front, spawn: Spawn, admits: Callable[[str], bool], *, frame_bytes_max: int
    ) -> None:
        self._keys = keys
        self._front = door
        self._spawn = spawn
        self._admits = admits
        self._scratch = Scratch()
        self._frame_bytes_max = frame_bytes_max
        self.refused = 0

    def accept(self, judge: Judge, serve: Serve) -> None:
        """Take inbound lanes in from now on."""

        async def handle(arrival: Arrival) -> None:
            try:
                lane = await self._receive(arrival, judge)
            except RiosError as error:
                self.refused += 1
                log.debug("a lane from %s came to nothing: %s", arrival.host, error)
                return
            await serve(lane)

        self._front.accept(front.LANE, handle)

    async def _receive(self, arrival: Arrival, judge: Judge) -> Lane:
        try:
            secured = await shake(arrival.socket, self._keys, initiator=False)
        except RiosError as error:
            arrival.visit.blame("handshake")
            if self._keys.psk and isinstance(error, IntegrityError):
                knocked = Refusal("swarm_key", "somebody without this swarm's key knocked")
                self._front.doors.refused(knocked, arrival.host)
            raise
        peer_id = secured.peer_id
        refusal = self._refusal(judge, peer_id)
        if not refusal and not arrival.visit.known(peer_id):
            refusal = "the doors keep this peer out"
        await welcome(arrival.socket, secured, refusal)
        if refusal:
            raise RemoteError("unavailable", f"{peer_id} was refused: {refusal}", peer_id=peer_id)
        return self._made(arrival.socket, secured, arrival.visit, outbound=False)

    def _refusal(self, judge: Judge, peer_id: PeerId) -> str:
        return judge(peer_id) if self._admits(peer_id) else "p2p.allow of this node does not list it"

    async def answer(self, socket: trio.socket.SocketType, peer_id: PeerId, host: str, judge: Judge) -> Lane:
        """The responder's part on a socket that this node dialled, and that leads to a peer that begins."""
        if await front.hear(socket) != front.LANE:
            raise RemoteError("unavailable", f"{peer_id} did not begin a lane", peer_id=peer_id)
        secured = await shake(socket, self._keys, initiator=False, expected=peer_id)
        refusal = self._refusal(judge, peer_id)
        visit = None if refusal else self._front.doors.dialled(peer_id, host)
        refusal = refusal or ("" if visit else "the doors keep this peer out")
        try:
            await welcome(socket, secured, refusal)
        except BaseException:
            if visit is not None:
                visit.leave()
            raise
        if visit is None:
            raise RemoteError("unavailable", f"{peer_id} was refused: {refusal}", peer_id=peer_id)
        return self._made(socket, secured, visit, outbound=False)

    def _made(self, socket: trio.socket.SocketType, secured: Secured, visit: Visit, *, outbound: bool) -> Lane:
        """The lane on a socket whose handshake is done."""
        return Lane(
            socket,
            secured,
            visit,
            self._scratch,
            self._front.doors.paces,
            outbound=outbound,
            spawn=self._spawn,
            frame_bytes_max=self._frame_bytes_max,
            blame=self._front.doors.blame,
        )

    async def dial(self, peer_id: PeerId, texts: Sequence[str]) -> Lane:
        """A lane to a peer at the first of these addresses (multiaddrs) that answers. The next one is tried as soon as
        one fails, or after :data:`NEXT_SECONDS`: an address that swallows everything hides none of the others."""
        problem = RemoteError("unavailable", f"no address of {peer_id} takes a lane", peer_id=peer_id)
        found: list[Lane] = []

        async def attempt(text: str, host: str, port: int, failed: trio.Event) -> None:
            nonlocal problem
            try:
                found.append(await self._dial(peer_id, host, port))
            except RiosError as error:
                problem = RemoteError("unavailable", f"lane to {text}: {error.message}", peer_id=peer_id)
                failed.set()
            else:
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                for text in texts[:ADDRESSES_MAX]:
                    address = addresses.parse(text)
                    if address is not None and not address.relay:
                        failed = trio.Event()
                        nursery.start_soon(attempt, text, address.host, address.port, failed)
                        with trio.move_on_after(NEXT_SECONDS):
                            await failed.wait()
        except BaseException:
            for lane in found:
                lane.fail(CLOSED_HERE)
            raise
        if not found:
            raise problem
        for lane in found[1:]:
            lane.fail(CLOSED_HERE)
        return found[0]

    async def _dial(self, peer_id: PeerId, host: str, port: int) -> Lane:
        socket = await connect(host, port)
        try:
            return await self.greet(socket, peer_id, host)
        except BaseException:
            socket.close()
            raise

    async def greet(self, socket: trio.socket.SocketType, peer_id: PeerId, host: str) -> Lane:
        """The initiator's part on a socket that leads to a peer, directly or through a splice at ``host``."""
        try:
            await socket.send(front.preamble(front.LANE))
        except OSError as error:
            raise RemoteError("unavailable", f"connection lost: {error.strerror or error}") from error
        secured = await shake(socket, self._keys, initiator=True, expected=peer_id)
        if not self._admits(peer_id):
            raise RemoteError("unavailable", f"p2p.allow of this node does not list {peer_id}", peer_id=peer_id)
        await await_welcome(socket, secured)
        visit = self._front.doors.dialled(peer_id, host)
        if visit is None:
            raise RemoteError("unavailable", f"{peer_id} is banned here", peer_id=peer_id)
        return self._made(socket, secured, visit, outbound=True)


async def connect(host: str, port: int) -> trio.socket.SocketType:
    """A TCP connection, without Nagle's delay. Raises RemoteError ``unavailable``."""
    with trio.move_on_after(CONNECT_SECONDS):
        try:
            stream = await trio.open_tcp_stream(host, port)
        except (OSError, UnicodeError) as error:  # the latter: a name that cannot be one
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise RemoteError("unavailable", f"{host}:{port}: {reason}") from error
        return (
            stream.socket
        )  # trio switched Nagle's delay off; doing it here would raise where the peer is gone already
    raise RemoteError("unavailable", f"{host}:{port}: no connection within {CONNECT_SECONDS:.0f} s")
