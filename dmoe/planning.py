"""Which route answers a request here and now: the planner fed with what this node knows.

Owns: the view made from adverts, measurements and the store; plans kept for a moment; what ``route = "auto"`` means.
Does not own: the estimates (``core.plan``), carrying a plan out (``dmoe/models``), the calls (``dmoe/session``).

Invariants:
1. Requests of one class (sizes to the next power of two) share a plan; it is made anew when the view changes, at the
   latest after :data:`KEPT_SECONDS`. An answer keeps the route it began with.
2. Nothing here waits or calls anybody.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import psutil
import trio

from config.errors import ConfigError, LocalError
from config.vocabulary import PeerId
from dmoe.caller import Caller
from dmoe.core import costs
from dmoe.core.costs import Host, Shape, View, shape_of
from dmoe.core.dispatch import PEER_WIDE
from dmoe.core.manifest import Manifest
from dmoe.core.plan import Candidate, Kind, Pin, Plan, Wishes, plan
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.spans import Ask
from dmoe.replicas import now_us
from dmoe.sightings import Sightings
from p2p.core.advert import Advert
from p2p.core.coordinates import from_wire
from p2p.face import Network

KEPT_SECONDS = 5.0
CLASSES_MAX = 256
SHAPES_MAX = 64
PEERS_MAX = 256
HOPS_MAX = 48
"""So many of the nearest stage holders are looked at for the ways between them."""
NEAR_US = 3_000.0
NEAR_BYTES_PER_S = 125_000_000.0
FAR_BYTES_PER_S = 12_500_000.0
UNKNOWN_ROUND_TRIP_US = 100_000.0
SPREAD = 0.2
"""Weight of a new measurement in a moving average."""
_HIDDEN = ("relayed", "private")


@dataclass(frozen=True, slots=True)
class Held:
    """Which shards of a model are here: their files (``on_disk``), and in memory for answers (``resident``)."""

    on_disk: frozenset[int]
    resident: frozenset[int] = frozenset()


_PEER_IDS = ("12D3", "16Uiu2", "Qm")
"""How peer ids begin."""


def wishes_of(
    route: str,
    stage_hosts: Collection[str] = (),
    plan_pins: Collection[str] = (),
    price_weight: int = 0,
    privacy: Privacy = OPEN,
) -> Wishes:
    """The operator's settings. Raises ConfigError for a pin that cannot be read."""
    pins = tuple(_pin(text) for text in plan_pins)
    for one, other in combinations(sorted(pins, key=lambda pin: pin.first), 2):
        if other.first <= one.last:
            raise ConfigError(
                "config", f"dmoe.plan_pins: layers {other.first} to {one.last} are pinned twice", "name each layer once"
            )
    hosts = tuple(PeerId(host) for host in stage_hosts)
    for host in hosts:
        if not host.startswith(_PEER_IDS):
            raise ConfigError("config", f"dmoe.stage_hosts: {host[:80]!r} is no peer id", "as rios id shows it there")
    return Wishes(
        route=route,  # type: ignore[arg-type]
        stage_hosts=hosts,
        pins=pins,
        price_weight=price_weight,
        privacy=privacy,
    )


def _pin(text: str) -> Pin:
    layers, equals, where = (part.strip() for part in text.partition("="))
    first, dash, last = layers.partition("-")
    if not (equals and where and first.isdecimal() and (last.isdecimal() if dash else True)):
        raise ConfigError(
            "config", f"dmoe.plan_pins: {text!r} is no pin", "e.g. 0-9=here, 10=experts, 20-29=12D3Koo..."
        )
    if where not in ("here", "experts") and not where.startswith(_PEER_IDS):
        raise ConfigError("config", f"dmoe.plan_pins: {text!r} names {where!r}", "one of here, experts, a peer id")
    pin = Pin(int(first), int(last or first), where)
    if pin.last < pin.first:
        raise ConfigError("config", f"dmoe.plan_pins: {text!r} ends before it begins", "first layer, then last layer")
    return pin


