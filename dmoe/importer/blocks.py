"""GGUF's block formats as :class:`Linear` layers, transcoded without quantising anything again.

Owns: where each format keeps its scales and minima (ggml-quants.h), and the codes of those that are common. The
codes of the others are the package's own dequantised weights over their scale.

Invariants:
1. ``transcode(...).dequantised()`` is ``gguf.dequantize``'s to one unit in the last place of a block's largest weight.
2. Codes that 4 bits can hold as an affine grid stay in 4 bits; all others (IQ4, MXFP4: grids that are not even) take 8.

=============================================  ==================================================  ===============
format                                         stored form                                         bytes a weight
=============================================  ==================================================  ===============
Q4_0, TQ1_0, TQ2_0                             4 bits, scale per 32                                0.625
Q4_1, Q4_K, IQ3_S, IQ1_S                       4 bits, scale and offset per 32                     0.75
Q3_K                                           4 bits, scale per 16                                0.75
Q2_K                                           4 bits, scale and offset per 16                     1
Q8_0, Q5_0, IQ4_NL, IQ4_XS, MXFP4, IQ3_XXS,    8 bits, scale per 32                                1.125
IQ2_XXS
Q6_K, NVFP4, IQ2_XS, IQ2_S, IQ1_M              8 bits, scale per 16                                1.25
Q5_1, Q5_K                                     8 bits, scale and offset per 32                     1.25
=============================================  ==================================================  ===============
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gguf
import numpy as np
from gguf.quants import IQ4_NL, MXFP4, NVFP4, Q4_K, dequantize
from numpy.typing import NDArray

from dmoe.core.linear import Linear, pack

Array = NDArray[Any]
Floats = NDArray[np.float32]

FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})


def block_size(kind: str) -> int:
    """How many weights a block of this format holds."""
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0])


def transcode(kind: str, blocks: Array) -> Linear:
    """Blocks ``u8[rows, blocks, bytes]`` of one of BLOCK_TYPES. Scales that are not finite give parts that are not."""
    with np.errstate(all="ignore"):
        if kind in _WITH_MINIMA:
            return _WITH_MINIMA[kind](blocks)
        if kind == "Q4_0":  # f16 d, 16 bytes: weight i low, weight i + 16 high
            return Linear({"q4": pack(_nibbles(blocks[..., 2:])), "s": _half(blocks, 0)})
        rows, scales = len(blocks), _SCALES[kind](blocks)
        scales = np.ascontiguousarray(scales.reshape(rows, -1), np.float32)
        if kind in _CODES:
            return Linear({"q8": _CODES[kind](blocks).reshape(*scales.shape, -1), "s": scales})
        return _coded(kind, _dequantised(kind, blocks).reshape(*scales.shape, -1), scales)


def mxfp4_layer(packed: Array, exponents: Array) -> Linear:
    """The same format as gpt-oss's own files keep it: ``u8[N, K/32, 16]``, neighbours in a byte, the first one low, and
    ``u8[N, K/32]`` (OCP Microscaling Formats 1.0). Codes are twice the number, scales half of it."""
    pairs = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(*packed.shape[:-1], -1)
    values = np.array(MXFP4.kvalues, np.int16) + 128
    return Linear({"q8": values.astype(np.uint8)[pairs], "s": MXFP4.e8m0_to_fp32_half(exponents)})


def _coded(kind: str, weights: Floats, scales: Floats) -> Linear:
    """Weights ``f32[N, K/B, B]`` that are whole multiples of their block's scale ``f32[N, K/B]``."""
    codes = np.rint(weights / np.where(scales == 0, 1, scales)[..., None])
    codes = np.nan_to_num(codes, posinf=0, neginf=0).astype(np.int16)
    if kind == "IQ3_S":  # the odd numbers from -15 to 15
        return _affine(codes >> 1, 2 * scales, scales)
    if kind == "IQ1_S":  # -8, 0 or 8, and in the whole block one more or one less
        steps = (codes + 1) >> 3
        return _affine(steps, 8 * scales, (codes - 8 * steps)[..., 0] * scales)
    if kind in ("Q3_K", "TQ1_0", "TQ2_0"):
        return Linear({"q4": pack((codes + 8).astype(np.uint8)), "s": scales})
    return Linear({"q8": (codes + 128).astype(np.uint8), "s": scales})


def _affine(codes: Array, scales: Floats, offsets: Floats, bits: int = 4) -> Linear:
    """``w = scale * code + offset`` of signed codes ``[N, K/B, B]``."""
    unsigned = (codes + (1 << bits - 1)).astype(np.uint8)
    parts = {"q8": unsigned} if bits == 8 else {"q4": pack(unsigned)}
    return Linear(parts | {"s": scales, "c": np.ascontiguousarray(offsets.T, np.float32)})


