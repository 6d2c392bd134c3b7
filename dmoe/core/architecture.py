"""A model's hyper-parameters: everything its graphs and its router are built from.

Owns: sizes, their bounds, what follows from them. Does not own: the differences between families (``variant``), files
and shards (``manifest``).

Invariants:
1. A field that came later is left out of the JSON while it is not set: stored manifests keep their bytes and ids.
2. What passes :meth:`Architecture.check` can be computed by this package.
"""

from typing import Literal

import msgspec

from dmoe.core.variant import PLAIN, Variant, demand

BLOCK = 32
"""Weights of one quantisation block share a scale."""
INTERMEDIATE_MAX = 1 << 18
ROPE_NUMBERS_MAX = 1 << 29
"""Numbers of a rope table: four million positions of 128."""
CACHE_BYTES_MAX = 64 << 20
"""Of one position, all layers: six times what the largest models without shared heads need."""
WIDE, WIDE_KEYS_MIN = 128, 65
"""Heads wider than this must see so many keys at least (``dmoe/attention`` says why)."""
CHOSEN_MAX = 256
"""Experts per row that a call can name."""

RouterKind = Literal["all", "softmax_topk", "topk_softmax", "sigmoid_topk", "threshold"]


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Immutable, strictly typed, no unknown fields."""


class Router(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How rows choose experts (``core/routing`` computes it).

    ``all``: every expert, unweighted. ``softmax_topk``: the ``top_k`` largest of a softmax over all experts.
    ``topk_softmax``: a softmax over the ``top_k`` largest logits. ``sigmoid_topk``: the ``top_k`` largest of sigmoids
    plus a bias. ``threshold``: every expert whose softmax share is at least ``threshold``, one to ``top_k`` of them.
    ``normalise``: the weights are rescaled to sum 1; then they are multiplied by ``scale``. ``groups``: experts stand
    in so many equal groups, and only those of the ``groups_used`` best groups are chosen from.
    """

    kind: RouterKind
    experts: int
    top_k: int
    normalise: bool = False
    groups: int | msgspec.UnsetType = msgspec.UNSET
    groups_used: int | msgspec.UnsetType = msgspec.UNSET
    scale: float | msgspec.UnsetType = msgspec.UNSET
    threshold: float | msgspec.UnsetType = msgspec.UNSET

    @property
    def grouping(self) -> tuple[int, int]:
        """How many groups there are and how many are used; ``(1, 1)`` without groups."""
        groups, used = self.groups, self.groups_used
        return (groups if isinstance(groups, int) else 1), (used if isinstance(used, int) else 1)

    @property
    def factor(self) -> float:
        """What the weights are multiplied by."""
        return self.scale if isinstance(self.scale, float) else 1.0

    def check(self) -> None:
        """Raise IntegrityError unless it can be computed."""
        demand(1 <= self.experts <= 1 << 12, f"router.experts = {self.experts} is not within 1..4096")
        demand(1 <= self.top_k <= self.experts, f"router.top_k = {self.top_k} is not within 1..{self.experts}")
        demand(self.kind == "all" or self.top_k <= CHOSEN_MAX, f"router.top_k = {self.top_k} exceeds {CHOSEN_MAX}")
        groups, used = self.grouping
        together = (self.groups is msgspec.UNSET) == (self.groups_used is msgspec.UNSET)
        demand(together and groups >= 1 and self.experts % groups == 0, f"router.groups = {groups}")
        size = self.experts // groups
        demand(1 <= used <= groups and used * size >= self.top_k, f"router.groups_used = {used}")
        demand(groups == 1 or self.kind in ("softmax_topk", "sigmoid_topk"), f"router {self.kind} has no groups")
        demand(groups == 1 or size >= 2 or self.kind != "sigmoid_topk", "router groups of one expert")
        demand(0 < self.factor <= 1e6, f"router.scale = {self.factor}")
        demand((self.kind == "threshold") == isinstance(self.threshold, float), "router.threshold is for its own kind")
        demand(not isinstance(self.threshold, float) or 0 < self.threshold < 1, f"router.threshold = {self.threshold}")


