"""What a daemon computes with: worker, hosts, callers, planner and engine, made from the settings and joined.

Owns: how they are wired and in which order they start. Does not own: their behaviour; the node's life cycle, network,
ledger and edges (``daemon``).
"""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import psutil
import trio

from config.errors import RiosError
from config.settings import DmoeSettings, Settings, chosen_route
from config.vocabulary import KFLOP_PER_TFLOP
from dmoe import hardware
from dmoe.audit import Auditor, Rules
from dmoe.caller import Caller
from dmoe.cells.cells import Cells
from dmoe.cells.link import Options as CellOptions
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.plan import KINDS
from dmoe.core.privacy import Privacy, privacy_of
from dmoe.engine import Engine
from dmoe.hosting import Hosting
from dmoe.joint import Joints
from dmoe.judging import Judging
from dmoe.models import StoredModels, SwarmExperts
from dmoe.passes import PassOptions
from dmoe.planning import Planner, wishes_of
from dmoe.ports import Quote
from dmoe.purse import Purse
from dmoe.replicas import Replicas
from dmoe.stages.caller import StageCaller
from dmoe.stages.chain import Account
from dmoe.stages.directions import Directions
from dmoe.stages.host import Limits, StageHost
from dmoe.stages.loading import load_stage
from dmoe.store import ModelStore
from dmoe.trust import Trust
from dmoe.worker import Worker
from ledger.core.genesis import Genesis
from p2p.core.identity import peer_id_of

if TYPE_CHECKING:
    from node.daemon import Node

log = logging.getLogger("rios.node")

MEASURED_ROWS_MAX = 8


async def start_work(node: "Node", nursery: trio.Nursery, genesis: Genesis | None) -> None:
    """Make the parts and start them in ``nursery``, those that are used before those that use them."""
    settings = node.settings
    privacy, quote = privacy_rule(settings.dmoe), _quote(settings)
    node.worker = _worker(node, quote)
    node.caller = _caller(node)
    node.stage_host = _stage_host(node, quote)
    node.hosting = _hosting(node, genesis, privacy)
    models = node.models = _models(node, privacy)
    node.planner = models.planner = _planner(node, models, privacy)
    node.stages = models.stages = _stage_caller(node)
    node.engine = _engine(node, models)
    parts = (node.worker.run, node.caller.run, node.stage_host.run, node.stages.run, node.hosting.run, node.engine.run)
    for part in parts:
        await nursery.start(part)
    is_whole = chosen_route(settings.dmoe) in ("fused", "local")
    bring = node.hosting.bringer.whole if is_whole else node.hosting.bringer.trunk
    for name in settings.dmoe.orchestrate:
        nursery.start_soon(_bring, bring, name)


# --- serving


def _worker(node: "Node", quote: Quote) -> Worker:
    """Who computes experts for others and for this node's own answers."""
    dmoe = node.settings.dmoe
    worker = Worker(
        node.network,
        quote=quote,
        seller=node.ledger.seller if node.ledger else None,
        threads=node.options.thread_count,
        queue_rows_max=dmoe.queue_rows_max,
        batch_rows_max=dmoe.batch_rows_max,
        device=hardware.device_class(node.options.providers()[0]),
    )
    worker.paused = node.paths.paused.exists()
    if worker.paused:
        log.warning("paused by its operator: this node takes no work; rios resume ends that")
    return worker


def _stage_host(node: "Node", quote: Quote) -> StageHost:
    """Who runs whole stages for others."""
    return StageHost(
        node.network,
        quote=quote,
        seller=node.ledger.seller if node.ledger else None,
        limits=_stage_limits(node.settings),
        paused=lambda: node.worker.paused,
        device=node.worker.device,
    )


def _hosting(node: "Node", genesis: Genesis | None, privacy: Privacy) -> Hosting:
    """What takes, fetches and drops shards."""
    dmoe = node.settings.dmoe
    return Hosting(
        node.network,
        node.store,
        node.worker,
        load=node.cells.load,
        state_file=node.paths.hosting,
        publishers=allowed_publishers(node, genesis),
        disk_bytes_max=dmoe.disk_bytes_max,
        ram_bytes_max=_ram_bytes_max(node.settings),
        serve=dmoe.serve,
        stages=node.stage_host,
        load_stage=node.cells.load_stage,
        keeps=partial(_keeps, privacy),
        cells=node.cells,
    )


