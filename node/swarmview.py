"""The swarm as the gateway's :class:`gateway.ports.Swarm` wants it: adverts, deployments and measurements joined.

Owns what no other part remembers: the state each deployment had (whoever was complete once is degraded afterwards) and
the workers that went a while ago. Everything else is read where it stands.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from config.errors import RequestError
from config.swarm import (
    Deployment,
    DeploymentMode,
    DeploymentState,
    MapShard,
    ModelMap,
    ShardHealth,
    Worker,
    WorkerGpu,
    WorkerHardware,
    WorkerHealth,
    WorkerReputation,
    next_state,
)
from config.vocabulary import PeerId
from dmoe.core.dispatch import PEER_WIDE
from dmoe.core.manifest import Manifest
from dmoe.replicas import now_us
from p2p.core.advert import Advert

if TYPE_CHECKING:
    from node.daemon import Node

log = logging.getLogger("rios.node")

LOOK_SECONDS = 1.0
"""Between looks at a directory that changes all the time."""
GONE_MS = 15 * 60 * 1000
GONE_MAX = 256
SINCE_MS_COARSE = 3000


@dataclass(frozen=True, slots=True)
class _Holders:
    """By index of the manifest: who holds a shard, and how many of those are of use now."""

    peers: Mapping[int, Sequence[PeerId]]
    healthy: Mapping[int, int]


class SwarmView:
    """:meth:`run` must be running for what is remembered to be remembered."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._states: dict[str, DeploymentState] = {}
        self._seen: dict[str, Worker] = {}
        self._gone: OrderedDict[str, Worker] = OrderedDict()
        self._since_ms: dict[str, int] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Remember, until cancelled."""
        self._remember()
        task_status.started()
        while True:
            with trio.move_on_after(5 * LOOK_SECONDS):  # deployments change without the directory
                await self._node.network.directory.wait_change()
            try:
                self._remember()
            except Exception:
                log.exception("the swarm could not be looked at")
            await trio.sleep(LOOK_SECONDS)

    def _remember(self) -> None:
        self.deployments()
        now, present = _now_ms(), {worker.peer_id: worker for worker in self._present()}
        for peer_id in self._since_ms.keys() - present.keys():
            del self._since_ms[peer_id]
        for peer_id in self._seen.keys() - present.keys():
            self._gone[peer_id] = replace(
                self._seen[peer_id], health="gone", linked=False, since_ms=now, load=0, shards=0, models=()
            )
        self._seen = present
        for peer_id, worker in list(self._gone.items()):
            if peer_id in present or now - (worker.since_ms or 0) > GONE_MS or len(self._gone) > GONE_MAX:
                del self._gone[peer_id]

    # --- workers

    def workers(self) -> Sequence[Worker]:
        """See the port."""
        present = list(self._present())
        known = {worker.peer_id for worker in present}
        gone = [worker for peer_id, worker in self._gone.items() if peer_id not in known]
        return [*sorted(present, key=lambda worker: (not worker.is_self, worker.peer_id)), *gone]

    def _present(self) -> Iterator[Worker]:
        network = self._node.network
        regions, linked = network.locator.regions(), set(network.peers())
        audit = self._node.caller.audit
        audits = audit.trust.table() if audit is not None else {}
        for peer_id, advert in network.directory.adverts().items():
            is_self = peer_id == self._node.identity.peer_id
            door = network.doors.peer(peer_id)
            region, inferred = regions.get(peer_id, (advert.region, False))
            record = audits.get(peer_id, {})
            yield Worker(
                peer_id=peer_id,
                name=(self._node.settings.node.name if is_self else "") or f"…{peer_id[-8:]}",
                is_self=is_self,
                version=advert.version,
                region=region,
                region_inferred=inferred,
                roles=advert.roles,
                hardware=_hardware(advert),
                round_trip_ms=0.0 if is_self else _rounded(network.directory.distance_ms(peer_id)),
                linked=is_self or peer_id in linked,
                reach=advert.reach,
                shards=sum(byte.bit_count() for offer in advert.models for byte in offer.shards),
                models=[offer.model_id for offer in advert.models],
                offered_bytes=advert.offered_bytes,
                full=advert.full,
                load=advert.load,
                health=self._health(
                    peer_id, advert, banned=door["ban"] is not None, linked=is_self or peer_id in linked
                ),
                reputation=WorkerReputation(
                    score=round(float(door["score"]), 3),
                    audits=_count(record, "audits"),
                    wrong=_count(record, "guilty"),
                    unclear=_count(record, "unclear"),
                ),
                since_ms=self._since(peer_id, door["linked_s"], is_self=is_self),
                microcredits_per_tflop=max((offer.microcredits_per_tflop for offer in advert.models), default=0),
                microcredits_per_kv_unit=max((offer.microcredits_per_kv_unit for offer in advert.models), default=0),
            )

    def _since(self, peer_id: str, linked_s: int, *, is_self: bool) -> int | None:
        """The same at every look, while the link lasts: the seconds that links count are coarse."""
        seconds = time.monotonic() - self._node.started_at if is_self else linked_s
        if not seconds:
            self._since_ms.pop(peer_id, None)
            return None
        since = _now_ms() - int(seconds * 1000)
        if abs(since - self._since_ms.get(peer_id, 0)) > SINCE_MS_COARSE:
            self._since_ms[peer_id] = since
        return self._since_ms[peer_id]

    def _health(self, peer_id: PeerId, advert: Advert, *, banned: bool, linked: bool) -> WorkerHealth:
        if banned:
            return "banned"
        if advert.paused:
            return "paused"
        if self._node.caller.dispatcher.held(peer_id, PEER_WIDE, now_us()):
            return "resting"
        return "healthy" if linked else "unlinked"

    # --- deployments

    def deployments(self) -> Sequence[Deployment]:
        """See the port."""
        wanted = self._node.hosting.deployments.book.replicas()
        for gone in self._states.keys() - {model_id for model_id, replicas in wanted.items() if replicas}:
            del self._states[gone]
        return [self._deployment(model_id, replicas) for model_id, replicas in sorted(wanted.items()) if replicas]

    def _deployment(self, model_id: str, replicas: int) -> Deployment:
        hosting, book = self._node.hosting, self._node.hosting.deployments.book
        manifest = self._node.store.manifests().get(model_id)  # type: ignore[call-overload]
        shards = self._shards(manifest) if manifest else []
        error = "" if manifest else hosting.manifest_error(model_id)
        before = self._states.get(model_id)
        state, reason = next_state(before, shards, known=manifest is not None, error=error)
        self._states[model_id] = state
        own = book.own(model_id)
        return Deployment(
            id=model_id,
            model=manifest.name if manifest else "",
            mode=book.mode(model_id),
            replicas=replicas,
            state=state,
            reason=reason,
            deployed_here=own is not None and own.replicas > 0,
            changed_ms=own.seq if own is not None else 0,
            deployers=book.deployers(model_id),
            replicas_min=min((shard.healthy for shard in shards if shard.kind != "trunk"), default=0),
            shards_ready=sum(shard.healthy >= shard.wanted for shard in shards),
            shards=shards,
        )

    def _shards(self, manifest: Manifest) -> list[ShardHealth]:
        """Those that are wanted. A trunk is wanted once: it is what answers are put together with, and whoever answers
        brings it to itself."""
        book, holders = self._node.hosting.deployments.book, self._holders(manifest)
        problems = self._node.hosting.problems(manifest.model_id)
        found = []
        for index, shard in enumerate(manifest.shards):
            wanted = book.wanted(manifest.model_id, shard.kind)
            if wanted:
                health = ShardHealth(
                    id=shard.id,
                    kind=shard.kind,
                    wanted=1 if shard.kind == "trunk" else wanted,
                    there=len(holders.peers.get(index, ())),
                    healthy=holders.healthy.get(index, 0),
                    problem=problems.get(shard.id, ""),
                )
                found.append(health)
        return found

    def _holders(self, manifest: Manifest) -> _Holders:
        peers: dict[int, list[PeerId]] = {}
        healthy: dict[int, int] = {}
        dispatcher, now = self._node.caller.dispatcher, now_us()
        for peer, advert in sorted(self._node.network.directory.adverts().items()):
            offer = advert.offer(manifest.model_id)
            if offer is None:
                continue
            rests = advert.paused or dispatcher.held(peer, PEER_WIDE, now)
            for index in _indices(offer.shards, len(manifest.shards)):
                peers.setdefault(index, []).append(peer)
                if not rests and not dispatcher.held(peer, index, now):
                    healthy[index] = healthy.get(index, 0) + 1
        return _Holders(peers, healthy)

    async def deploy(self, model: str, replicas: int | None, mode: DeploymentMode) -> Deployment:
        """See the port."""
        manifest = self._node.store.find(model)
        count = self._node.settings.dmoe.replicas if replicas is None else replicas
        await self._node.hosting.deploy(manifest.model_id, count, mode)
        return self._found(manifest.model_id)

    async def scale(self, model_id: str, replicas: int) -> Deployment:
        """See the port."""
        await self._node.hosting.scale(model_id, replicas)
        return self._found(model_id)

    async def undeploy(self, model_id: str) -> None:
        """See the port."""
        await self._node.hosting.undeploy(model_id)

    def _found(self, model_id: str) -> Deployment:
        for each in self.deployments():
            if each.id == model_id:
                return each
        raise RequestError("not_found", f"there is no deployment of {model_id[:12]}", "it was taken back meanwhile")

    # --- the map

    def maps(self) -> Sequence[ModelMap]:
        """See the port."""
        wanted = self._node.hosting.deployments.book.replicas()
        answered = {model.id for model in self._node.engine.models()}
        manifests = sorted(self._node.store.manifests().items(), key=lambda pair: pair[1].name)
        return [
            self._map(manifest, wanted.get(model_id, 0))
            for model_id, manifest in manifests
            if wanted.get(model_id, 0) or model_id in answered
        ]

    def _map(self, manifest: Manifest, wanted: int) -> ModelMap:
        holders = self._holders(manifest)
        workers = sorted({peer for peers in holders.peers.values() for peer in peers})
        place = {peer: number for number, peer in enumerate(workers)}
        return ModelMap(
            id=manifest.model_id,
            model=manifest.name,
            layers=manifest.architecture.layers,
            experts=manifest.experts_per_layer,
            wanted=wanted,
            workers=workers,
            shards=[
                MapShard(
                    id=shard.id,
                    kind=shard.kind,
                    first_layer=shard.layers[0],
                    last_layer=shard.layers[1],
                    experts=shard.experts,
                    holders=[place[peer] for peer in holders.peers.get(index, ())],
                )
                for index, shard in enumerate(manifest.shards)
            ],
        )


def _indices(bitmap: bytes, count: int) -> Iterator[int]:
    for number, byte in enumerate(bitmap):
        for bit in range(8):
            if byte >> bit & 1 and number * 8 + bit < count:
                yield number * 8 + bit


def _hardware(advert: Advert) -> WorkerHardware:
    told = advert.hardware
    return WorkerHardware(
        cpu=told.cpu,
        cores=told.cores,
        ram_bytes=told.ram_bytes,
        gpus=[WorkerGpu(name=gpu.name, memory_bytes=gpu.memory_bytes) for gpu in told.gpus],
        expert_kflop_per_s=told.expert_kflop_per_s,
        memory_bytes_per_s=told.memory_bytes_per_s,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _count(record: Mapping[str, object], name: str) -> int:
    value = record.get(name, 0)
    return value if isinstance(value, int) else 0


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
