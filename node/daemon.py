"""The daemon: starts every part of a node in the order in which they need each other, and ends them backwards.

Owns: life cycle, wiring, health. Does not own: any behaviour of the parts; what operators may ask of a running node
stands in ``operator``, how the parts that compute are joined in ``work``.

Invariants:
1. One daemon per data folder (a lock that the operating system drops if the process dies).
2. What can fail for a reason the operator can mend fails before anything is announced to peers.
3. SIGTERM or SIGINT ends it within five seconds: no new work, work in flight finished, ledger closed, links closed.
"""

import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace

import msgspec
import trio
from prometheus_client import CollectorRegistry

from config.accountbook import PaidChannel
from config.errors import EXIT_OK, LocalError, RiosError
from config.files import write_whole
from config.paths import PAUSE_NOTE, Paths
from config.settings import Settings
from config.vocabulary import MIB
from dmoe import hardware
from dmoe.bills import Bills
from dmoe.caller import Caller
from dmoe.cells.cells import Cells
from dmoe.cells.home import Homes
from dmoe.engine import Engine
from dmoe.hosting import Hosting
from dmoe.models import StoredModels
from dmoe.planning import Planner
from dmoe.runtime import RuntimeOptions, check_version
from dmoe.stages.caller import StageCaller
from dmoe.stages.host import StageHost
from dmoe.store import ModelStore
from dmoe.worker import Worker
from ledger.keys import EpochKeys
from ledger.ledger import Ledger, open_ledger
from node import control, founding, locks, membership, metrics, operator, repair, work
from node.cli import VERSION, root_cause
from node.spending import NodeSpending, opening_of
from p2p import keyfile, swarmfile
from p2p.core.advert import Advert
from p2p.core.identity import Identity
from p2p.network import PeerNetwork, open_network

log = logging.getLogger("rios.node")

STOP_SECONDS_MAX = 4.5
DRAIN_SECONDS_MAX = 1.5
DISK_FREE_BYTES_MIN = 16 * MIB
_SWITCH_SECONDS = 0.0005
"""After so long another thread gives the interpreter to trio's, a tenth of what is usual: answers wait for it."""


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
        self.bills = Bills()
        self.paid: Sequence[PaidChannel] = ()
        """The channels on which it pays, as it found them when it started."""
        self.gateway_url = ""
        self.reload: Callable[[], None] | None = None
        """Reads again what can change while it runs; None: there is nothing."""
        self.swarm: Mapping[str, str] | None = None
        """The private swarm's name and id."""
        self.network: PeerNetwork
        self.worker: Worker
        self.caller: Caller
        self.cells: Cells
        self.homes: Homes
        self.models: StoredModels
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


def run(settings: Settings, paths: Paths, passphrase: str, *, until_stdin_closes: bool = False) -> int:
    """Run a node until it is told to stop; returns the exit code. Raises RiosError if it cannot start."""
    with locks.data_folder(paths.lock), ExitStack() as held:
        identity = keyfile.load(paths.key, passphrase=passphrase)
        held.enter_context(locks.key(identity.peer_id))
        try:
            keys = EpochKeys(identity, paths.epoch_keys, passphrase)
            trio.run(_main, settings, paths, identity, keys, until_stdin_closes)
        except Exception as error:
            if not isinstance(root_cause(error), RiosError | OSError):
                log.exception("the node ends: a fault in it")
            raise
    return EXIT_OK


