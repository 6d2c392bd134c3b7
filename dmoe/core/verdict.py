"""Was an expert's answer honest? The answer is computed again in fp64, with a bound of what honest machines differ by.

Owns: the recomputation, the bound, the comparison of two answers. Does not own: files, who asked whom, what follows.

An expert is ``y = D (s(G h) * (U h))``. Honest kernels add in different orders, and some round the activations of a
quantised product to 8 bits per block of weights, others do not. So there is more than one honest
*arithmetic*; each is followed here in fp64, roundings of activations included, and an answer has to be near one
of them. What is left is the error of fp32 sums. To first order it is at most ``u * |W| |x|`` times a small factor for
each product, and it grows on its way through the activation and ``D``. The bound follows it through all of them: where
inputs are chosen so that a product nearly cancels (``y``, or ``G h`` behind which nothing but noise is left), it is as
large as the noise.

Invariants:
1. Guilty only by this recomputation, per row, and only of finite inputs whose products are far from overflowing.
2. An answer is as good as any number that the wire rounds to it: single flips of a rounding accuse nobody.
3. What an activation is rounded to is uncertain near a tie. An answer is as good as the likeliest choice: inputs' ties
   are tried either way, later ones are solved for; where there are too many, the bound grows by all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from dmoe.core.calls import Indices, Weights
from dmoe.core.linear import Linear
from dmoe.core.variant import Variant
from dmoe.core.wire import Dtype, FloatRows

Exact = NDArray[np.float64]
TAU = 2.0**-24 / 10
"""Ten of these per absolute product are allowed: fp32's unit roundoff in a sum of :data:`LONG` terms. Measured
(``tests/bench/bench_trust.py``), honest kernels stay below a half of the bound that follows, also where inputs are
solved for."""
TEN_TAU = 10 * TAU
LONG = 128
"""Errors of a sum grow with the root of the number of its terms, the sum of absolute products with that number."""
STEPS = 127
"""Steps of an 8-bit activation on either side of zero."""
TIE = 2e-5
"""In steps: how near a tie fp32 may round an activation either way (a few units of its 24 bits)."""
LARGE = 1e30
"""Products beyond this may overflow on their way: nobody is judged by them."""
TINY = 1e-30
"""An absolute error that underflow may leave."""
FLIPS_SHARE_MAX, UPRIGHT_MIN = 8, 0.1
"""Uncertain roundings are solved for if an answer has so many times more elements, and if their columns point in
directions so different (smallest over largest singular value); else they widen the bound."""
TIES_TRIED = 4
"""Ties of a row's inputs that are tried both ways."""
FLIPS_MOST = 1
"""Steps by which an uncertain rounding moves. What may move further is so noisy that its row is not judged."""
_FP16_MAX = 65504.0
SAME_CLASS_MAX, QUANTISED_MAX = 1e-3, 5e-2
"""Relative distances that answers of different device classes may have (float, quantised) without a closer look."""


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """Weights as the shard's file holds them."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class Recomputed:
    """``y, bound f64[N, H]`` (``y`` infinite in rows to which this does not apply); ``judged bool[N]``: no product came
    near an overflow."""

    y: Exact
    bound: Exact
    judged: NDArray[np.bool_]
    flips: Mapping[int, Exact]
    """Row -> what each of its uncertain roundings would change, ``f64[M, H]``."""


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """``ratio f64[N]``: distance from the nearest honest answer over its bound, per row; above 1 is guilty."""

    ratio: Exact

    @property
    def guilty(self) -> bool:
        """Whether a row is further off than an honest machine can be."""
        return bool((self.ratio > 1).any())

    @property
    def worst(self) -> float:
        """The largest ratio."""
        return float(self.ratio.max()) if self.ratio.size else 0.0


class Likeness(Enum):
    """Two answers to one row."""

    EQUAL = "equal"
    SUSPICIOUS = "suspicious"
    OTHER_CLASS = "other class"
    """They differ, as little as different kinds of machines may."""


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """Values and how far an honest machine's may be from them, ``f64[N, K]``."""

    value: Exact
    error: Exact


def recompute(
    experts: Mapping[int, Expert],
    members: Sequence[int],
    traits: Variant,
    rows: FloatRows,
    chosen: Indices | None,
    weights: Weights | None,
) -> list[Recomputed]:
    """The partial sum ``f64[N, H]`` of a sum group's ``members`` for ``rows`` as they travelled, and its bound; once
    for each arithmetic that is honest for such weights, and for each way to round inputs between two codes."""
    with np.errstate(all="ignore"):  # what overflows is not judged
        return _candidates(experts, members, traits, rows, chosen, weights)


