"""Shares of a call add up to it exactly, whoever takes part in a pass."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from config.vocabulary import PeerId
from dmoe.bills import Bill, Bills, Payers
from dmoe.core.calls import kflop
from dmoe.core.sharing import split, weights_of

amounts = st.integers(0, 1 << 80)
WORK = ([(0, 1), (2, 3, 4)], [1999, 3001])
"""Two sum groups and what a row costs that chose all experts of them."""


@given(amounts, st.lists(st.integers(0, 1 << 50), min_size=1, max_size=20))
def test_parts_add_up_and_are_off_by_less_than_one_unit(total: int, weights: list[int]) -> None:
    parts = split(total, weights)
    assert sum(parts) == total
    whole = sum(weights)
    if whole:
        assert all(abs(p - Fraction(total * w, whole)) < 1 for p, w in zip(parts, weights, strict=True))
    assert parts == split(total, weights)


def test_the_rest_goes_to_the_largest_remainders_and_then_to_the_first() -> None:
    assert split(10, [1, 1, 1]) == [4, 3, 3]
    assert split(11, [1, 1, 1]) == [4, 4, 3]
    assert split(7, [3, 1]) == [5, 2]
    assert split(5, [0, 0]) == [5, 0]


@given(st.data())
def test_any_mix_of_answers_pays_each_call_to_the_nanocredit(data: st.DataObject) -> None:
    """Passes of several answers, dense and sparse, calls with all rows and with some, of bills and of nobody."""
    bills = Bills()
    owed = {b"a": 0, b"b": 0}
    known = [bills.of(f"request-{number}") for number in range(4)]
    for _ in range(data.draw(st.integers(1, 5))):
        mix: list[tuple[Bill | None, int]] = data.draw(
            st.lists(st.tuples(st.sampled_from([*known, None]), st.integers(1, 5)), min_size=1, max_size=6)
        )
        counts = [count for _, count in mix]
        payers = Payers([bill for bill, _ in mix], counts, bills.purpose("kept"))
        for _ in range(data.draw(st.integers(1, 4))):
            first = data.draw(st.integers(0, sum(counts) - 1))
            last = data.draw(st.integers(first + 1, sum(counts)))
            chosen = None
            if data.draw(st.booleans()):
                chosen = sorted(data.draw(st.sets(st.integers(0, last - first - 1), min_size=1)))
            rows = last - first if chosen is None else len(chosen)
            experts = None
            if data.draw(st.booleans()):
                flat = data.draw(st.lists(st.integers(-1, 7), min_size=2 * rows, max_size=2 * rows))
                experts = np.array(flat, np.int32).reshape(rows, 2)
            nano = kflop(*WORK, rows, experts) * data.draw(st.integers(0, 1 << 40))
            channel = data.draw(st.sampled_from(sorted(owed)))
            owed[channel] += nano
            payers.pay(PeerId("peer"), channel, nano, rows, experts, WORK, (first, chosen))
            weights = weights_of(counts, first, chosen, rows, *WORK, experts)
            assert len(weights) == len(counts)
    booked = {channel: 0 for channel in owed}
    for spent in bills.take():
        assert (spent.purpose == "request") == bool(spent.bill)
        for cost in spent.costs:
            booked[bytes.fromhex(cost.channel)] += cost.nano
    assert booked == owed


def test_a_call_is_paid_by_those_whose_rows_it_has() -> None:
    experts = np.array([[0, 2], [5, 6], [3, 4]], np.int32)
    # rows 0 and 1 are the first answer's, 2 the second's, 3 the third's; the call has rows 1, 2 and 3
    assert weights_of([2, 1, 1], 1, None, 3, *WORK, experts) == [1999 // 2 + 3001 // 3, 0, 2 * 3001 // 3]
    assert weights_of([2, 1, 1], 0, [0, 3], 2, *WORK, None) == [5000, 0, 5000]


def test_bills_are_taken_whole_and_forgotten_when_nobody_holds_them() -> None:
    bills = Bills()
    bill = bills.of("one")
    assert bills.of("one") is bill
    bill.add(PeerId("p"), b"a", 5)
    bills.of("").add(PeerId("p"), b"a", 1)
    assert [(each.bill, each.costs[0].nano) for each in bills.take(["one", "two"])] == [("one", 5)]
    bill.add(PeerId("p"), b"a", 7)
    found = {each.purpose: each.costs[0] for each in bills.take()}
    assert (found["request"].nano, found["request"].calls, found["asked"].nano) == (12, 2, 1)
    assert list(bills.take()) == []
    del bill
    assert bills.of("one").costs() == ()


def test_only_channels_that_changed_are_taken_and_each_with_its_whole_sum() -> None:
    """A node that runs for months has had thousands of channels; most of them will never change again."""
    bills = Bills()
    audits = bills.purpose("audit")
    for number in range(100):
        audits.add(PeerId("p"), bytes([number]), 1)
    assert len(bills.take()[0].costs) == 100
    audits.add(PeerId("p"), b"\x07", 5)
    (spent,) = bills.take()
    assert [(cost.channel, cost.calls, cost.nano) for cost in spent.costs] == [("07", 2, 6)]
    assert len(audits.costs()) == 100


def test_a_call_is_counted_once_for_a_bill_with_several_sequences_in_it() -> None:
    bills = Bills()
    texts = bills.of("embedding")
    Payers([texts, texts, None], [1, 2, 1], bills.purpose("kept")).pay(
        PeerId("p"), b"c", 40, 4, None, ([[0]], [10]), (0, None)
    )
    (cost,) = texts.costs()
    assert (cost.calls, cost.nano) == (1, 30)
    assert bills.purpose("kept").costs()[0].nano == 10
