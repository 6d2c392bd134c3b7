"""The daemon: starts every part of a node in the order in which they need each other, and ends them backwards.

Owns: life cycle, wiring, health. Does not own: any behaviour of the parts; what operators may ask of a running node
stands in ``operator``.

Invariants:
1. One daemon per data folder (a lock that the operating system drops if the process dies).
2. What can fail for a reason the operator can mend fails before anything is announced to peers.
3. SIGTERM or SIGINT ends it within five seconds: no new work, work in flight finished, ledger closed, links closed.
"""

import fcntl
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import psutil
import trio
from prometheus_client import CollectorRegistry

from config.errors import EXIT_OK, LocalError, RiosError
from config.files import naming, write_whole
from config.paths import PAUSE_NOTE, Paths
from config.settings import DmoeSettings, Settings, chosen_route
from config.vocabulary import KFLOP_PER_TFLOP, MIB
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
from dmoe.judging import Judging
from dmoe.models import StoredModels, SwarmExperts
from dmoe.passes import PassOptions
from dmoe.planning import Planner, wishes_of
from dmoe.ports import Quote
from dmoe.purse import Purse
from dmoe.replicas import Replicas
from dmoe.runtime import ExpertShard, RuntimeOptions, check_version
from dmoe.stages.caller import StageCaller
from dmoe.stages.chain import Account
from dmoe.stages.directions import Directions
from dmoe.stages.host import Limits, StageHost
from dmoe.stages.loading import load_stage
from dmoe.store import ModelStore
from dmoe.trust import Trust
from dmoe.worker import Worker
from ledger.core.genesis import Genesis
from ledger.ledger import Ledger, open_ledger
from node import control, founding, membership, metrics, operator
from node.cli import VERSION, root_cause
from p2p import keyfile, swarmfile
from p2p.core.advert import Advert
from p2p.core.identity import Identity, peer_id_of
from p2p.network import PeerNetwork, open_network

log = logging.getLogger("rios.node")

STOP_SECONDS_MAX = 4.5
DRAIN_SECONDS_MAX = 1.5
DISK_FREE_BYTES_MIN = 16 * MIB
MEASURED_ROWS_MAX = 8


class Node:
    """A running node: its parts, for ``operator`` and ``metrics`` to look at."""

    def __init__(self, settings: Settings, paths: Paths, identity: Identity) -> None:
        self.settings = settings
        self.paths = paths
        self.identity = identity
        self.started_at = time.monotonic()
        self.store = ModelStore(paths.models)
        self.options = RuntimeOptions(device=settings.dmoe.device, threads=settings.dmoe.threads)  # type: ignore[arg-type]
        self.ledger: Ledger | None = None
        self.gateway_url = ""
        self.swarm: Mapping[str, str] | None = None
        """The private swarm's name and id."""
        self.network: PeerNetwork
        self.worker: Worker
        self.caller: Caller
        self.cells: Cells
        self.stage_host: StageHost
        self.stages: StageCaller
        self.hosting: Hosting
        self.engine: Engine
        self.planner: Planner

    def expert_rows(self) -> int:
        """Rows computed by the experts and stages here, for peers and for this node's own answers."""
        return sum(shard["rows_computed"] for shard in self._served())

    def shards_served(self) -> int:
        """Shards loaded and served."""
        return len(self._served())

    def _served(self) -> list[Mapping[str, int]]:
        """The figures of every shard served."""
        kinds = (self.worker.statistics()["shards"], self.stage_host.statistics()["stages"])
        return [shard for models in kinds for shards in models.values() for shard in shards.values()]

    def ready(self) -> tuple[bool, list[str]]:
        """Whether the node can do its work, and why not (also the gateway's readiness)."""
        reasons = [
            f"model {m.name}: {m.reason.removeprefix(f'{m.name}: ')}" for m in self.engine.models() if not m.ready
        ]
        if self.ledger is not None and self.ledger.balance() == 0 and self.settings.gateway.enabled:
            paying = any(channel["payer"] == self.identity.peer_id for channel in self.ledger.channels())
            if not paying and len(self.network.directory.adverts()) > 1:
                reasons.append("this node's ledger account is empty: paid experts will refuse its calls")
        if shutil.disk_usage(self.paths.data).free < DISK_FREE_BYTES_MIN:
            reasons.append(f"the disk of {self.paths.data} is full: nothing can be paid or kept")
        return not reasons, reasons

    def pause(self, paused: bool) -> None:
        """Take no work from now on, or take it again; remembered across restarts, and told to the others."""
        if paused:
            write_whole(self.paths.paused, PAUSE_NOTE)
        else:
            self.paths.paused.unlink(missing_ok=True)
        self.worker.paused = paused
        self.network.directory.update(lambda advert: msgspec.structs.replace(advert, paused=paused))
        self.hosting.wake()
        log.info("paused by its operator" if paused else "the operator ended the pause")

    def idle_reasons(self) -> list[str]:
        """Why no work may be coming in."""
        reasons = ["it is paused by its operator (rios resume)"] if self.worker.paused else []
        if not self.settings.dmoe.serve:
            reasons.append("dmoe.serve is off")
        elif not self.shards_served():
            reasons.append("no shards are served (no deployment has placed one here, or its publisher is not allowed)")
        if not self.network.peers():
            reasons.append("no peer is linked")
        return reasons


