"""The verdict: liars of every kind are guilty, honest machines never, whatever they are asked."""

from random import Random

import numpy as np
import pytest

from dmoe.core import verdict, wire
from dmoe.core.variant import Variant
from dmoe.core.verdict import Likeness, alike
from dmoe.graphs import expert_graph
from dmoe.runtime import Expert as Session
from dmoe.runtime import open_session, weighted_sum
from tests.unit.dmoe.trust_kit import (
    cancelling,
    closed,
    expert,
    nudged,
    ratios,
    rewritten,
    session,
    silent,
    tied,
)

KINDS = ("fp32", "fp16", "int8", "int4")


def rows(count, hidden=128, seed=0, scale=1.0):
    return wire.rounded((np.random.default_rng(seed).standard_normal((count, hidden)) * scale).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_honest_answers_stay_far_below_the_bound_whatever_batch_and_threads(kind):
    found = expert(kind)
    worst = 0.0
    for threads in (1, 2):
        run = session(found, threads)
        for batch in (1, 3, 8, 64):
            for scale in (0.01, 1.0, 40.0):
                h = rows(batch, seed=batch, scale=scale)
                for dtype in ("fp16", "fp32"):
                    worst = max(worst, ratios(found, h, run.run(h), dtype).max())
    assert worst < 0.5


@pytest.mark.parametrize(
    ("kind", "lie"), [("fp32", "fp16"), ("fp32", "int8"), ("fp32", "int4"), ("fp16", "int8"), ("int8", "int4")]
)
def test_cheaper_weights_are_guilty_in_every_row(kind, lie):
    found = expert(kind, hidden=256, width=192)
    h = rows(32, 256)
    assert ratios(found, h, session(rewritten(found, lie)).run(h)).min() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundredth_more_in_one_element_and_zeros_are_guilty(kind):
    found = expert(kind)
    h = rows(32)
    honest = session(found).run(h)
    assert (ratios(found, h, nudged(honest, Random(1))) > 1).mean() > 0.95
    assert ratios(found, h, np.zeros_like(honest)).min() > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solve", [cancelling, silent, closed, tied])
def test_inputs_that_are_solved_for_frame_nobody(kind, solve):
    found = expert(kind, hidden=64, width=32 if solve is not cancelling else 96, seed=2)
    run = session(found)
    for seed in range(4):
        exact = solve(found, seed)[None, :]
        for h in (wire.rounded(exact), exact):
            for dtype in ("fp16", "fp32"):
                assert ratios(found, h, run.run(h), dtype).max() < 1


def test_where_outputs_cancel_honest_orders_differ_far_more_and_are_both_innocent():
    found = expert("fp32", hidden=64, width=96, seed=2)
    both, down = found.gate_up.dequantised(), found.down.dequantised()

    def apart(x):
        g, u = both[:96] @ x, both[96:] @ x
        a = g / (1 + np.exp(-g)) * u
        zero = np.zeros(64, np.float32)
        one = sum((down[:, i] * a[i] for i in range(96)), zero)
        other = sum((down[:, i] * a[i] for i in reversed(range(96))), zero)
        for answer in (one, other):
            assert ratios(found, x[None, :], answer[None, :].astype(np.float32), "fp32").max() < 1
        return np.linalg.norm(one - other) / np.linalg.norm(one)

    usual = apart(rows(1, 64)[0])
    assert max(apart(cancelling(found, seed)) for seed in range(4)) > 30 * usual


def test_either_honest_arithmetic_of_quantised_weights_is_innocent():
    found = expert("int8")
    h = rows(16)
    unrounded = rewritten(found, "fp32")
    assert ratios(found, h, session(unrounded).run(h)).max() < 1
    assert ratios(found, h, session(found).run(h)).max() < 1


def test_a_sum_of_chosen_experts_with_biases_and_clamps():
    traits = Variant(activation="clamped", expert_bias=True)
    random = np.random.default_rng(3)
    experts = {}
    for member in (2, 5):
        found = expert("int8", seed=member)
        biases = [random.standard_normal(n).astype(np.float32) for n in (found.gate_up.rows, found.down.rows)]
        experts[member] = verdict.Expert(found.gate_up.with_bias(biases[0]), found.down.with_bias(biases[1]))
    runs = {
        m: Session(open_session(expert_graph(e.gate_up, e.down, traits), threads=1), 128) for m, e in experts.items()
    }
    h = rows(12, scale=4.0)
    chosen = random.integers(0, 7, (12, 2)).astype(np.int32)
    chosen[:, 1] = (chosen[:, 0] + 3) % 7
    weights = random.random((12, 2)).astype(np.float32)
    y = weighted_sum((2, 5), h, chosen, weights, lambda member, some: runs[member].run(some))
    honest = verdict.recompute(experts, (2, 5), traits, h, chosen, weights)
    assert verdict.judge(wire.rounded(y), honest, "fp16").worst < 1
    assert verdict.judge(wire.rounded(y * np.float32(1.01)), honest, "fp16").guilty
    nobody = ~np.isin(chosen, (2, 5)).any(axis=1)
    assert nobody.any()
    y[nobody, 0] = 1e-3
    assert (verdict.judge(wire.rounded(y), honest, "fp16").ratio[nobody] > 1).all()


def test_rows_that_overflow_or_are_not_finite_are_not_judged():
    found = expert("fp32")
    h = rows(3)
    h[0, 0], h[1] = np.inf, h[1] * 1e30
    assert (ratios(found, h, np.ones((3, 128), np.float32))[:2] == 0).all()


def test_bf16_hides_nothing_in_rows_that_fit_fp16():
    found = expert("fp32")
    h = rows(4)
    honest = session(found).run(h)
    coarse = (honest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    given = verdict.recompute({0: found}, [0], Variant(), h, None, None)
    assert verdict.judge(coarse, given, "fp16").guilty
    wide = rows(4, scale=3000.0)
    assert ratios(found, wide, session(found).run(wide)).max() < 1


def test_two_answers_are_equal_suspicious_or_of_another_class():
    one = rows(3, 16)
    other = one.copy()
    other[1] *= np.float32(1 + 1e-5)
    other[2] = 0
    assert alike(one, other, same_class=True, quantised=False) == [
        Likeness.EQUAL,
        Likeness.SUSPICIOUS,
        Likeness.SUSPICIOUS,
    ]
    assert alike(one, other, same_class=False, quantised=False) == [
        Likeness.EQUAL,
        Likeness.OTHER_CLASS,
        Likeness.SUSPICIOUS,
    ]
