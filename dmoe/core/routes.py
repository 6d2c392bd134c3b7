"""Who can answer for each sum group of a model: a table made from the manifest and the adverts of the moment.

Owns: the join of manifest and adverts. Does not own: which replica is taken (``dispatch``).

Invariants:
1. A table never changes; a new view makes a new one.
2. This node is a replica of exactly what is loaded in it, whatever its own advert says at the moment.
3. A peer that its operator paused is no replica.
4. A peer that the privacy rule keeps from a layer is no replica for it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from config.vocabulary import PeerId
from dmoe.core.dispatch import Need, Replica
from dmoe.core.manifest import Manifest
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.routing import NOBODY
from dmoe.core.wire import Dtype
from dmoe.ports import Quote
from p2p.core.advert import Advert


@dataclass(frozen=True, slots=True)
class Place:
    """Where one sum group of one layer lives."""

    group: int
    shard: int
    shard_id: str
    experts: tuple[int, ...]
    flops_per_row: int


@dataclass(frozen=True, slots=True)
class ModelMap:
    """The fixed part: layer -> its sum groups (none for a layer without experts), and expert -> its group, the last
    place standing for a choice that is not used (``i32[experts + 1]``)."""

    name: str
    model_id: str
    width: int
    top_k: int
    dtype: Dtype
    layers: tuple[tuple[Place, ...], ...]
    group_of: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Table:
    """Layer -> needs with replicas; peer -> the price its advert names. ``offered``: shards with a replica for every
    layer they serve; ``withheld``: those that have others, too, which the privacy rule does not allow."""

    needs: tuple[tuple[Need, ...], ...]
    quotes: Mapping[PeerId, Quote]
    offered: frozenset[int]
    every: Mapping[int, tuple[Replica, ...]]
    """All replicas by shard, also those that are not used."""
    withheld: frozenset[int] = frozenset()


def map_of(manifest: Manifest) -> ModelMap:
    """The manifest as the caller needs it."""
    architecture, groups = manifest.architecture, manifest.sum_groups
    # one place more: a router's index -1 means nobody, and so does the group -1 it stands for
    group_of = np.full(manifest.experts_per_layer + 1, NOBODY, np.int32)
    for group, members in enumerate(groups):
        group_of[list(members)] = group
    layers, sparse = [], frozenset(architecture.sparse_layers)
    for layer in range(architecture.layers):
        held = range(len(groups)) if layer in sparse else ()
        shards = [manifest.expert_shard(layer, group) for group in held]
        layers.append(
            tuple(
                Place(group, manifest.shard_index(shard.id), shard.id, shard.experts, shard.flops_per_row)
                for group, shard in enumerate(shards)
            )
        )
    top_k = 0 if architecture.router.kind == "all" else architecture.router.top_k
    return ModelMap(
        manifest.name, manifest.model_id, architecture.hidden, top_k, manifest.wire_dtype, tuple(layers), group_of
    )


def table_of(
    model: ModelMap,
    adverts: Mapping[PeerId, Advert],
    me: PeerId,
    local: Collection[int],
    own_price: int,
    privacy: Privacy = OPEN,
    choose: Callable[[int, Sequence[Replica]], Sequence[Replica]] = lambda shard, found: found,
) -> Table:
    """Who offers what right now and may compute it. ``local``: manifest indices of the shards loaded in this node;
    ``choose``: which of a shard's replicas may be used."""
    offers = {
        peer: offer
        for peer, advert in adverts.items()
        if peer != me and not advert.paused and (offer := advert.offer(model.model_id))
    }
    quotes = {
        peer: Quote(offer.quote, offer.microcredits_per_tflop, offer.microcredits_per_kv_unit)
        for peer, offer in offers.items()
    }
    replicas: dict[int, tuple[Replica, ...]] = {}
    every: dict[int, tuple[Replica, ...]] = {}
    for shard in {place.shard for places in model.layers for place in places}:
        found = [
            Replica(peer, quotes[peer].microcredits_per_tflop) for peer in sorted(offers) if offers[peer].holds(shard)
        ]
        if shard in local:
            found.append(Replica(me, own_price))
        every[shard], replicas[shard] = tuple(found), tuple(choose(shard, found))
    if privacy.is_open:
        needs = tuple(
            tuple(Need(place.group, place.shard, replicas[place.shard]) for place in places) for places in model.layers
        )
        return Table(needs, quotes, frozenset(shard for shard, found in replicas.items() if found), every)
    needs = tuple(
        tuple(
            Need(place.group, place.shard, _allowed(replicas[place.shard], privacy, me, layer, len(model.layers)))
            for place in places
        )
        for layer, places in enumerate(model.layers)
    )
    bare = {need.shard for layer_needs in needs for need in layer_needs if not need.replicas}
    fewer = {need.shard for own in needs for need in own if len(need.replicas) < len(replicas[need.shard])}
    return Table(needs, _of_replicas(quotes, needs), frozenset(replicas) - bare, every, frozenset(fewer))


def _allowed(
    replicas: tuple[Replica, ...], privacy: Privacy, me: PeerId, layer: int, layers: int
) -> tuple[Replica, ...]:
    return tuple(each for each in replicas if each.peer_id == me or privacy.allows(each.peer_id, layer, layer, layers))


def _of_replicas(quotes: Mapping[PeerId, Quote], needs: Sequence[Sequence[Need]]) -> Mapping[PeerId, Quote]:
    """Only the prices of those that may be asked for something."""
    asked = {replica.peer_id for layer in needs for need in layer for replica in need.replicas}
    return {peer: quote for peer, quote in quotes.items() if peer in asked}


def paused_with(model_id: str, shard: int, adverts: Mapping[PeerId, Advert]) -> int:
    """How many peers have a shard but are paused."""
    return sum(a.paused and (offer := a.offer(model_id)) is not None and offer.holds(shard) for a in adverts.values())


def row_us_of(layers: Sequence[Sequence[Place]], kflop_per_s: int) -> float | None:
    """Expected time of one row of one group at a peer that claims this speed; None if it claims nothing."""
    places = next((places for places in layers if places), ())
    if not places or not kflop_per_s:
        return None
    return places[0].flops_per_row * 1000.0 / kflop_per_s
