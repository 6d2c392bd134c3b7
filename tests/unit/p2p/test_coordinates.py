"""The map of round trips: it comes to fit, a liar does not bend it, regions are inferred from those who say theirs."""

import math
from random import Random
from statistics import median

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from p2p.core import coordinates
from p2p.core.advert import Advert
from p2p.core.coordinates import MOVE_US_MAX, Coordinate, from_wire, moved, regions

CITIES = {"eu": (0, 0), "us": (80_000, 0), "asia": (60_000, 150_000)}


class FakeWorld:
    """Nodes in three regions; round trips are distances on a plane plus access lines, with some jitter."""

    def __init__(self, per_city: int = 6, seed: int = 3) -> None:
        self.random = Random(seed)
        self.nodes = []
        for city, (x, y) in CITIES.items():
            for _ in range(per_city):
                near = (x + self.random.uniform(-4000, 4000), y + self.random.uniform(-4000, 4000))
                self.nodes.append((city, near, self.random.uniform(200, 3000)))
        self.places = [Coordinate() for _ in self.nodes]

    def rtt_us(self, a: int, b: int) -> float:
        return math.dist(self.nodes[a][1], self.nodes[b][1]) + self.nodes[a][2] + self.nodes[b][2]

    def run(self, rounds: int, claims=None) -> None:
        for _ in range(rounds):
            for a in range(len(self.nodes)):
                for b in self.random.sample(range(len(self.nodes)), 6):
                    if a != b:
                        theirs = (claims or {}).get(b) or self.places[b]
                        rtt = self.rtt_us(a, b) * self.random.uniform(1.0, 1.1)
                        self.places[a] = moved(self.places[a], theirs, rtt, self.random.random)

    def error(self, honest) -> float:
        pairs = [(a, b) for a in honest for b in honest if a < b]
        off = [abs(self.places[a].distance_us(self.places[b]) / self.rtt_us(a, b) - 1) for a, b in pairs]
        return median(off)


def test_estimates_come_to_fit():
    world = FakeWorld()
    world.run(60)
    assert world.error(range(len(world.nodes))) < 0.15


def test_liars_do_not_bend_the_map_much():
    world = FakeWorld()
    # two of eighteen claim to be sure to stand far away
    lie = Coordinate(9_000_000, -9_000_000, 0, 50, 0.02)
    world.run(60, {0: lie, 9: lie})
    honest = [n for n in range(len(world.nodes)) if n not in (0, 9)]
    assert world.error(honest) < 0.5


@given(
    st.tuples(*[st.integers(-60_000_000, 60_000_000)] * 8),
    st.integers(0, 8),
    st.floats(-1e9, 1e9, allow_nan=False),
)
def test_no_claim_moves_a_node_far(field, length, rtt_us):
    theirs = from_wire(field[:length])
    if theirs is None:
        return
    own = Coordinate(1000, 2000, 3000, 400, 0.5)
    after = moved(own, theirs, rtt_us, Random(1).random)
    assert math.dist((own.x, own.y, own.z), (after.x, after.y, after.z)) <= MOVE_US_MAX * 1.001
    assert abs(after.height - own.height) <= MOVE_US_MAX
    assert coordinates.ERROR_MIN <= after.error <= coordinates.ERROR_MAX
    assert from_wire(after.on_wire()) is not None


def test_regions_are_inferred_from_those_who_configured_theirs():
    world = FakeWorld()
    world.run(60)
    told = set()
    adverts = {}
    for number, ((city, _, _), place) in enumerate(zip(world.nodes, world.places, strict=True)):
        says = city if city not in told or number % 3 == 0 else ""
        told.add(says)
        adverts[str(number)] = Advert(str(number), 1, 1, region=says, coordinate=place.on_wire())
    # one liar: says "asia", stands in "eu"
    adverts["liar"] = msgspec.structs.replace(adverts["1"], region="asia")
    found = regions(adverts)
    for number, (city, _, _) in enumerate(world.nodes):
        region, inferred = found[str(number)]
        assert region == city
        assert inferred == (not adverts[str(number)].region)


def test_who_knows_nothing_is_told_nothing():
    adverts = {
        "a": Advert("a", 1, 1, region="eu", coordinate=(0, 0, 0, 50, 100_000)),
        "far": Advert("far", 1, 1, coordinate=(900_000, 0, 0, 50, 100_000)),
        "new": Advert("new", 1, 1),
        "unsure": Advert("unsure", 1, 1, coordinate=(0, 0, 0, 50, 1_000_000)),
        "odd": Advert("odd", 1, 1, coordinate=(1, 2)),
    }
    found = regions(adverts)
    assert found["a"] == ("eu", False)
    assert all(found[peer][0] == "" for peer in ("far", "new", "unsure", "odd"))
