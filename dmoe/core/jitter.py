"""Operators of a layer in fp64, several times side by side: once exactly, and with every rounding of an honest machine
exaggerated at random.

Owns: what rounding each operator may do, and how much of it is tried. Does not own: which operators make a layer, what
the spread of the copies means (``core/stageverdict``).

Everything has a leading axis ``R`` of copies. Copy 0 is exact arithmetic. The others get, behind every operator, noise
up to the *bound* of that operator's error in fp32 (several times what honest kernels show), and are rounded to codes
or to the wire's dtype after a nudge of :data:`NUDGE` steps, so that some in a hundred go the other way. The last
copy does not round activations at all, as some machines do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from dmoe.core.linear import Linear
from dmoe.core.variant import Variant
from dmoe.core.verdict import LONG, STEPS, TEN_TAU, Exact
from dmoe.core.wire import Dtype

COPIES = 8
NUDGE = 0.03
"""In steps of a rounding: up to so much an activation is moved before it is rounded."""
_FP16_MAX = 65504.0
_FP16_STEP, _BF16_STEP, _FP16_LEAST = 2.0**-10, 2.0**-7, 2.0**-24

Weights = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Jitter:
    """``random`` makes all the noise. Arrays are ``f64[R, N, width]`` with ``R = COPIES`` unless said otherwise."""

    random: Generator

    def noisy(self, value: Exact, bound: Exact) -> Exact:
        """``value`` with noise up to ``bound`` (which may have one copy) in all copies but the first."""
        noise = self.random.uniform(-1.0, 1.0, value.shape)
        noise[0] = 0.0
        noise *= bound
        noise += value
        return noise

    def relative(self, value: Exact, times: float = 1.0) -> Exact:
        """Every number off by a few units of fp32's roundoff."""
        return self.noisy(value, np.abs(value) * (TEN_TAU * times))

    def norm(self, x: Exact, weight: NDArray[np.float32], epsilon: float) -> Exact:
        """RMS norm over the last axis."""
        scale = 1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)
        return self.relative(x * scale * weight.astype(np.float64), 4.0)

    def product(self, x: Exact, dense: Weights) -> Exact:
        """``x @ dense^T``, summed in any order."""
        most = TEN_TAU * (LONG / dense.shape[1]) ** 0.5
        bound = (np.abs(x[0]) * max(most, TEN_TAU / 4)) @ np.abs(dense).T
        return self.noisy(x @ dense.T, bound[None])

    def linear(self, x: Exact, layer: Linear) -> Exact:
        """``x @ W^T + bias`` as honest kernels of the layer's form compute it."""
        out = self._blocked(x, layer) if layer.bits else self.product(x, layer.dequantised().astype(np.float64))
        if (bias := layer.parts.get("bias")) is not None:
            out = self.relative(out + bias.astype(np.float64))
        return out

    def _blocked(self, x: Exact, layer: Linear) -> Exact:
        """Activations rounded to 8 bits per block; offsets of a block meet them unrounded."""
        parts = layer.parts
        codes = layer.codes.astype(np.float64) - (1 << layer.bits - 1)
        dense = (codes * parts["s"].astype(np.float64)[..., None]).reshape(layer.rows, layer.columns)
        out = self.product(self._coded(x, layer.block), dense)
        if "c" in parts:
            sums = x.reshape(*x.shape[:2], -1, layer.block).sum(axis=3)
            out = out + self.product(self.relative(sums, 4.0), parts["c"].astype(np.float64).T)
        return out

    def _coded(self, x: Exact, block: int) -> Exact:
        blocks = x.reshape(*x.shape[:2], -1, block)
        most = np.abs(blocks).max(axis=3, keepdims=True)
        step = np.where(most > 0, most, 1.0) / STEPS
        places = self._nudged(blocks / step)
        coded = np.rint(places) * step
        coded[-1] = blocks[-1]
        return coded.reshape(x.shape)

    def _nudged(self, places: Exact) -> Exact:
        nudge = self.random.uniform(-NUDGE, NUDGE, places.shape)
        nudge[0] = 0.0
        nudge += places
        return nudge

    def sent(self, x: Exact, dtype: Dtype) -> Exact:
        """``x`` rounded row by row as it travels."""
        if dtype == "fp32":
            return self.relative(x)
        power = np.ldexp(1.0, np.frexp(np.maximum(np.abs(x), 2.0**-126))[1] - 1)
        wide = np.abs(x).max(axis=-1, keepdims=True) > _FP16_MAX
        step = np.where(wide, power * _BF16_STEP, np.maximum(power * _FP16_STEP, _FP16_LEAST))
        found: Exact = np.rint(self._nudged(x / step)) * step
        return found

    def softmax(self, scores: Exact) -> Exact:
        """Over the last axis; ``-inf`` takes no part."""
        powers = self.relative(np.exp(scores - scores.max(axis=-1, keepdims=True)), 4.0)
        shares: Exact = powers / powers.sum(axis=-1, keepdims=True)
        return shares

    def gated(self, both: Exact, traits: Variant) -> Exact:
        """What an expert or another feed-forward part makes of gate and up, before its last product."""
        width = both.shape[-1] // 2
        gate, up, alpha = both[..., :width], both[..., width:], 1.0
        if traits.activation == "clamped":
            alpha, limit = traits.activation_alpha, traits.activation_limit
            gate, up = np.minimum(gate, limit), self.relative(np.clip(up, -limit, limit) + 1.0)
        sigma = self.sigmoid(alpha * gate)
        return self.relative(gate * sigma * up, 2.0)

    def sigmoid(self, x: Exact) -> Exact:
        """A few units of fp32's roundoff off, absolutely: near 0 it is cut off."""
        return self.noisy(1.0 / (1.0 + np.exp(-np.clip(x, -700, 700))), np.array(4 * TEN_TAU))

    def rotated(self, x: Exact, cos: Exact, sin: Exact, *, interleaved: bool) -> Exact:
        """``x f64[R, N, heads, width]`` turned by ``cos, sin f64[N, width / 2]``."""
        half = x.shape[-1] // 2
        one, two = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
        c, s = cos[None, :, None], sin[None, :, None]
        turned = one * c - two * s, two * c + one * s
        out = np.stack(turned, axis=-1).reshape(x.shape) if interleaved else np.concatenate(turned, axis=-1)
        return self.noisy(out, np.abs(x).max(axis=-1, keepdims=True) * (4 * TEN_TAU))


