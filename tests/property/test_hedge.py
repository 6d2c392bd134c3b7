"""When a call is late, and how often another is asked as well."""

from hypothesis import given
from hypothesis import strategies as st

from dmoe.core.hedge import LIMIT_MIN_US, RATIO_MAX, SAMPLES_MIN, SAVED_MAX, SHARE, WINDOW, HedgeBudget, Tail, Tails

ratios = st.floats(0, 50)


@given(st.lists(st.booleans(), max_size=2000))
def test_hedges_are_a_share_of_the_calls_and_a_few(events):
    budget = HedgeBudget()
    for is_call in events:
        if is_call:
            budget.called()
        else:
            budget.take()
        assert budget.hedges <= SAVED_MAX + SHARE * budget.calls + 1e-6
        assert 0 <= budget.saved <= SAVED_MAX


@given(st.lists(st.booleans(), min_size=1, max_size=2000), st.data())
def test_no_stretch_of_calls_has_more(events, data):
    """The bound holds from any moment on, not only from the beginning: nothing is saved up beyond a few."""
    budget, start = HedgeBudget(), data.draw(st.integers(0, len(events) - 1))
    for n, is_call in enumerate(events):
        if n == start:
            calls, hedges = budget.calls, budget.hedges
        if is_call:
            budget.called()
        else:
            budget.take(data.draw(st.integers(1, 3)))
    assert budget.hedges - hedges <= SAVED_MAX + SHARE * (budget.calls - calls) + 1e-6


@given(st.lists(ratios, max_size=400))
def test_the_percentile_is_one_of_the_window(values):
    tail = Tail()
    for value in values:
        tail.add(value)
    found = tail.p95()
    assert (found is None) == (len(values) < SAMPLES_MIN)
    assert len(tail.values) <= WINDOW
    if found is not None:
        window = sorted(values[-WINDOW:])
        assert sum(value > found for value in window) <= 0.05 * len(window)


@given(st.floats(1, 1e6), st.floats(1, 1e6))
def test_a_limit_grows_with_what_is_expected(short, long):
    tails = Tails()
    for n in range(SAMPLES_MIN):
        tails.took("a", 100.0 + n, 100.0)
    short, long = sorted((short, long))
    assert LIMIT_MIN_US <= tails.limit_us("a", short) <= tails.limit_us("a", long) <= 1.2 * max(long, LIMIT_MIN_US)


def test_a_new_peer_is_measured_by_the_others_and_nobody_by_nothing():
    tails = Tails()
    assert tails.limit_us("a", 1e6) is None
    for _ in range(SAMPLES_MIN):
        tails.took("a", 2e6, 1e6)
    assert tails.limit_us("b", 1e6) == tails.limit_us("a", 1e6) == 2e6
    for _ in range(SAMPLES_MIN):
        tails.took("b", 9e6, 1e6)
    assert tails.limit_us("b", 1e6) == 9e6
    tails.forget({"a"})
    assert tails.limit_us("b", 1e6) > 2e6, "what all of them took is kept"
    tails.took("b", 1e12, 0.0)
    assert max(tails._own["b"].values) == RATIO_MAX
