"""Peers far off their like rest although they answer; a bounded share of them, and a probe brings each back."""

from hypothesis import given
from hypothesis import strategies as st

from dmoe.core.dispatch import Dispatcher, Need, Replica
from dmoe.core.holds import EJECT_FIRST_US, HOLD_MAX_US
from dmoe.core.outliers import SAMPLES_MIN, SHARE_MAX, Outliers

SECOND = 1_000_000
PEERS = ["a", "b", "c", "d", "e", "f"]


def swarm_of(*peers):
    dispatcher = Dispatcher("me")
    for _ in range(3 * SAMPLES_MIN):
        for peer in peers:
            good(dispatcher, peer)
    return dispatcher


def good(dispatcher, peer, us=1000.0, now=0):
    dispatcher.answered(peer, (), 1, us, 100.0)
    dispatcher.took(peer, us, us, now)


def late(dispatcher, peer, now=0):
    dispatcher.answered(peer, (), 1, 50_000.0, 100.0)
    dispatcher.took(peer, 50_000.0, 1000.0, now)


def needs(*peers):
    return [Need(0, 0, tuple(Replica(peer, 0) for peer in peers))]


@given(st.lists(st.tuples(st.sampled_from(PEERS), st.booleans(), st.floats(0, 1e6)), max_size=400))
def test_at_most_a_third_is_ejected_whatever_happens(calls):
    outliers, ejected = Outliers(), set()
    for peer, bad, typical_us in calls:
        if peer in ejected:
            continue
        outliers.ended(peer, bad=bad, typical_us=typical_us)
        if outliers.is_outlier(peer, ejected):
            ejected.add(peer)
        assert len(ejected) <= SHARE_MAX * len(PEERS)


@given(st.integers(0, SAMPLES_MIN - 1))
def test_few_calls_judge_nobody(count):
    dispatcher = swarm_of("a", "b")
    for _ in range(count):
        late(dispatcher, "c")
    assert not dispatcher.holds.ejected()


def test_who_is_late_now_and_then_rests_and_the_others_do_not():
    dispatcher = swarm_of("a", "b", "c")
    for n in range(40):
        good(dispatcher, "a")
        good(dispatcher, "b")
        late(dispatcher, "c") if n % 2 else good(dispatcher, "c")
    assert dispatcher.holds.ejected() == {"c"}
    assert dispatcher.held("c", 0, 0)
    assert "c" not in dispatcher.plan(needs("a", "b", "c"), 1, 1, 0.019)
    assert dispatcher.plan(needs("c"), 1, 1, 0.5) == {"c": [0]}, "better than an error"


def test_who_fails_now_and_then_rests():
    dispatcher = swarm_of("a", "b", "c")
    for n in range(40):
        dispatcher.failed("c", (0,), n) if n % 2 else good(dispatcher, "c")
    assert dispatcher.holds.ejected() == {"c"}


def test_who_is_steadily_much_slower_rests():
    dispatcher = swarm_of("a", "b")
    for _ in range(40):
        good(dispatcher, "c", us=20_000.0)
    assert dispatcher.holds.ejected() == {"c"}


def test_where_all_are_slow_nobody_rests():
    dispatcher = swarm_of("a", "b", "c")
    for _ in range(40):
        for peer in "abc":
            late(dispatcher, peer)
    assert len(dispatcher.holds.ejected()) <= 1


def test_of_two_peers_none_is_ejected():
    dispatcher = swarm_of("a", "b")
    for _ in range(40):
        late(dispatcher, "b")
    assert not dispatcher.holds.ejected()


def ejected_once():
    dispatcher = swarm_of("a", "b", "c")
    while not dispatcher.holds.ejected():
        late(dispatcher, "c")
    return dispatcher


def test_answers_of_calls_from_before_do_not_end_an_ejection():
    dispatcher = ejected_once()
    for _ in range(3):
        good(dispatcher, "c")
    assert dispatcher.held("c", 0, 1)


def test_one_probe_at_a_time_and_a_good_one_brings_it_back():
    dispatcher = ejected_once()
    now = EJECT_FIRST_US + 1
    for peer in "ab":
        dispatcher.estimate(peer).round_trip_us = 1e6
    assert dispatcher.plan(needs("a", "c"), 1, now, 0.5) == {"c": [0]}, "the probe"
    assert dispatcher.plan(needs("a", "c"), 1, now, 0.5) == {"a": [0]}, "one at a time"
    good(dispatcher, "c", now=now)
    assert not dispatcher.holds.ejected()
    assert not dispatcher.held("c", 0, now)


def test_a_bad_probe_makes_it_rest_twice_as_long_up_to_a_bound():
    dispatcher, now, length = ejected_once(), 0, EJECT_FIRST_US
    for _ in range(6):
        now += length + 1
        assert not dispatcher.held("c", 0, now)
        dispatcher.holds.probe("c", 0, now)
        late(dispatcher, "c", now)
        length = min(2 * length, HOLD_MAX_US)
        assert dispatcher.held("c", 0, now + length - 1)
    assert length == HOLD_MAX_US