def attended(
    jitter: Jitter,
    queries: Exact,
    keys: Exact,
    values: Exact,
    scale: float,
    window: int,
    sinks: NDArray[np.float32] | None,
    rows_at_once: int,
    each: Callable[[], None],
) -> Exact:
    """Causal attention of ``queries f64[R, N, heads, d]`` over ``keys f64[R, N, kv, d]``, ``values f64[R, N, kv, v]``:
    ``f64[R, N, heads, v]``. ``each`` is called now and then, and may raise."""
    copies, count, heads, width = queries.shape
    group = heads // keys.shape[2]
    out = np.empty((copies, count, heads, values.shape[3]))
    most = TEN_TAU * (LONG / width) ** 0.5
    for head in range(heads):
        k, v = keys[:, :, head // group], values[:, :, head // group]
        sink = None if sinks is None else np.full((copies, 1, 1), float(sinks[head]))
        for first in range(0, count, rows_at_once):
            each()
            q, end = queries[:, first : first + rows_at_once, head], min(count, first + rows_at_once)
            seen = k[:, :end]
            bound = (np.abs(q[0]) * most) @ np.abs(seen[0]).T * scale
            scores = jitter.noisy((q @ seen.transpose(0, 2, 1)) * scale, bound[None])
            apart = np.arange(first, end)[:, None] - np.arange(end)[None]
            hidden = (apart < 0) | ((apart >= window) if window else False)
            scores = np.where(hidden[None], -np.inf, scores)
            if sink is not None:
                scores = np.concatenate([scores, np.broadcast_to(sink, (*scores.shape[:2], 1))], axis=2)
            shares = jitter.softmax(scores)[..., :end]
            reach = (shares[0] * TEN_TAU * 4) @ np.abs(v[0, :end])
            out[:, first:end, head] = jitter.noisy(shares @ v[:, :end], reach[None])
    return out
