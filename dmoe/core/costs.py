"""What a model's parts cost to run, and what is known of the machines that may run them: the planner's arithmetic.

Owns: the shape of a model as costs, hosts as speeds, the time of one pass at a host. Does not own: which host does what
(``core.plan``), measuring (``core.dispatch``, ``dmoe/hardware``).

A part's time is a roofline (Williams et al., CACM 2009): the larger of ``rows * flops / speed`` and ``weight bytes /
memory bandwidth``. Where calls were measured, the measured time of a row replaces the claim of the advert, and the
roofline only says what further rows add.

Invariants:
1. Pure and deterministic: the same arguments give the same figures.
2. More rows never cost less time, and a measured host is never judged by its claims.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from config.vocabulary import PeerId
from dmoe.core.manifest import Manifest

KFLOP_PER_S_PRIOR = 5_000_000
MEMORY_BYTES_PER_S_PRIOR = 15_000_000_000
READ_SHARE = 0.35
"""How much of the claimed memory bandwidth reading quantised weights reaches (int8 experts: 10.7 of 27 GB/s)."""
CORE_GAIN = 0.5
"""What each further core adds to a pass through whole layers, as a share of the first (1.5 with two threads)."""
CORES_MAX = 16
PIECE_US = 30.0
"""What one more piece (an attention piece, a sum group) costs this process beside its arithmetic."""
KV_BYTES = 4


@dataclass(frozen=True, slots=True)
class Cost:
    """One part of a layer: work per row, and bytes that a pass reads however many rows it has."""

    flops_per_row: float
    weight_bytes: float


@dataclass(frozen=True, slots=True)
class Group:
    """A sum group of a layer: the manifest index of its shard, how many experts, and their cost if all are chosen."""

    shard: int
    experts: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage shard: its manifest index, its first and last layer."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model as costs. ``row_bytes``: a hidden row on the wire. ``ram_bytes``: of each shard, by manifest index."""

    name: str
    dense: bool
    experts: int
    top_k: int
    row_bytes: int
    kv_bytes_per_position: int
    attention: Cost
    head: Cost
    layers: tuple[tuple[Group, ...], ...]
    trunk: int
    stages: tuple[Stage, ...]
    ram_bytes: tuple[int, ...]
    shard_ids: tuple[str, ...]

    def chosen(self, experts: int) -> float:
        """How many of ``experts`` experts a row chooses, expected."""
        return experts * self.top_k / self.experts

    def touched(self, experts: int, rows: int) -> float:
        """The chance that at least one of ``rows`` rows chooses at least one of ``experts`` experts."""
        return 1.0 - _missed(self.experts, self.top_k, experts) ** rows


@lru_cache(maxsize=4096)
def _missed(total: int, top_k: int, experts: int) -> float:
    """The chance that none of ``experts`` is among ``top_k`` of ``total`` drawn without putting back."""
    missed = 1.0
    for draw in range(top_k):
        missed *= max(0, total - experts - draw) / (total - draw)
    return missed


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine as the planner sees it; all zero: nothing is known.

    ``bytes_per_s``: of the way to it. ``row_us``: measured, one row of one sum group; ``layer_row_us``: measured, one
    row through one layer of a stage. ``dialable``: other peers can connect to it, so that a stage may forward to it.
    ``barred``: why it is not asked.
    """

    peer_id: PeerId
    round_trip_us: float = 0.0
    kflop_per_s: float = 0.0
    memory_bytes_per_s: float = 0.0
    cores: int = 1
    bytes_per_s: float = 12_500_000.0
    row_us: float | None = None
    layer_row_us: float | None = None
    queue_rows: int = 0
    microcredits_per_tflop: int = 0
    shards: frozenset[int] = frozenset()
    dialable: bool = True
    barred: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What this node knows at one moment. ``me.shards``: whose files are here; ``loaded``: which of them it serves;
    ``resident``: which need no further memory.

    ``hops_us``: estimated round trips between two other peers (ids ascending); ``runs``: routes this node can run;
    ``may_miss``: a sparse layer may do without experts that nobody has.
    """

    me: Host
    peers: tuple[Host, ...] = ()
    loaded: frozenset[int] = frozenset()
    resident: frozenset[int] = frozenset()
    ram_bytes_free: int = 1 << 62
    hops_us: Mapping[tuple[PeerId, PeerId], float] = field(default_factory=dict)
    runs: frozenset[str] = frozenset({"experts", "local", "fused"})
    may_miss: bool = False

    def one_way_us(self, a: Host, b: Host) -> float:
        """Expected time of a message from one host to another; through this node where they cannot connect."""
        if a.peer_id == b.peer_id:
            return 0.0
        through_me = (a.round_trip_us + b.round_trip_us) / 2
        if self.me.peer_id in (a.peer_id, b.peer_id) or not (a.dialable or b.dialable):
            return through_me
        known = self.hops_us.get((min(a.peer_id, b.peer_id), max(a.peer_id, b.peer_id)))
        return through_me / 2 if known is None else known / 2