def _q4_1(blocks: Array) -> Linear:
    """f16 d, f16 m, 16 bytes: weight i low, weight i + 16 high; w = d * q + m."""
    scales = _half(blocks, 0)
    return _affine(_nibbles(blocks[..., 4:]).astype(np.int16) - 8, scales, _half(blocks, 2) + 8 * scales)


def _q5_1(blocks: Array) -> Linear:
    """f16 d, f16 m, 4 bytes of fifth bits, 16 bytes; w = d * q + m."""
    scales = _half(blocks, 0)
    fifth = np.unpackbits(blocks[..., 4:8], axis=-1, bitorder="little")
    codes = (_nibbles(blocks[..., 8:]) | (fifth << np.uint8(4))).astype(np.int16)
    return _affine(codes - 16, scales, _half(blocks, 2) + 16 * scales, bits=8)


def _q4_k(blocks: Array) -> Linear:
    """f16 d, f16 dmin, 12 bytes of 8 scales and minima, 128 bytes; w = d * scale * q - dmin * minimum."""
    scales, minima = _k_scales(blocks)
    codes = _nibbles(blocks[..., 16:], 32).astype(np.int16)
    return _affine(codes.reshape(*scales.shape, 32) - 8, scales, 8 * scales - minima)


def _q5_k(blocks: Array) -> Linear:
    """As Q4_K, with 32 bytes of fifth bits before the 128 bytes: bit i of each byte belongs to sub-block i."""
    scales, minima = _k_scales(blocks)
    fifth = (blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    codes = (_nibbles(blocks[..., 48:], 32).reshape(fifth.shape) | (fifth << np.uint8(4))).astype(np.int16)
    return _affine(codes.reshape(*scales.shape, 32) - 16, scales, 16 * scales - minima, bits=8)


def _q2_k(blocks: Array) -> Linear:
    """16 bytes of scale and minimum, 64 bytes, f16 d, f16 dmin; w = d * scale * q - dmin * minimum."""
    rows, packed = len(blocks), blocks[..., :16]
    scales = (_half(blocks, 80)[..., None] * (packed & 15)).reshape(rows, -1)
    minima = (_half(blocks, 82)[..., None] * (packed >> 4)).reshape(rows, -1)
    pairs = blocks[..., 16:80].reshape(*blocks.shape[:2], 2, 1, 32)
    codes = (pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)
    return _affine(codes.reshape(*scales.shape, 16).astype(np.int16) - 2, scales, 2 * scales - minima)


_WITH_MINIMA: Mapping[str, Callable[[Array], Linear]] = {
    "Q4_1": _q4_1,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
}


def _q6_k(blocks: Array) -> Array:
    """128 bytes of four low bits, 64 of two high bits each; q - 32."""
    low = _nibbles(blocks[..., :128], 64)
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (low | (high.reshape(low.shape) & np.uint8(3)) << np.uint8(4)) + np.uint8(128 - 32)


def _q5_0(blocks: Array) -> Array:
    """4 bytes of fifth bits, 16 bytes; q - 16."""
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    return (_nibbles(blocks[..., 6:]) | (fifth << np.uint8(4))) + np.uint8(128 - 16)


def _from(values: Sequence[int], offset: int) -> Callable[[Array], Array]:
    """Four-bit places in a list of whole numbers."""
    codes = (np.array(values, np.int16) + 128).astype(np.uint8)
    return lambda blocks: codes[_nibbles(blocks[..., offset:])]


# 8-bit codes with zero point 128, of formats that are common: the others take the package's numbers over their scale
_CODES: Mapping[str, Callable[[Array], Array]] = {
    "Q8_0": lambda blocks: blocks[..., 2:] ^ np.uint8(0x80),
    "Q5_0": _q5_0,
    "Q6_K": _q6_k,
    "IQ4_NL": _from(IQ4_NL.kvalues, 2),
    "IQ4_XS": _from(IQ4_NL.kvalues, 8),
    "MXFP4": _from(MXFP4.kvalues, 1),
}


def _q3_k(blocks: Array) -> Array:
    low = blocks[..., 96:104]
    low = np.concatenate([low & 15, low >> 4], axis=-1)
    high = (blocks[..., None, 104:108] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)
    six = low | (high.reshape(*low.shape) << np.uint8(4))
    scales: Array = _half(blocks, 108)[..., None] * (six.astype(np.float32) - 32)
    return scales


def _iq4_xs(blocks: Array) -> Array:
    low = np.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], axis=-1).reshape(*blocks.shape[:2], 8)
    high = _integers(blocks, 2, 4, "<u2") >> (2 * np.arange(8, dtype=np.uint16)) & 3
    scales: Array = _half(blocks, 0)[..., None] * ((low | (high << 4)).astype(np.float32) - 32)
    return scales


