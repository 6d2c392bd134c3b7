"""A GGUF's metadata: typed access to the keys of its architecture, and its rope.

Owns: how a key is read and what a bad one gets. Does not own: which keys a family has (``architectures``).
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError
from dmoe.core.rope import magnitude
from dmoe.core.variant import RopeScaling

_LLAMA3_ORIGINAL, _LLAMA3_SLOW, _LLAMA3_FAST = 8192, 1.0, 4.0
"""What every Llama 3 model has; only its factor differs."""


class Keys:
    """Keys below ``name.``, the architecture's. Raises IntegrityError naming the key."""

    def __init__(self, name: str, metadata: Mapping[str, Any]) -> None:
        self.name = name
        self._metadata = metadata

    def get(self, key: str) -> Any:  # noqa: ANN401 - any metadata value
        """The value as it is, or None."""
        return self._metadata.get(f"{self.name}.{key}")

    def number(self, key: str, default: float | None = None) -> float:
        """A number."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault(key, "is missing or no number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.number(key, default)
        if value != int(value):
            self.fault(key, f"= {value} is no whole number")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.fault(key, "is neither true nor false")
        return value

    def must_be(self, key: str, *wanted: Any) -> None:  # noqa: ANN401 - any metadata value
        """Refuse a value that changes what is computed; a missing key is fine."""
        value = self.get(key)
        if value is not None and value not in wanted:
            self.fault(key, f"= {value!r} is not supported")

    def fault(self, key: str, what: str) -> NoReturn:
        """Refuse a key."""
        raise IntegrityError("integrity", f"metadata key {self.name}.{key} {what}")


def rope_of(keys: Keys, factors: NDArray[np.float32] | None, *, rounded: bool = True) -> RopeScaling | None:
    """How the rope is scaled. ``factors``: the tensor ``rope_freqs.weight``, by which frequencies are divided.
    ``rounded``: see :class:`RopeScaling`; no key says it."""
    kind = keys.get("rope.scaling.type") or "none"
    if kind in ("linear", "yarn") and factors is None:
        factor = float(keys.number("rope.scaling.factor"))
        return RopeScaling(kind="linear", factor=factor) if kind == "linear" else _yarn(keys, factor, rounded)
    if kind != "none":
        keys.fault("rope.scaling.type", f"= {kind!r} is not supported")
    return None if factors is None else _llama3(keys, factors)


def _yarn(keys: Keys, factor: float, rounded: bool) -> RopeScaling:
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        keys.must_be(f"rope.scaling.{key}", 1, 1.0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=keys.integer("rope.scaling.original_context_length", keys.integer("context_length")),
        fast=float(keys.number("rope.scaling.yarn_beta_fast", 32)),
        slow=float(keys.number("rope.scaling.yarn_beta_slow", 1)),
        attention_factor=magnitude(factor),
        rounded=rounded,
    )


def _llama3(keys: Keys, factors: NDArray[np.float32]) -> RopeScaling:
    """Llama 3's scaling, known by its factors: any others are refused."""
    largest = float(factors.max())
    scaling = RopeScaling(
        kind="llama3", factor=largest, original_context=_LLAMA3_ORIGINAL, slow=_LLAMA3_SLOW, fast=_LLAMA3_FAST
    )
    theta = keys.number("rope.freq_base", 10000.0)
    plain = theta ** -(np.arange(len(factors)) / len(factors))
    turns = _LLAMA3_ORIGINAL * plain / (2 * math.pi)
    kept = np.clip((turns - _LLAMA3_SLOW) / (_LLAMA3_FAST - _LLAMA3_SLOW), 0.0, 1.0)
    if largest < 1 or not np.allclose(factors, 1 / ((1 - kept) / largest + kept), rtol=1e-3):
        raise IntegrityError("integrity", "tensor rope_freqs.weight scales the rope otherwise than Llama 3 does")
    return scaling
