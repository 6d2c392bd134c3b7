"""Placement: deterministic, stable, balanced, and nobody is left out."""

from collections import Counter
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.core import placement
from dmoe.core.placement import Candidate, Holding, Patience, Wanted, assign, decide, quantised

MODEL = "m" * 64
GIB = 1 << 30


def shards(count, replicas):
    return [Wanted(index, f"expert-{index}", replicas) for index in range(count)]


def nodes(weights):
    return [Candidate(f"peer-{n}", weight * GIB, False, frozenset()) for n, weight in enumerate(weights)]


sizes = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=12)


@given(sizes, st.integers(1, 30), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_view_in_any_order_gives_the_same_assignment(weights, count, replicas, random):
    view = nodes(weights)
    other = list(view)
    random.shuffle(other)
    assert assign(MODEL, shards(count, replicas), view) == assign(MODEL, shards(count, replicas), other)


@given(sizes, st.integers(1, 30), st.integers(1, 4))
def test_every_shard_has_its_replicas_on_different_nodes(weights, count, replicas):
    for peers in assign(MODEL, shards(count, replicas), nodes(weights)).values():
        assert len(set(peers)) == len(peers) >= min(replicas, len(weights))


@given(sizes, st.integers(1, 30), st.integers(1, 4))
def test_every_node_gets_some(weights, count, replicas):
    assigned = assign(MODEL, shards(count, replicas), nodes(weights))
    assert {peer for peers in assigned.values() for peer in peers} == {c.peer_id for c in nodes(weights)}


@given(sizes, st.integers(1, 30), st.integers(1, 4), st.data())
def test_when_a_node_leaves_only_its_shards_move(weights, count, replicas, data):
    view = nodes(weights)
    before = assign(MODEL, shards(count, replicas), view)
    gone = data.draw(st.sampled_from(view)).peer_id
    after = assign(MODEL, shards(count, replicas), [c for c in view if c.peer_id != gone])
    for index, peers in before.items():
        base = [peer for peer in peers[:replicas] if peer != gone]
        assert list(after[index][: len(base)]) == base, "those who stay keep what they had, in the same order"
        if gone not in peers[:replicas]:
            assert after[index][:replicas] == peers[:replicas]


def test_shares_follow_the_offered_room():
    held = Counter(peer for peers in assign(MODEL, shards(4000, 1), nodes([1, 1, 2, 4])).values() for peer in peers)
    for peer, part in (("peer-0", 1), ("peer-1", 1), ("peer-2", 2), ("peer-3", 4)):
        assert abs(held[peer] / 4000 - part / 8) < 0.03


@given(sizes, st.integers(1, 20), st.integers(1, 3), st.data())
def test_a_full_node_gets_nothing_new_and_keeps_what_it_has(weights, count, replicas, data):
    view = nodes(weights)
    plain = assign(MODEL, shards(count, replicas), view)
    who = data.draw(st.sampled_from(view))
    had = frozenset(index for index, peers in plain.items() if who.peer_id in peers[:replicas] and index % 2)
    full = Candidate(who.peer_id, who.offered_bytes, True, had)
    after = assign(MODEL, shards(count, replicas), [full if c is who else c for c in view])
    assert {index for index, peers in after.items() if who.peer_id in peers} == had


@settings(max_examples=50)
@given(sizes, st.integers(1, 16), st.integers(1, 3))
def test_nodes_that_follow_their_decisions_settle_and_stay_settled(weights, count, replicas):
    wanted, view = shards(count, replicas), nodes(weights)
    held = {c.peer_id: set(range(count)) if n == 0 else set() for n, c in enumerate(view)}
    for _ in range(4):
        view = [Candidate(c.peer_id, c.offered_bytes, False, frozenset(held[c.peer_id])) for c in view]
        decisions = {c.peer_id: decide(c.peer_id, MODEL, wanted, view, held[c.peer_id]) for c in view}
        for peer, decision in decisions.items():
            held[peer] |= set(decision.fetch)
            held[peer] -= set(decision.surplus)
        for index in range(count):
            assert any(index in have for have in held.values()), "a shard is never dropped by everybody"
    assert all(not d.fetch and not d.surplus for d in decisions.values())


def test_the_rarest_shard_is_fetched_first():
    view = [Candidate("me", GIB, False, frozenset()), Candidate("other", GIB, False, frozenset({0, 2}))]
    assert decide("me", MODEL, shards(3, 2), view, ()).fetch[0] == 1


def test_nothing_is_wanted_after_an_undeployment():
    view = nodes([1, 2])
    assert decide("peer-0", MODEL, shards(3, 0), view, (0, 1)).surplus == (0, 1)
    assert decide("peer-0", MODEL, shards(3, 0), view, ()).fetch == ()


def test_a_surplus_is_dropped_only_after_the_hold_time_without_a_break():
    holding = Holding(hold_ms=100)
    assert holding.ripe(MODEL, (1, 2), 0) == []
    assert holding.ripe(MODEL, (2,), 60) == []
    assert holding.ripe(MODEL, (1, 2), 110) == [2]
    assert holding.ripe(MODEL, (1, 2), 210) == [1, 2]


@given(st.integers(0, 1 << 50))
def test_offered_room_is_quantised_downwards_and_never_by_more_than_a_third(offered):
    value = quantised(offered)
    assert value <= offered
    assert 3 * value >= 2 * offered or offered < 4
    assert quantised(value) == value


def test_the_next_in_rank_steps_in_for_a_node_that_never_brings_a_shard_up():
    wanted = shards(4, 1)
    view = nodes([1, 1, 1])
    me = view[0].peer_id
    patience, waits = Patience(me), {shard.index: 100 for shard in wanted}
    first = assign(MODEL, wanted, view)
    assert not patience.observe(MODEL, first, view, waits, 0)
    assert not patience.observe(MODEL, first, view, waits, 99)
    assert patience.observe(MODEL, first, view, waits, 100)
    second = assign(MODEL, wanted, view, patience.late(MODEL))
    for index, peers in first.items():
        if peers[0] == me:
            assert second[index][0] == me, "a node never counts itself late"
        else:
            assert second[index][0] != peers[0]
    ready = [Candidate(c.peer_id, c.offered_bytes, False, frozenset(range(4))) for c in view]
    patience.observe(MODEL, second, ready, waits, 150)
    assert assign(MODEL, wanted, ready, patience.late(MODEL)) == first, "whoever comes late takes its place again"


def test_no_peer_id_can_break_the_ranking(monkeypatch):
    """A hash of all ones (or zeros) can be searched for; it ranks first (or last) like any other."""
    for digest in (b"\xff" * 32, b"\0" * 32):
        monkeypatch.setattr(placement, "sha256", lambda data, digest=digest: SimpleNamespace(digest=lambda: digest))
        assert 0 < placement.score("m", "s", "p", 1 << 62) < float("inf")