def _iq1_m(blocks: Array) -> Array:
    words = _integers(blocks, 48, 56, "<u2")
    halves = (words & np.uint16(0xF000)) >> np.array([12, 8, 4, 0], np.uint16)
    d = np.bitwise_or.reduce(halves, axis=-1).view(np.float16).astype(np.float32)
    steps = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & np.uint16(7)
    scales: Array = d[..., None] * (2 * steps.reshape(*blocks.shape[:2], 16) + 1) / np.float32(8)
    return scales


def _nibble_scales(start: int, end: int) -> Callable[[Array], Array]:
    """Scales per 16 weights, two a byte, in halves of a step: an eighth of it is the unit of the grid."""
    return lambda blocks: _half(blocks, 0)[..., None] * (_paired(blocks, start, end) + np.float32(0.5)) / 4


def _top_bits(start: int, end: int, step: int, divisor: int) -> Callable[[Array], Array]:
    """Scales per 32 weights in the top four bits of every ``step``-th word: the other bits are signs."""

    def read(blocks: Array) -> Array:
        top = (_integers(blocks, start, end, "<u4")[..., step - 1 :: step] >> np.uint32(28)).astype(np.float32)
        return _half(blocks, 0)[..., None] * (top + np.float32(0.5)) / np.float32(divisor)

    return read


def _repeated(offset: int) -> Callable[[Array], Array]:
    """One scale per 256 weights, said for each 32."""
    return lambda blocks: _half(blocks, offset)[..., None].repeat(8, axis=-1)


# where a format without minima keeps the scales of its sub-blocks: f32[rows, blocks, sub-blocks]
_SCALES: Mapping[str, Callable[[Array], Array]] = {
    "Q8_0": lambda blocks: _half(blocks, 0),
    "Q5_0": lambda blocks: _half(blocks, 0),
    "Q3_K": _q3_k,
    "Q6_K": lambda blocks: _half(blocks, 208)[..., None] * blocks[..., 192:208].view(np.int8).astype(np.float32),
    "IQ4_NL": lambda blocks: _half(blocks, 0),
    "IQ4_XS": _iq4_xs,
    "MXFP4": lambda blocks: MXFP4.e8m0_to_fp32_half(blocks[..., 0]),
    "NVFP4": lambda blocks: NVFP4.ue4m3_to_fp32(blocks[..., :4]).astype(np.float32),
    "TQ1_0": _repeated(52),
    "TQ2_0": _repeated(64),
    "IQ3_S": lambda blocks: _half(blocks, 0)[..., None] * (2 * _paired(blocks, 106, 110) + 1),
    "IQ3_XXS": _top_bits(66, 98, 1, 2),
    "IQ2_XXS": _top_bits(2, 66, 2, 4),
    "IQ2_XS": _nibble_scales(66, 74),
    "IQ2_S": _nibble_scales(74, 82),
    "IQ1_S": lambda blocks: (
        _half(blocks, 0)[..., None] * (2 * (_integers(blocks, 34, 50, "<u2") >> 12 & 7) + 1) / np.float32(8)
    ),
    "IQ1_M": _iq1_m,
}

BLOCK_TYPES = frozenset({"Q4_0", *_WITH_MINIMA, *_SCALES})


def _dequantised(kind: str, blocks: Array) -> Floats:
    weights: Floats = dequantize(blocks.reshape(len(blocks), -1), gguf.GGMLQuantizationType[kind])
    return weights


def _half(blocks: Array, offset: int) -> Floats:
    """The f16 at a byte of each block."""
    values: Floats = np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")[..., 0].astype(np.float32)
    return values


def _integers(blocks: Array, start: int, end: int, kind: str) -> Array:
    return np.ascontiguousarray(blocks[..., start:end]).view(kind)


def _paired(blocks: Array, start: int, end: int) -> Floats:
    """Four-bit numbers, the low half of a byte first."""
    packed = blocks[..., start:end]
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.float32)


def _nibbles(packed: Array, half: int = 16) -> NDArray[np.uint8]:
    """Four-bit codes: of every ``half`` bytes all low halves, then all high ones."""
    groups = packed.reshape(*packed.shape[:-1], -1, half)
    return np.concatenate([groups & np.uint8(15), groups >> np.uint8(4)], axis=-1).reshape(*packed.shape[:-1], -1)


def _k_scales(blocks: Array) -> tuple[Floats, Floats]:
    """Scales and minima of a K-format's eight sub-blocks: ``f32[rows, blocks * 8]`` each."""
    rows = len(blocks)
    six, low = Q4_K.get_scale_min(np.ascontiguousarray(blocks[..., 4:16]).reshape(-1, 12))
    scales = _half(blocks, 0)[..., None] * six.reshape(rows, -1, 8)
    minima = _half(blocks, 2)[..., None] * low.reshape(rows, -1, 8)
    return scales.reshape(rows, -1), minima.reshape(rows, -1)
