"""The direct lane: encrypted records straight on one TCP socket, two channels in them, no multiplexer below.

A record is a 4-byte head (kind u8, length u24; big-endian) and that many bytes of ciphertext with its tag; the head is
authenticated with it, the nonce is the number of records sent before in this direction. The kinds:

====================  ==================================================================================
DATA + channel        the next bytes of the channel's stream of RPC frames
WINDOW + channel      u32: the peer may send that many bytes more on the channel
128 and above         nothing yet: decrypted, then ignored, so that a later version may send them
====================  ==================================================================================

Owns: the socket after the handshake, the order in which channels get it, flow control. Does not own: what the bytes
mean, who is dialled.

Invariants:
1. Records reach the socket in the order of their nonces. What is written is queued whole before anybody waits: a
   cancelled caller leaves nothing half-sent.
2. The main channel's frames go before the bulk channel's, an urgent frame before others of its channel that have not
   begun. What is sealed and waits is at most one record; what the kernel holds unsent is bounded as well.
3. What waits to be sent is bounded: senders wait above :data:`BACKLOG_BYTES`; a peer that takes nothing for
   :data:`STALL_SECONDS`, or lets :data:`OVERFLOW_BYTES` or :data:`WAITING_MAX` frames pile up, loses the lane.
4. A peer may have a window and one frame unconsumed on each channel; past that, or with a record that is too long, out
   of order, replayed or damaged, it loses the lane. No record is stored before its length was checked.
5. A key seals at most :data:`REKEY_BYTES`; both ends count, and go on with the next key.
"""

import logging
import os
import socket as plain_socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from struct import Struct
from time import perf_counter
from typing import Any

import trio
from cryptography.exceptions import InvalidTag

from config.vocabulary import PeerId
from p2p.carrier import Buffer
from p2p.doors import Visit
from p2p.handshake import Cipher, Secured
from p2p.networks import peer_host
from p2p.pace import Paces

log = logging.getLogger(__name__)

RECORD_BYTES_MAX = (256 << 10) + 4096
"""Plaintext in a record: a frame with a tensor of 256 KiB fits one. Measured: fewer, larger records are faster than a
pipeline of small ones, since a record more is a wake-up more."""
READ_BYTES = 1 << 20
READ_BYTES_MIN = 64 << 10
TURN_SECONDS = 0.004
"""What was read should be served in so long; else others get a turn, and less is read at once."""
IN_PLACE_BYTES = 8 << 10
"""Records from this size on are sealed into the shared buffer."""
READS_PER_TURN = 16
"""Reads after which other tasks get a turn, however much data waits."""
GATHER_SECONDS = 0.0001
"""A frame so soon after another, with nothing read between them, is one of many: those written in this turn of the
event loop share records."""
RECORDS_PER_TURN = 8
"""Records written before other tasks get a turn."""
WINDOW_BYTES = 4 << 20
URGENT_BYTES = 64 << 10
"""Urgent frames may run the window over by this much."""
BACKLOG_BYTES = 1 << 20
OVERFLOW_BYTES = 256 << 20
WAITING_MAX = 1 << 14
STALL_SECONDS = 20.0
UNSENT_BYTES = 128 << 10
ASIDE_BYTES = 4 << 20
"""Records that are no data may make up so much more than the data: no limit on calls or windows counts them."""
REKEY_BYTES = 1 << 35
"""AES-GCM stays far from its limits below 2**36 bytes of large records: RFC 8446, section 5.5."""

CLOSED_HERE = "closed here"

HEAD_BYTES, TAG_BYTES = 4, 16
DATA, WINDOW = 0, 2
MAIN, BULK = 0, 1
IGNORED = 128
_HEAD = Struct("!I")
_NONCE = Struct("<4xQ")
_U32 = Struct("!I")
_TCP_NOTSENT_LOWAT = 25

Spawn = Callable[[Callable[[], Awaitable[None]]], None]
_pack_head, _unpack_head, _pack_nonce = _HEAD.pack, _HEAD.unpack_from, _NONCE.pack


