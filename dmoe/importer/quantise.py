"""A source's weights in the form an import wants: as they are, as floats, or quantised on request.

Owns: the int8 and int4 block-32 quantisers. Does not own: GGUF's formats (``blocks``). ``source`` never quantises
again: blocks keep their codes and scales, floats their bits.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmoe.core.linear import Linear, pack
from dmoe.core.manifest import BLOCK, Quantisation

Array = NDArray[Any]
Floats = NDArray[np.float32]

_F16_MAX = 65504.0
_WEIGHTS_AT_ONCE = 1 << 16
"""As many as stay in a core's cache while they are fitted again and again."""
_SPANS = tuple(np.float32(span) for span in np.arange(13, 16.1, 0.5))
"""Over how many steps of the grid a block's weights are spread; above 15 its ends are cut off."""
_REFITS = 2


def float_layer(kind: str, data: Array, *shape: int) -> Linear:
    """A float tensor's bytes as a layer that keeps them."""
    flat = np.ascontiguousarray(data).view(np.uint8).ravel()
    suffix, dtype = {"BF16": ("b", "<u2"), "F16": ("h", "<f2"), "F32": ("w", "<f4")}[kind]
    layer = Linear({suffix: flat.view(dtype).reshape(shape)})
    odd = suffix != "w" and layer.rows * layer.columns % 2  # a file's tensors start at multiples of 4 bytes
    return Linear({"w": layer.dequantised()}) if odd else layer


def to_float(kind: str, data: Array, *shape: int) -> NDArray[np.float32]:
    """A float tensor's bytes as f32."""
    flat = np.ascontiguousarray(data).view(np.uint8).ravel()
    if kind == "BF16":
        return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return flat.view("<f2" if kind == "F16" else "<f4").astype(np.float32).reshape(shape)


def quantise_int8(weights: NDArray[np.float32]) -> Linear:
    """``f32[N, K]`` in blocks of 32 with one symmetric scale each (largest magnitude / 127)."""
    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // BLOCK, BLOCK)
    scales = np.abs(blocks).max(axis=-1) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.rint(blocks * inverse[..., None]) + np.float32(128)
    return Linear({"q8": codes.astype(np.uint8), "s": scales})


def quantise_int4(weights: Floats) -> Linear:
    """``f32[N, K]`` in blocks of 32 with the scale and offset of least squared error that a search finds (after
    ``make_qkx2_quants`` of ggml-quants.c; its extra weight for large numbers made SmolLM2's text worse)."""
    rows, columns = weights.shape
    step = max(1, _WEIGHTS_AT_ONCE // columns)
    parts = [_fit(weights[row : row + step].reshape(-1, columns // BLOCK, BLOCK)) for row in range(0, rows, step)]
    codes, scales, offsets = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Linear({"q4": pack((codes + 8).astype(np.uint8)), "s": scales, "c": np.ascontiguousarray(offsets.T)})


def _fit(x: Floats) -> tuple[Floats, Floats, Floats]:
    """Codes, scales and offsets of blocks ``f32[.., 32]``, so that ``x`` is about ``scale * code + offset``."""
    mean = x.mean(axis=-1)
    x = x - mean[..., None]
    low, width = x.min(axis=-1), x.max(axis=-1) - x.min(axis=-1)
    steps = [np.float32(8) - max(span - 15, np.float32(0)) / 2 for span in _SPANS]
    tries = [(width / span, low + width / span * step) for span, step in zip(_SPANS, steps, strict=True)]
    best = _fitted(x, *tries[0])
    for scale, offset in tries[1:]:
        best = _better(best, _fitted(x, scale, offset))
    for _ in range(_REFITS):
        best = _better(best, _fitted(x, *best[1:]))
    return _codes(x, *best[1:]), best[1], best[2] + mean


_Fit = tuple[Floats, Floats, Floats]
"""Squared error saved, scale and offset per block."""


def _codes(x: Floats, scale: Floats, offset: Floats) -> Floats:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)[..., None]
    codes: Floats = np.clip(np.rint((x - offset[..., None]) * inverse), -8, 7)
    return codes


def _fitted(x: Floats, scale: Floats, offset: Floats) -> _Fit:
    """Round blocks of mean 0 to the grid of ``scale`` and ``offset``, then fit both to the codes by least squares."""
    codes = _codes(x, scale, offset)
    mean = codes.mean(axis=-1)
    spread = np.einsum("...i,...i", codes, codes) - BLOCK * mean * mean
    shared = np.einsum("...i,...i", codes, x)
    slope = np.divide(shared, spread, out=np.zeros_like(spread), where=spread > 0)
    return slope * shared, slope, -slope * mean


def _better(one: _Fit, other: _Fit) -> _Fit:
    """Per block the one that saves more."""
    wins = other[0] > one[0]
    saved, scale, offset = (np.where(wins, new, old) for new, old in zip(other, one, strict=True))
    return saved, scale, offset


def convert(layer: Linear, quantisation: Quantisation) -> Linear:
    """A lossless layer in the wanted form. What has no whole blocks stays float, and so does what f16 cannot hold."""
    if quantisation == "source" or (quantisation == f"int{layer.bits}" and _is_plain(layer)):
        return layer
    weights = layer.dequantised()
    if quantisation == "fp16" and weights.size % 2 == 0 and np.abs(weights).max(initial=0) <= _F16_MAX:
        return Linear({"h": weights.astype(np.float16)})
    if quantisation in ("fp32", "fp16") or layer.columns % BLOCK:
        return Linear({"w": weights})
    return quantise_int8(weights) if quantisation == "int8" else quantise_int4(weights)


def _is_plain(layer: Linear) -> bool:
    """int8 is chosen for its speed, which offsets would take; int4 has them itself."""
    return layer.block == BLOCK and (layer.bits == 4 or "c" not in layer.parts)