@contextmanager
def _only_daemon(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode(errors="replace").strip()
            message = f"a node is already running with the data folder {lock.parent} (pid {pid or 'unknown'})"
            raise LocalError("local", message, "stop it, or use another node.data_dir") from None
        with naming(lock):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def run(settings: Settings, paths: Paths, passphrase: str, *, until_stdin_closes: bool = False) -> int:
    """Run a node until it is told to stop; returns the exit code. Raises RiosError if it cannot start."""
    with _only_daemon(paths.lock):
        identity = keyfile.load(paths.key, passphrase=passphrase)
        try:
            trio.run(_main, settings, paths, identity, until_stdin_closes)
        except Exception as error:
            if not isinstance(root_cause(error), RiosError | OSError):
                log.exception("the node ends: a fault in it")
            raise
    return EXIT_OK


async def _main(settings: Settings, paths: Paths, identity: Identity, until_stdin_closes: bool) -> None:
    up = False
    stop = trio.Event()

    def end() -> None:
        """In order once the node is up, at once while it still starts."""
        if not stop.is_set():
            stop.set()
            _exit_at_the_latest(STOP_SECONDS_MAX)
            if not up:
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, end)
        if until_stdin_closes:
            nursery.start_soon(_watch_stdin, end)
        async with open_node(settings, paths, identity) as node:
            up = True
            _announce(node)
            await stop.wait()
            log.info("stopping")
            with trio.move_on_after(DRAIN_SECONDS_MAX):
                async with trio.open_nursery() as draining:  # neither takes anything new from now on
                    draining.start_soon(node.worker.drain)
                    draining.start_soon(node.stage_host.drain)
        nursery.cancel_scope.cancel()
    log.info("stopped" if up else "stopped before it was up")


def _announce(node: Node) -> None:
    log.info("node %s is up (RiOS %s)", node.identity.peer_id, VERSION)
    for address in node.network.addresses:
        log.info("listening on %s", address)
    if node.gateway_url:
        log.info("gateway on %s", node.gateway_url)


