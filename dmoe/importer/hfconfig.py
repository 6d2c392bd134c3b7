"""The content of a ``config.json``: typed access to its keys, and its rope.

Owns: how a key is read and what a bad one gets. Does not own: which keys a family has (``families``).
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from config.errors import IntegrityError
from dmoe.core.rope import magnitude
from dmoe.core.variant import RopeScaling

_SAME_AS_PLAIN = ("default", "dynamic")
"""``dynamic`` stretches the rope beyond the model's context alone, where nothing is computed here."""


class Config:
    """Keys by type; a key that is null is as good as missing. Raises IntegrityError naming the key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, key: str) -> Any:  # noqa: ANN401 - JSON
        """The value as it is, or None."""
        return self.values.get(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A number."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            fault(f"key {key} is missing or no number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.number(key, default)
        if value != int(value):
            fault(f"key {key} = {value} is no whole number")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            fault(f"key {key} is neither true nor false")
        return value

    def layers(self, key: str) -> tuple[int, ...]:
        """A list of layers, ascending; empty if there is none."""
        value = self.values.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(type(layer) is int for layer in value):
            fault(f"key {key} is no list of layers")
        return tuple(sorted(set(value)))

    def must_be(self, key: str, *wanted: Any) -> None:  # noqa: ANN401 - JSON
        """Refuse a value that changes what is computed; a missing key is fine."""
        value = self.values.get(key)
        if value is not None and not any(type(value) is type(good) and value == good for good in wanted):
            fault(f"{key} = {value!r} is not supported")


def fault(what: str) -> NoReturn:
    """Refuse a configuration."""
    raise IntegrityError("integrity", f"config.json: {what}")


def rope_of(config: Config, theta: float) -> tuple[float, RopeScaling | None, float]:
    """theta, how the rope is scaled, and the factor of the attention's logits that comes with it (DeepSeek).

    ``theta`` is for a configuration that names none. transformers 5 keeps everything under ``rope_parameters``.
    """
    rope = Config(_object(config, "rope_parameters") or _object(config, "rope_scaling"))
    theta = float(rope.number("rope_theta", config.number("rope_theta", theta)))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    for source in (config, rope):
        source.must_be("partial_rotary_factor", 1, 1.0)
    if kind in _SAME_AS_PLAIN:
        return theta, None, 1.0
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(rope.number("factor"))), 1.0
    if kind not in ("llama3", "yarn"):
        fault(f"rope of type {kind!r} is not supported")
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = Config({"original_max_position_embeddings": original or config.get("max_position_embeddings")})
    context = original.integer("original_max_position_embeddings")
    if kind == "llama3":
        scaling = RopeScaling(
            kind="llama3",
            factor=float(rope.number("factor")),
            original_context=context,
            fast=float(rope.number("high_freq_factor")),
            slow=float(rope.number("low_freq_factor")),
        )
        return theta, scaling, 1.0
    return theta, *_yarn(config, rope, context)


def _yarn(config: Config, rope: Config, original: int) -> tuple[RopeScaling, float]:
    factor = float(rope.number("factor", config.integer("max_position_embeddings") / original))
    numerator, denominator = rope.number("mscale", 0), rope.number("mscale_all_dim", 0)
    grown = magnitude(factor)
    if numerator and denominator:
        grown = magnitude(factor, numerator) / magnitude(factor, denominator)
    scaling = RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        fast=float(rope.number("beta_fast", 32)),
        slow=float(rope.number("beta_slow", 1)),
        attention_factor=float(rope.number("attention_factor", grown)),
        rounded=rope.flag("truncate", True),
    )
    return scaling, magnitude(factor, denominator) ** 2 if denominator else 1.0


def _object(config: Config, key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        fault(f"{key} is not an object")
    if any(isinstance(part, Mapping) for part in value.values()):
        fault(f"{key} differs between kinds of layers, which is not supported")
    return value
