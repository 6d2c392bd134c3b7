"""The carrier over libp2p: one long-lived stream, claimed from yamux, implementing :class:`p2p.carrier.Carrier`.

Owns: yamux's flow control for its stream (windows respected and granted), the queue of what the window does not allow
yet. Does not own: the connection (``secure.Session``), what the bytes mean.

A peer that sends past its window, or asks for more and more answers and takes none, loses its connection.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import trio
from libp2p.abc import INetStream
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.yamux.yamux import YamuxStream

from p2p.carrier import Buffer
from p2p.secure import BACKLOG_BYTES, DATA, OVERFLOW_BYTES, PAYLOAD_MAX, WINDOW_UPDATE, YAMUX_HEAD, Connection, Session

WINDOW_BYTES = 4 << 20
WAITING_MAX = 1 << 14
"""Messages that may wait for the peer's window: far more than the calls that it may have in flight."""


class Channel:
    """A libp2p stream of ours, claimed from yamux: chunks out, data in, both without a task of its own.

    ``receiver`` must be set before :meth:`open`. What is received counts against the window until :meth:`consumed`.
    """

    def __init__(self, stream: INetStream) -> None:
        muxed: Any = stream.muxed_conn
        inner: Any = stream
        self._stream: YamuxStream = inner.muxed_stream
        self._net_stream = stream
        self._yamux: Connection = muxed
        self._session: Session = muxed.secured_conn
        self._window = 0
        self._allowed = 0
        self._unreported = 0
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._begun = False  # whether part of the first one that waits was sent
        self._urgent = 0  # how many come next because they are urgent
        self.bytes_in = self.bytes_out = 0
        self._room = trio.Event()
        self._receive: Callable[[memoryview], None] = _nowhere
        self._lost: Callable[[], None] = _nothing
        self.closed = False

    kind = "stream"

    @property
    def peer_id(self) -> str:
        """Who is at the other end; proved by the Noise handshake."""
        return str(self._yamux.peer_id)

    more = False

    @property
    def host(self) -> str:
        """The IP address at the other end of the connection."""
        return self._session.host

    @property
    def outbound(self) -> bool:
        """Whether this side opened the stream."""
        return self._stream.is_initiator

    def open(self, receive: Callable[[memoryview], None], lost: Callable[[], None]) -> None:
        """Take the stream over from yamux; data that came already is delivered at once."""
        self._receive, self._lost = receive, lost
        stream_id = self._stream.stream_id
        early = bytes(self._yamux.stream_buffers.get(stream_id, b""))
        if stream_id not in self._yamux.stream_buffers or self._stream.closed or self._stream.recv_closed:
            self.closed = True
            lost()
            return
        self._yamux.stream_buffers[stream_id].clear()
        self._window = self._stream.send_window
        self._session.claim(stream_id, self)
        # what was granted so far is used up or in flight; top it up to the full window
        self._allowed = self._stream.recv_window
        self._grant(WINDOW_BYTES - self._stream.recv_window)
        if early:
            self._receive(memoryview(early))

    # -- Sink

    def on_data(self, data: memoryview) -> None:
        """Bytes for us."""
        self._allowed -= len(data)
        self.bytes_in += len(data)
        if self._allowed < 0:
            self._session.fail()
        elif not self.closed:
            self._receive(data)

    def on_window(self, increment: int) -> None:
        """The peer takes more."""
        self._window += increment
        if self._waiting:
            self._send_waiting()

    def on_closed(self) -> None:
        """The end."""
        self.closed = True
        self._waiting.clear()
        self._waiting_bytes = 0
        self._wake()
        self._lost()

    # -- sending

    def send(self, chunks: list[Buffer], urgent: bool = False) -> None:
        """Send now or queue; never blocks. Ask :attr:`congested` before sending much."""
        if self.closed:
            return
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self.bytes_out += len(data)
        try:
            if not self._waiting and len(data) <= self._window and len(data) <= PAYLOAD_MAX:
                self._window -= len(data)
                self._session.push([YAMUX_HEAD.pack(0, DATA, 0, self._stream.stream_id, len(data)) + data])
                return
            if len(self._waiting) >= WAITING_MAX or self._waiting_bytes > OVERFLOW_BYTES:
                self._session.fail()
                return
            self._enqueue(memoryview(data), urgent)
            self._waiting_bytes += len(data)
            self._send_waiting()
        except ConnectionClosedError:
            return  # on_closed has run

    def _enqueue(self, frame: memoryview, urgent: bool) -> None:
        """Queue a frame; an urgent one goes before those that have not begun, after other urgent ones."""
        if not urgent:
            self._waiting.append(frame)
            return
        begun = 1 if self._begun else 0
        self._waiting.insert(begun + self._urgent, frame)
        self._urgent += 1

    def _send_waiting(self) -> None:
        messages: list[Buffer] = []
        while self._waiting and self._window > 0:
            first = self._waiting[0]
            count = min(len(first), self._window, PAYLOAD_MAX)
            head = YAMUX_HEAD.pack(0, DATA, 0, self._stream.stream_id, count)
            messages.append(b"".join((head, first[:count])))
            self._window -= count
            self._waiting_bytes -= count
            if not self._begun and self._urgent:
                self._urgent -= 1
            self._begun = count < len(first)
            if self._begun:
                self._waiting[0] = first[count:]
            else:
                self._waiting.popleft()
        if messages:
            try:
                self._session.push(messages)
            except ConnectionClosedError:
                return  # on_closed has run
        if self._waiting_bytes <= BACKLOG_BYTES:
            self._wake()

    @property
    def congested(self) -> bool:
        """Whether senders should :meth:`drain` first."""
        return self._waiting_bytes > BACKLOG_BYTES or self._session.congested

    async def drain(self) -> None:
        """Wait while too much waits to be sent."""
        while self._waiting_bytes > BACKLOG_BYTES and not self.closed:
            await self._room.wait()
        await self._session.drain()

    def _wake(self) -> None:
        event, self._room = self._room, trio.Event()
        event.set()

    # -- window

    def consumed(self, count: int) -> None:
        """That many received bytes take no room any more; the peer is told in big steps."""
        self._unreported += count
        if self._unreported >= WINDOW_BYTES // 2:
            self._grant(self._unreported)
            self._unreported = 0

    def _grant(self, increment: int) -> None:
        if increment > 0 and not self.closed:
            self._allowed += increment
            try:
                self._session.push([YAMUX_HEAD.pack(0, WINDOW_UPDATE, 0, self._stream.stream_id, increment)])
            except ConnectionClosedError:
                return  # on_closed has run

    def statistics(self) -> dict[str, Any]:
        """Numbers for people."""
        return {
            "carrier": self.kind,
            "cipher": "ChaCha20-Poly1305",
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }

    async def close(self) -> None:
        """End the stream; its connection stays."""
        self._stream.recv_window = max(0, self._allowed)  # what is still under way was granted by us
        self._session.release(self._stream.stream_id)
        with trio.move_on_after(1, shield=True):
            await self._net_stream.reset()


def _nowhere(_data: memoryview) -> None:
    return


def _nothing() -> None:
    return
