"""A stage computed again in fp64, as a judge does it: what honest machines may answer, and how far apart they are.

Owns: the layers of a stage as plain numpy, what is done about choices that honest machines may make either way, the
distance of an answer. Does not own: the noise (``core/jitter``), weights on disk (``judging``), what follows.

One expert's error can be bounded by arithmetic (``core/verdict``). Through several layers such a bound grows by the
root of a product's length at every product, and hides everything after two layers. So the stage is computed several
times side by side, all but the first with every rounding exaggerated at random. Where inputs are such that roundings
matter (products that cancel, codes between two steps, attention that hangs on a hair), the copies lie far apart, and
hardly anything proves guilt. Where they do not, the copies lie close.

Invariants:
1. Guilty is only an element that is further from the exact answer than :data:`MARGIN` times the spread of the copies,
   beyond what the wire's rounding explains. Honest answers stay below a third of that (``tests/bench/bench_trust.py``).
2. Where honest machines may choose other experts, the copies do, each expert on the edge in one of them at least: what
   that means for the row and for those behind it is in the spread. Where groups of experts or a threshold are
   undecided, that row and all behind it are not judged.
3. What overflows, or is no number, is not judged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmoe.core import routing, verdict
from dmoe.core.architecture import Router
from dmoe.core.jitter import COPIES, Jitter, attended
from dmoe.core.linear import Linear
from dmoe.core.manifest import Manifest
from dmoe.core.rope import rope_tables
from dmoe.core.variant import PLAIN, Variant
from dmoe.core.verdict import LARGE, TEN_TAU, TINY, Exact, Expert
from dmoe.core.wire import FloatRows
from dmoe.latent import NORM_EPS
from dmoe.weights import GroupedWeights, LatentWeights, LayerWeights, OwnWeights

MARGIN = 8.0
"""Times the spread of the copies: float weights. Their noise alone is several times what honest machines show."""
CODED_MARGIN = 8.0
"""The same where activations are rounded to codes: there honest machines are as far apart as the copies are."""
TURNS = 3
"""Copies choose independently in so many layers: they are eight."""
NEAR = 6.0
"""Choices are undecided within so many times what the copies' ranks differ by."""
ROWS_AT_ONCE = 128
"""Rows that go through attention, or a wide product, together: bounds memory."""
Choice = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer's weights. ``experts``: by number; of a dense model the whole feed-forward part, as number 0."""

    trunk: LayerWeights
    experts: Mapping[int, Expert]

    def has_codes(self) -> bool:
        """Whether some of it is quantised: then activations are rounded."""
        trunk = self.trunk
        used = [trunk.attention.qkv if isinstance(trunk.attention, GroupedWeights) else trunk.attention.query]
        used += [trunk.output, *(part for expert in self.experts.values() for part in (expert.gate_up, expert.down))]
        if trunk.own is not None:
            used += [trunk.own.gate_up, trunk.own.down]
        return any(part.bits for part in used)


@dataclass(frozen=True, slots=True, eq=False)
class Retraced:
    """``y f64[R, N, H]``: the copies' answers, the exact one first. ``judged bool[N]``. ``coded``: activations are
    rounded to codes somewhere, or travel between experts."""

    y: Exact
    judged: NDArray[np.bool_]
    coded: bool

    def ratios(self, answer: FloatRows, dtype: str) -> Exact:
        """Per row of ``answer f32[N, H]`` the largest distance over its bound, ``f64[N]``: above 1 is guilty."""
        with np.errstate(all="ignore"):
            exact = self.y[0]
            spread = np.abs(self.y[1:] - exact).max(axis=0)
            common = np.sqrt((spread * spread).mean(axis=1, keepdims=True))
            bound = (CODED_MARGIN if self.coded else MARGIN) * np.maximum(spread, common) + TINY
            half = verdict.half_steps(answer, exact, bound, dtype)  # type: ignore[arg-type]
            apart = np.maximum(0.0, np.abs(answer - exact) - half)
            ratio = (apart / bound).max(axis=1, initial=0.0)
            fits = (np.abs(exact) + bound).max(axis=1, initial=0.0) < LARGE
        found: Exact = np.where(self.judged & fits & np.isfinite(ratio), ratio, 0.0)
        return found