def cells_of(node: "Node") -> Cells:
    """Where the shards served here run."""
    dmoe, joints = node.settings.dmoe, Joints(node.options)
    return Cells(
        node.store,
        lambda manifest, shard: joints.load(manifest, shard, node.store),
        lambda manifest, shard: load_stage(manifest, shard, node.store, node.options),
        own=node.identity.peer_id,
        mode=dmoe.sandbox,  # type: ignore[arg-type]
        allow_unsandboxed=dmoe.allow_unsandboxed,
        device=dmoe.device,
        options=cell_options(node),
    )


def cell_options(node: "Node") -> CellOptions:
    """How its cells are made."""
    return CellOptions(
        threads=node.options.thread_count,
        call_seconds_max=node.settings.dmoe.call_timeout_ms / 1000,
        kv_bytes_max=_stage_limits(node.settings).kv_bytes_max,
        gvisor=node.settings.dmoe.gvisor,
    )


def _ram_bytes_max(settings: Settings) -> int:
    """Memory offered for shards."""
    total: int = psutil.virtual_memory().total
    return settings.dmoe.ram_bytes_max or total // 2


def _stage_limits(settings: Settings) -> Limits:
    """What this node gives to stages."""
    dmoe, ram_bytes_max = settings.dmoe, _ram_bytes_max(settings)
    return Limits(
        sequences_max=dmoe.stage_sequences_max,
        kv_bytes_max=dmoe.stage_kv_bytes_max or ram_bytes_max // 4,
        ram_bytes_max=ram_bytes_max,
        idle_seconds=dmoe.stage_idle_seconds,
        queue_rows_max=dmoe.queue_rows_max,
        batch_rows_max=dmoe.batch_rows_max,
    )


def _quote(settings: Settings) -> Quote:
    """What work here costs."""
    price = settings.ledger
    return Quote(_quote_number(settings), price.microcredits_per_tflop, price.microcredits_per_kv_unit)


def _quote_number(settings: Settings) -> int:
    """Names a price: the same number for the same price, so that a restart does not make callers ask again."""
    price = settings.ledger
    return price.microcredits_per_tflop * KFLOP_PER_TFLOP + price.microcredits_per_kv_unit


def allowed_publishers(node: "Node", genesis: Genesis | None) -> frozenset[str]:
    """Whose models this node takes: its own, those the operator lists, and (if none are listed) the issuer's."""
    listed = node.settings.dmoe.publishers
    issuer = [] if listed or genesis is None else [peer_id_of(genesis.issuer)]
    return frozenset([node.identity.peer_id, *listed, *issuer])


def _keeps(privacy: Privacy, manifest: Manifest, shard: Shard) -> bool:
    """Whether a shard has experts of layers that stay here."""
    layers = manifest.architecture.layers
    return shard.kind == "expert" and any(privacy.keeps(layer, layers) for layer in shard.layers)


# --- asking


def _caller(node: "Node") -> Caller:
    """Who calls experts wherever they are."""
    dmoe = node.settings.dmoe
    return Caller(
        node.network,
        worker=node.worker,
        buyer=node.ledger.buyer if node.ledger else None,
        call_timeout_ms=dmoe.call_timeout_ms,
        renormalise=dmoe.on_missing == "renormalise",
        audits=partial(_auditor, node) if dmoe.audit_share else None,
        bills=node.bills,
    )


def _auditor(node: "Node", purse: Purse, replicas: Replicas) -> Auditor:
    """Who looks at the answers of peers."""
    dmoe = node.settings.dmoe

    async def fetch(manifest: Manifest, shard: Shard) -> None:
        await node.hosting.bringer.shard(manifest, shard)

    return Auditor(
        node.network,
        purse,
        replicas,
        node.worker,
        Judging(node.store),
        Trust(node.paths.trust),
        Rules(dmoe.audit_share, node.paths.evidence, dmoe.call_timeout_ms),
        notary=node.ledger.buyer if node.ledger else None,
        fetch=fetch,
        blame=node.network.doors.blame,
    )


