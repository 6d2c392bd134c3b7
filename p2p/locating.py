"""Measures round trips to linked peers, and keeps this node's place in the map of the swarm.

Owns: the pings and the filter over them. Does not own: the arithmetic (``core.coordinates``), links.

Invariants:
1. At most :data:`SAMPLED_PEERS` pings every :data:`ROUND_S`; a peer that hangs keeps nobody waiting.
2. The least of a link's last :data:`KEPT` round trips counts: a busy event loop makes them longer, nothing shorter.
3. The own coordinate travels with the next advert; no message is sent for it.
"""

import random
from collections import deque
from collections.abc import Mapping

import msgspec
import trio

from config.vocabulary import PeerId
from p2p.core import coordinates
from p2p.core.coordinates import Coordinate
from p2p.directory import PeerDirectory
from p2p.finding import sample
from p2p.links import Links

ROUND_S = 10.0
FIRST_ROUNDS_S = 1.0
FIRST_ROUNDS = 5
SAMPLED_PEERS = 16
PING_S = 3.0
KEPT = 8
STEP_US = 200


class Locator:
    """This node's place, and how far others are."""

    def __init__(self, links: Links, directory: PeerDirectory) -> None:
        self._links = links
        self._directory = directory
        self._rtts_us: dict[PeerId, deque[float]] = {}
        self.place = Coordinate()

    async def run(self) -> None:
        """Measure, forever."""
        rounds = 0
        async with trio.open_nursery() as nursery:
            while True:
                rounds += 1
                await trio.sleep((FIRST_ROUNDS_S if rounds <= FIRST_ROUNDS else ROUND_S) * random.uniform(0.8, 1.2))
                linked = self._links.peers()
                for gone in self._rtts_us.keys() - set(linked):
                    del self._rtts_us[gone]
                for peer_id in sample(linked, SAMPLED_PEERS):
                    nursery.start_soon(self._measure, peer_id)

    async def _measure(self, peer_id: PeerId) -> None:
        link = self._links.ready(peer_id)
        if link is None or not await link.ping(PING_S):
            return
        kept = self._rtts_us.setdefault(peer_id, deque(maxlen=KEPT))
        kept.append(link.round_trip_s * 1e6)
        advert = self._directory.view.get(peer_id)
        # a peer that does not know its place yet stands at the origin, as this node does at first
        theirs = (coordinates.from_wire(advert.coordinate) if advert else None) or Coordinate()
        self.place = coordinates.moved(self.place, theirs, min(kept), random.random)
        field, told = self.place.on_wire(), self._directory.own().coordinate
        if not told or any(abs(new - old) > STEP_US for new, old in zip(field[:4], told, strict=False)):
            self._directory.update(lambda own: msgspec.structs.replace(own, coordinate=field))

    def distance_ms(self, peer_id: PeerId) -> float | None:
        """The round trip to a peer: measured where there is a link, else estimated; None if nothing is known."""
        kept = self._rtts_us.get(peer_id)
        if kept:
            return min(kept) / 1000
        advert = self._directory.view.get(peer_id)
        theirs = coordinates.from_wire(advert.coordinate) if advert else None
        if theirs is None or self.place.error >= coordinates.ERROR_MAX:
            return None
        return self.place.distance_us(theirs) / 1000

    def regions(self) -> Mapping[PeerId, tuple[str, bool]]:
        """Each known peer's region, and whether it is inferred from round trips."""
        return coordinates.regions(self._directory.adverts())
