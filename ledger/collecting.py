"""Brings the handovers of an old committee to a witness of the next one, from whoever has them.

Owns the fetches under way and their bounds. A handover proves itself by its signature: it may come from anybody, and is
whole only once ``take`` has accepted it.

Invariants: every handover is fetched by a task of its own, so whoever stalls delays nobody else. A peer names size and
signature once and sends every piece whole, each within :data:`DEADLINE_MS`: that bounds the time of a fetch. Of
handovers longer than a piece one comes from a peer at a time, and 2f + 2 in all: as many as both committees have liars,
and two more.
"""

from collections.abc import Awaitable, Callable, Sequence
from random import Random

import trio

from config.errors import IntegrityError, RiosError
from config.vocabulary import PeerId
from ledger.core.objects import HANDOVER_BYTES_MAX, Signed
from p2p.face import Network

PIECE_BYTES = 1 << 20
DEADLINE_MS = 10_000
NEXT_AFTER_S = 30.0
"""A peer that takes longer is not waited for any more before the next one is asked as well; then twice as long."""

Take = Callable[[Signed], Awaitable[bool]]
"""Checks and keeps a handover; False if it is not the one that was asked for. Raises RiosError for a wrong one."""


class Collecting:
    """The handovers that are being fetched."""

    def __init__(self, network: Network, net: bytes) -> None:
        self._network = network
        self._net = net
        self._random = Random()
        self._room = trio.CapacityLimiter(2)
        self._sending: dict[PeerId, trio.Lock] = {}
        self._under_way: set[tuple[int, bytes]] = set()

    def begin(
        self, nursery: trio.Nursery, epoch: int, key: bytes, first: PeerId, others: Sequence[PeerId], f: int, take: Take
    ) -> None:
        """Fetch the handover of ``key`` in the background: from ``first``, else from one of the others. Nothing if that
        is under way. ``f`` is how many liars a committee may have."""
        if (epoch, key) not in self._under_way:
            self._under_way.add((epoch, key))
            self._room.total_tokens = max(self._room.total_tokens, 2 * f + 2)
            peers = [peer for peer in others if peer not in (first, self._network.identity.peer_id)]
            self._random.shuffle(peers)
            nursery.start_soon(self._fetch, epoch, key, [first, *peers], take)

    async def _fetch(self, epoch: int, key: bytes, peers: Sequence[PeerId], take: Take) -> None:
        taking, patience_s = trio.Lock(), NEXT_AFTER_S
        try:
            async with trio.open_nursery() as nursery:

                async def ask(peer_id: PeerId, failed: trio.Event) -> None:
                    try:
                        if await self._from(peer_id, epoch, key, take, taking):
                            nursery.cancel_scope.cancel()
                    except RiosError:
                        pass  # the others may have it; the next round asks again
                    failed.set()

                for peer_id in peers:
                    failed = trio.Event()
                    nursery.start_soon(ask, peer_id, failed)
                    with trio.move_on_after(patience_s) as waited:
                        await failed.wait()
                    patience_s *= 2 if waited.cancelled_caught else 1
        finally:
            self._under_way.discard((epoch, key))

    async def _from(self, peer_id: PeerId, epoch: int, key: bytes, take: Take, taking: trio.Lock) -> bool:
        size, signature, piece = await self._piece(peer_id, epoch, key, 0)
        if size == len(piece):
            async with taking:
                return await take(Signed(piece, signature))
        async with self._sending.setdefault(peer_id, trio.Lock()), self._room:
            body = bytearray(piece)
            while len(body) < size:
                *named, piece = await self._piece(peer_id, epoch, key, len(body))
                if named != [size, signature]:
                    raise IntegrityError("integrity", f"{peer_id} sent pieces of two handovers")
                body += piece
            async with taking:
                return await take(Signed(bytes(body), signature))

    async def _piece(self, peer_id: PeerId, epoch: int, key: bytes, offset: int) -> tuple[int, bytes, bytes]:
        """Size and signature of the whole, and the piece at ``offset``."""
        ask = {"net": self._net, "epoch": epoch, "witness": key, "offset": offset}
        reply = await self._network.call(peer_id, "ledger.handover", ask, deadline_ms=DEADLINE_MS)
        size, signature = reply.header.get("bytes"), reply.header.get("signature")
        piece = bytes(reply.buffers[0]) if len(reply.buffers) == 1 else b""
        if type(size) is not int or not offset < size <= HANDOVER_BYTES_MAX or not isinstance(signature, bytes):
            raise IntegrityError("integrity", f"{peer_id} sent a malformed handover")
        if len(piece) != min(PIECE_BYTES, size - offset):
            raise IntegrityError("integrity", f"{peer_id} sent a piece of a handover that is not whole")
        return size, signature, piece
