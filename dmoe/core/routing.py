"""The router: which experts a row goes to and with which weights, from the scores that the trunk's graph gave.

Owns: the choice, for every kind of router in ``core/architecture``. Does not own: the scores (``dmoe/graphs``), which
replica computes an expert (``core/dispatch``).

Invariants:
1. A row's choice and its weights depend on that row alone, bit for bit, whatever rows it is computed with.
2. Equal scores go to the lower index.
3. A row has ``top_k`` places; one that is not used holds index -1 and weight 0, behind those that are.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmoe.core.architecture import Router

FloatRows = NDArray[np.float32]
IntRows = NDArray[np.int32]
_Indices = NDArray[np.intp]

NOBODY = -1
"""The index in a place that is not used."""
_SMALLEST = np.float32(1e-20)
"""Keeps a sum of weights from being 0 (as DeepSeek-V3 does)."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The router's choice: ``experts i32[N, k]``, ``weights f32[N, k]``. Both None: every expert, unweighted."""

    experts: IntRows | None = None
    weights: FloatRows | None = None


ALL_EXPERTS = Routing()


def route(router: Router, scores: FloatRows, bias: FloatRows | None = None) -> Routing:
    """Choose by ``scores f32[N, experts]``, the router's logits. ``bias f32[experts]``: what a sigmoid router adds to
    its scores for the choice, not for the weights."""
    if router.kind == "all":
        return ALL_EXPERTS
    if router.kind == "topk_softmax":
        chosen = _largest(scores, router.top_k)
        return _routing(router, chosen, _softmax(np.take_along_axis(scores, chosen, axis=-1)))
    if router.kind == "sigmoid_topk":
        shares = _sigmoid(scores)
        ranks = shares if bias is None else shares + bias
        ranks = _in_groups(router, ranks, best=2, fill=-np.inf)
    else:
        shares = _softmax(scores)
        ranks = _in_groups(router, shares, best=1, fill=0.0)
    chosen = _largest(ranks, router.top_k)
    weights = np.take_along_axis(shares, chosen, axis=-1)
    if router.kind == "threshold":
        chosen, weights = _above(router, chosen, weights)
    return _routing(router, chosen, weights)


def _routing(router: Router, chosen: _Indices, weights: FloatRows) -> Routing:
    if router.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + _SMALLEST)
    if router.factor != 1.0:
        weights = weights * np.float32(router.factor)
    return Routing(chosen.astype(np.int32), weights)


def _above(router: Router, chosen: _Indices, weights: FloatRows) -> tuple[_Indices, FloatRows]:
    """Only those at or above the threshold; always the first."""
    assert isinstance(router.threshold, float)
    kept = weights >= np.float32(router.threshold)
    kept[:, 0] = True
    return np.where(kept, chosen, NOBODY), np.where(kept, weights, np.float32(0))


def _in_groups(router: Router, ranks: FloatRows, *, best: int, fill: float) -> FloatRows:
    """The ranks, with ``fill`` for experts outside the groups used. A group ranks by the sum of its ``best`` largest
    (DeepSeek-V2, arXiv:2405.04434, 2.1.2: the largest; DeepSeek-V3, arXiv:2412.19437: the two largest)."""
    groups, used = router.grouping
    if groups == 1:
        return ranks
    grouped = ranks.reshape(len(ranks), groups, -1)
    group_ranks = np.sort(grouped, axis=-1)[:, :, -best:].sum(axis=-1)
    chosen = _largest(group_ranks, used)
    is_used = (chosen[:, :, None] == np.arange(groups)).any(axis=1)
    return np.where(is_used[:, :, None], grouped, np.float32(fill)).reshape(ranks.shape)


def _largest(ranks: FloatRows, count: int) -> _Indices:
    return np.argsort(-ranks, axis=-1, kind="stable")[:, :count]


def _softmax(scores: FloatRows) -> FloatRows:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: FloatRows = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def _sigmoid(scores: FloatRows) -> FloatRows:
    with np.errstate(over="ignore"):  # exp of much is infinite, and 1 / infinite is the right 0
        shares: FloatRows = np.float32(1) / (np.float32(1) + np.exp(-scores))
    return shares
