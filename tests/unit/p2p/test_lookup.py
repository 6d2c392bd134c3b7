"""Look-ups in the DHT: disjoint paths, dead peers, liars; and what a node announces there."""

from random import Random

from p2p.core import lookup, providing
from p2p.core.advert import ModelOffer, bitmap
from p2p.core.lookup import ASKED_MAX, CLOSE, Lookup, distance

KEY = b"\x12\x20" + b"k" * 32
OWN = b"own"


class FakeSwarm:
    """Peers that know some others, near ones best, as Kademlia tables do."""

    def __init__(self, count: int, seed: int = 1) -> None:
        self.random = Random(seed)
        self.peers = [self.random.randbytes(20) for _ in range(count)]
        self.dead: set[bytes] = set()

    def closest(self, key: bytes, count: int) -> list[bytes]:
        return sorted(self.peers, key=lambda peer: distance(key, peer))[:count]

    def answer(self, peer: bytes) -> list[bytes]:
        known = self.random.sample(self.peers, 30)
        return sorted(known, key=lambda other: distance(KEY, other))[:20]

    def run(self, search: Lookup, answer=None) -> list[bytes]:
        asked: list[bytes] = []
        waiting = search.next()
        while waiting or not search.is_over:
            peer = waiting.pop(0)
            asked.append(peer)
            if peer in self.dead:
                search.failed(peer)
            else:
                search.answered(peer, (answer or self.answer)(peer))
            waiting += search.next()
        return asked


def test_a_look_up_comes_to_the_closest_peers_and_asks_nobody_twice():
    swarm = FakeSwarm(200)
    asked = swarm.run(Lookup(KEY, swarm.random.sample(swarm.peers, 9), OWN))
    assert len(asked) == len(set(asked)) <= ASKED_MAX
    assert set(swarm.closest(KEY, CLOSE)) <= set(asked)


def test_dead_peers_do_not_stand_in_the_way():
    swarm = FakeSwarm(100)
    swarm.dead = set(swarm.random.sample(swarm.peers, 40))
    alive = [peer for peer in swarm.closest(KEY, 100) if peer not in swarm.dead]
    asked = swarm.run(Lookup(KEY, swarm.random.sample(alive, 6), OWN))
    assert set(alive[:3]) <= set(asked)


def test_liars_on_one_path_do_not_take_the_others():
    swarm = FakeSwarm(100)
    start = swarm.random.sample(swarm.peers, 6)
    liar = start[0]
    # made-up peers that lie far closer to the key than anybody real
    fakes = sorted((swarm.random.randbytes(20) for _ in range(3000)), key=lambda fake: distance(KEY, fake))[:40]

    def answer(peer: bytes) -> list[bytes]:
        return fakes if peer == liar or peer in fakes else swarm.answer(peer)

    asked = swarm.run(Lookup(KEY, start, OWN), answer)
    assert set(swarm.closest(KEY, 3)) <= set(asked)
    assert len(asked) <= ASKED_MAX


def test_nobody_known_is_nobody_asked():
    search = Lookup(KEY, [OWN], OWN)
    assert search.next() == []
    assert search.is_over


def test_a_peer_names_a_bounded_number_of_others():
    search = Lookup(KEY, [b"liar"], OWN)
    assert search.next() == [b"liar"]
    search.answered(b"liar", (bytes([n, n]) for n in range(250)))
    assert sum(len(path.known) for path in search._paths) == 1 + lookup.NAMED_MAX


def test_keys_are_multihashes_and_differ():
    model = "ab" * 32
    keys = {providing.model_key(model), providing.shard_key(model, 0), providing.shard_key(model, 1)}
    assert len(keys) == 3
    assert all(len(key) == 34 and key.startswith(b"\x12\x20") for key in keys)
    assert (
        providing.shard_key(model, 1).hex().endswith("1e9419c4575779755312e5653f5ba76cad8d6827be44489b8cf9d5977b88fa32")
    )


def test_what_is_held_is_announced_rarest_first_again_in_time_and_withdrawn(monkeypatch):
    monkeypatch.setattr(providing, "SHARD_KEYS_MAX", 3)
    model = "ab" * 32
    it = providing.Announcements()
    rarity = {0: 9, 1: 1, 2: 5, 3: 2}
    held = (ModelOffer(model, bitmap({0, 1, 2, 3}), 1, 1, 1),)
    assert it.follow(held, lambda _model, index: rarity[index]) == ()
    order = []
    while (key := it.next(1000, 99)) is not None:
        order.append(key)
        it.done(key, 1000, 99)
    assert order == [providing.model_key(model), *(providing.shard_key(model, index) for index in (1, 3, 2))]
    assert it.next(1000 + providing.REPUBLISH_MS, 99) == order[0]
    fewer = (ModelOffer(model, bitmap({3}), 1, 1, 1),)
    dropped = it.follow(fewer, lambda _model, index: rarity[index])
    assert set(dropped) == {providing.shard_key(model, 1), providing.shard_key(model, 2)}
    assert it.next(1000, 99) is None
    assert set(it.follow((), lambda _model, _index: 0)) == {providing.model_key(model), providing.shard_key(model, 3)}


def test_a_key_that_cannot_be_announced_does_not_hold_up_the_others():
    it = providing.Announcements()
    it.follow((ModelOffer("ab" * 32, b"\x01", 1, 1, 1),), lambda _model, _index: 0)
    first = it.next(0, 1)
    it.failed(first, 0)
    assert it.next(0, 1) not in (None, first)


def test_a_key_is_announced_again_when_the_swarm_has_grown():
    it = providing.Announcements()
    it.follow((ModelOffer("ab" * 32, b"\x01", 1, 1, 1),), lambda _model, _index: 0)
    rounds = []
    for peers in (*range(1, 60), 500):
        while (key := it.next(0, peers)) is not None:
            it.done(key, 0, peers)
            rounds.append(peers)
    assert sorted(set(rounds)) == [1, 2, 4, 8, 16, 20]
    assert len(rounds) == 12
