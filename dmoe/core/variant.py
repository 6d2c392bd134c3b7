"""What sets a model apart from a plain Llama or Mixtral, as data: the fields that graphs and the router are built from.

Owns: the structs and their rules. Does not own: which family has what (``dmoe/importer``) and how it is computed
(``dmoe/graphs``, ``dmoe/latent``, ``core/rope``, ``core/routing``).

Invariants:
1. Every field has a default that means "as in a plain model" and is left out of the JSON then, so that a new field
   changes no stored manifest.
2. What is checked here can be computed: a value that passes is never refused later.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import msgspec

from config.errors import IntegrityError

RopeKind = Literal["linear", "yarn", "llama3"]
Activation = Literal["silu", "clamped"]
"""``silu``: silu(gate) * up. ``clamped`` (gpt-oss): (up + 1) * gate * sigmoid(alpha * gate), both clamped before."""
RANK_MAX = 1 << 16


def demand(rule: bool, fault: str) -> None:
    """Raise IntegrityError about a manifest unless ``rule`` holds."""
    if not rule:
        raise IntegrityError("integrity", f"manifest: {fault}", "get the model again from its publisher")


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Immutable, strictly typed; what equals its default is not written."""


class RopeScaling(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a rope was stretched over a longer context. ``linear``: by ``factor``. ``yarn`` (arXiv:2309.00071): by
    frequency between ``fast`` and ``slow`` rotations, and cos and sin times ``attention_factor``; ``rounded``: the
    bounds are whole dimensions. ``llama3``: by wavelength, where ``slow`` and ``fast`` are its low and high factor."""

    kind: RopeKind
    factor: float
    original_context: int = 0
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float = 1.0
    rounded: bool = True

    def check(self) -> None:
        """Raise IntegrityError unless it can be computed."""
        demand(0 < self.factor <= 1e6, f"rope.factor = {self.factor}")
        demand(0 < self.attention_factor <= 1e3, f"rope.attention_factor = {self.attention_factor}")
        if self.kind != "linear":
            demand(1 <= self.original_context <= 1 << 24, f"rope.original_context = {self.original_context}")
            demand(0 < self.slow < self.fast <= 1e6, f"rope.fast = {self.fast}, rope.slow = {self.slow}")


class Latent(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): a token's keys and values are kept as one vector of
    ``rank`` numbers for all heads, and a key of ``rope`` numbers that knows its position. ``query_rank`` 0: queries
    come from the hidden state at once. ``plain``: a head's part of query and key without position."""

    rank: int
    rope: int
    plain: int
    value: int
    query_rank: int = 0

    @property
    def width(self) -> int:
        """Numbers in the cache per token and layer."""
        return self.rank + self.rope

    def check(self, head_dim: int) -> None:
        """Raise IntegrityError unless all sizes are possible."""
        for name in ("rank", "rope", "plain", "value"):
            value = getattr(self, name)
            demand(1 <= value <= RANK_MAX, f"latent.{name} = {value} is not within 1..{RANK_MAX}")
        demand(0 <= self.query_rank <= RANK_MAX, f"latent.query_rank = {self.query_rank}")
        demand(self.rope % 2 == 0 and self.width % 8 == 0, f"latent.rope = {self.rope}, latent.rank = {self.rank}")
        demand(head_dim == self.plain + self.rope, f"latent heads are {self.plain} + {self.rope} wide, not {head_dim}")


class Variant(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The differences. Tensors that a field adds to the trunk's shard are named in brackets, ``layer.N.`` before them.

    Attention: ``qkv_bias`` [qkv.bias], ``output_bias`` [output.bias]; ``qk_norm`` [query_norm, key_norm], an RMS norm
    of each ``head`` or of the ``whole`` width, before the rope; ``qkv_clip``: queries, keys, values are clamped to it
    (0: not); ``sinks`` [sinks]: a logit per head that takes part in the softmax and has no value; ``windows``: per
    layer, how many keys a row sees, itself included (0: all; empty: all layers see all); ``attention_scale`` of the
    logits (0: head_dim ** -0.5).

    Feed-forward: ``dense_layers`` have no experts but one FFN of ``dense_intermediate`` in the trunk [ffn.gate_up,
    ffn.down]; ``shared_intermediate``: width of an FFN beside the experts, in the trunk too [shared.gate_up,
    shared.down], weighted by a sigmoid with ``shared_gate`` [shared.gate, f32[1, H]]. ``expert_bias``: experts have
    [expert.E.gate_up.bias, expert.E.down.bias]. ``router_bias`` [router.bias]: added to the logits, except that a
    sigmoid router chooses by score + bias and weighs by the score alone.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    qkv_clip: float = 0.0
    sinks: bool = False
    windows: tuple[int, ...] = ()
    attention_scale: float = 0.0
    rope: RopeScaling | None = None
    latent: Latent | None = None
    dense_layers: tuple[int, ...] = ()
    dense_intermediate: int = 0
    shared_intermediate: int = 0
    shared_gate: bool = False
    activation: Activation = "silu"
    activation_alpha: float = 1.702
    activation_limit: float = 7.0
    expert_bias: bool = False
    router_bias: bool = False

    def check(self, layers: int, head_dim: int, width_max: int) -> None:
        """Raise IntegrityError unless a model of so many layers and so wide heads can be computed."""
        if self.rope is not None:
            self.rope.check()
        if self.latent is not None:
            self.latent.check(head_dim)
            plain = not (self.qkv_bias or self.sinks or self.windows or self.qkv_clip) and self.qk_norm == "none"
            demand(plain, "latent attention has no biases, norms per head, clips, sinks or windows")
        demand(len(self.windows) in (0, layers), f"{len(self.windows)} windows for {layers} layers")
        demand(all(0 <= window <= 1 << 24 for window in self.windows), "a window is not within 0..2**24")
        demand(0 <= self.qkv_clip <= 1e9, f"qkv_clip = {self.qkv_clip}")
        demand(0 <= self.attention_scale <= 1e3, f"attention_scale = {self.attention_scale}")
        self._check_feed_forward(layers, width_max)

    def _check_feed_forward(self, layers: int, width_max: int) -> None:
        dense = self.dense_layers
        demand(_ascends(dense) and all(0 <= layer < layers for layer in dense), "dense_layers are no ascending layers")
        demand(len(dense) < layers, "no layer has experts")
        for name in ("dense_intermediate", "shared_intermediate"):
            value = getattr(self, name)
            demand(0 <= value <= width_max, f"{name} = {value} is not within 0..{width_max}")
        demand(bool(dense) == bool(self.dense_intermediate), "dense_layers and dense_intermediate go together")
        demand(not self.shared_gate or self.shared_intermediate > 0, "shared_gate without shared_intermediate")
        demand(0 < self.activation_limit <= 1e9, f"activation_limit = {self.activation_limit}")
        demand(abs(self.activation_alpha) <= 1e3, f"activation_alpha = {self.activation_alpha}")

    def window(self, layer: int) -> int:
        """How many keys a row of ``layer`` sees, itself included; 0: all."""
        return self.windows[layer] if self.windows else 0


PLAIN = Variant()


def _ascends(numbers: Sequence[int]) -> bool:
    return all(left < right for left, right in itertools.pairwise(numbers))
