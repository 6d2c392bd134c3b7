"""Random blocks of every GGUF format, those too that the gguf package reads but cannot write."""

import gguf
import numpy as np

_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}
"""Where a format keeps its f16 numbers, if not at the start."""
_TWO = {"Q4_1", "Q5_1", "Q4_K", "Q5_K"}


def dequantised(kind, blocks):
    """What the gguf package reads from blocks ``u8[rows, blocks, bytes]``."""
    return gguf.dequantize(blocks.reshape(len(blocks), -1), gguf.GGMLQuantizationType[kind])


def random_blocks(kind, rows=6, columns=512, seed=3, deviation=None):
    """``u8[rows, blocks, bytes]``: every byte random, but the scales, which give weights of that standard deviation."""
    own = dequantised(kind, random_blocks(kind, 64, 1024, seed)).std() if deviation else 1
    scale = 0.1 * (deviation or 1) / own
    random = np.random.default_rng(seed)
    size, length = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (rows, columns // size, length), np.uint8)
    halves = random.uniform(-scale, scale, (2, *blocks.shape[:2])).astype(np.float16).view(np.uint16)
    if kind == "MXFP4":
        exponents = random.integers(-3, 3, blocks.shape[:2])
        blocks[..., 0] = np.clip(exponents + 128 + np.rint(np.log2(scale)), 0, 255)
    elif kind == "IQ1_M":  # the top nibbles of four words are an f16
        for word in range(4):
            nibble = (halves[0] >> (4 * word) & 15).astype(np.uint8)
            blocks[..., 49 + 2 * word] = (blocks[..., 49 + 2 * word] & 15) | (nibble << 4)
    elif kind == "NVFP4":  # four e4m3 scales, without the codes of no number
        blocks[..., :4] = random.integers(1, 0x30, blocks[..., :4].shape)
    else:
        offsets = _HALVES.get(kind, (0, 2) if kind in _TWO else (0,))
        for offset, half in zip(offsets, halves, strict=False):
            blocks[..., offset : offset + 2] = half[..., None].view(np.uint8)
    return blocks
