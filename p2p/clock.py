"""How far this node's clock is from its peers' clocks: the RPC ``clock.read`` and what follows from its answers.

The offset is NTP's (RFC 5905, section 8): the peer's time less the middle of the round trip; wrong by half a round trip
at most. Peers may be wrong themselves, so the median counts. It is looked at when somebody asks, and corrects nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import trio

from config.errors import RiosError
from config.vocabulary import PeerId
from p2p.face import Buffer, Call, Header, Reply

METHOD = "clock.read"
ASKED_MAX = 8
DEADLINE_MS = 2000


class Caller(Protocol):
    """What is needed of the network."""

    async def call(
        self, peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer] = (), *, deadline_ms: int
    ) -> Reply:
        """Call a peer."""


@dataclass(frozen=True, slots=True)
class Skew:
    """This clock is ``offset_ms`` behind (negative: ahead of) the median of ``peers`` clocks, give or take
    ``error_ms``."""

    offset_ms: int
    error_ms: int
    peers: int


def _unix_ms() -> float:
    return time.time_ns() / 1e6


async def serve(_call: Call) -> Reply:
    """``clock.read``: this node's unix time."""
    return Reply({"unix_ms": int(_unix_ms())})


async def measure(caller: Caller, peers: Sequence[PeerId]) -> Skew | None:
    """Ask some peers at the same time; None if nobody answers."""
    offsets: list[float] = []
    trips: list[float] = []

    async def ask(peer_id: PeerId) -> None:
        began = _unix_ms()
        try:
            reply = await caller.call(peer_id, METHOD, {}, deadline_ms=DEADLINE_MS)
        except RiosError:
            return
        ended, theirs = _unix_ms(), reply.header.get("unix_ms")
        if type(theirs) is int:
            offsets.append(theirs - (began + ended) / 2)
            trips.append(ended - began)

    async with trio.open_nursery() as nursery:
        for peer_id in peers[:ASKED_MAX]:
            nursery.start_soon(ask, peer_id)
    if not offsets:
        return None
    return Skew(round(median(offsets)), round(max(trips) / 2) + 1, len(offsets))