def _models(node: "Node", privacy: Privacy) -> StoredModels:
    """The models that requests are answered with."""
    return StoredModels(
        node.store,
        SwarmExperts(node.caller),
        node.options,
        node.identity.peer_id,
        chosen=_chosen(node.store, node.settings),
        privacy=privacy,
        homes=node.homes,
        text_walls_demanded=node.settings.dmoe.sandbox == "required",
    )


def _planner(node: "Node", models: StoredModels, privacy: Privacy) -> Planner:
    """Who chooses the route of a request."""
    dmoe = node.settings.dmoe
    return Planner(
        node.network,
        node.caller,
        models.held,
        wishes_of(chosen_route(dmoe), dmoe.stage_hosts, dmoe.plan_pins, dmoe.plan_price_weight, privacy),
        threads=node.options.thread_count,
        runs=KINDS,
        loaded=node.worker.indices,
    )


def _stage_caller(node: "Node") -> StageCaller:
    """Who calls stages wherever they are."""
    dmoe = node.settings.dmoe
    return StageCaller(
        node.network,
        node.stage_host,
        Directions(node.planner, node.network),
        node.caller.dispatcher,
        buyer=node.ledger.buyer if node.ledger else None,
        timeout_ms=dmoe.call_timeout_ms,
        measured=partial(_measured, node.planner),
        may_forward=dmoe.stage_forwarding,
        auditor=node.caller.audit,
        bills=node.bills,
    )


def _engine(node: "Node", models: StoredModels) -> Engine:
    """Who turns requests into answers."""
    dmoe = node.settings.dmoe
    return Engine(
        models,
        generations_max=dmoe.generations_max,
        waiting_max=dmoe.waiting_max,
        kv_tokens_max=dmoe.kv_tokens_max,
        passes=pass_options(dmoe),
        draft_model=dmoe.draft_model,
        default_route=chosen_route(dmoe),
        walls_demanded=dmoe.sandbox == "required",
        bills=node.bills,
    )


def _measured(planner: Planner, model_id: str, account: Account) -> None:
    """The planner learns how fast a host is from runs of few rows, in which it did not wait."""
    if account.rows <= MEASURED_ROWS_MAX:
        first, last = account.link.layers
        spent = account.service_us - account.waited_us
        planner.measured_stage(model_id, account.link.peer, last - first + 1, account.rows, spent)


def pass_options(dmoe: DmoeSettings) -> PassOptions:
    """The bounds of passes, from the settings."""
    return PassOptions(
        rows_max=dmoe.pass_rows_max,
        drafts_max=dmoe.drafts_max,
        prefix_positions_max=dmoe.prefix_cache_tokens,
    )


def _chosen(store: ModelStore, settings: Settings) -> Callable[[Manifest], bool]:
    """Which models requests are answered with: those listed, else all whose trunk is here."""
    listed = frozenset(settings.dmoe.orchestrate)
    if listed and settings.dmoe.draft_model:
        listed |= {settings.dmoe.draft_model}

    def chosen(manifest: Manifest) -> bool:
        if listed:
            return manifest.name in listed or manifest.model_id in listed
        return all(store.path(manifest.model_id, file).exists() for file in manifest.trunk.files)

    return chosen


def privacy_rule(dmoe: DmoeSettings) -> Privacy:
    """Who may see hidden states, from the settings. Raises ConfigError."""
    return privacy_of(dmoe.trusted_peers, dmoe.trusted_peers_only, dmoe.local_layers)


async def _bring(bring: Callable[[str], Awaitable[object]], name: str) -> None:
    """Fetch what answering with a model needs; a publisher that is not allowed is said once, not fatal."""
    try:
        await bring(name)
    except RiosError as error:
        log.error("dmoe.orchestrate: %s: %s", name, error)