class Planner:
    """Plans of a node. ``held`` says what of a model is here; ``runs``: the routes that can be carried out."""

    def __init__(
        self,
        network: Network,
        caller: Caller,
        held: Callable[[Manifest], Held],
        wishes: Wishes,
        *,
        threads: int,
        runs: Collection[Kind] = ("experts", "local", "fused"),
        loaded: Callable[[str], frozenset[int]] = lambda model_id: frozenset(),
        ram_bytes_free: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
    ) -> None:
        self._network = network
        self._caller = caller
        self._held = held
        self.wishes = wishes
        self._threads = threads
        self._runs = frozenset(runs)
        self._loaded = loaded
        self._ram_bytes_free = ram_bytes_free
        self._shapes: dict[str, Shape] = {}
        self._kept: dict[tuple[str, Ask, Privacy], tuple[object, float, Plan]] = {}
        self._layer_us: dict[str, float] = {}
        self._stage_layer_us: dict[tuple[str, PeerId], float] = {}
        self._chosen: Counter[str] = Counter()

    def plan(self, manifest: Manifest, ask: Ask, privacy: Privacy | None = None) -> Plan:
        """A plan for exactly this, made now; ``privacy``: the rule in force, the operator's unless a request tightens
        it."""
        return plan(self._shape(manifest), self.view(manifest), ask, self._wishes_under(privacy))

    def _wishes_under(self, privacy: Privacy | None) -> Wishes:
        """A request that shall stay here is planned over all routes here."""
        if privacy is None:
            return self.wishes
        route = "auto" if privacy.asked == "local" else self.wishes.route
        return replace(self.wishes, privacy=privacy, route=route)

    def route(self, manifest: Manifest, ask: Ask, privacy: Privacy | None = None) -> Candidate:
        """How to answer a request of this class. Raises LocalError ``unavailable`` if no route is possible."""
        made = self._plan_of_class(manifest, class_of(ask), privacy)
        if made.chosen is None:
            why = "; ".join(f"{each.kind}: {each.why_not}" for each in made.candidates)
            raise LocalError("unavailable", f"{manifest.name}: no route is possible: {why}", "see: rios plan")
        self._chosen[made.chosen.kind] += 1
        return made.chosen

    def _plan_of_class(self, manifest: Manifest, ask: Ask, privacy: Privacy | None) -> Plan:
        wishes = self._wishes_under(privacy)
        key = (manifest.model_id, ask, wishes.privacy)
        version = self._caller.table(self._caller.map(manifest))[0], self._caller.dispatcher.changes
        now = trio.current_time()
        known = self._kept.get(key)
        if known is not None and known[0] == version and now < known[1]:
            return known[2]
        settled = known[2].chosen.kind if known is not None and known[2].chosen is not None else None
        made = plan(self._shape(manifest), self.view(manifest), ask, wishes, settled=settled)
        if len(self._kept) >= CLASSES_MAX:
            self._kept.clear()
        self._kept[key] = (version, now + KEPT_SECONDS, made)
        return made

    def measured(self, manifest: Manifest, kind: Kind, rows: int, pass_us: float) -> None:
        """A pass of few rows that ran here by route ``local`` or ``fused`` took so long: better than any claim."""
        known = self._layer_us.get(manifest.model_id)
        found = costs.layer_row_us(
            self._shape(manifest), self._own(manifest, None), rows, pass_us, whole=kind == "fused"
        )
        self._layer_us[manifest.model_id] = _moved(known, found)

    def measured_stage(self, model_id: str, peer: PeerId, layers: int, rows: int, service_us: float) -> None:
        """A host ran a stage of so many layers on so few rows in this time."""
        key = (model_id, peer)
        if len(self._stage_layer_us) > PEERS_MAX * SHAPES_MAX:
            self._stage_layer_us.clear()
        self._stage_layer_us[key] = _moved(self._stage_layer_us.get(key), service_us / max(1, layers * rows))

    @property
    def sightings(self) -> Sightings:
        """Who was seen to hold what."""
        return self._caller.sightings

    def answered_at_us(self, peer: PeerId) -> int | None:
        """When a peer last answered a call, by :func:`dmoe.replicas.now_us`; None if never."""
        return self._caller.dispatcher.answered_at_us(peer)

    def spreads(self, manifest: Manifest, first: int, last: int) -> bool:
        """Whether these layers, where they run here, have their experts elsewhere: pinned so, or not on this disk."""
        groups = {group.shard for layer in self._shape(manifest).layers[first : last + 1] for group in layer}
        return self.wishes.spreads(first, last) or not groups <= self._held(manifest).on_disk

    def statistics(self) -> dict[str, Any]:
        """What was chosen so far and what the plans in use say, JSON-able."""
        plans = []
        for (model_id, ask, _), (_, _, made) in list(self._kept.items())[-8:]:
            chosen = made.chosen
            plans.append(
                {
                    "model_id": model_id,
                    **asdict(ask),
                    "route": chosen.kind if chosen else None,
                    "token_ms": round(chosen.token_us / 1000, 3) if chosen else None,
                    "first_token_ms": round(chosen.first_token_us / 1000, 3) if chosen else None,
                }
            )
        return {"route": self.wishes.route, "chosen": dict(self._chosen), "plans": plans}

    # --- the view

    def _shape(self, manifest: Manifest) -> Shape:
        if manifest.model_id not in self._shapes:
            if len(self._shapes) >= SHAPES_MAX:
                self._shapes.clear()
            self._shapes[manifest.model_id] = shape_of(manifest)
        return self._shapes[manifest.model_id]

    def view(self, manifest: Manifest) -> View:
        """What is known now, as far as this model is concerned."""
        adverts, me = self._network.directory.adverts(), self._network.peer_id
        held, loaded = self._held(manifest), self._loaded(manifest.model_id)
        peers = [
            self._host(manifest, peer, advert, offer.shards, offer.microcredits_per_tflop)
            for peer, advert in adverts.items()
            if peer != me and (offer := advert.offer(manifest.model_id)) is not None
        ]
        peers.sort(key=lambda host: (host.round_trip_us, host.peer_id))
        del peers[PEERS_MAX:]
        return View(
            me=self._own(manifest, self._layer_us.get(manifest.model_id), held.on_disk),
            peers=tuple(peers),
            loaded=loaded,
            resident=held.resident,
            ram_bytes_free=self._ram_bytes_free(),
            hops_us=self._hops(manifest, peers, adverts),
            runs=self._runs,
            may_miss=self._caller.renormalises,
        )

    def _own(self, manifest: Manifest, layer_row_us: float | None, on_disk: frozenset[int] = frozenset()) -> Host:
        """This machine."""
        hardware, me = self._network.directory.own().hardware, self._network.peer_id
        known = self._caller.dispatcher.estimate(me)
        return Host(
            peer_id=me,
            kflop_per_s=hardware.expert_kflop_per_s,
            memory_bytes_per_s=hardware.memory_bytes_per_s,
            cores=self._threads,
            row_us=known.row_us if known.calls else None,
            layer_row_us=layer_row_us,
            shards=on_disk,
        )

    def _host(self, manifest: Manifest, peer: PeerId, advert: Advert, bitmap: bytes, price: int) -> Host:
        known = self._caller.dispatcher.peers.get(peer)
        called = known is not None and known.calls > 0
        distance_ms = self._network.directory.distance_ms(peer)
        round_trip_us = UNKNOWN_ROUND_TRIP_US if distance_ms is None else 1000 * distance_ms
        if known is not None and called:
            round_trip_us = known.round_trip_us
        barred = "paused by its operator" if advert.paused else ""
        if self._caller.dispatcher.held(peer, PEER_WIDE, now_us()):
            barred = barred or "resting after failures"
        return Host(
            peer_id=peer,
            round_trip_us=round_trip_us,
            kflop_per_s=advert.hardware.expert_kflop_per_s,
            memory_bytes_per_s=advert.hardware.memory_bytes_per_s,
            cores=max(1, advert.hardware.cores),
            bytes_per_s=NEAR_BYTES_PER_S if round_trip_us < NEAR_US else FAR_BYTES_PER_S,
            row_us=known.row_us if known is not None and called else None,
            layer_row_us=self._stage_layer_us.get((manifest.model_id, peer)),
            queue_rows=advert.load,
            microcredits_per_tflop=price,
            shards=_indices(bitmap),
            dialable=advert.reach not in _HIDDEN,
            barred=barred,
        )

    def _hops(
        self, manifest: Manifest, peers: Collection[Host], adverts: Mapping[PeerId, Advert]
    ) -> Mapping[tuple[PeerId, PeerId], float]:
        """Estimated round trips between those who hold stages, from their places in the map of round trips."""
        stages = {stage.shard for stage in self._shape(manifest).stages}
        places = {}
        for host in [host for host in peers if stages & host.shards][:HOPS_MAX]:
            place = from_wire(adverts[host.peer_id].coordinate)
            if place is not None and place.error < 1:
                places[host.peer_id] = place
        return {(a, b): places[a].distance_us(places[b]) for a, b in combinations(sorted(places), 2)}


def class_of(ask: Ask) -> Ask:
    """The class a request is planned in: sizes to the next power of two."""
    return replace(
        ask,
        prompt_tokens=_power(ask.prompt_tokens),
        answer_tokens=_power(ask.answer_tokens),
        batch=_power(ask.batch),
        tokens_per_pass=round(ask.tokens_per_pass * 2) / 2,
    )


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _moved(old: float | None, new: float) -> float:
    return new if old is None else old + SPREAD * (new - old)


def _indices(bitmap: bytes) -> frozenset[int]:
    return frozenset(8 * byte + bit for byte, bits in enumerate(bitmap) if bits for bit in range(8) if bits >> bit & 1)
