"""libp2p's Noise session and yamux connection, made quick: the bottom of every libp2p stream we use.

py-libp2p passes each byte through five layers with a lock, a log line and a scheduler turn each. Here one session owns
the socket after the Noise handshake: it reads with one system call for whatever arrived, decrypts in place, and hands
the data of *claimed* streams (our RPC) straight to their channel, without waking a task in between. Everything else
goes to py-libp2p's own yamux logic, unchanged.

Invariants:
1. Bytes reach the socket in the order in which they were encrypted; nobody but the session writes to it after the
   handshake. A cancelled writer leaves nothing half-written: data is queued whole before anybody waits.
2. What waits to be sent is bounded: writers wait above :data:`BACKLOG_BYTES`; a peer that reads nothing for
   :data:`STALL_SECONDS`, or lets :data:`OVERFLOW_BYTES` pile up, loses its connection.
3. A claimed stream keeps yamux's flow control: windows are respected and granted. A peer that sends past the window it
   was granted, on any stream, loses its connection.
4. A peer that opens streams without end loses its connection and is blamed: :data:`STREAMS_MAX` may be open,
   :data:`STREAMS_PER_SECOND` may come. What it may leave unread in them is bounded by that.

The handshake before it stands in ``noise``.
"""

import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from struct import Struct
from typing import Any, Protocol

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import IMuxedConn, IRawConnection, ISecureConn
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux import yamux as yamux_module
from libp2p.stream_muxer.yamux.yamux import DEFAULT_WINDOW_SIZE, Yamux

from config.vocabulary import PeerId
from p2p.core.buckets import Bucket
from p2p.core.doors import Refusal
from p2p.doors import Doors
from p2p.networks import peer_host

BACKLOG_BYTES = 1 << 20
OVERFLOW_BYTES = 256 << 20
STALL_SECONDS = 20.0
RECEIVE_BYTES = 256 << 10
STREAMS_MAX = 128
STREAMS_PER_SECOND, STREAMS_BURST = 50.0, 200.0
READS_PER_TURN = 16
"""Reads after which other tasks get a turn, however much data waits."""

NOISE_PLAIN_MAX = 65535 - 16
YAMUX_HEAD = Struct("!BBHII")
_NONCE = Struct("<4xQ")
PAYLOAD_MAX = NOISE_PLAIN_MAX - YAMUX_HEAD.size
DATA, WINDOW_UPDATE, _SYN, _FIN, _RST = 0, 1, 1, 4, 8
_IOV_MAX = 512

# one yamux frame then fits one Noise message
yamux_module.MAX_MESSAGE_SIZE = NOISE_PLAIN_MAX

Buffer = bytes | bytearray | memoryview
Spawn = Callable[[Callable[[], Awaitable[None]]], None]


class Sink(Protocol):
    """Where the data of a claimed stream goes. Called in the connection's reader; must not raise or block."""

    def on_data(self, data: memoryview) -> None:
        """The next bytes."""

    def on_window(self, increment: int) -> None:
        """The peer can take that many bytes more."""

    def on_closed(self) -> None:
        """The stream or its connection ended. Called once."""


class Door(Protocol):
    """What a session needs of ``p2p/front.Front``."""

    @property
    def doors(self) -> Doors:
        """Whom to blame."""

    def proven(self, socket: trio.socket.SocketType) -> None:
        """The handshake on an accepted socket succeeded, whether the peer may stay or not."""

    def known(self, socket: trio.socket.SocketType, peer_id: PeerId) -> bool:
        """The handshake on an accepted socket proved who it is: whether that peer may stay."""

    def dialled(self, socket: trio.socket.SocketType, peer_id: PeerId, close: Callable[[], None]) -> bool:
        """A dialled socket leads to this peer: whether it may stay; how to hang up on it."""

    def ended(self, socket: trio.socket.SocketType) -> None:
        """A session and its socket are over."""