class _Key:
    """One direction's key: seals or opens record after record."""

    __slots__ = ("cipher", "number", "used")

    def __init__(self, cipher: Cipher) -> None:
        self.cipher = cipher
        self.number = 0
        self.used = 0

    def renew(self) -> None:
        """The next key, as in Noise's rekey: the first 32 bytes of zeros sealed with the last nonce but one."""
        made = self.cipher.encrypt(b"\xff" * 11 + b"\xfe", bytes(32), b"rekey")[:32]
        self.cipher, self.used = type(self.cipher)(made), 0

    def seal(self, kind: int, data: Buffer, room: memoryview) -> Buffer:
        """A record, head included; a large one lies in ``room`` and must be used before the next is made."""
        size = len(data)
        head = _pack_head(kind << 24 | size + TAG_BYTES)
        nonce = _pack_nonce(self.number)
        self.number += 1
        self.used += size
        if size < IN_PLACE_BYTES:
            record: Buffer = head + self.cipher.encrypt(nonce, data, head)
        else:
            end = HEAD_BYTES + size + TAG_BYTES
            room[:HEAD_BYTES] = head
            self.cipher.encrypt_into(nonce, data, head, room[HEAD_BYTES:end])
            record = room[:end]
        if self.used > REKEY_BYTES:
            self.renew()
        return record

    def open(self, record: memoryview) -> bytes:
        """The plaintext of a whole record. Raises InvalidTag."""
        plain = self.cipher.decrypt(_pack_nonce(self.number), record[HEAD_BYTES:], record[:HEAD_BYTES])
        self.number += 1
        self.used += len(plain)
        if self.used > REKEY_BYTES:
            self.renew()
        return plain


class Scratch:
    """Buffers that the lanes of a node share: none is in use across an ``await``."""

    def __init__(self) -> None:
        self.read = memoryview(bytearray(READ_BYTES))
        self.seal = memoryview(bytearray(HEAD_BYTES + RECORD_BYTES_MAX + TAG_BYTES))


class LaneChannel:
    """One of a lane's two channels: :class:`p2p.carrier.Carrier`."""

    kind = "lane"

    def __init__(self, lane: "Lane", number: int) -> None:
        self._lane = lane
        self._data, self._grants = DATA + number, WINDOW + number
        self._window = WINDOW_BYTES
        self._allowed = WINDOW_BYTES
        self._unreported = 0
        self._granting = 0
        self._begun: memoryview | None = None  # the rest of the frame that is on its way
        self._urgent: deque[bytes] = deque()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._room = trio.Event()
        self._receive: Callable[[memoryview], None] | None = None
        self._lost: Callable[[], None] = _nothing
        self.bytes_in = self.bytes_out = 0
        self.closed = False

    @property
    def peer_id(self) -> str:
        """Who is at the other end; proved by the handshake."""
        return self._lane.peer_id

    @property
    def host(self) -> str:
        """The IP address at the other end of the socket."""
        return self._lane.host

    @property
    def outbound(self) -> bool:
        """Whether this side dialled."""
        return self._lane.outbound

    @property
    def more(self) -> bool:
        """See :class:`p2p.carrier.Carrier`."""
        return self._lane.more

    def open(self, receive: Callable[[memoryview], None], lost: Callable[[], None]) -> None:
        """Start delivery; the lane's reader must not run before."""
        self._receive, self._lost = receive, lost
        if self.closed:  # the lane ended before anybody listened
            lost()

    # -- sending

    def send(self, chunks: list[Buffer], urgent: bool = False) -> None:
        """See :meth:`p2p.carrier.Carrier.send`."""
        if self.closed:
            return
        data: Any = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        lane = self._lane
        if self._window > 0 and not self._waiting and self._begun is None and lane.idle_for(self._data):
            size = len(data)
            if size > lane.cut:
                self._window -= size
                self.bytes_out += size
                self._begun = memoryview(data)
                lane.pump()
            elif lane.in_a_row():
                self._waiting.append(bytes(data))
                self._waiting_bytes += size
                lane.gather()
            else:
                self._window -= size
                self.bytes_out += size
                lane.write(self._data, data)
            return
        if len(self._waiting) + len(self._urgent) >= WAITING_MAX or self._waiting_bytes > OVERFLOW_BYTES:
            lane.fail("the peer does not read what it asks for")
            return
        # a copy, so that the caller may use its buffers again
        (self._urgent if urgent else self._waiting).append(bytes(data))
        self._waiting_bytes += len(data)
        if not lane.gathering:
            lane.pump()

    def next_piece(self) -> tuple[int, Buffer] | None:
        """The next record to send on this channel: its kind and plaintext."""
        if self._granting:
            granted, self._granting = self._granting, 0
            return self._grants, _U32.pack(granted)
        if self._begun is None:
            if self._urgent and self._window > -URGENT_BYTES:
                frame = _first(self._urgent)
            elif self._waiting and self._window > 0:
                frame = _first(self._waiting)
            else:
                return None
            self._window -= len(frame)
            self._waiting_bytes -= len(frame)
            self.bytes_out += len(frame)
            self._begun = memoryview(frame)
            if self._waiting_bytes <= BACKLOG_BYTES:
                self._wake()
        cut = self._lane.cut
        piece, rest = self._begun[:cut], self._begun[cut:]
        self._begun = rest if rest else None
        return self._data, piece

    @property
    def quiet(self) -> bool:
        """Whether nothing could be sent now."""
        if self._begun is not None or self._granting:
            return False
        return not (self._urgent and self._window > -URGENT_BYTES) and not (self._waiting and self._window > 0)

    @property
    def congested(self) -> bool:
        """Whether senders should :meth:`drain` first."""
        return self._waiting_bytes > BACKLOG_BYTES

    async def drain(self) -> None:
        """Wait while too much waits to be sent."""
        while self._waiting_bytes > BACKLOG_BYTES and not self.closed:
            await self._room.wait()

    def _wake(self) -> None:
        event, self._room = self._room, trio.Event()
        event.set()

    # -- receiving

    def on_data(self, data: bytes) -> None:
        """The next bytes."""
        size = len(data)
        self.bytes_in += size
        self._allowed -= size
        if self._receive is None or self._allowed < -self._lane.overdraft:
            self._lane.fail("the peer sends more than its window allows", "flood")
        else:
            self._receive(memoryview(data))

    def on_window(self, increment: int) -> None:
        """The peer takes more."""
        self._window += increment
        if self._window > 1 << 40:
            self._lane.fail("a window without measure", "protocol")

    def consumed(self, count: int) -> None:
        """That many received bytes take no room any more; the peer is told in big steps."""
        self._unreported += count
        if self._unreported >= WINDOW_BYTES // 2:
            self._allowed += self._unreported
            self._granting += self._unreported
            self._unreported = 0
            self._lane.pump()

    def on_closed(self) -> None:
        """The end."""
        if not self.closed:
            self.closed = True
            self._begun = None
            self._urgent.clear()
            self._waiting.clear()
            self._waiting_bytes = 0
            self._wake()
            self._lost()

    async def close(self) -> None:
        """Close the lane, the other channel with it."""
        self._lane.fail(CLOSED_HERE)
        await trio.lowlevel.checkpoint()

    def statistics(self) -> dict[str, Any]:
        """Numbers for people."""
        return {
            "carrier": self.kind,
            "cipher": self._lane.cipher,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }


