"""Where nodes stand in the swarm's map of round trips: network coordinates (Vivaldi: Dabek et al., SIGCOMM 2004).

Every node has a point in three dimensions and a height (its access line); the estimated round trip of two nodes is the
distance of their points plus both heights. Each measured round trip moves the own point a little. Owns: the arithmetic,
what a region is made from. Does not own: measuring.

Invariants:
1. One sample moves a point by at most :data:`MOVE_US_MAX`, and a peer is sampled once a round: a liar shifts a node
   little, and honest peers pull it back. What a peer claims of its error cannot make it weigh more than its share.
2. A coordinate of the wrong shape, or further from a measured round trip than any line is long, counts for nothing.
3. A region is inferred only from peers that have it configured, by the middle of what they claim (the median).

On the wire: x, y, z, height in microseconds, then the relative error in millionths.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from config.vocabulary import PeerId
from p2p.core.advert import COORDINATE_US_MAX, Advert

TUNE_ERROR, TUNE_MOVE = 0.25, 0.25
ERROR_MIN, ERROR_MAX = 0.02, 1.0
HEIGHT_US_MIN = 50.0
MOVE_US_MAX = 20_000.0
RTT_US_MAX = 10_000_000.0
REGION_US_MAX = 25_000.0
"""A node nearer than this to the middle of a region is taken to be in it."""
REGIONS_MAX = 64


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A place in the map, in microseconds; ``error`` is relative (1: knows nothing)."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0
    height: float = HEIGHT_US_MIN
    error: float = ERROR_MAX

    def distance_us(self, other: "Coordinate") -> float:
        """The estimated round trip."""
        return math.dist((self.x, self.y, self.z), (other.x, other.y, other.z)) + self.height + other.height

    def on_wire(self) -> tuple[int, ...]:
        """The advert's field."""
        limit = COORDINATE_US_MAX
        place = (max(-limit, min(limit, round(part))) for part in (self.x, self.y, self.z, self.height))
        return (*place, round(self.error * 1_000_000))


def from_wire(field: tuple[int, ...]) -> Coordinate | None:
    """What an advert says, or None if it says nothing usable. A longer field is a later version's."""
    if len(field) < 5 or field[3] < 0 or not 0 <= field[4] <= 1_000_000:
        return None
    x, y, z, height, error = map(float, field[:5])
    return Coordinate(x, y, z, max(HEIGHT_US_MIN, height), max(ERROR_MIN, error / 1_000_000))


def moved(own: Coordinate, other: Coordinate, rtt_us: float, dice: Callable[[], float]) -> Coordinate:
    """The own coordinate after a round trip to a peer was measured. ``dice`` gives numbers from 0 to 1."""
    estimate = own.distance_us(other)
    if not 0 < rtt_us <= RTT_US_MAX or estimate > 2 * RTT_US_MAX:
        return own
    # a peer's word that it is sure counts as half at most
    weight = own.error / (own.error + max(other.error, own.error / 2, ERROR_MIN))
    off = min(1.0, abs(estimate - rtt_us) / rtt_us)
    share = TUNE_ERROR * weight
    error = min(ERROR_MAX, max(ERROR_MIN, off * share + own.error * (1 - share)))
    force = max(-MOVE_US_MAX, min(MOVE_US_MAX, TUNE_MOVE * weight * (rtt_us - estimate)))
    ways = (own.x - other.x, own.y - other.y, own.z - other.z)
    length = math.hypot(*ways)
    if length < 1.0:  # in the same place: any direction
        ways = (dice() - 0.5, dice() - 0.5, dice() - 0.5)
        length = math.hypot(*ways) or 1.0
    along = length / (length + own.height + other.height) if estimate > 0 else 1.0
    x, y, z = (at + way / length * force for at, way in zip((own.x, own.y, own.z), ways, strict=True))
    height = max(HEIGHT_US_MIN, own.height + force * (1 - along))
    return Coordinate(x, y, z, height, error)


def middles(adverts: Iterable[Advert]) -> dict[str, Coordinate]:
    """The middle of each configured region; the :data:`REGIONS_MAX` with most peers."""
    there: dict[str, list[Coordinate]] = {}
    for advert in adverts:
        place = from_wire(advert.coordinate) if advert.region else None
        if place is not None and place.error < ERROR_MAX:
            there.setdefault(advert.region, []).append(place)
    largest = sorted(there, key=lambda region: -len(there[region]))[:REGIONS_MAX]
    return {region: _middle(there[region]) for region in largest}


def _middle(places: list[Coordinate]) -> Coordinate:
    parts = zip(*((p.x, p.y, p.z, p.height, p.error) for p in places), strict=True)
    return Coordinate(*(median(part) for part in parts))


def regions(adverts: Mapping[PeerId, Advert]) -> dict[PeerId, tuple[str, bool]]:
    """Each peer's region, and whether it is inferred; empty where nothing is known."""
    known = middles(adverts.values())
    found: dict[PeerId, tuple[str, bool]] = {}
    for peer_id, advert in adverts.items():
        place = None if advert.region else from_wire(advert.coordinate)
        found[peer_id] = (advert.region, False) if place is None or not known else (_nearest(place, known), True)
    return found


def _nearest(place: Coordinate, known: Mapping[str, Coordinate]) -> str:
    if place.error >= ERROR_MAX:
        return ""
    # two access lines are in the estimate, and say nothing about where it is
    far = {region: math.dist((place.x, place.y, place.z), (m.x, m.y, m.z)) for region, m in known.items()}
    best = min(far, key=far.__getitem__)
    return best if far[best] <= REGION_US_MAX else ""