async def _main(
    settings: Settings, paths: Paths, identity: Identity, keys: EpochKeys, until_stdin_closes: bool
) -> None:
    up: Node | None = None
    stop = trio.Event()

    def end() -> None:
        """In order once the node is up, at once while it still starts."""
        if not stop.is_set():
            stop.set()
            _exit_at_the_latest(STOP_SECONDS_MAX)
            if up is None:
                nursery.cancel_scope.cancel()

    async def hang_up() -> None:
        """The terminal is gone, or an operator wants new files read; the latter where there are any."""
        if up is None or up.reload is None:
            end()
        else:
            await trio.to_thread.run_sync(up.reload)

    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, end, hang_up)
        if until_stdin_closes:
            nursery.start_soon(_watch_stdin, end)
        async with open_node(settings, paths, identity, keys) as node:
            up = node
            _announce(node)
            await stop.wait()
            log.info("stopping")
            with trio.move_on_after(DRAIN_SECONDS_MAX):
                async with trio.open_nursery() as draining:  # neither takes anything new from now on
                    draining.start_soon(node.worker.drain)
                    draining.start_soon(node.stage_host.drain)
        nursery.cancel_scope.cancel()
    log.info("stopped before it was up" if up is None else "stopped")


def _announce(node: Node) -> None:
    log.info("node %s is up (RiOS %s)", node.identity.peer_id, VERSION)
    for address in node.network.addresses:
        log.info("listening on %s", address)
    if node.gateway_url:
        log.info("gateway on %s", node.gateway_url)


async def _watch_signals(
    end: Callable[[], None],
    hang_up: Callable[[], Awaitable[None]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    wanted = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means: outlive the terminal
        wanted.append(signal.SIGHUP)
    with trio.open_signal_receiver(*wanted) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP:
                await hang_up()
            else:
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
async def open_node(settings: Settings, paths: Paths, identity: Identity, keys: EpochKeys) -> AsyncIterator[Node]:
    """A running node with all its parts."""
    check_version()
    node = Node(settings, paths, identity)
    genesis = founding.in_force(settings, paths)
    if genesis is not None:
        repair.check_not_half_repaired(paths.ledger)
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
        if settings.node.trace_endpoint:
            from node.tracing import open_tracing  # noqa: PLC0415 - a node without traces does not pay for it

            name = settings.node.name or str(identity.peer_id)
            await stack.enter_async_context(open_tracing(settings.node, name))
        node.cells = work.cells_of(node)
        stack.callback(node.cells.close)
        node.homes = Homes(node.cells, node.store, work.cell_options(node))
        stack.callback(node.homes.close)
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
                node.network, identity, genesis, paths.ledger, settings.ledger, nursery=nursery, epoch_keys=keys
            )
            stack.push_async_callback(node.ledger.aclose)
            node.paid = opening_of(node.ledger.book.store)
        else:
            log.warning("no genesis file %s: this node neither pays nor is paid", paths.genesis)
        await work.start_work(node, nursery, genesis)
        await _start_edges(node, stack, nursery)
        gc.collect()
        gc.freeze()  # what is loaded stays: collections need not walk it again in the middle of an answer
        sys.setswitchinterval(_SWITCH_SECONDS)
        yield node


@asynccontextmanager
async def _background() -> AsyncIterator[trio.Nursery]:
    """A nursery for what runs as long as the node; left by cancelling."""
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


async def _start_edges(node: Node, stack: AsyncExitStack, nursery: trio.Nursery) -> None:
    registry = metrics.registry_of(node)
    if node.settings.gateway.enabled:
        from gateway.gateway import open_gateway  # noqa: PLC0415 - a node without a gateway does not pay for it
        from node.anchors import NodeAnchor  # noqa: PLC0415
        from node.ledgerview import NodeLedger  # noqa: PLC0415
        from node.swarmview import SwarmView  # noqa: PLC0415

        swarm = SwarmView(node)
        await nursery.start(swarm.run)

        gateway = await stack.enter_async_context(
            open_gateway(
                settings=node.settings.gateway,
                data_dir=node.paths.data,
                engine=node.engine,
                health=node,
                registry=registry,
                slots=node.settings.dmoe.generations_max,
                anchor=NodeAnchor(node.identity, node.ledger),
                ledger_view=NodeLedger(node.ledger) if node.ledger is not None else None,
                swarm=swarm,
                spending=NodeSpending(node.bills, node.paid),
                version=VERSION,
            )
        )
        node.gateway_url = gateway.url
        if gateway.certificate is not None:
            node.reload = gateway.certificate.reload
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