class Lane:
    """One direct connection. :meth:`run` reads until it ends."""

    def __init__(
        self,
        socket: trio.socket.SocketType,
        secured: Secured,
        visit: Visit,
        scratch: Scratch,
        paces: Paces,
        *,
        outbound: bool,
        spawn: Spawn,
        frame_bytes_max: int,
        blame: Callable[[PeerId, str], None],
    ) -> None:
        self.peer_id = secured.peer_id
        self.cipher = secured.cipher
        self.outbound = outbound
        self.closed = False
        self.reason = ""
        self.overdraft = frame_bytes_max + URGENT_BYTES + (64 << 10)
        """What a peer may be past its window: frames are sent whole."""
        self._socket = socket
        self.host = peer_host(socket)
        self._fd = socket.fileno()
        self._spawn = spawn
        self._blame = blame
        self._visit = visit
        self._seal, self._open = _Key(secured.seal), _Key(secured.open)
        self._rest = memoryview(b"")  # of the one record that the socket did not take whole
        self._more = self._writing = False
        self._aside = 0
        self.gathering = False
        """Whether frames wait for the end of the turn."""
        self._wrote_at = 0.0
        self._read_since = True
        self.more = False
        """Whether more was received than is being delivered."""
        self._upload, download = paces
        self._download = download
        self.cut = RECORD_BYTES_MAX if self._upload is None else min(RECORD_BYTES_MAX, self._upload.piece)
        """The longest record that is sent."""
        self._scratch = scratch
        self._room = scratch.read if download is None else scratch.read[: max(HEAD_BYTES, download.piece)]
        self._room_max = len(self._room)
        self._head = b""  # the first bytes of a record, fewer than a head has
        self._partial = memoryview(b"")  # a record of which only the beginning came
        self._filled = 0
        self.main, self.bulk = LaneChannel(self, MAIN), LaneChannel(self, BULK)
        self._channels = (self.main, self.bulk)
        visit.on_hang_up(partial(self.fail, "the doors want it closed"))
        if sys.platform == "linux":
            # so that bulk data does not stand between the main channel and the wire
            socket.setsockopt(plain_socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    # -- sending

    def idle_for(self, kind: int) -> bool:
        """Whether a frame on this channel may be written at once."""
        if self._upload is not None and self._upload.wait_s(bulk=kind != DATA + MAIN):
            return False
        return not self._rest and (kind == DATA + MAIN or self.main.quiet)

    def write(self, kind: int, data: Buffer) -> None:
        """Seal a record and write what the socket takes; only when nothing else is half-written."""
        record = self._seal.seal(kind, data, self._scratch.seal)
        if self._upload is not None:
            self._upload.used(len(record))
        count = self._write(record)
        if kind < WINDOW:
            self._wrote_at = perf_counter()
            self._read_since = False
        if count < len(record):
            self._rest = memoryview(bytes(record[count:]))
            self._need_writer()

    def _write(self, data: Buffer) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.fail(f"connection lost: {error.strerror or error}")
            return len(data)

    def pump(self) -> None:
        """Write what may go, in order of rank, while the socket takes it and it is not too long for one turn."""
        for _ in range(RECORDS_PER_TURN):
            if self._rest or self.closed:
                return
            if self._upload is not None and self._upload.wait_s(bulk=self.main.quiet):
                break
            piece = self.main.next_piece() or self.bulk.next_piece()
            if piece is None:
                self._more = False
                return
            self.write(*piece)
        self._more = True
        self._need_writer()

    def in_a_row(self) -> bool:
        """Whether the last record was written just now, and this frame does not answer anything since."""
        return not self._read_since and perf_counter() - self._wrote_at < GATHER_SECONDS

    def gather(self) -> None:
        """Write what waits once the tasks that run in this turn have added theirs."""
        if not self.gathering:
            self.gathering = True
            self._spawn(self._end_turn)

    async def _end_turn(self) -> None:
        self.gathering = False
        self.pump()

    def _need_writer(self) -> None:
        if not self._writing and not self.closed:
            self._writing = True
            self._spawn(self._flush)

    async def _flush(self) -> None:
        """The writer: runs while the socket is full, or while there is more than a turn's worth."""
        try:
            while (self._rest or self._more) and not self.closed:
                if self._upload is not None:
                    await self._upload.room(bulk=self.main.quiet)
                    if self.closed:
                        return
                with trio.move_on_after(STALL_SECONDS) as stalled:
                    await trio.lowlevel.wait_writable(self._socket)
                if stalled.cancelled_caught:
                    self.fail(f"the peer took nothing for {STALL_SECONDS:.0f} s", "slow")
                elif not self.closed:
                    if self._rest:
                        self._rest = self._rest[self._write(self._rest) :]
                    self.pump()
        except (OSError, trio.ClosedResourceError):
            self.fail("connection lost")
        finally:
            self._writing = False

    # -- receiving

    async def run(self) -> None:
        """Read and deliver until the lane is over."""
        reads, waiting = 0, True
        try:
            while not self.closed:
                if waiting:
                    await trio.lowlevel.wait_readable(self._socket)
                    if self.closed:
                        return
                    reads = 0
                elif reads >= READS_PER_TURN:
                    reads = 0
                    await trio.lowlevel.checkpoint()
                    if self.closed:
                        return
                if self._download is not None:
                    await self._download.room()
                    if self.closed:
                        return
                began = perf_counter()
                try:
                    count, room = self._read()
                except BlockingIOError:
                    waiting = True
                    continue
                reads += 1
                self._adapt(perf_counter() - began)
                if perf_counter() - began > TURN_SECONDS:
                    reads = READS_PER_TURN
                if self._download is not None:
                    self._download.used(count)
                waiting = count < room
                if count == 0:
                    self.fail("closed by the peer")
                    return
        except (OSError, trio.ClosedResourceError) as error:
            self.fail(f"connection lost: {error}")
        finally:
            self.fail("no longer read")

    def _adapt(self, spent_s: float) -> None:
        """Read less at once from a peer whose bytes take long to serve: others want a turn, too."""
        size = len(self._room)
        if spent_s > TURN_SECONDS:
            if size > READ_BYTES_MIN:
                self._room = self._scratch.read[: max(READ_BYTES_MIN, size // 2)]
        elif size < self._room_max and spent_s < TURN_SECONDS / 4:
            self._room = self._scratch.read[: min(2 * size, self._room_max)]

    def _read(self) -> tuple[int, int]:
        """Read once and deliver the records that are complete: bytes read, bytes that there was room for."""
        buffer = self._room
        if self._partial:
            rest = self._partial[self._filled :]
            count = os.readv(self._fd, (rest, buffer))
            self._read_since = True
            if count < len(rest):
                self._filled += count
            else:
                record, self._partial = self._partial, memoryview(b"")
                self.more = count > len(rest)
                if self._take(record):
                    self._split(buffer, count - len(rest))
            return count, len(rest) + len(buffer)
        have = len(self._head)
        if have:
            buffer[:have] = self._head
        count = os.readv(self._fd, (buffer[have:] if have else buffer,))
        self._read_since = True
        if count:
            self._head = b""
            self._split(buffer, have + count)
        return count, len(buffer) - have

    def _split(self, buffer: memoryview, end: int) -> None:
        """Deliver the records in ``buffer``, keep what is left."""
        start = 0
        while end - start >= HEAD_BYTES:
            (head,) = _unpack_head(buffer, start)
            size = head & 0xFFFFFF
            if not TAG_BYTES <= size <= RECORD_BYTES_MAX + TAG_BYTES:
                self._tampered(f"a record of {size} bytes")
                return
            stop = start + HEAD_BYTES + size
            if stop > end:
                self._partial = memoryview(bytearray(HEAD_BYTES + size))
                self._filled = end - start
                self._partial[: self._filled] = buffer[start:end]
                return
            self.more = stop < end
            if not self._take(buffer[start:stop]):
                return
            start = stop
        self._head = bytes(buffer[start:end]) if start < end else b""

    def _take(self, record: memoryview) -> bool:
        """Deliver a record; whether to go on."""
        try:
            plain = self._open.open(record)
        except InvalidTag:
            self._tampered("a record that does not decrypt")
            return False
        kind = record[0]
        if kind < WINDOW:
            self._channels[kind].on_data(plain)
        else:
            self._deliver(kind, plain)
        return not self.closed

    def _deliver(self, kind: int, plain: bytes) -> None:
        """What is no data."""
        self._aside += HEAD_BYTES + TAG_BYTES + len(plain)
        if self._aside > ASIDE_BYTES + sum(channel.bytes_in + channel.bytes_out for channel in self._channels):
            self.fail("more records beside the data than data", "flood")
            return
        if kind < WINDOW + 2 and len(plain) == _U32.size:
            self._channels[kind - WINDOW].on_window(_U32.unpack(plain)[0])
            self.pump()
        elif kind < IGNORED:
            self.fail(f"a record of the unknown kind {kind}", "protocol")

    # -- the end

    def _tampered(self, reason: str) -> None:
        """Something is wrong outside what the cipher vouches for: anybody on the way can cause that, so the address
        answers for it, not the peer."""
        if not self.closed:
            self._visit.blame("handshake")
            log.warning("the lane to %s is closed: %s", self.peer_id, reason)
            self.fail(reason)

    def fail(self, reason: str, fault: str = "") -> None:
        """The lane is over: nothing more is sent, both channels learn it."""
        if self.closed:
            return
        self.closed, self.reason = True, reason
        if fault:
            log.warning("the lane to %s is closed: %s", self.peer_id, reason)
            self._blame(self.peer_id, fault)
        else:
            log.debug("the lane to %s is closed: %s", self.peer_id, reason)
        self._rest = memoryview(b"")
        self._socket.close()
        self._visit.leave()
        for channel in self._channels:
            channel.on_closed()


def _first(frames: deque[bytes]) -> bytes:
    """The next frame, and those after it that fit into the same record."""
    frame = frames.popleft()
    room = RECORD_BYTES_MAX - len(frame)
    if not frames or len(frames[0]) > room:
        return frame
    together = [frame]
    while frames and len(frames[0]) <= room:
        room -= len(frames[0])
        together.append(frames.popleft())
    return b"".join(together)


def _nothing() -> None:
    return