async def _watch_signals(
    end: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    wanted = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means: outlive the terminal
        wanted.append(signal.SIGHUP)
    with trio.open_signal_receiver(*wanted) as signals:
        task_status.started()
        async for _ in signals:
            end()


async def _watch_stdin(end: Callable[[], None]) -> None:
    """For a parent that wants its nodes to end with it, however it ends."""
    reader = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
    while await reader.receive_some(4096):
        pass
    end()


def _exit_at_the_latest(seconds: float) -> None:
    """A last resort: everything durable is written before it is acknowledged, so leaving hard loses nothing."""

    def leave() -> None:
        log.error("a part did not stop within %.1f s; leaving anyway", seconds)
        os._exit(EXIT_OK)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


@asynccontextmanager
async def open_node(settings: Settings, paths: Paths, identity: Identity) -> AsyncIterator[Node]:
    """A running node with all its parts."""
    check_version()
    node = Node(settings, paths, identity)
    genesis = founding.in_force(settings, paths)
    measured = await trio.to_thread.run_sync(hardware.measure)
    advert = Advert(
        peer_id=identity.peer_id,
        seq=0,
        expires_ms=0,
        version=VERSION,
        region=settings.node.region,
        hardware=measured,
        disk_bytes=settings.dmoe.disk_bytes_max,
        roles=("witness",) if settings.ledger.witness else (),
        net=genesis.net if genesis else b"",
        paused=paths.paused.exists(),
    )
    swarm = swarmfile.load(paths.swarm)
    if swarm is not None:
        node.swarm = {"name": swarm.name, "id": swarm.id}
    listed = membership.seeds_of(settings.p2p, paths.config_file.parent, swarm)
    allow = (*settings.p2p.allow, *(swarm.allow if swarm else ()))
    p2p_settings = replace(settings.p2p, seeds=listed, seeds_file="", allow=allow)
    async with AsyncExitStack() as stack:
        node.cells = _cells(node)
        stack.callback(node.cells.close)
        node.network = await stack.enter_async_context(
            open_network(
                identity,
                p2p_settings,
                data_dir=paths.network,
                version=VERSION,
                advert=advert,
                swarm_key=swarm.key if swarm else None,
            )
        )
        nursery = await stack.enter_async_context(_background())
        if genesis is not None:
            node.ledger = await open_ledger(
                node.network, identity, genesis, paths.ledger, settings.ledger, nursery=nursery
            )
            stack.push_async_callback(node.ledger.aclose)
        else:
            log.warning("no genesis file %s: this node neither pays nor is paid", paths.genesis)
        await _start_work(node, nursery, genesis)
        await _start_edges(node, stack, nursery)
        gc.collect()
        gc.freeze()  # what is loaded stays: collections need not walk it again in the middle of an answer
        yield node


@asynccontextmanager
async def _background() -> AsyncIterator[trio.Nursery]:
    """A nursery for what runs as long as the node; left by cancelling."""
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


async def _start_work(node: Node, nursery: trio.Nursery, genesis: Genesis | None) -> None:
    settings, network, identity = node.settings, node.network, node.identity
    quote = Quote(
        _quote_number(settings), settings.ledger.microcredits_per_tflop, settings.ledger.microcredits_per_kv_unit
    )
    node.worker = Worker(
        network,
        quote=quote,
        seller=node.ledger.seller if node.ledger else None,
        threads=node.options.thread_count,
        queue_rows_max=settings.dmoe.queue_rows_max,
        batch_rows_max=settings.dmoe.batch_rows_max,
        device=hardware.device_class(node.options.providers()[0]),
    )
    node.worker.paused = node.paths.paused.exists()
    if node.worker.paused:
        log.warning("paused by its operator: this node takes no work; rios resume ends that")
    node.caller = Caller(
        network,
        worker=node.worker,
        buyer=node.ledger.buyer if node.ledger else None,
        call_timeout_ms=settings.dmoe.call_timeout_ms,
        renormalise=settings.dmoe.on_missing == "renormalise",
        audits=partial(_auditor, node) if settings.dmoe.audit_share else None,
    )
    ram_bytes_max = _ram_bytes_max(settings)
    node.stage_host = StageHost(
        network,
        quote=quote,
        seller=node.ledger.seller if node.ledger else None,
        limits=_stage_limits(settings, ram_bytes_max),
        paused=lambda: node.worker.paused,
        device=node.worker.device,
    )
    privacy = privacy_rule(settings.dmoe)
    node.hosting = Hosting(
        network,
        node.store,
        node.worker,
        load=node.cells.load,
        state_file=node.paths.hosting,
        publishers=allowed_publishers(node, genesis),
        disk_bytes_max=settings.dmoe.disk_bytes_max,
        ram_bytes_max=ram_bytes_max,
        serve=settings.dmoe.serve,
        stages=node.stage_host,
        load_stage=node.cells.load_stage,
        keeps=partial(_keeps, privacy),
    )
    models = StoredModels(
        node.store,
        SwarmExperts(node.caller),
        node.options,
        identity.peer_id,
        chosen=_chosen(node.store, settings),
        privacy=privacy,
    )
    route = chosen_route(settings.dmoe)
    node.planner = models.planner = Planner(
        network,
        node.caller,
        models.held,
        wishes_of(route, settings.dmoe.stage_hosts, settings.dmoe.plan_pins, settings.dmoe.plan_price_weight, privacy),
        threads=node.options.thread_count,
        runs=KINDS,
        loaded=node.worker.indices,
    )
    node.stages = models.stages = StageCaller(
        network,
        node.stage_host,
        Directions(node.planner, network),
        node.caller.dispatcher,
        buyer=node.ledger.buyer if node.ledger else None,
        timeout_ms=settings.dmoe.call_timeout_ms,
        measured=partial(_measured, node.planner),
        may_forward=settings.dmoe.stage_forwarding,
        auditor=node.caller.audit,
    )
    node.engine = Engine(
        models,
        generations_max=settings.dmoe.generations_max,
        waiting_max=settings.dmoe.waiting_max,
        kv_tokens_max=settings.dmoe.kv_tokens_max,
        passes=pass_options(settings.dmoe),
        draft_model=settings.dmoe.draft_model,
        default_route=route,
    )
    parts = (node.worker.run, node.caller.run, node.stage_host.run, node.stages.run, node.hosting.run, node.engine.run)
    for part in parts:
        await nursery.start(part)
    bring = node.hosting.ensure_whole if route in ("fused", "local") else node.hosting.ensure_trunk
    for name in settings.dmoe.orchestrate:
        nursery.start_soon(_bring, bring, name)


def _auditor(node: Node, purse: Purse, replicas: Replicas) -> Auditor:
    """Who looks at the answers of peers."""
    dmoe = node.settings.dmoe

    async def fetch(manifest: Manifest, shard: Shard) -> None:
        await node.hosting.bring(manifest, shard)

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


def privacy_rule(dmoe: DmoeSettings) -> Privacy:
    """Who may see hidden states, from the settings. Raises ConfigError."""
    return privacy_of(dmoe.trusted_peers, dmoe.trusted_peers_only, dmoe.local_layers)


def _keeps(privacy: Privacy, manifest: Manifest, shard: Shard) -> bool:
    """Whether a shard has experts of layers that stay here."""
    layers = manifest.architecture.layers
    return shard.kind == "expert" and any(privacy.keeps(layer, layers) for layer in shard.layers)


def pass_options(dmoe: DmoeSettings) -> PassOptions:
    """The bounds of passes, from the settings."""
    return PassOptions(
        rows_max=dmoe.pass_rows_max,
        drafts_max=dmoe.drafts_max,
        prefix_positions_max=dmoe.prefix_cache_tokens,
    )


def _cells(node: Node) -> Cells:
    """Where the shards served here run."""
    dmoe = node.settings.dmoe
    return Cells(
        node.store,
        lambda manifest, shard: ExpertShard(manifest, shard, node.store, node.options),
        lambda manifest, shard: load_stage(manifest, shard, node.store, node.options),
        own=node.identity.peer_id,
        mode=dmoe.sandbox,  # type: ignore[arg-type]
        allow_unsandboxed=dmoe.allow_unsandboxed,
        device=dmoe.device,
        options=CellOptions(
            threads=node.options.thread_count,
            call_seconds_max=dmoe.call_timeout_ms / 1000,
            kv_bytes_max=_stage_limits(node.settings, _ram_bytes_max(node.settings)).kv_bytes_max,
        ),
    )


def _ram_bytes_max(settings: Settings) -> int:
    """Memory offered for shards."""
    total: int = psutil.virtual_memory().total
    return settings.dmoe.ram_bytes_max or total // 2


def _stage_limits(settings: Settings, ram_bytes_max: int) -> Limits:
    """What this node gives to stages."""
    dmoe = settings.dmoe
    return Limits(
        sequences_max=dmoe.stage_sequences_max,
        kv_bytes_max=dmoe.stage_kv_bytes_max or ram_bytes_max // 4,
        ram_bytes_max=ram_bytes_max,
        idle_seconds=dmoe.stage_idle_seconds,
        queue_rows_max=dmoe.queue_rows_max,
        batch_rows_max=dmoe.batch_rows_max,
    )


def _measured(planner: Planner, model_id: str, account: Account) -> None:
    """The planner learns how fast a host is from runs of few rows, in which it did not wait."""
    if account.rows <= MEASURED_ROWS_MAX:
        first, last = account.link.layers
        spent = account.service_us - account.waited_us
        planner.measured_stage(model_id, account.link.peer, last - first + 1, account.rows, spent)


async def _bring(bring: Callable[[str], Awaitable[object]], name: str) -> None:
    """Fetch what answering with a model needs; a publisher that is not allowed is said once, not fatal."""
    try:
        await bring(name)
    except RiosError as error:
        log.error("dmoe.orchestrate: %s: %s", name, error)


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


def _quote_number(settings: Settings) -> int:
    """Names a price: the same number for the same price, so that a restart does not make callers ask again."""
    price = settings.ledger
    return price.microcredits_per_tflop * KFLOP_PER_TFLOP + price.microcredits_per_kv_unit


def allowed_publishers(node: Node, genesis: Genesis | None) -> frozenset[str]:
    """Whose models this node takes: its own, those the operator lists, and (if none are listed) the issuer's."""
    listed = node.settings.dmoe.publishers
    issuer = [] if listed or genesis is None else [peer_id_of(genesis.issuer)]
    return frozenset([node.identity.peer_id, *listed, *issuer])


async def _start_edges(node: Node, stack: AsyncExitStack, nursery: trio.Nursery) -> None:
    registry = metrics.registry_of(node)
    if node.settings.gateway.enabled:
        from gateway.gateway import open_gateway  # noqa: PLC0415 - a node without a gateway does not pay for it

        gateway = await stack.enter_async_context(
            open_gateway(
                settings=node.settings.gateway,
                data_dir=node.paths.data,
                engine=node.engine,
                health=node,
                registry=registry,
                version=VERSION,
            )
        )
        node.gateway_url = gateway.url
    if node.settings.node.metrics_port:
        stack.callback(_serve_metrics(node.settings.node.metrics_port, registry))
    await nursery.start(control.serve, node.paths.control, operator.commands(node))


def _serve_metrics(port: int, registry: CollectorRegistry) -> Callable[[], None]:
    from prometheus_client import start_http_server  # noqa: PLC0415 - only where the port is set

    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise LocalError("port_taken", f"port {port}: {error.strerror}", "change node.metrics_port") from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close
