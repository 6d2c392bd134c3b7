"""A source file's numbers as :class:`Linear` layers: transcoded, or quantised on request.

Owns: GGUF block layouts (ggml-quants.h) and the int8 block-32 quantiser. ``source`` never quantises again: 4-bit and
8-bit blocks keep their codes and scales, float tensors stay float.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmoe.core.linear import Linear
from dmoe.core.manifest import BLOCK, Quantisation

Array = NDArray[Any]

FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
BLOCK_TYPES = frozenset({"Q4_0", "Q4_1", "Q8_0"})


def transcode(kind: str, blocks: Array) -> Linear:
    """GGUF blocks ``u8[rows, columns / 32, block bytes]`` of one of BLOCK_TYPES, without loss."""
    if kind == "Q8_0":  # f16 d, i8[32]; w = d * q
        return Linear({"q8": blocks[..., 2:] ^ np.uint8(0x80), "s": _halves(blocks, 0)})
    if kind == "Q4_0":  # f16 d, 16 bytes: weight i low, weight i + 16 high; w = d * (q - 8)
        return Linear({"q4": _pair_nibbles(blocks[..., 2:]), "s": _halves(blocks, 0)})
    assert kind == "Q4_1", kind  # f16 d, f16 m, 16 bytes; w = d * q + m
    scales, minima = _halves(blocks, 0), _halves(blocks, 2)
    offsets = np.ascontiguousarray((minima + 8 * scales).T)
    return Linear({"q4": _pair_nibbles(blocks[..., 4:]), "s": scales, "c": offsets})


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


def convert(layer: Linear, quantisation: Quantisation) -> Linear:
    """A lossless layer in the wanted form. What has no whole blocks stays float."""
    if quantisation == "source" or (quantisation == "int8" and "q8" in layer.parts):
        return layer
    weights = layer.dequantised()
    if quantisation == "fp32" or layer.columns % BLOCK:
        return Linear({"w": weights})
    return quantise_int8(weights)


def _halves(blocks: Array, offset: int) -> NDArray[np.float32]:
    values: NDArray[np.float32] = (
        np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")[..., 0].astype(np.float32)
    )
    return values


def _pair_nibbles(codes: Array) -> NDArray[np.uint8]:
    """GGUF packs weight i with i + 16; MatMulNBits packs weight 2i with 2i + 1."""
    low, high = codes & 15, codes >> 4
    out = np.empty(codes.shape, np.uint8)
    half = codes.shape[-1] // 2
    out[..., :half] = low[..., 0::2] | (low[..., 1::2] << 4)
    out[..., half:] = high[..., 0::2] | (high[..., 1::2] << 4)
    return out