def retrace(
    manifest: Manifest,
    layers: tuple[int, int],
    load: Callable[[int], Layer],
    rows: FloatRows,
    random: np.random.Generator,
    each: Callable[[], None] = lambda: None,
) -> Retraced:
    """The stage over ``rows f32[N, H]`` as they travelled, from position 0 on. ``load`` gives a layer's weights;
    ``each`` is called often, and may raise to end it. Blocking: seconds to minutes."""
    arch = manifest.architecture
    with np.errstate(all="ignore"):  # what overflows is not judged
        judged = np.array(np.isfinite(rows).all(axis=1), np.bool_)
        start = np.where(judged[:, None], rows, 0).astype(np.float64)
        judged[np.cumsum(~judged) > 0] = False
        run = _Run(manifest, Jitter(random), len(rows), each)
        x = np.broadcast_to(start, (COPIES, *start.shape)).copy()
        for index in range(layers[0], layers[1] + 1):
            x = run.layer(index, load(index), x, judged)
        judged &= np.isfinite(x).all(axis=(0, 2))
        judged[np.cumsum(~np.isfinite(x).all(axis=(0, 2))) > 0] = False
        return Retraced(x, judged, run.coded or (arch.router.kind != "all" and manifest.wire_dtype != "fp32"))


class _Run:
    """One pass through a stage's layers."""

    def __init__(self, manifest: Manifest, jitter: Jitter, count: int, each: Callable[[], None]) -> None:
        self.coded = False
        self._manifest, self._arch, self._jitter = manifest, manifest.architecture, jitter
        cos, sin = rope_tables(self._arch, count)
        self._cos, self._sin = cos.astype(np.float64), sin.astype(np.float64)
        self._each = each

    def layer(self, index: int, layer: Layer, x: Exact, judged: NDArray[np.bool_]) -> Exact:
        """``x f64[R, N, H]`` through a layer; rows that cannot be judged any more are struck from ``judged``."""
        jitter, arch, trunk = self._jitter, self._arch, layer.trunk
        self._each()
        self.coded |= layer.has_codes()
        h = jitter.norm(x, trunk.norm_attention, arch.norm_eps)
        heads = self._grouped(index, trunk.attention, h) if isinstance(trunk.attention, GroupedWeights) else None
        if heads is None:
            assert isinstance(trunk.attention, LatentWeights)
            heads = self._latent(index, trunk.attention, h)
        x = jitter.relative(x + jitter.linear(heads, trunk.output))
        h = jitter.norm(x, trunk.norm_experts, arch.norm_eps)
        if arch.router.kind == "all":
            return jitter.relative(x + self._expert(layer.experts[0], h))
        if trunk.own is not None:
            x = jitter.relative(x + self._own(trunk.own, h))
        return jitter.relative(x + self._routed(index, layer, h, judged)) if trunk.is_sparse else x

    # --- attention

    def _attended(
        self, index: int, queries: Exact, keys: Exact, values: Exact, sinks: NDArray[np.float32] | None
    ) -> Exact:
        arch = self._arch
        scale = float(arch.traits.attention_scale or arch.head_dim**-0.5)
        window = arch.traits.window(index)
        return attended(
            self._jitter, queries, keys, values, scale, window, sinks, rows_at_once=ROWS_AT_ONCE, each=self._each
        )

    def _grouped(self, index: int, weights: GroupedWeights, h: Exact) -> Exact:
        """``f64[R, N, heads * head_dim]``."""
        arch, jitter = self._arch, self._jitter
        qkv = jitter.linear(h, weights.qkv)
        width, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        queries, keys, values = np.split(qkv, [width, width + kv], axis=-1)
        if weights.query_norm is not None and weights.key_norm is not None:
            queries, keys = self._normed(queries, weights.query_norm), self._normed(keys, weights.key_norm)
        if clip := arch.traits.qkv_clip:
            queries, keys, values = (np.clip(part, -clip, clip) for part in (queries, keys, values))
        shape = (*h.shape[:2], -1, arch.head_dim)
        q, k = (self._rotated(part.reshape(shape)) for part in (queries, keys))
        out = self._attended(index, q, k, values.reshape(shape), weights.sinks)
        return out.reshape(*h.shape[:2], -1)

    def _normed(self, rows: Exact, weight: NDArray[np.float32]) -> Exact:
        parts = rows.reshape(*rows.shape[:2], -1, len(weight))
        return self._jitter.norm(parts, weight, self._arch.norm_eps).reshape(rows.shape)

    def _rotated(self, x: Exact) -> Exact:
        return self._jitter.rotated(x, self._cos, self._sin, interleaved=self._arch.rope_interleaved)

    def _latent(self, index: int, weights: LatentWeights, h: Exact) -> Exact:
        """``f64[R, N, heads * value]``; the matrices of keys and values are absorbed, as in ``dmoe/latent``."""
        arch, jitter, latent = self._arch, self._jitter, self._arch.traits.latent
        assert latent is not None
        low = h
        if weights.query_down is not None and weights.query_norm is not None:
            low = jitter.norm(jitter.linear(h, weights.query_down), weights.query_norm, NORM_EPS)
        wide = jitter.linear(low, weights.query).reshape(*h.shape[:2], arch.heads, -1)
        plain, turning = wide[..., : latent.plain], wide[..., latent.plain :]
        down = jitter.linear(h, weights.latent_down)
        normed = jitter.norm(down[..., : latent.rank], weights.latent_norm, NORM_EPS)
        key = self._rotated(down[..., None, latent.rank :])
        rank = weights.key_up.rows // arch.heads
        sought = np.stack(
            [
                jitter.linear(
                    np.ascontiguousarray(plain[:, :, head]),
                    weights.key_up.take_rows(slice(head * rank, (head + 1) * rank)),
                )
                for head in range(arch.heads)
            ],
            axis=2,
        )
        queries = np.concatenate([sought, self._rotated(turning)], axis=-1)
        both = np.concatenate([normed[:, :, None], key], axis=-1)
        found = self._attended(index, queries, both, both, None)[..., : latent.rank]
        rows = weights.value_up.rows // arch.heads
        values = [
            jitter.linear(
                np.ascontiguousarray(found[:, :, head]),
                weights.value_up.take_rows(slice(head * rows, (head + 1) * rows)),
            )
            for head in range(arch.heads)
        ]
        return np.concatenate(values, axis=-1)

    # --- feed-forward parts

    def _expert(self, expert: Expert, h: Exact) -> Exact:
        return self._feed_forward(expert.gate_up, expert.down, h, self._arch.traits)

    def _feed_forward(self, gate_up: Linear, down: Linear, h: Exact, traits: Variant) -> Exact:
        """Some rows after the other: what is between the products is wide."""
        jitter, found = self._jitter, []
        for first in range(0, h.shape[1], ROWS_AT_ONCE):
            self._each()
            part = h[:, first : first + ROWS_AT_ONCE]
            found.append(jitter.linear(jitter.gated(jitter.linear(part, gate_up), traits), down))
        return np.concatenate(found, axis=1)

    def _own(self, own: OwnWeights, h: Exact) -> Exact:
        jitter = self._jitter
        y = self._feed_forward(own.gate_up, own.down, h, PLAIN)
        if own.gate is None:
            return y
        return jitter.relative(y * jitter.sigmoid(jitter.product(h, own.gate.astype(np.float64))))

    def _routed(self, index: int, layer: Layer, h: Exact, judged: NDArray[np.bool_]) -> Exact:
        """The experts that each copy chose: partial sums per group, rounded as they travel."""
        manifest, jitter, trunk = self._manifest, self._jitter, layer.trunk
        assert trunk.router is not None
        scores = jitter.linear(h, trunk.router)
        chosen, weights = choose(self._arch.router, scores, trunk.choice_bias, judged, index % TURNS)
        seen = jitter.sent(h, manifest.wire_dtype)
        total = np.zeros_like(h)
        for members in manifest.sum_groups:
            part = np.zeros_like(h)
            for member in members:
                share = np.where(chosen == member, weights, 0.0).sum(axis=2)
                used = np.flatnonzero(share.any(axis=0))
                if used.size:
                    self._each()
                    out = self._expert(layer.experts[member], seen[:, used])
                    part[:, used] += jitter.relative(share[:, used, None] * out, 2.0)
            total = total + jitter.sent(part, manifest.wire_dtype)
        return jitter.relative(total)


