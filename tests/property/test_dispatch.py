"""Replica choice: every group goes to one who has it, failures rest and come back, load spreads, estimates adapt."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dmoe.core.dispatch import HOLD_FIRST_US, HOLD_MAX_US, PEER_WIDE, Dispatcher, Need, Replica

SECOND = 1_000_000
peers = st.sampled_from(["me", "a", "b", "c", "d"])
need_lists = st.lists(st.lists(peers, unique=True, max_size=5), min_size=1, max_size=8)


def needs_of(lists, price=0):
    return [Need(group, group, tuple(Replica(p, price) for p in names)) for group, names in enumerate(lists)]


@given(need_lists, st.integers(1, 300), st.floats(0, 1, exclude_max=True), st.data())
def test_each_group_goes_to_exactly_one_peer_that_has_it(lists, rows, dice, data):
    dispatcher, needs = Dispatcher("me"), needs_of(lists)
    for _ in range(data.draw(st.integers(0, 5))):
        peer, shard = data.draw(peers), data.draw(st.integers(-1, 7))
        dispatcher.failed(peer, (shard,), data.draw(st.integers(0, 10 * SECOND)))
    plan = dispatcher.plan(needs, rows, data.draw(st.integers(0, 60 * SECOND)), dice)
    got = sorted(position for positions in plan.values() for position in positions)
    assert got == [position for position, names in enumerate(lists) if names]
    for peer, positions in plan.items():
        assert all(peer in lists[position] for position in positions)


@given(need_lists, st.data())
def test_who_failed_a_group_already_is_not_asked_for_it_again(lists, data):
    dispatcher, needs = Dispatcher("me"), needs_of(lists)
    tried = {group: set(data.draw(st.lists(peers))) for group in range(len(lists))}
    plan = dispatcher.plan(needs, 1, 0, 0.5, tried)
    for peer, positions in plan.items():
        assert not any(peer in tried[position] for position in positions)


def warm(dispatcher, peer, round_trip_us, row_us, calls=50):
    for _ in range(calls):
        dispatcher.answered(peer, (), 1, round_trip_us + row_us, row_us)


def test_the_faster_replica_is_taken_and_the_choice_follows_measurements():
    dispatcher, needs = Dispatcher("me"), needs_of([["a", "b"]])
    warm(dispatcher, "a", 1000, 100)
    warm(dispatcher, "b", 5000, 100)
    assert dispatcher.plan(needs, 1, 0, 0.5) == {"a": [0]}
    warm(dispatcher, "a", 20_000, 100)
    assert dispatcher.plan(needs, 1, 0, 0.5) == {"b": [0]}


def test_few_rows_share_a_call_and_many_rows_share_the_work():
    dispatcher, needs = Dispatcher("me"), needs_of([["a", "b"]] * 4)
    for peer in ("a", "b"):
        warm(dispatcher, peer, 1000, 100)
    few, many = dispatcher.plan(needs, 1, 0, 0.5), dispatcher.plan(needs, 200, 0, 0.5)
    assert len(few) <= 2
    assert {peer: len(positions) for peer, positions in many.items()} == {"a": 2, "b": 2}


def test_rows_in_flight_send_the_next_call_elsewhere():
    dispatcher, needs = Dispatcher("me"), needs_of([["a", "b"]])
    for peer in ("a", "b"):
        warm(dispatcher, peer, 1000, 100)
    (first,) = dispatcher.plan(needs, 100, 0, 0.5)
    dispatcher.started(first, 100)
    (second,) = dispatcher.plan(needs, 100, 0, 0.5)
    assert second != first
    dispatcher.ended(first, 100)
    assert dispatcher.plan(needs, 100, 0, 0.5) == {first: [0]}


def test_local_experts_are_a_replica_like_any_other():
    dispatcher, needs = Dispatcher("me"), needs_of([["me", "a"]] * 4)
    warm(dispatcher, "me", 0, 100)
    warm(dispatcher, "a", 1000, 100)
    assert dispatcher.plan(needs, 1, 0, 0.5) == {"me": [0, 1, 2, 3]}
    assert set(dispatcher.plan(needs, 200, 0, 0.5)) == {"me", "a"}


def test_a_dear_replica_must_be_faster_to_be_taken():
    dispatcher = Dispatcher("me")
    needs = [Need(0, 0, (Replica("a", 4_000_000), Replica("b", 1_000_000)))]
    warm(dispatcher, "a", 1000, 100)
    warm(dispatcher, "b", 1200, 100)
    assert dispatcher.plan(needs, 1, 0, 0.5) == {"b": [0]}
    warm(dispatcher, "b", 9000, 100)
    assert dispatcher.plan(needs, 1, 0, 0.5) == {"a": [0]}


def test_a_failed_replica_rests_longer_each_time_and_one_probe_lets_it_back():
    dispatcher, needs = Dispatcher("me"), needs_of([["a", "b"]])
    warm(dispatcher, "a", 100, 10)
    warm(dispatcher, "b", 9000, 10)
    now, length = 0, HOLD_FIRST_US
    for _ in range(3):
        dispatcher.failed("a", (0,), now)
        assert dispatcher.plan(needs, 1, now + length - 1, 0.5) == {"b": [0]}
        now += length
        assert dispatcher.plan(needs, 1, now, 0.5) == {"a": [0]}, "the probe"
        assert dispatcher.plan(needs, 1, now, 0.5) == {"b": [0]}, "one at a time"
        length *= 2
    dispatcher.answered("a", (0,), 1, 110, 10)
    assert dispatcher.plan(needs, 1, now, 0.5) == {"a": [0]}


def test_failures_of_calls_sent_before_the_hold_count_once():
    dispatcher = Dispatcher("me")
    for _ in range(20):
        dispatcher.failed("a", (0,), 0)
    assert dispatcher.held("a", 0, HOLD_FIRST_US - 1)
    assert not dispatcher.held("a", 0, HOLD_FIRST_US)
    for turn in range(20):
        dispatcher.failed("b", (0,), turn * 2 * HOLD_MAX_US)
    assert not dispatcher.held("b", 0, 19 * 2 * HOLD_MAX_US + HOLD_MAX_US)


def test_an_unreachable_peer_rests_with_all_its_shards_and_is_the_last_resort():
    dispatcher, needs = Dispatcher("me"), needs_of([["a", "b"], ["a"]])
    warm(dispatcher, "a", 100, 10)
    warm(dispatcher, "b", 9000, 10)
    dispatcher.failed("a", (PEER_WIDE,), 0)
    assert dispatcher.plan(needs, 1, 1, 0.5) == {"b": [0], "a": [1]}


def test_every_replica_is_tried_now_and_then():
    dispatcher, needs = Dispatcher("me"), needs_of([["a", "b", "c"]])
    warm(dispatcher, "a", 100, 10)
    warm(dispatcher, "b", 9000, 10)
    warm(dispatcher, "c", 9000, 10)
    chosen = Counter(peer for n in range(10_000) for peer in dispatcher.plan(needs, 1, 0, n / 10_000))
    assert chosen["a"] > 9_700
    assert min(chosen["b"], chosen["c"]) > 20


def test_callers_that_know_nothing_spread_over_the_replicas():
    needs = needs_of([["a", "b", "c"]])
    chosen = Counter(peer for n in range(300) for peer in Dispatcher(f"caller-{n}").plan(needs, 1, 0, 0.5))
    assert min(chosen[peer] for peer in "abc") > 50


def test_the_retry_budget_ends_and_refills_with_answers():
    dispatcher = Dispatcher("me")
    used = 0
    while dispatcher.may_retry():
        used += 1
    assert used == 32
    warm(dispatcher, "a", 1, 1, calls=10)
    assert dispatcher.may_retry()
    assert not dispatcher.may_retry()


def test_peers_that_left_are_forgotten_once_they_are_many():
    dispatcher = Dispatcher("me")
    for n in range(3000):
        warm(dispatcher, f"peer-{n}", 1, 1, calls=1)
        dispatcher.failed(f"peer-{n}", (0,), 0)
    dispatcher.started("peer-7", 1)
    dispatcher.forget({"peer-5"})
    assert set(dispatcher.peers) == {"peer-5", "peer-7"}
    assert dispatcher.held("peer-5", 0, 1)
    assert not dispatcher.held("peer-9", 0, 1)
