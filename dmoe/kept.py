"""Experts of the layers that stay on this node, beside those that are wherever they are: the same bits.

Owns: which layers of a model are computed from the files here because the privacy rule keeps them, and who is told to
have done so. Does not own: the rule (``core.privacy``), the calls of the other layers (``session``).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from config.vocabulary import PeerId
from dmoe.bills import Bill, Purpose
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.privacy import Privacy
from dmoe.core.routing import Routing
from dmoe.core.wire import FloatRows
from dmoe.layers import LocalExperts, LocalShard
from dmoe.runtime import ExpertShard, RuntimeOptions, ShardFiles
from dmoe.stages.loading import MeteredExperts
from dmoe.tally import Share


def kept_layers(manifest: Manifest, privacy: Privacy) -> tuple[int, ...]:
    """The layers with experts that stay here."""
    arch = manifest.architecture
    return tuple(layer for layer in arch.sparse_layers if privacy.keeps(layer, arch.layers))


class KeptExperts:
    """A model's experts: ``kept`` layers from here, the others from ``elsewhere``."""

    def __init__(
        self, manifest: Manifest, peer_id: PeerId, layers: Sequence[int], kept: LocalExperts, elsewhere: MeteredExperts
    ) -> None:
        self._layers = frozenset(layers)
        self._kept = kept
        self._elsewhere = elsewhere
        self._peer_id = peer_id
        self._places = frozenset((layer, group) for layer in layers for group in range(len(manifest.sum_groups)))

    async def open(self) -> None:
        """See :class:`dmoe.tally.Meter`."""
        await self._elsewhere.open()

    async def run(self, layer: int, h: FloatRows, routing: Routing) -> FloatRows:
        """See :class:`dmoe.segment.Experts`."""
        experts = self._kept if layer in self._layers else self._elsewhere
        return await experts.run(layer, h, routing)

    def begin(self, bills: Sequence[Bill | None], counts: Sequence[int], spare: Purpose = "kept") -> None:
        """See :class:`dmoe.tally.Meter`."""
        self._elsewhere.begin(bills, counts, spare)

    def take(self, counts: Sequence[int]) -> list[Share]:
        """See :class:`dmoe.tally.Meter`."""
        me, shares = str(self._peer_id), self._elsewhere.take(counts)
        return [
            replace(
                share,
                rows={**share.rows, me: share.rows.get(me, 0) + count * len(self._places)},
                places={**share.places, me: self._places | share.places.get(me, frozenset())},
            )
            for share, count in zip(shares, counts, strict=True)
        ]


def kept_experts(
    manifest: Manifest,
    store: ShardFiles,
    options: RuntimeOptions,
    peer_id: PeerId,
    privacy: Privacy,
    elsewhere: MeteredExperts,
    load: Callable[[Manifest, Shard], LocalShard] | None = None,
) -> KeptExperts:
    """Load what stays here; blocking. ``load``: how, if not in this process. Raises LocalError,
    IntegrityError as :class:`ExpertShard` does."""
    layers = kept_layers(manifest, privacy)
    groups = range(len(manifest.sum_groups))
    wanted = [manifest.expert_shard(layer, group) for layer in layers for group in groups]
    here = load or (lambda manifest, shard: ExpertShard(manifest, shard, store, options))
    shards = [here(manifest, shard) for shard in {each.id: each for each in wanted}.values()]
    local = LocalExperts(manifest, shards, threads=options.thread_count, layers=layers)
    return KeptExperts(manifest, peer_id, layers, local, elsewhere)