class Architecture(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``intermediate`` is one expert's width. With latent attention ``head_dim`` is a query's and ``kv_heads`` is
    ``heads``."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int
    rope_theta: float
    rope_interleaved: bool
    norm_eps: float
    tie_embeddings: bool
    context: int
    router: Router
    variant: Variant | msgspec.UnsetType = msgspec.UNSET

    @property
    def traits(self) -> Variant:
        """The variant; that of a plain model if none is set."""
        return self.variant if isinstance(self.variant, Variant) else PLAIN

    @property
    def qkv_width(self) -> int:
        """Columns of the packed query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def output_width(self) -> int:
        """Columns that the output projection reads."""
        latent = self.traits.latent
        return self.heads * (latent.value if latent else self.head_dim)

    @property
    def rope_width(self) -> int:
        """Numbers of a head that the rope turns."""
        latent = self.traits.latent
        return latent.rope if latent else self.head_dim

    @property
    def cache_numbers(self) -> int:
        """Floats that a layer keeps of each position."""
        latent = self.traits.latent
        return latent.width if latent else 2 * self.kv_heads * self.head_dim

    @property
    def keys_min(self) -> int:
        """How many keys attention must see at least for its sums to be the same at any length."""
        latent = self.traits.latent
        return WIDE_KEYS_MIN if (latent.width if latent else self.head_dim) > WIDE else 1

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that have experts, ascending."""
        dense = frozenset(self.traits.dense_layers)
        return tuple(layer for layer in range(self.layers) if layer not in dense)

    def attention_weights(self) -> int:
        """Weights that a row meets in one layer's attention."""
        latent = self.traits.latent
        if latent is None:
            return self.hidden * (self.qkv_width + self.output_width)
        queries = self.heads * self.head_dim
        made = latent.query_rank * (self.hidden + queries) if latent.query_rank else self.hidden * queries
        per_head = latent.rank * (latent.plain + latent.value)
        return made + self.hidden * (latent.width + self.output_width) + self.heads * per_head

    def trunk_weights(self, layer: int) -> int:
        """Weights that a row meets in one layer's piece of the trunk, its router and own feed-forward part included."""
        traits = self.traits
        if layer in traits.dense_layers:
            return self.attention_weights() + 3 * self.hidden * traits.dense_intermediate
        router = 0 if self.router.kind == "all" else self.router.experts
        return self.attention_weights() + self.hidden * (3 * traits.shared_intermediate + router)

    def check(self) -> None:
        """Raise IntegrityError unless all sizes are possible."""
        sizes = {
            "hidden": (self.hidden, 1 << 16),
            "layers": (self.layers, 1 << 10),
            "heads": (self.heads, 1 << 10),
            "kv_heads": (self.kv_heads, 1 << 10),
            "head_dim": (self.head_dim, 1 << 10),
            "vocab": (self.vocab, 1 << 21),
            "intermediate": (self.intermediate, INTERMEDIATE_MAX),
            "context": (self.context, 1 << 22),
        }
        for name, (value, most) in sizes.items():
            demand(1 <= value <= most, f"architecture.{name} = {value} is not within 1..{most}")
        # what is built from these numbers alone, before any weight is seen
        table = self.context * self.rope_width
        demand(table <= ROPE_NUMBERS_MAX, f"a rope over {self.context} positions of {self.rope_width} is too large")
        cache = 4 * self.layers * self.cache_numbers
        demand(cache <= CACHE_BYTES_MAX, f"a position would need {cache >> 20} MiB of key/value cache")
        demand(self.heads % self.kv_heads == 0, f"{self.heads} heads cannot share {self.kv_heads} key/value heads")
        demand(self.head_dim % 2 == 0, f"architecture.head_dim = {self.head_dim} is odd")
        demand(0 < self.norm_eps < 1, f"architecture.norm_eps = {self.norm_eps}")
        demand(1 <= self.rope_theta <= 1e12, f"architecture.rope_theta = {self.rope_theta}")
        self.router.check()
        self.traits.check(self.layers, self.head_dim, INTERMEDIATE_MAX)
        traits, dense = self.traits, self.router.kind == "all"
        own = traits.dense_layers or traits.shared_intermediate or traits.router_bias
        demand(not (dense and own), "a model without a router has no layers or parts beside its experts")