# --- choices


def choose(
    router: Router, scores: Exact, bias: NDArray[np.float32] | None, judged: NDArray[np.bool_], turn: int = 0
) -> tuple[Choice, Exact]:
    """The experts and weights of every copy, ``[R, N, k]`` each, from ``scores f64[R, N, experts]``. Where honest
    machines may choose differently, the copies do: all but the first one after the other take the experts on the edge,
    ``turn`` makes that independent of what they do in other layers. Rows whose groups are undecided, and all behind
    them, are struck from ``judged``."""
    copies, count, experts = scores.shape
    flat = scores.reshape(-1, experts)
    ranks, shares = routing.ranks_of(router, flat, bias)
    spread = _spread(ranks.reshape(scores.shape))
    chosen = routing.largest(_ranked(router, ranks), router.top_k).reshape(copies, count, -1)
    base = _ranked(router, ranks.reshape(scores.shape)[0])
    order = np.argsort(-base, axis=1, kind="stable")
    lost = _lost(router, ranks.reshape(scores.shape), spread)
    if router.kind == "threshold":
        assert isinstance(router.threshold, float)
        lost |= (np.abs(base - router.threshold) < NEAR * spread[:, None]).any(axis=1)
    top, places = router.top_k, np.arange(count)
    if top < experts:
        edge = (base[places, order[:, top - 1]] + base[places, order[:, top]]) / 2
        near = np.abs(base - edge[:, None]) < NEAR * spread[:, None]
        for row in np.flatnonzero(near.sum(axis=1) > 1):
            for copy in range(copies):
                chosen[copy, row] = _turned(order[row], near[row], top, copy >> turn if copy else 0)
    judged[np.cumsum(lost) > 0] = False
    weighed = routing.weighed(router, flat, shares, chosen.reshape(-1, top))
    assert weighed.weights is not None
    assert weighed.experts is not None
    shares = weighed.weights.astype(np.float64)
    return weighed.experts.astype(np.intp).reshape(chosen.shape), shares.reshape(chosen.shape)


