"""Admission and shares of passes: bounded, in order, and fair between users whatever they send."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import BusyError
from dmoe.core.scheduler import (
    ADMISSION_QUANTUM,
    PREFILL_QUANTUM,
    PREFILL_ROWS_MIN,
    Admission,
    PassPlan,
    Ready,
)

COST_MAX = 3000
costs = st.integers(1, COST_MAX)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), costs, st.booleans()), max_size=60),
    st.integers(1, 5),
    st.integers(COST_MAX, 2 * COST_MAX),
    st.randoms(use_true_random=False),
)
def test_bounds_hold_and_everybody_is_served_once(requests, slots, positions, random):
    admission = Admission(slots_max=slots, positions_max=positions, waiting_max=1000)
    running, served, cost_of = [], [], {}
    arrived = {user: [] for user in "abcd"}

    def start():
        for key in admission.admit():
            running.append(key)
            served.append(key)
        assert admission.active == len(running) <= slots
        assert admission.positions == sum(cost_of[key] for key in running) <= positions

    for key, (user, cost, leave) in enumerate(requests):
        cost_of[key] = cost
        admission.join(key, user, cost)
        arrived[user].append(key)
        start()
        if leave and running:
            admission.leave(running.pop(random.randrange(len(running))))
            start()
    while running:
        admission.leave(running.pop(0))
        start()
    assert sorted(served) == list(range(len(requests)))
    for mine in arrived.values():
        assert [key for key in served if key in mine] == mine, "a user's requests keep their order"
    assert (admission.active, admission.waiting, admission.positions) == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(costs, min_size=1, max_size=40), st.lists(costs, min_size=1, max_size=40))
def test_two_users_who_wait_get_the_same_positions(ours, theirs):
    admission = Admission(slots_max=1, positions_max=COST_MAX, waiting_max=1000)
    cost_of = {("ours", n): cost for n, cost in enumerate(ours)} | {("theirs", n): c for n, c in enumerate(theirs)}
    for key, cost in cost_of.items():
        admission.join(key, key[0], cost)
    got, left = Counter(), Counter({"ours": len(ours), "theirs": len(theirs)})
    while left["ours"] and left["theirs"]:
        (key,) = admission.admit()
        got[key[0]] += cost_of[key]
        left[key[0]] -= 1
        admission.leave(key)
        assert abs(got["ours"] - got["theirs"]) <= 2 * (COST_MAX + ADMISSION_QUANTUM)


def test_many_requests_of_one_user_do_not_keep_another_waiting():
    admission = Admission(slots_max=2, positions_max=10_000, waiting_max=1000)
    for n in range(100):
        admission.join(("many", n), "many", 100)
    running = admission.admit()
    admission.join("one", "one", 100)
    for _ in range(2 * ADMISSION_QUANTUM // 100):
        admission.leave(running.pop(0))
        running += admission.admit()
        if "one" in running:
            return
    pytest.fail("the other user still waits")


def test_a_place_that_is_left_is_free_at_once_and_the_line_is_bounded():
    admission = Admission(slots_max=1, positions_max=100, waiting_max=1)
    admission.join("a", "u", 60)
    assert admission.admit() == ["a"]
    admission.join("b", "u", 60)
    with pytest.raises(BusyError) as caught:
        admission.require_room(2.0)
    assert caught.value.retry_after_ms == 4000
    admission.leave("b")
    admission.require_room(2.0)
    assert admission.waiting == 0
    admission.join("c", "v", 60)
    admission.leave("a")
    assert admission.admit() == ["c"]


def test_what_does_not_fit_is_not_passed_over():
    admission = Admission(slots_max=4, positions_max=100, waiting_max=10)
    admission.join("a", "u", 60)
    admission.join("large", "u", 80)
    admission.join("small", "u", 10)
    assert admission.admit() == ["a"]
    admission.leave("a")
    assert admission.admit() == ["large", "small"]


answers = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 400), st.integers(0, 6)), min_size=1, max_size=30, unique=False
)


@settings(max_examples=100, deadline=None)
@given(answers, st.integers(1, 300))
def test_every_pass_serves_all_who_speak_and_some_prompt_within_the_budget(found, budget):
    plan = PassPlan(budget)
    ready = [Ready(n, user, prompt) for n, (user, prompt, _) in enumerate(found)]
    _, spare = plan.spare(ready)
    drafts = [0] * len(found)
    for n, (_, prompt, wanted) in enumerate(found):
        if not prompt:
            drafts[n] = min(wanted, spare)
            spare -= drafts[n]
    ready = [Ready(n, user, prompt, drafts[n]) for n, (user, prompt, _) in enumerate(found)]
    shares = dict(plan.plan(ready))
    saying = [each for each in ready if not each.prompt_rows]
    prompts = [each for each in ready if each.prompt_rows]
    assert all(shares[each.key] == 1 + each.drafts for each in saying)
    assert all(shares.get(each.key, 0) <= each.prompt_rows for each in prompts)
    given_rows = sum(shares.get(each.key, 0) for each in prompts)
    least = min(PREFILL_ROWS_MIN, budget, sum(each.prompt_rows for each in prompts))
    assert given_rows >= least
    assert sum(shares.values()) <= max(budget, len(saying) + min(PREFILL_ROWS_MIN, budget))
    assert all(rows > 0 for rows in shares.values())


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(1, 5), min_size=2),
    st.integers(1, 256),
)
def test_users_with_prompts_get_the_same_rows_however_many_they_send(requests, budget):
    plan, got = PassPlan(budget), Counter()
    left = {(user, n): 5000 for user, count in requests.items() for n in range(count)}
    for _ in range(12):
        for key, rows in plan.plan([Ready(key, key[0], rows) for key, rows in left.items()]):
            left[key] -= rows
            got[key[0]] += rows
    assert max(got.values()) - min(got.values()) <= PREFILL_QUANTUM
    assert sum(got.values()) == 12 * budget
