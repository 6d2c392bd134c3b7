"""Streamed answers: the items that come to us, and those that we send.

Invariants:
1. Items that wait here are bounded by the protocol's credit; credit is granted again as they are taken, never before.
2. The caller's iteration ends at the stream's end, its error or the deadline; leaving it early cancels the call.
"""

from collections import deque
from typing import Protocol

import trio

from config.errors import RemoteError, RiosError
from p2p.carrier import Carrier
from p2p.core import frames
from p2p.face import Header, Reply

GRANT_ITEMS = frames.STREAM_CREDIT // 2


class Line(Protocol):
    """What a stream to us needs of its connection."""

    def give_up(self, call_id: int) -> None:
        """Cancel the call."""

    def grant(self, call_id: int, items: int, size_bytes: int) -> None:
        """Let the peer send more; so many bytes are free again."""

    def hold(self, size_bytes: int) -> None:
        """Bytes wait here."""

    def release(self, size_bytes: int) -> None:
        """They are gone."""

    def late(self, method: str) -> RemoteError:
        """The error of a missed deadline."""


class Incoming:
    """Items of a streaming call of ours: :class:`p2p.face.Items`."""

    def __init__(self, line: Line, call_id: int, method: str, deadline: float) -> None:
        self.method = method
        self.end: Header | None = None
        self._line = line
        self._call_id = call_id
        self._deadline = deadline
        self._items: deque[tuple[Reply, int]] = deque()
        self._error: RiosError | None = None
        self._taken = self._taken_bytes = 0
        self._news = trio.Event()

    # -- from the connection

    def put(self, item: Reply) -> None:
        """The next item."""
        size = sum(len(buffer) for buffer in item.buffers)
        self._items.append((item, size))
        self._line.hold(size)
        self._news.set()

    def finish(self, header: Header) -> None:
        """The stream is complete."""
        self.end = header
        self._news.set()

    def fail(self, error: RiosError) -> None:
        """The stream broke off."""
        self._error = error
        self._news.set()

    # -- for the caller

    def __aiter__(self) -> "Incoming":
        return self

    async def __anext__(self) -> Reply:
        with trio.CancelScope(deadline=self._deadline):
            while not self._items:
                if self._error is not None:
                    raise self._error
                if self.end is not None:
                    raise StopAsyncIteration
                self._news = trio.Event()
                await self._news.wait()
            await trio.lowlevel.checkpoint_if_cancelled()
            item, size = self._items.popleft()
            self._took(size)
            return item
        self._error = self._line.late(self.method)
        self.close()
        raise self._error

    def _took(self, size: int) -> None:
        self._taken += 1
        self._taken_bytes += size
        if self._taken >= GRANT_ITEMS:
            self._line.grant(self._call_id, self._taken, self._taken_bytes)
            self._taken = self._taken_bytes = 0

    def close(self) -> None:
        """No more is wanted."""
        if self.end is None and self._error is None:
            self._error = RemoteError("cancelled", f"{self.method} was left by its caller")
        self._line.give_up(self._call_id)
        self._line.release(self._taken_bytes + sum(size for _, size in self._items))
        self._taken_bytes = 0
        self._items.clear()


class Outgoing:
    """The sending end of a streaming call that is served here."""

    def __init__(self, machine: frames.Machine, carrier: Carrier, call_id: int) -> None:
        self._machine = machine
        self._carrier = carrier
        self._call_id = call_id
        self._news = trio.Event()

    def granted(self) -> None:
        """The peer takes more items."""
        self._news.set()

    async def send(self, reply: Reply) -> None:
        """Send one item; waits while the peer is slow to take them."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._machine.credit(self._call_id) == 0:
            self._news = trio.Event()
            await self._news.wait()
        if self._carrier.congested:
            await self._carrier.drain()
        chunks = self._machine.item(self._call_id, reply.header, reply.buffers)
        if chunks:
            self._carrier.send(chunks)
        await trio.lowlevel.cancel_shielded_checkpoint()