def _candidates(
    experts: Mapping[int, Expert],
    members: Sequence[int],
    traits: Variant,
    rows: FloatRows,
    chosen: Indices | None,
    weights: Weights | None,
) -> list[Recomputed]:
    used = [experts[member] for member in members]
    found = [_recompute(experts, members, traits, rows, chosen, weights, None)]
    if not any(layer.bits for expert in used for layer in (expert.gate_up, expert.down)):
        return found
    ties = np.zeros(len(rows), np.intp)
    for block in {expert.gate_up.block for expert in used if expert.gate_up.bits}:
        ties = np.maximum(ties, _ties(rows, block))
    for choice in range(1 << min(int(ties.max(initial=0)), TIES_TRIED)):
        some = np.flatnonzero(ties >= choice.bit_length())  # the others have no such tie
        choices, scales = (None, None) if chosen is None or weights is None else (chosen[some], weights[some])
        made = _recompute(experts, members, traits, rows[some], choices, scales, choice)
        found.append(made if len(some) == len(rows) else _spread(made, some, len(rows)))
    return found


def _spread(made: Recomputed, some: NDArray[np.intp], count: int) -> Recomputed:
    """What was computed of some rows, among ``count`` rows."""
    shape = (count, made.y.shape[1])
    y, bound, judged = np.full(shape, np.inf), np.zeros(shape), np.ones(count, np.bool_)
    y[some], bound[some], judged[some] = made.y, made.bound, made.judged
    return Recomputed(y, bound, judged, {int(some[row]): changes for row, changes in made.flips.items()})


def _recompute(
    experts: Mapping[int, Expert],
    members: Sequence[int],
    traits: Variant,
    rows: FloatRows,
    chosen: Indices | None,
    weights: Weights | None,
    choice: int | None,
) -> Recomputed:
    """One of them. ``choice``: which ties of inputs are rounded the other way, a bit each; None: none are rounded."""
    y, bound = np.zeros(rows.shape), np.zeros(rows.shape)
    judged = np.array(np.isfinite(rows).all(axis=1), np.bool_)
    h = np.where(judged[:, None], rows, 0).astype(np.float64)
    flips: dict[int, list[Exact]] = {}
    for member in members:
        share = _share(member, len(rows), chosen, weights)
        used = np.flatnonzero(share)
        if not used.size:
            continue
        out, fits, unsure = _expert(experts[member], traits, h[used], choice)
        scale = share[used, None]
        y[used] += scale * out.value
        bound[used] += np.abs(scale) * (out.error + TEN_TAU * np.abs(out.value))
        judged[used] &= fits
        for row, changes in unsure.items():
            flips.setdefault(int(used[row]), []).append(share[used[row]] * changes)
    judged &= (np.abs(y) + bound).max(axis=1, initial=0.0) < LARGE
    return Recomputed(y, bound, judged, {row: np.concatenate(found) for row, found in flips.items()})


def judge(answer: FloatRows, honest: Sequence[Recomputed], dtype: Dtype) -> Verdict:
    """``answer f32[N, H]`` as it arrived, against what it may be under each arithmetic."""
    ratios = [_ratio(answer, each, dtype) for each in honest]
    return Verdict(np.minimum.reduce(ratios))


def alike(one: FloatRows, other: FloatRows, *, same_class: bool, quantised: bool) -> list[Likeness]:
    """Compare two answers ``f32[N, H]`` row by row, as they travelled. A difference is a reason to recompute, never a
    proof: honest machines of one class agree bit for bit, others nearly."""
    equal = (one == other).all(axis=1)
    if same_class:
        return [Likeness.EQUAL if same else Likeness.SUSPICIOUS for same in equal]
    apart = np.linalg.norm(one.astype(np.float64) - other, axis=1)
    most = (QUANTISED_MAX if quantised else SAME_CLASS_MAX) * np.linalg.norm(one.astype(np.float64), axis=1)
    near = np.where(apart <= most, 1, 2)
    kinds = (Likeness.EQUAL, Likeness.OTHER_CLASS, Likeness.SUSPICIOUS)
    return [kinds[0 if same else kind] for same, kind in zip(equal.tolist(), near.tolist(), strict=True)]


# --- an expert in fp64


def _share(member: int, count: int, chosen: Indices | None, weights: Weights | None) -> Exact:
    """How much each row wants of an expert, ``f64[N]``."""
    if chosen is None or weights is None:
        return np.ones(count)
    share: Exact = np.where(chosen == member, weights, 0).astype(np.float64).sum(axis=1)
    return share


