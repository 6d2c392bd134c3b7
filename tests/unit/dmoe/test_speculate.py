"""Drafts from the text itself, and when they get a row."""

import numpy as np
import pytest

from dmoe.core.speculate import DRAFT_TOKENS_MAX, Draft, Lookup, Odds, Pace, allot


def drafted(tokens, count=5):
    return Lookup(tokens, 100).draft(count).tokens


def test_a_draft_is_what_followed_the_longest_match():
    assert drafted([1, 2, 3, 9, 9, 2, 3, 8, 8, 1, 2, 3]) == (9, 9, 2, 3, 8)


def test_of_equal_matches_the_latest_counts():
    assert drafted([1, 2, 7, 0, 1, 2, 8, 0, 4, 1, 2], 2) == (8, 0)


def test_a_single_token_is_no_match():
    assert drafted([1, 2, 3, 1]) == ()
    assert drafted([1, 1]) == ()


def test_a_repetition_goes_on():
    assert drafted([9, 4, 5, 6, 4, 5, 6, 4, 5], 7) == (6, 4, 5, 6, 4, 5, 6)


def test_what_was_said_since_counts():
    lookup = Lookup([1, 2, 3, 4], 50)
    assert lookup.draft(3).tokens == ()
    lookup.extend([1, 2])
    assert lookup.draft(3).tokens == (3, 4, 1)
    assert len(lookup.draft(1000).tokens) == DRAFT_TOKENS_MAX
    assert lookup.draft(0).tokens == ()


def test_longer_matches_are_another_kind():
    assert Lookup([1, 2, 9, 1, 2], 50).draft(1).kind == 0
    assert Lookup([1, 2, 3, 9, 1, 2, 3], 50).draft(1).kind == 1
    assert Lookup([1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5], 50).draft(1).kind == 2


def test_odds_follow_what_comes_true_even_without_a_row():
    odds = Odds()
    before = odds.of(1)
    for _ in range(20):
        odds.observe(Draft((7, 8), 1), 0, [7])
    assert odds.of(1) > 0.85 > before
    assert odds.of(0) == Odds().of(0)
    for _ in range(40):
        odds.observe(Draft((7, 8), 1), 2, [9])
    assert odds.of(1) < 0.1


def test_a_new_answers_odds_begin_where_the_others_are():
    every = Odds()
    one = Odds(every)
    for _ in range(30):
        one.observe(Draft((1, 2, 3, 4), 2), 4, [9])
    assert Odds(every).of(2) < 0.2
    assert every.observe(Draft((1, 2, 3), 2), 3, [1, 2, 9]) == 2


def paced(times):
    pace = Pace()
    for _ in range(5):
        for rows, seconds in times.items():
            pace.observe(rows, seconds)
    return pace


def test_drafts_get_rows_where_rows_are_nearly_free_and_none_where_they_cost_a_pass():
    far = paced({1: 0.300, 4: 0.302, 16: 0.310})
    assert allot([(0.8, 16)], far, 1, 64)[0] >= 8
    dear = paced({1: 0.010, 4: 0.040, 16: 0.160})
    assert allot([(0.8, 16)], dear, 1, 64) == [0]
    local = paced({1: 0.0100, 4: 0.0152, 16: 0.0360})
    assert 2 <= allot([(0.8, 16)], local, 1, 64)[0] <= 9
    assert allot([(0.15, 16)], local, 1, 64) == [0]


def test_the_likelier_answer_gets_the_rows():
    far = paced({1: 0.300, 16: 0.305})
    counts = allot([(0.9, 10), (0.3, 10), (0.9, 0)], far, 3, 8)
    assert counts[0] > counts[1]
    assert counts[2] == 0
    assert sum(counts) <= 8


def test_nothing_is_drafted_before_a_pass_was_measured():
    assert allot([(1.0, 8)], Pace(), 1, 8) == [0]


def test_times_that_are_old_are_tried_again():
    pace = paced({1: 0.010, 2: 0.100, 8: 0.400})
    assert allot([(0.95, 8)], pace, 1, 8) == [0]
    for _ in range(401):
        pace.observe(1, 0.010)
    assert allot([(0.95, 8)], pace, 1, 8)[0] > 0


@pytest.mark.parametrize("seed", range(3))
def test_one_slow_pass_does_not_count(seed):
    random = np.random.default_rng(seed)
    pace = paced({1: 0.010, 4: 0.011})
    pace.observe(4, 0.5 + random.random())
    assert pace.seconds(np.array([4]))[0] < 0.02
