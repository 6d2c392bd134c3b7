"""Rotary position embedding: how fast each pair of a head's numbers turns, plain or stretched over a longer context.

Owns: the frequencies and the tables of cos and sin. Does not own: how a family's configuration names them
(``dmoe/importer``) or the operator that turns (``dmoe/attention``, ``dmoe/latent``).
"""

import math

import numpy as np
from numpy.typing import NDArray

from dmoe.core.architecture import Architecture
from dmoe.core.variant import RopeScaling

Frequencies = NDArray[np.float64]


def rope_tables(arch: Architecture, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, ``f32[positions, rope_width / 2]`` (RoFormer, arXiv:2104.09864), times the attention factor."""
    scaling = arch.traits.rope
    factor = scaling.attention_factor if scaling else 1.0
    angles = np.outer(np.arange(positions, dtype=np.float64), frequencies(arch))
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)


def frequencies(arch: Architecture) -> Frequencies:
    """Radians per position, ``f64[rope_width / 2]``."""
    width, scaling = arch.rope_width, arch.traits.rope
    plain = arch.rope_theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(scaling, plain)
    return _yarn(scaling, plain, arch.rope_theta)


def _llama3(scaling: RopeScaling, plain: Frequencies) -> Frequencies:
    """Slow pairs are stretched, fast ones are kept, between them it is mixed (Llama 3.1)."""
    turns = scaling.original_context * plain / (2 * math.pi)
    kept = np.clip((turns - scaling.slow) / (scaling.fast - scaling.slow), 0.0, 1.0)
    mixed: Frequencies = plain / scaling.factor * (1 - kept) + plain * kept
    return mixed


def _yarn(scaling: RopeScaling, plain: Frequencies, theta: float) -> Frequencies:
    """As :func:`_llama3`, but mixed along the pair's number, not its frequency (YaRN, arXiv:2309.00071, 3.2)."""
    width = 2 * len(plain)

    def place(turns: float) -> float:
        """The dimension that turns so often over the original context."""
        return width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(scaling.fast), place(scaling.slow)
    if scaling.rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    stretched = np.clip((np.arange(len(plain)) - low) / span, 0.0, 1.0)
    mixed: Frequencies = plain / scaling.factor * stretched + plain * (1 - stretched)
    return mixed


def magnitude(factor: float, weight: float = 1.0) -> float:
    """By how much attention grows when a context is stretched by ``factor`` (YaRN, arXiv:2309.00071, 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