def _expert(
    expert: Expert, traits: Variant, h: Exact, choice: int | None
) -> tuple[_Known, NDArray[np.bool_], Mapping[int, Exact]]:
    """An expert's output, which rows are judged, and what uncertain roundings before the last product change."""
    both, unsure = _product(_Known(h, np.zeros(h.shape)), expert.gate_up, choice)
    if unsure is not None:  # what these become behind the activation is no straight line: the bound takes them all
        both = _Known(both.value, both.error + unsure.widths())
    width = expert.gate_up.rows // 2
    gate = _Known(both.value[:, :width], both.error[:, :width])
    up = _Known(both.value[:, width:], both.error[:, width:])
    alpha = 1.0
    if traits.activation == "clamped":
        alpha, limit = traits.activation_alpha, traits.activation_limit
        gate = _Known(np.minimum(gate.value, limit), gate.error)
        clipped = np.clip(up.value, -limit, limit) + 1.0
        up = _Known(clipped, up.error + TEN_TAU * (np.abs(clipped) + 1.0))
    out, unsure = _product(_activated(gate, up, alpha), expert.down, None if choice is None else 0)
    fits = np.abs(both.value).max(axis=1, initial=0.0) < np.sqrt(LARGE)
    if unsure is None:
        return out, fits, {}
    fits &= (unsure.off <= FLIPS_MOST * unsure.steps * 1.5).all(axis=1)
    return out, fits, unsure.changes()


def _activated(gate: _Known, up: _Known, alpha: float) -> _Known:
    """``g sigma(alpha g) u``. The sigmoid's slope bounds what an error of ``g`` becomes, also where it is no small one;
    the sigmoid itself is a few units of fp32's roundoff off (absolutely: near 0 it is cut off)."""
    g, u = gate.value, up.value
    sigma = 1.0 / (1.0 + np.exp(-np.clip(alpha * g, -700, 700)))
    silu = g * sigma
    slope = np.abs(sigma + alpha * g * sigma * (1 - sigma))
    of_gate = np.minimum(1.1, slope + 0.5 * alpha * gate.error) * gate.error + TEN_TAU * np.abs(g) * (1 + 2 * sigma)
    value = silu * u
    error = of_gate * (np.abs(u) + up.error) + np.abs(silu) * up.error + TEN_TAU * np.abs(value)
    return _Known(value, error + TINY)


@dataclass(frozen=True, slots=True, eq=False)
class _Unsure:
    """Roundings of activations that may go either way: by how much (``off f64[N, K]``, mostly 0), into which weights
    (``dense f64[R, K]``). ``steps f64[N, K]``: what one of them is."""

    off: Exact
    steps: Exact
    dense: Exact

    def widths(self) -> Exact:
        """How far the products may move, all roundings together."""
        return self.off @ np.abs(self.dense).T

    def changes(self) -> Mapping[int, Exact]:
        """See :attr:`Recomputed.flips`."""
        rows = np.flatnonzero(self.off.any(axis=1)).tolist()
        found = {row: np.flatnonzero(self.off[row]) for row in rows}
        return {row: self.dense[:, at].T * self.steps[row, at, None] for row, at in found.items()}


def _product(x: _Known, layer: Linear, choice: int | None) -> tuple[_Known, _Unsure | None]:
    """``x @ W^T + bias``, and the roundings that are uncertain, which its error does not hold."""
    bias, unsure = layer.parts.get("bias"), None
    if layer.bits and choice is not None:
        out, unsure = _blocked(x, layer, choice)
    else:
        out = _sum(x, layer.dequantised().astype(np.float64))
    if bias is not None:
        wide = bias.astype(np.float64)
        out = _Known(out.value + wide, out.error + TEN_TAU * np.abs(wide))
    return out, unsure


def _sum(x: _Known, dense: Exact) -> _Known:
    most = TEN_TAU * (LONG / dense.shape[1]) ** 0.5
    spread = x.error + most * np.abs(x.value)
    return _Known(x.value @ dense.T, spread @ np.abs(dense).T + TINY)


def _blocked(x: _Known, layer: Linear, choice: int) -> tuple[_Known, _Unsure]:
    """Activations rounded to 8 bits per block; offsets of a block meet them unrounded."""
    parts = layer.parts
    codes = layer.codes.astype(np.float64) - (1 << layer.bits - 1)
    dense = (codes * parts["s"].astype(np.float64)[..., None]).reshape(layer.rows, layer.columns)
    rounded, off, steps = _rounded(x, layer.block, choice)
    out = _sum(rounded, dense)
    if "c" in parts:
        count, blocks = len(x.value), layer.columns // layer.block
        sums = x.value.reshape(count, blocks, -1).sum(axis=2)
        errors = (x.error + TEN_TAU * np.abs(x.value)).reshape(count, blocks, -1).sum(axis=2)
        more = _sum(_Known(sums, errors), parts["c"].astype(np.float64).T)
        out = _Known(out.value + more.value, out.error + more.error)
    return out, _Unsure(off, steps, dense)