def shape_of(manifest: Manifest) -> Shape:
    """A manifest as costs. The trunk's attention, whatever its kind, is what is not embedding and head."""
    arch, trunk = manifest.architecture, manifest.trunk
    head = arch.vocab * arch.hidden
    per_param = trunk.size_bytes / max(1, trunk.params)
    attention = max(0, trunk.params - head * (1 if arch.tie_embeddings else 2)) / arch.layers
    dense = arch.router.kind == "all"
    layers = []
    for layer in range(arch.layers):
        groups = []
        for group, members in enumerate(manifest.sum_groups if layer in arch.sparse_layers else ()):
            shard = manifest.expert_shard(layer, group)
            read = shard.size_bytes / (shard.layers[1] - shard.layers[0] + 1)
            groups.append(Group(manifest.shard_index(shard.id), len(members), Cost(shard.flops_per_row, read)))
        layers.append(tuple(groups))
    stages = [Stage(index, *shard.layers) for index, shard in enumerate(manifest.shards) if str(shard.kind) == "stage"]
    return Shape(
        name=manifest.name,
        dense=dense,
        experts=arch.router.experts,
        top_k=arch.router.experts if dense else arch.router.top_k,
        row_bytes=arch.hidden * (4 if manifest.wire_dtype == "fp32" else 2),
        kv_bytes_per_position=KV_BYTES * arch.cache_numbers * arch.layers,
        attention=Cost(2 * attention, attention * per_param),
        head=Cost(2 * head, head * per_param),
        layers=tuple(layers),
        trunk=manifest.shard_index(trunk.id),
        stages=tuple(sorted(stages, key=lambda stage: (stage.first, stage.last, stage.shard))),
        ram_bytes=tuple(shard.ram_bytes for shard in manifest.shards),
        shard_ids=tuple(shard.id for shard in manifest.shards),
    )


def experts_us(shape: Shape, host: Host, groups: Sequence[Group], rows: int) -> float:
    """Expected time at ``host`` for ``rows`` rows of these sum groups of one layer, without queue and way."""
    many = sum(_roofline_us(host, _group_cost(shape, group, rows), rows, 1.0) for group in groups)
    if host.row_us is None:
        return many
    one = sum(_roofline_us(host, _group_cost(shape, group, 1), 1, 1.0) for group in groups)
    return _corrected(many, one, host.row_us * len(groups))


def layers_us(shape: Shape, host: Host, first: int, last: int, rows: int) -> float:
    """Expected time at ``host`` for ``rows`` rows through whole layers, without queue and way."""
    many = sum(_layer_us(shape, host, layer, rows) for layer in range(first, last + 1))
    if host.layer_row_us is None:
        return many
    one = sum(_layer_us(shape, host, layer, 1) for layer in range(first, last + 1))
    return _corrected(many, one, host.layer_row_us * (last - first + 1))


def pieces_us(shape: Shape, first: int, last: int) -> float:
    """What running layers in pieces costs beside their arithmetic."""
    return PIECE_US * sum(1 + len(shape.layers[layer]) for layer in range(first, last + 1))


def layer_row_us(shape: Shape, host: Host, rows: int, pass_us: float, *, whole: bool) -> float:
    """What one row through one layer took, told from a pass of few rows through the whole model at ``host``."""
    last = len(shape.layers) - 1
    parts_us = pass_us - head_us(shape, host, rows) - (0.0 if whole else pieces_us(shape, 0, last))
    parts_us = max(parts_us, pass_us / 10)
    many, one = layers_us(shape, host, 0, last, rows), layers_us(shape, host, 0, last, 1)
    found = one + parts_us - many if parts_us >= many else one * parts_us / many
    return found / (last + 1)


def attention_us(shape: Shape, host: Host, rows: int) -> float:
    """One layer's attention piece."""
    return _part_us(shape, host, shape.attention, rows)


def head_us(shape: Shape, host: Host, rows: int) -> float:
    """The last norm and the head, for the rows whose logits are wanted."""
    return _part_us(shape, host, shape.head, rows)


def flops(shape: Shape, groups: Sequence[Group]) -> float:
    """Expected work of one row in these sum groups."""
    return sum(group.cost.flops_per_row * shape.chosen(group.experts) / group.experts for group in groups)


def layers_flops(shape: Shape, first: int, last: int) -> float:
    """Expected work of one row in whole layers."""
    experts = sum(flops(shape, shape.layers[layer]) for layer in range(first, last + 1))
    return experts + shape.attention.flops_per_row * (last - first + 1)


def _layer_us(shape: Shape, host: Host, layer: int, rows: int) -> float:
    parts = (shape.attention, *(_group_cost(shape, group, rows) for group in shape.layers[layer]))
    gain = _gain(host)
    return sum(_roofline_us(host, part, rows, gain) for part in parts)


def _group_cost(shape: Shape, group: Group, rows: int) -> Cost:
    """A group's cost for so many rows: of its experts only the chosen ones are read and computed."""
    share = shape.chosen(group.experts) / group.experts
    return Cost(group.cost.flops_per_row * share, group.cost.weight_bytes * shape.touched(1, rows))


def _roofline_us(host: Host, cost: Cost, rows: int, gain: float) -> float:
    speed = (host.kflop_per_s or KFLOP_PER_S_PRIOR) * gain
    bandwidth = (host.memory_bytes_per_s or MEMORY_BYTES_PER_S_PRIOR) * READ_SHARE * gain
    return max(rows * cost.flops_per_row * 1000.0 / speed, cost.weight_bytes * 1e6 / bandwidth)


def _part_us(shape: Shape, host: Host, part: Cost, rows: int) -> float:
    """A part of the trunk, corrected as whole layers are."""
    many, one = (_roofline_us(host, part, count, _gain(host)) for count in (rows, 1))
    if host.layer_row_us is None:
        return many
    claimed = sum(_layer_us(shape, host, layer, 1) for layer in range(len(shape.layers)))
    return _corrected(many, one, one * host.layer_row_us * len(shape.layers) / max(1e-9, claimed))


def _corrected(many_us: float, one_us: float, measured_us: float) -> float:
    """An estimate for many rows, given what one row was expected to take and took. What it took more is taken once,
    however many rows: it is overhead, or weights read more slowly than claimed. A faster host is faster with all."""
    if measured_us >= one_us:
        return many_us + measured_us - one_us
    return many_us * measured_us / one_us


def _gain(host: Host) -> float:
    return 1.0 + CORE_GAIN * (min(max(host.cores, 1), CORES_MAX) - 1)
