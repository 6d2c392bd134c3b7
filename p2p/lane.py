"""The direct lane: encrypted records straight on one TCP socket, two channels in them, no multiplexer below.

Records are those of ``core/records``.

Owns: the socket after the handshake, the order in which channels get it. Does not own: a channel's queue and window
(``lanechannel``), keys and nonces (``core/records``), what the bytes mean, who is dialled.

Invariants:
1. Records reach the socket in the order of their nonces. What is written is queued whole before anybody waits: a
   cancelled caller leaves nothing half-sent.
2. The main channel's frames go before the bulk channel's, an urgent frame before others of its channel that have not
   begun. What is sealed and waits is at most one record; what the kernel holds unsent is bounded as well.
3. A peer that takes nothing for :data:`STALL_SECONDS`, or lets more pile up than a channel holds, loses the lane.
4. A peer may have a window and one frame unconsumed on each channel; past that, or with a record that is too long, out
   of order, replayed or damaged, it loses the lane. No record is stored before its length was checked.
"""

import logging
import os
import socket as plain_socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter

import trio
from cryptography.exceptions import InvalidTag

from config.vocabulary import PeerId
from p2p.carrier import Buffer
from p2p.core.records import (
    BULK,
    DATA,
    HEAD_BYTES,
    IGNORED,
    MAIN,
    RECORD_BYTES_MAX,
    TAG_BYTES,
    U32,
    WINDOW,
    Key,
    unpack_head,
)
from p2p.doors import Visit
from p2p.handshake import Secured
from p2p.lanechannel import GATHER_SECONDS, URGENT_BYTES, LaneChannel
from p2p.networks import peer_host
from p2p.pace import Paces

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20
READ_BYTES_MIN = 64 << 10
TURN_SECONDS = 0.004
"""What was read should be served in so long; else others get a turn, and less is read at once."""
READS_PER_TURN = 16
"""Reads after which other tasks get a turn, however much data waits."""
RECORDS_PER_TURN = 8
"""Records written before other tasks get a turn."""
STALL_SECONDS = 20.0
UNSENT_BYTES = 128 << 10
ASIDE_BYTES = 4 << 20
"""Records that are no data may make up so much more than the data: no limit on calls or windows counts them."""

_TCP_NOTSENT_LOWAT = 25

Spawn = Callable[[Callable[[], Awaitable[None]]], None]


class Scratch:
    """Buffers that the lanes of a node share: none is in use across an ``await``."""

    def __init__(self) -> None:
        self.read = memoryview(bytearray(READ_BYTES))
        self.seal = memoryview(bytearray(HEAD_BYTES + RECORD_BYTES_MAX + TAG_BYTES))


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
        self._seal, self._open = Key(secured.seal), Key(secured.open)
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
            (head,) = unpack_head(buffer, start)
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
        if kind < WINDOW + 2 and len(plain) == U32.size:
            self._channels[kind - WINDOW].on_window(U32.unpack(plain)[0])
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