def _rounded(x: _Known, block: int, choice: int) -> tuple[_Known, Exact, Exact]:
    """``x`` as its blocks' codes say, how far each value may be off by roundings that go either way, and the steps.
    Of values without error the first ties are rounded as ``choice`` says, and are then sure."""
    count, columns = x.value.shape
    value, error = x.value.reshape(count, -1, block), x.error.reshape(count, -1, block)
    most = np.abs(value).max(axis=2, keepdims=True)
    step = np.where(most > 0, most, 1.0) / STEPS
    places = value / step
    drift = error.max(axis=2, keepdims=True) / step / STEPS
    doubt = error / step + np.abs(places) * drift + TIE
    to_tie = np.abs(places - np.floor(places) - 0.5)
    flips = np.ceil(np.maximum(0.0, doubt - to_tie)).reshape(count, columns)
    codes, places = np.rint(places).reshape(count, columns), places.reshape(count, columns)
    if not x.error.any():
        order = np.cumsum(flips > 0, axis=1) - 1
        tried = (flips > 0) & (order < TIES_TRIED)
        other = tried & ((choice >> np.clip(order, 0, TIES_TRIED)) & 1 == 1)
        codes = np.where(other, 2 * np.floor(places) + 1 - codes, codes)
        flips = np.where(tried, 0.0, flips)
    steps = np.broadcast_to(step, value.shape).reshape(count, columns)
    drifts = np.broadcast_to(drift, value.shape).reshape(count, columns)
    return _Known(codes * steps, steps * np.abs(codes) * drifts), steps * flips, steps


def _ties(rows: FloatRows, block: int) -> NDArray[np.intp]:
    """How many inputs of each row lie between two codes, ``[N]``."""
    h = np.where(np.isfinite(rows), rows, 0).astype(np.float64)
    blocks = np.abs(h.reshape(len(h), -1, block))
    places = blocks * STEPS / np.maximum(blocks.max(axis=2, keepdims=True), TINY)
    near = np.abs(places - np.floor(places) - 0.5) < TIE
    found: NDArray[np.intp] = near.sum(axis=(1, 2))
    return found


# --- distance


def _ratio(answer: FloatRows, honest: Recomputed, dtype: Dtype) -> Exact:
    """Per row: how far the nearest number that rounds to the answer is from ``y``, over the bound (norms)."""
    y, bound = np.where(np.isfinite(honest.y), honest.y, 0.0), honest.bound
    half = half_steps(answer, y, bound, dtype)
    if honest.flips:
        y, bound = y.copy(), bound.copy()
        for row, changes in honest.flips.items():
            apart = answer[row] - y[row]
            solved = _solved(changes, apart)
            if solved is None or not np.isfinite(apart).all():
                bound[row] += FLIPS_MOST * np.abs(changes).sum(axis=0)
            else:
                y[row] += solved
    apart = np.maximum(0.0, np.abs(answer - y) - half)
    distance, width = np.linalg.norm(apart, axis=1), np.linalg.norm(bound, axis=1)
    ratio: Exact = np.where(distance > 0, distance / np.maximum(width, TINY), 0.0)
    ratio = np.where(np.isfinite(honest.y).all(axis=1), ratio, np.inf)
    return np.where(honest.judged, ratio, 0.0)


def _solved(changes: Exact, apart: Exact) -> Exact | None:
    """What uncertain roundings ``f64[M, H]`` explain of a difference ``f64[H]``, whole steps each; None if that cannot
    be told, because there are too many or their directions are too much alike."""
    count, width = changes.shape
    if count * FLIPS_SHARE_MAX > width:
        return None
    sizes = np.linalg.norm(changes, axis=1)
    if not sizes.all():
        return None
    try:
        times, _, _, singular = np.linalg.lstsq((changes / sizes[:, None]).T, apart, rcond=None)
    except np.linalg.LinAlgError:
        return None
    if singular[-1] < UPRIGHT_MIN * singular[0]:
        return None
    solved: Exact = np.clip(np.rint(times / sizes), -FLIPS_MOST, FLIPS_MOST) @ changes
    return solved


def half_steps(answer: FloatRows, y: Exact, bound: Exact, dtype: Dtype) -> Exact:
    """Half of the wire's step at each element: that of fp16, or of bf16 in rows that do not fit (or may not)."""
    size = np.maximum(np.abs(answer.astype(np.float64)), np.abs(y))
    if dtype == "fp32":
        return size * TEN_TAU
    fp16 = np.maximum(_power_below(size) * 2.0**-11, 2.0**-25)
    wide = (np.abs(y) + bound).max(axis=1, initial=0.0) > _FP16_MAX
    return np.where(wide[:, None], _power_below(size) * 2.0**-8, fp16)


def _power_below(size: Exact) -> Exact:
    """The largest power of two that is not larger."""
    power: Exact = np.ldexp(1.0, np.frexp(np.maximum(size, 2.0**-126))[1] - 1)
    return power
