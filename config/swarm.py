"""The swarm as one node sees it: what crosses the line between the node and whoever shows it (the gateway).

Plain values and one pure rule: how a deployment's state follows from its shards. Amounts are microcredits, times unix
milliseconds, sizes bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WorkerHealth = Literal["healthy", "unlinked", "resting", "paused", "banned", "gone"]
"""healthy: linked, and nothing is wrong; unlinked: known from others only; resting: calls to it failed a moment ago;
paused: by its operator; banned: shut out here; gone: it was there a while ago."""
DeploymentState = Literal["pending", "placing", "ready", "degraded", "failed"]
DeploymentMode = Literal["experts", "stages", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGpu:
    """One GPU."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHardware:
    """What a worker says it measured on itself."""

    cpu: str
    cores: int
    ram_bytes: int
    gpus: Sequence[WorkerGpu]
    expert_kflop_per_s: int
    memory_bytes_per_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReputation:
    """What this node knows of a worker's behaviour."""

    score: float
    """Faults at the network's door, fading with time; 0 is spotless."""
    audits: int
    """Answers that were looked at."""
    wrong: int
    """Answers that were proved wrong: such a worker is not used."""
    unclear: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A node of the swarm."""

    peer_id: str
    name: str
    """Its own name where it is this node; other nodes are called by the end of their peer id."""
    is_self: bool
    version: str
    region: str
    region_inferred: bool
    """The region was guessed from round trips, not told."""
    roles: Sequence[str]
    hardware: WorkerHardware
    round_trip_ms: float | None
    linked: bool
    reach: str
    shards: int
    models: Sequence[str]
    """Ids of the models that it holds something of."""
    offered_bytes: int
    full: bool
    load: int
    """Rows waiting in its queues."""
    health: WorkerHealth
    reputation: WorkerReputation
    since_ms: int | None
    """Since when it is linked; gone: when it was last seen; None: not known."""
    microcredits_per_tflop: int
    microcredits_per_kv_unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHealth:
    """A shard and its replicas."""

    id: str
    kind: Literal["expert", "trunk", "stage"]
    wanted: int
    there: int
    healthy: int
    """Of those that are there: neither paused nor failing."""
    problem: str
    """Why this node has withdrawn it, or cannot get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A model that somebody wants served."""

    id: str
    """The model's id."""
    model: str
    """The model's name; empty until its manifest is known."""
    mode: DeploymentMode
    replicas: int
    state: DeploymentState
    reason: str
    """Why it is not ready, for people."""
    deployed_here: bool
    """By this node, so that it can be scaled and taken back here."""
    changed_ms: int
    """When it was last changed here, also on the command line: no two changes have the same. 0: never."""
    deployers: Sequence[str]
    replicas_min: int
    """Healthy replicas of the shard that has the fewest, the trunk aside."""
    shards_ready: int
    shards: Sequence[ShardHealth]


@dataclass(frozen=True, slots=True, kw_only=True)
class MapShard:
    """A shard on the map. ``holders`` are places in the map's ``workers``."""

    id: str
    kind: Literal["expert", "trunk", "stage"]
    first_layer: int
    last_layer: int
    experts: Sequence[int]
    holders: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMap:
    """Who holds which layers and experts of a model."""

    id: str
    model: str
    layers: int
    experts: int
    wanted: int
    workers: Sequence[str]
    """Peer ids."""
    shards: Sequence[MapShard]


def next_state(
    before: DeploymentState | None, shards: Sequence[ShardHealth], *, known: bool, error: str
) -> tuple[DeploymentState, str]:
    """A deployment's state, and why it is not ready. Whoever was complete once is degraded or failed afterwards, never
    "placing": that is what tells a swarm that grows from one that loses nodes.

    ``before`` is the state it had; ``known``: its manifest is here; ``error``: why that could not be had.
    """
    if not known:
        return ("failed", error) if error else ("pending", "its manifest is on the way")
    short = [shard for shard in shards if shard.healthy < shard.wanted]
    if not short:
        return "ready", ""
    missing = [shard for shard in short if not shard.healthy]
    reason = f"{len(short)} of {len(shards)} shards have fewer replicas than wanted"
    if missing:
        reason = f"nobody serves {len(missing)} of {len(shards)} shards (the first is {missing[0].id})"
    if problem := next((shard.problem for shard in short if shard.problem), ""):
        reason = f"{reason}: {problem}"
    if before in ("ready", "degraded", "failed"):
        return "failed" if missing else "degraded", reason
    served = any(shard.healthy for shard in shards if shard.kind != "trunk")
    return "placing" if served else "pending", reason
