"""A connection's bytes, and for how long its client has kept them from being written.

Stands between HTTP, or TLS, and trio's stream, which does not tell a write that waits for its client from one that
waits for its turn in a busy event loop. Only the first counts; a write that the kernel takes at once reads no clock.
"""

import os

import trio


class Wire(trio.abc.HalfCloseableStream):
    """One at a time may send. Raises trio.BrokenResourceError when the connection is broken."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._blocked = 0.0
        self._blocked_since: float | None = None

    def blocked_seconds(self) -> float:
        """For how long in all, the write under way included, there was no room for what was to be written."""
        if self._blocked_since is None:
            return self._blocked
        return self._blocked + trio.current_time() - self._blocked_since

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio. What was written when it is cancelled is not known."""
        await trio.lowlevel.checkpoint_if_cancelled()
        left = self.send_now(data)
        if left:
            await self._send_rest(left)
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def _send_rest(self, left: memoryview) -> None:
        """What :meth:`send_now` left."""
        self._blocked_since = trio.current_time()
        try:
            while left:
                await trio.lowlevel.wait_writable(self._stream.socket)
                left = self.send_now(left)
        finally:
            self._blocked += trio.current_time() - self._blocked_since
            self._blocked_since = None

    def send_now(self, data: bytes | bytearray | memoryview) -> memoryview:
        """Write what the kernel has room for; the rest. The socket does not block: trio made it so."""
        data = memoryview(data)
        try:
            return data[os.write(self._stream.socket.fileno(), data) :] if data else data
        except BlockingIOError:
            return data
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def wait_send_all_might_not_block(self) -> None:
        """See trio."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See trio."""
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See trio."""
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """See trio."""
        await self._stream.aclose()
