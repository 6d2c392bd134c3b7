"""The router: every kind against a plain computation in fp64, ties, groups, and rows that do not see each other."""

import numpy as np
import pytest

from dmoe.core.calls import build, kflop, parse
from dmoe.core.manifest import Router
from dmoe.core.routing import ALL_EXPERTS, route
from dmoe.core.wire import encode
from dmoe.runtime import weighted_sum

RANDOM = np.random.default_rng(7)
SCORES = (2 * RANDOM.standard_normal((40, 12))).astype(np.float32)
BIAS = RANDOM.uniform(-0.3, 0.3, 12).astype(np.float32)


def router(kind, **more):
    return Router(**({"kind": kind, "experts": 12, "top_k": 3} | more))


KINDS = {
    "softmax": router("softmax_topk"),
    "normalised": router("softmax_topk", normalise=True),
    "scaled": router("softmax_topk", scale=2.5),
    "grouped": router("softmax_topk", groups=4, groups_used=2, scale=16.0),
    "gpt-oss": router("topk_softmax"),
    "sigmoid": router("sigmoid_topk", normalise=True, scale=2.5),
    "deepseek-v3": router("sigmoid_topk", normalise=True, scale=2.5, groups=4, groups_used=2),
    "threshold": router("threshold", top_k=12, threshold=0.15),
    "a few above": router("threshold", top_k=2, threshold=0.15, normalise=True),
}


def softmax(x):
    e = np.exp(x - max(x))
    return e / e.sum()


def plain(router, row, bias):
    """The same rules, written out for one row: {expert: weight}."""
    row = row.astype(np.float64)
    if router.kind == "topk_softmax":
        best = sorted(range(12), key=lambda e: (-row[e], e))[: router.top_k]
        return dict(zip(best, softmax(row[best]), strict=True))
    shares = 1 / (1 + np.exp(-row)) if router.kind == "sigmoid_topk" else softmax(row)
    ranks = shares + bias if router.kind == "sigmoid_topk" else shares
    allowed = list(range(12))
    if isinstance(router.groups, int):
        size, best = 12 // router.groups, 2 if router.kind == "sigmoid_topk" else 1
        value = [sum(sorted(ranks[g * size : g * size + size])[-best:]) for g in range(router.groups)]
        used = sorted(range(router.groups), key=lambda g: (-value[g], g))[: router.groups_used]
        allowed = [e for e in allowed if e // size in used]
    chosen = sorted(allowed, key=lambda e: (-ranks[e], e))[: router.top_k]
    if router.kind == "threshold":
        chosen = [e for place, e in enumerate(chosen) if not place or shares[e] >= router.threshold]
    total = sum(shares[e] for e in chosen) if router.normalise else 1.0
    return {e: shares[e] / total * router.factor for e in chosen}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_chooses_and_weighs_by_its_rule(name):
    kind = KINDS[name]
    kind.check()
    found = route(kind, SCORES, BIAS)
    assert found.experts.dtype == np.int32
    assert found.weights.dtype == np.float32
    assert found.experts.shape == found.weights.shape == (40, kind.top_k)
    for row in range(40):
        expected = plain(kind, SCORES[row], BIAS if kind.kind == "sigmoid_topk" else 0)
        used = found.experts[row] >= 0
        assert list(found.experts[row][used]) == list(expected)  # the best first
        assert np.allclose(found.weights[row][used], list(expected.values()), rtol=1e-5)
        assert not found.weights[row][~used].any()


@pytest.mark.parametrize("name", KINDS)
def test_a_row_chooses_the_same_bits_alone_and_among_others(name):
    whole = route(KINDS[name], SCORES, BIAS)
    for rows in (slice(3, 4), slice(5, 7), slice(11, 40, 3)):
        part = route(KINDS[name], SCORES[rows], BIAS)
        assert part.experts.tobytes() == whole.experts[rows].tobytes()
        assert part.weights.tobytes() == whole.weights[rows].tobytes()


@pytest.mark.parametrize("name", KINDS)
def test_equal_scores_go_to_the_lower_index(name):
    found = route(KINDS[name], np.zeros((2, 12), np.float32)).experts
    used = found[0][found[0] >= 0]
    assert list(used) == list(range(len(used)))


def test_large_scores_neither_warn_nor_overflow():
    far = np.array([[1e4, -1e4, 100, -100] * 3], np.float32)
    for kind in KINDS.values():
        assert np.isfinite(route(kind, far).weights).all()


def test_all_experts_are_no_choice():
    assert route(router("all", top_k=12), SCORES) is ALL_EXPERTS


def test_places_that_are_not_used_cost_nothing_and_change_nothing():
    """From the router through the call to the partial sum: index -1 is nobody."""
    choice = route(KINDS["threshold"], SCORES)
    counts = (choice.experts >= 0).sum(axis=-1)
    assert counts.min() >= 1
    assert len(set(counts)) > 2
    h = RANDOM.standard_normal((40, 8)).astype(np.float32)
    shape, rows = encode(h)
    header = build("0" * 64, 0, [0, 1], 0, b"", shape, 12)
    buffers = [rows, memoryview(choice.experts).cast("B"), memoryview(choice.weights).cast("B")]
    call = parse(header, buffers)
    groups = [tuple(range(6)), tuple(range(6, 12))]
    assert kflop(groups, [6000, 6000], 40, call.experts) == counts.sum()
    total = sum(weighted_sum(group, h, call.experts, call.weights, lambda e, x: x * e) for group in groups)
    expected = [
        row * sum(w * e for e, w in plain(KINDS["threshold"], s, 0).items()) for row, s in zip(h, SCORES, strict=True)
    ]
    assert np.allclose(total, expected, rtol=1e-4, atol=1e-5)