def _spread(ranks: Exact) -> Exact:
    """How far the copies' ranks are apart, per row, ``f64[N]``; at least what fp32 may do to them."""
    apart = np.abs(ranks - ranks[0]).max(axis=(0, 2))
    found: Exact = np.maximum(apart, TEN_TAU * np.abs(ranks[0]).max(axis=1))
    return found


def _ranked(router: Router, ranks: Exact) -> Exact:
    """Ranks of one copy as they count once groups are chosen."""
    return routing.in_used_groups(router, ranks).astype(np.float64)


def _lost(router: Router, ranks: Exact, spread: Exact) -> NDArray[np.bool_]:
    """Rows whose groups honest machines may choose differently."""
    groups, used = router.grouping
    if groups == 1 or used == groups or router.kind == "topk_softmax":
        return np.zeros(ranks.shape[1], np.bool_)
    found = np.sort(routing.group_ranks(router, ranks[0]), axis=1)[:, ::-1]
    lost: NDArray[np.bool_] = found[:, used - 1] - found[:, used] < 2 * NEAR * spread
    return lost


def _turned(order: Choice, near: NDArray[np.bool_], top: int, copy: int) -> Choice:
    """The choice of a copy: the sure ones, and of those on the edge others in every copy."""
    edge: Sequence[int] = [expert for expert in order.tolist() if near[expert]]
    sure = [expert for expert in order[:top].tolist() if not near[expert]]
    free = top - len(sure)
    taken = [edge[(copy * free + at) % len(edge)] for at in range(free)]
    return np.array(sure + taken, np.intp)
