"""The way through a relay: two sockets that bear the same token become one, byte by byte.

Owns: pairing and copying at the relay, dialling at the ends. Does not own: who may have a circuit (``core.relay``),
what travels: the ends run the lane's handshake through it, so the relay sees ciphertext only.

An end says the front's preamble and its token. Once both are there the relay answers each with :data:`GO`, and from
then on passes on what it gets.

Invariants:
1. A socket without a valid token is closed within :data:`TOKEN_SECONDS`; one that waits for the other end too.
2. A circuit ends when an end closes, takes nothing for :data:`STALL_SECONDS`, or reaches a limit, which is counted
   under the setting's name.
"""

import logging
import socket as plain_socket

import trio

from config.errors import RemoteError
from config.vocabulary import PeerId
from p2p.core.buckets import Bucket
from p2p.core.relay import TOKEN_BYTES, TOKEN_S, Books, Circuit
from p2p.front import SPLICE, Arrival, preamble

log = logging.getLogger(__name__)

GO = b"\x01"
TOKEN_SECONDS = TOKEN_S
STALL_SECONDS = 30.0
COPY_BYTES = 128 << 10


class _Waiting:
    """The end that came first."""

    def __init__(self, socket: trio.socket.SocketType) -> None:
        self.socket = socket
        self.taken = trio.Event()
        self.done = trio.Event()
        self.gone = trio.CancelScope()
        """Ends the circuit when this end's socket is about to be closed."""


class Splicer:
    """The relay's part."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._waiting: dict[int, _Waiting] = {}
        self._ends: dict[PeerId, set[trio.CancelScope]] = {}
        rate = books.limits.relay_bytes_per_second_max
        self._rate = Bucket(rate, max(rate / 4, COPY_BYTES))

    async def serve(self, arrival: Arrival) -> None:
        """See one end's socket through (a handler of the front)."""
        token = b""
        with trio.move_on_after(TOKEN_SECONDS):
            while len(token) < TOKEN_BYTES:
                part = await arrival.socket.recv(TOKEN_BYTES - len(token))
                if not part:
                    return
                token += part
        found = self._books.arrive(token, trio.current_time())
        if found is None:  # nobody is to blame: over a bad line a token comes too late
            log.debug("%s came with a token that opens nothing", arrival.host)
            return
        circuit, peer_id = found
        arrival.visit.leave()  # from here on it is a circuit, and counts by the limits of those
        with trio.CancelScope() as scope:
            self._ends.setdefault(peer_id, set()).add(scope)
            try:
                if circuit.tokens:
                    await self._wait(circuit, arrival.socket)
                else:
                    await self._join(circuit, arrival.socket)
            finally:
                self._forget(peer_id, scope)

    def _forget(self, peer_id: PeerId, scope: trio.CancelScope) -> None:
        scopes = self._ends.get(peer_id, set())
        scopes.discard(scope)
        if not scopes:
            self._ends.pop(peer_id, None)

    def end(self, peer_id: PeerId) -> None:
        """Close every circuit of a peer: it is banned."""
        for scope in list(self._ends.get(peer_id, ())):
            scope.cancel()

    async def _wait(self, circuit: Circuit, socket: trio.socket.SocketType) -> None:
        waiting = self._waiting[circuit.number] = _Waiting(socket)
        try:
            with trio.move_on_after(TOKEN_SECONDS):
                await waiting.taken.wait()
            if waiting.taken.is_set():
                await waiting.done.wait()
        finally:
            waiting.gone.cancel()
            if self._waiting.pop(circuit.number, None) is not None:
                self._books.close(circuit)

    async def _join(self, circuit: Circuit, socket: trio.socket.SocketType) -> None:
        first = self._waiting.pop(circuit.number, None)
        if first is None:
            return
        first.taken.set()
        try:
            for each in (first.socket, socket):
                each.setsockopt(plain_socket.IPPROTO_TCP, plain_socket.TCP_NODELAY, 1)
                await each.send(GO)
            with trio.CancelScope(deadline=circuit.expires) as scope, first.gone:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._copy, circuit, first.socket, socket, nursery.cancel_scope)
                    nursery.start_soon(self._copy, circuit, socket, first.socket, nursery.cancel_scope)
            if scope.cancelled_caught:
                self._books.refuse("relay_circuit_seconds_max")
        except OSError as error:
            log.debug("a circuit broke: %s", error)
        finally:
            first.done.set()
            self._books.close(circuit)

    async def _copy(
        self,
        circuit: Circuit,
        source: trio.socket.SocketType,
        sink: trio.socket.SocketType,
        end: trio.CancelScope,
    ) -> None:
        """One direction, until either end is done; then the other direction is done, too."""
        room = memoryview(bytearray(COPY_BYTES))
        try:
            while count := await source.recv_into(room):
                circuit.left_bytes -= count
                if circuit.left_bytes < 0:
                    self._books.refuse("relay_circuit_bytes_max")
                    return
                self._books.passed_bytes += count
                wait_s = self._rate.spend(count, trio.current_time())
                if wait_s:
                    await trio.sleep(wait_s)
                with trio.fail_after(STALL_SECONDS):
                    rest = room[:count]
                    while rest:
                        rest = rest[await sink.send(rest) :]
        except (OSError, trio.TooSlowError) as error:
            log.debug("a circuit broke: %s", error)
        finally:
            end.cancel()


async def enter(host: str, port: int, token: bytes, relay: PeerId) -> trio.socket.SocketType:
    """An end's way in: a socket to the other end. Raises RemoteError ``unavailable``."""
    family = plain_socket.AF_INET6 if ":" in host else plain_socket.AF_INET
    socket = trio.socket.socket(family, plain_socket.SOCK_STREAM)
    try:
        with trio.fail_after(TOKEN_SECONDS):
            socket.setsockopt(plain_socket.IPPROTO_TCP, plain_socket.TCP_NODELAY, 1)
            await socket.connect((host, port))
            await socket.send(preamble(SPLICE) + token)
            if await socket.recv(1) != GO:
                raise RemoteError("unavailable", f"the relay {relay} did not join the ends", peer_id=relay)
    except (OSError, UnicodeError, trio.TooSlowError) as error:
        socket.close()
        message = f"through the relay {relay} at {host}:{port}: {error or 'the other end did not come'}"
        raise RemoteError("unavailable", message, peer_id=relay) from error
    except BaseException:
        socket.close()
        raise
    return socket
