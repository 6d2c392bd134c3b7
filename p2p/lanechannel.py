"""One of a lane's two channels: a byte stream of RPC frames with a window of its own.

Owns: what waits to be sent on the channel and in which order, flow control. Does not own: the socket, the records.

Invariants:
1. A frame that has begun is sent to its end; urgent frames go before others that have not.
2. What waits is bounded: senders wait above :data:`BACKLOG_BYTES`; at :data:`OVERFLOW_BYTES` or :data:`WAITING_MAX`
   frames the lane ends.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from p2p.carrier import Buffer
from p2p.core.records import DATA, RECORD_BYTES_MAX, U32, WINDOW

if TYPE_CHECKING:
    from p2p.lane import Lane

GATHER_SECONDS = 0.0001
"""A frame so soon after another, with nothing read between them, is one of many: those written in this turn of the
event loop share records."""
CLOSED_HERE = "closed here"
WINDOW_BYTES = 4 << 20
URGENT_BYTES = 64 << 10
"""Urgent frames may run the window over by this much."""
BACKLOG_BYTES = 1 << 20
OVERFLOW_BYTES = 256 << 20
WAITING_MAX = 1 << 14


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
            return self._grants, U32.pack(granted)
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
