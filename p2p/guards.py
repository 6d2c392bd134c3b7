"""Around every libp2p stream handler: limits, deadlines, and an end to its exceptions.

The library's handlers read for as long as the peer likes, some behind a limit that all peers share: a few silent
streams would shut the DHT for everybody. Here each peer has its own few streams per protocol, a read that brings
nothing for too long ends the stream, and an exception ends its stream, never the host.

Invariants:
1. A peer has at most ``streams`` streams of a protocol in its handler; more are reset, counted and, if it goes on, a
   flood (``refusals``).
2. What is counted when a handler begins is counted down when it ends, however it ends.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio
from libp2p.abc import INetStream

from config.vocabulary import PeerId
from p2p.core.doors import Refusal
from p2p.doors import Doors

log = logging.getLogger(__name__)

Handle = Callable[[INetStream], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Terms:
    """What one peer may do with a protocol. ``idle_seconds``: the longest wait for its next bytes; 0: no limit."""

    streams: int
    idle_seconds: float


TERMS = {
    "/ipfs/kad/1.0.0": Terms(6, 10.0),
    "/ipfs/id/1.0.0": Terms(4, 10.0),
    "/ipfs/id/push/1.0.0": Terms(4, 10.0),
    "/ipfs/ping/1.0.0": Terms(4, 60.0),
    "/meshsub/1.1.0": Terms(3, 0.0),  # is quiet for long; the library bounds its messages
}
OTHERS = Terms(8, 0.0)
"""Our own RPC, which has its own deadlines, limits and pings."""


class Guards:
    """Wraps handlers."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors
        self._open: Counter[tuple[str, str]] = Counter()

    def wrap(self, protocol: str, handle: Handle) -> Handle:
        """``handle``, guarded."""
        terms = TERMS.get(protocol, OTHERS)

        async def guarded(stream: INetStream) -> None:
            peer_id = PeerId(str(stream.muxed_conn.peer_id))
            key = (peer_id, protocol)
            meter = self._doors.meter(peer_id)
            if self._open[key] >= terms.streams:
                name = protocol.split("/")[2]
                refusal = Refusal(f"streams_{name}_per_peer", f"{terms.streams} streams of {protocol} are open")
                self._doors.refused(refusal, peer_id)
                await _reset(stream)
                return
            if meter.open_stream():
                await _reset(stream)
                return
            self._open[key] += 1
            try:
                if terms.idle_seconds:
                    self._limit_reads(stream, terms.idle_seconds, peer_id)
                await handle(stream)
            except Exception as error:
                log.debug("stream handler: %.200r", error, exc_info=True)
                await _reset(stream)
            finally:
                meter.close_stream()
                self._open[key] -= 1
                if not self._open[key]:
                    del self._open[key]

        return guarded

    def _limit_reads(self, stream: INetStream, seconds: float, peer_id: PeerId) -> None:
        """yamux streams of the library have no deadlines of their own."""
        read: Any = stream.read

        async def read_soon(n: int | None = None) -> bytes:
            with trio.move_on_after(seconds):
                data: bytes = await read(n)
                return data
            self._doors.refused(Refusal("stream_idle", f"silent for {seconds:.0f} s"), peer_id)
            raise trio.TooSlowError

        stream.read = read_soon  # type: ignore[method-assign]


async def _reset(stream: INetStream) -> None:
    try:
        await stream.reset()
    except Exception as error:
        log.debug("resetting a stream: %.200r", error, exc_info=True)
