"""GGUF's block formats: every one is stored as the numbers that the gguf package reads from it."""

import gguf
import numpy as np
import pytest

from dmoe.core import linear
from dmoe.core.linear import Linear
from dmoe.importer.blocks import BLOCK_TYPES, block_size, bytes_per_weight, transcode
from dmoe.runtime import open_session
from dmoe.graphs import expert_graph

_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}
"""Where a format keeps its f16 numbers, if not at the start."""
_TWO = {"Q4_1", "Q5_1", "Q4_K", "Q5_K"}


def random_blocks(kind, rows=6, columns=512, seed=3):
    """Every byte random, but the f16 scales, which real files keep small."""
    random = np.random.default_rng(seed)
    size, length = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (rows, columns // size, length), np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = random.integers(100, 130, blocks.shape[:2])
    elif kind == "IQ1_M":  # the top nibbles of four words are an f16
        halves = random.uniform(-0.1, 0.1, blocks.shape[:2]).astype(np.float16).view(np.uint16)
        for word in range(4):
            nibble = (halves >> (4 * word) & 15).astype(np.uint8)
            blocks[..., 49 + 2 * word] = (blocks[..., 49 + 2 * word] & 15) | (nibble << 4)
    elif kind != "NVFP4":
        for offset in _HALVES.get(kind, (0, 2) if kind in _TWO else (0,)):
            halves = random.uniform(-0.1, 0.1, blocks.shape[:2]).astype(np.float16)
            blocks[..., offset : offset + 2] = halves[..., None].view(np.uint8)
    return blocks


def dequantised(kind, blocks):
    return gguf.dequantize(blocks.reshape(len(blocks), -1), gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_every_format_is_stored_without_loss(kind):
    blocks = random_blocks(kind)
    wanted = dequantised(kind, blocks)
    layer = transcode(kind, blocks)
    assert (layer.rows, layer.columns) == wanted.shape
    largest = np.abs(wanted.reshape(len(wanted), -1, block_size(kind))).max(axis=-1)
    error = np.abs(layer.dequantised() - wanted).reshape(*largest.shape, -1).max(axis=-1)
    if "c" in layer.parts:  # scale and offset are added in another order
        largest = largest + np.abs(layer.parts["c"]).max()
        assert (error <= 2 * np.spacing(largest.astype(np.float32))).all()
    else:
        assert not error.any()
    found = linear.find(layer.tensors("x"), "x", *wanted.shape)
    assert found.form == layer.form
    assert bytes_per_weight(kind) == layer.size_bytes / wanted.size