class Session(SecureSession):
    """A Noise session that owns its socket."""

    def __init__(self, plain: SecureSession, raw: IRawConnection, spawn: Spawn, door: Door) -> None:
        super().__init__(
            local_peer=plain.local_peer,
            local_private_key=plain.local_private_key,
            remote_peer=plain.remote_peer,
            remote_permanent_pubkey=plain.remote_permanent_pubkey,
            is_initiator=plain.is_initiator,
            conn=plain.conn,
        )
        noise: Any = plain.conn
        protocol = noise.noise_state.noise_protocol
        sending, receiving = protocol.cipher_state_encrypt, protocol.cipher_state_decrypt
        self._encrypt = ChaCha20Poly1305(sending.k).encrypt
        self._decrypt = ChaCha20Poly1305(receiving.k).decrypt
        self._sent, self._received = sending.n, receiving.n
        stream: Any = raw
        self._socket: trio.socket.SocketType = stream.stream.stream.socket
        self.host = peer_host(self._socket)
        self._spawn = spawn
        self._door = door
        self._claims: dict[int, Sink] = {}
        self.framed = False
        self.window_of: Callable[[int], int] = lambda stream_id: DEFAULT_WINDOW_SIZE
        """What the peer may still send on a stream that yamux handles."""
        self.streams_open: Callable[[], int] = lambda: 0
        self._streams_rate = Bucket(STREAMS_PER_SECOND, STREAMS_BURST)
        self._closed = False
        # receiving: ciphertext ring and the plaintext of the current message
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._start = self._end = self._reads = 0
        self._empty = False  # whether the last read took all there was
        self._message = b""
        self._at = 0
        # sending: what the socket did not take at once
        self._upload, self._download = door.doors.paces
        self._outbox: deque[memoryview] = deque()
        self._backlog = 0
        self._drained = trio.Event()

    def allowed(self) -> bool:
        """Whether the doors let a session that this node dialled be."""
        return self._door.dialled(self._socket, PeerId(str(self.remote_peer)), self.fail)

    # -- receiving

    async def read(self, n: int | None = None) -> bytes:
        """Up to ``n`` bytes; once yamux runs, the next frame header that is not for a claimed stream."""
        if self.framed:
            return await self._next_header()
        if n == 0:
            return b""
        await self._more()
        return self._piece(n if n is not None else NOISE_PLAIN_MAX)

    async def read_exactly(self, n: int) -> bytes:
        """Exactly ``n`` bytes of the plaintext stream."""
        await self._more()
        if len(self._message) - self._at >= n:
            return self._piece(n)
        parts = []
        while n:
            await self._more()
            part = self._piece(n)
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def _piece(self, n: int) -> bytes:
        if self._at == 0 and n >= len(self._message):
            part, self._message = self._message, b""
        else:
            part = self._message[self._at : self._at + n]
            self._at += len(part)
        if self._at >= len(self._message):
            self._message, self._at = b"", 0
        return part

    async def _more(self) -> None:
        """Make sure that there is plaintext."""
        while self._at >= len(self._message):
            self._message, self._at = await self._next_message(), 0

    async def _next_message(self) -> bytes:
        while True:
            have = self._end - self._start
            if have >= 2:
                start = self._start + 2
                end = start + int.from_bytes(self._buffer[start - 2 : start], "big")
                if end <= self._end:
                    try:
                        plain = self._decrypt(_NONCE.pack(self._received), self._buffer[start:end], None)
                    except InvalidTag:
                        raise ConnectionClosedError("the peer sent bytes that do not decrypt") from None
                    self._received += 1
                    self._start = end
                    return plain
            await self._receive()

    async def _receive(self) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end > RECEIVE_BYTES // 2:
            rest = bytes(self._buffer[self._start : self._end])
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        if self._download is None:
            room = (self._buffer[self._end :],)
        else:
            await self._download.room()
            room = (self._buffer[self._end : self._end + self._download.piece],)
        self._reads += 1
        if self._reads % READS_PER_TURN == 0:
            await trio.lowlevel.checkpoint()
        while True:
            try:
                if self._empty:
                    await trio.lowlevel.wait_readable(self._socket)
                count = os.readv(self._socket.fileno(), room)
                break
            except BlockingIOError:
                self._empty, self._reads = True, 0
            except (OSError, trio.ClosedResourceError) as error:
                raise ConnectionClosedError(f"connection lost: {error}") from error
        self._empty = count < len(room[0])
        if count == 0:
            raise ConnectionClosedError("connection closed by the peer")
        self._end += count
        if self._download is not None:
            self._download.used(count)

    async def _next_header(self) -> bytes:
        while True:
            await self._more()
            if len(self._message) - self._at >= 12:
                header = self._message[self._at : self._at + 12]
                self._at += 12
            else:
                header = await self.read_exactly(12)
            _, kind, flags, stream_id, length = YAMUX_HEAD.unpack(header)
            sink = self._claims.get(stream_id)
            if sink is None or kind > WINDOW_UPDATE:
                if kind == DATA and length > self.window_of(stream_id):
                    raise self._break("window", "the peer sends more than its window allows")
                if flags & _SYN and kind <= WINDOW_UPDATE:
                    self._check_streams()
                return header
            if kind == WINDOW_UPDATE:
                sink.on_window(length)
            else:
                await self._deliver(sink, length)
            if flags:
                if flags & (_FIN | _RST):
                    self.release(stream_id)
                return YAMUX_HEAD.pack(0, WINDOW_UPDATE, flags, stream_id, 0)

    def _check_streams(self) -> None:
        """One more stream comes."""
        if self.streams_open() >= STREAMS_MAX:
            raise self._break("streams_per_connection", f"more than {STREAMS_MAX} streams are open")
        if not self._streams_rate.take(1, trio.current_time()):
            raise self._break("streams_per_second_per_connection", "streams come too fast")

    def _break(self, limit: str, text: str) -> ConnectionClosedError:
        """A peer goes over a limit that every implementation keeps: the end of its connection."""
        peer_id = PeerId(str(self.remote_peer))
        self._door.doors.refused(Refusal(limit, text), peer_id)
        self._door.doors.blame(peer_id, "flood", text)
        return ConnectionClosedError(text)

    async def _deliver(self, sink: Sink, length: int) -> None:
        while length:
            await self._more()
            count = min(length, len(self._message) - self._at)
            sink.on_data(memoryview(self._message)[self._at : self._at + count])
            self._at += count
            length -= count

    def claim(self, stream_id: int, sink: Sink) -> None:
        """From now on the data of this stream goes to ``sink``."""
        self._claims[stream_id] = sink

    def release(self, stream_id: int) -> None:
        """The stream ended."""
        sink = self._claims.pop(stream_id, None)
        if sink is not None:
            sink.on_closed()

    # -- sending

    async def write(self, data: bytes) -> None:
        """Queue ``data`` whole, then wait while the backlog is too long."""
        self.push([data] if len(data) <= NOISE_PLAIN_MAX else _cut(data, NOISE_PLAIN_MAX))
        await trio.lowlevel.checkpoint()
        await self.drain()

    def push(self, messages: Sequence[Buffer]) -> None:
        """Encrypt and send each as one Noise message, now if the socket takes it.

        Each is sent before the next is encrypted: the peer decrypts one while we encrypt the next.
        """
        if self._closed:
            raise ConnectionClosedError("the connection is closed")
        if self._backlog > OVERFLOW_BYTES:
            self.fail()
            raise ConnectionClosedError("the peer does not read what it asks for")
        for message in messages:
            sealed = self._encrypt(_NONCE.pack(self._sent), message, None)
            self._sent += 1
            size = len(sealed).to_bytes(2, "big")
            if self._outbox:
                self._queue(size, sealed)
                continue
            if self._upload is not None and self._upload.wait_s():
                self._spawn(self._flush)
                self._queue(size, sealed)
                continue
            written = self._write_some((size, sealed))
            if self._upload is not None:
                self._upload.used(written)
            if written < len(sealed) + 2:
                self._spawn(self._flush)
                self._queue(size[written:], sealed[max(0, written - 2) :])

    def _queue(self, *parts: bytes) -> None:
        for part in parts:
            if part:
                self._outbox.append(memoryview(part))
                self._backlog += len(part)

    def _write_some(self, parts: Sequence[Buffer]) -> int:
        try:
            return os.writev(self._socket.fileno(), parts)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.fail()
            raise ConnectionClosedError(f"connection lost: {error}") from error

    async def _flush(self) -> None:
        """The writer: runs while the socket is full."""
        while self._outbox and not self._closed:
            if self._upload is not None:
                await self._upload.room()
                if self._closed:
                    return
            with trio.move_on_after(STALL_SECONDS) as stalled:
                try:
                    await trio.lowlevel.wait_writable(self._socket)
                except (OSError, trio.ClosedResourceError):
                    self.fail()
                    return
            if stalled.cancelled_caught:
                self.fail()
                return
            try:
                count = self._write_some(self._next_parts())
            except ConnectionClosedError:
                return
            self._backlog -= count
            if self._upload is not None:
                self._upload.used(count)
            while count:
                first = self._outbox[0]
                if count < len(first):
                    self._outbox[0] = first[count:]
                    break
                count -= len(first)
                self._outbox.popleft()
            if self._backlog <= BACKLOG_BYTES:
                self._wake()

    def _next_parts(self) -> list[memoryview]:
        """What to write next; with a limit on bandwidth no more than a piece."""
        parts = list(islice(self._outbox, _IOV_MAX))
        if self._upload is None:
            return parts
        left, chosen = self._upload.piece, []
        for part in parts:
            chosen.append(part[:left])
            left -= len(part)
            if left <= 0:
                break
        return chosen

    @property
    def congested(self) -> bool:
        """Whether writers should wait."""
        return self._backlog > BACKLOG_BYTES

    async def drain(self) -> None:
        """Wait while the backlog is too long."""
        while self._backlog > BACKLOG_BYTES and not self._closed:
            await self._drained.wait()

    def _wake(self) -> None:
        event, self._drained = self._drained, trio.Event()
        event.set()

    def fail(self) -> None:
        """The connection is broken: nothing more is sent, everybody who waits learns it. yamux tidies up."""
        if not self._closed:
            self._closed = True
            self._outbox.clear()
            self._backlog = 0
            self._wake()
            for stream_id in list(self._claims):
                self.release(stream_id)
            self._socket.close()
            self._door.ended(self._socket)

    async def close(self) -> None:
        """Close the connection."""
        self.fail()
        await self.conn.close()


class Connection(Yamux):
    """yamux over a :class:`Session`: no log lines, no cancelled writes."""

    async def start(self) -> None:
        """Run the connection."""
        session: Any = self.secured_conn
        session.framed = True
        session.window_of = self._window_of
        session.streams_open = lambda: len(self.streams)
        await super().start()

    def _window_of(self, stream_id: int) -> int:
        stream = self.streams.get(stream_id)
        return DEFAULT_WINDOW_SIZE if stream is None else max(0, int(stream.recv_window))

    async def _write_frame(self, data: bytes) -> None:
        await self.secured_conn.write(data)

    async def _read_data_body(self, length: int) -> bytes:
        session: Any = self.secured_conn
        with trio.fail_after(60):
            data: bytes = await session.read_exactly(length)
            return data


class Muxer(MuxerMultistream):
    """Offers yamux only and makes :class:`Connection`."""

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Agree on yamux over a fresh session."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        connection = Connection(conn, peer_id, is_initiator=conn.is_initiator)
        return self._annotate_connection(connection, conn, protocol)


def _cut(data: Buffer, size: int) -> list[Buffer]:
    view = memoryview(data)
    return [view[at : at + size] for at in range(0, len(view), size)]
