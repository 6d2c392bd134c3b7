"""The router: which experts a row goes to and with which weights, from the scores that the trunk's graph gave.

Owns: the choice, for every kind of router in ``core/architecture``. Does not own: the scores (``dmoe/graphs``), which
replica computes an expert (``core/dispatch``).

Invariants:
1. A row's choice and its weights depend on that row alone, bit for bit, whatever rows it is computed with.
2. Equal scores go to the lower index.
3. A row has ``top_k`` places; one that is not used holds index -1 and weight 0, behind those that are.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmoe.core.architecture import Router

FloatRows = NDArray[np.float32]
Rows = NDArray[Any]
"""Of one floating type: fp32 where it counts, fp64 where an answer is checked."""
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
    ranks, shares = ranks_of(router, scores, bias)
    chosen = largest(in_used_groups(router, ranks), router.top_k)
    return weighed(router, scores, shares, chosen)


def ranks_of(router: Router, scores: Rows, bias: FloatRows | None = None) -> tuple[Rows, Rows]:
    """What experts are chosen by, before groups count, and what they are weighed by: ``[N, experts]`` each."""
    if router.kind == "topk_softmax":
        return scores, scores
    if router.kind == "sigmoid_topk":
        shares = _sigmoid(scores)
        return shares if bias is None else shares + bias, shares
    shares = _softmax(scores)
    return shares, shares


def group_ranks(router: Router, ranks: Rows) -> Rows:
    """What groups are chosen by, ``[N, groups]``: the sum of a group's largest ranks (DeepSeek-V2, arXiv:2405.04434,
    2.1.2: the largest; DeepSeek-V3, arXiv:2412.19437: the two largest)."""
    groups, _ = router.grouping
    best = 2 if router.kind == "sigmoid_topk" else 1
    found: Rows = np.sort(ranks.reshape(len(ranks), groups, -1), axis=-1)[:, :, -best:].sum(axis=-1)
    return found


def weighed(router: Router, scores: Rows, shares: Rows, chosen: "_Indices") -> Routing:
    """The weights of the experts ``chosen [N, k]``."""
    if router.kind == "topk_softmax":
        return _routing(router, chosen, _softmax(np.take_along_axis(scores, chosen, axis=-1)))
    weights = np.take_along_axis(shares, chosen, axis=-1)
    if router.kind == "threshold":
        chosen, weights = _above(router, chosen, weights)
    return _routing(router, chosen, weights)


def _routing(router: Router, chosen: _Indices, weights: Rows) -> Routing:
    if router.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + _SMALLEST)
    if router.factor != 1.0:
        weights = weights * np.float32(router.factor)
    return Routing(chosen.astype(np.int32), weights)


def _above(router: Router, chosen: _Indices, weights: Rows) -> tuple[_Indices, Rows]:
    """Only those at or above the threshold; always the first."""
    assert isinstance(router.threshold, float)
    kept = weights >= np.float32(router.threshold)
    kept[:, 0] = True
    return np.where(kept, chosen, NOBODY), np.where(kept, weights, np.float32(0))


def in_used_groups(router: Router, ranks: Rows) -> Rows:
    """The ranks, with the least there is for experts outside the groups used."""
    groups, used = router.grouping
    if groups == 1 or router.kind == "topk_softmax":
        return ranks
    chosen = largest(group_ranks(router, ranks), used)
    is_used = (chosen[:, :, None] == np.arange(groups)).any(axis=1)
    fill = np.float32(-np.inf if router.kind == "sigmoid_topk" else 0.0)
    grouped = ranks.reshape(len(ranks), groups, -1)
    return np.where(is_used[:, :, None], grouped, fill).reshape(ranks.shape)


def largest(ranks: Rows, count: int) -> _Indices:
    """The columns of the ``count`` largest of each row, the lower of equal ones first."""
    return np.argsort(-ranks, axis=-1, kind="stable")[:, :count]


def _softmax(scores: Rows) -> Rows:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Rows = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def _sigmoid(scores: Rows) -> Rows:
    with np.errstate(over="ignore"):  # exp of much is infinite, and 1 / infinite is the right 0
        shares: Rows = np.float32(1) / (np.float32(1) + np.exp(-scores))
    return shares
