"""The package's face: opens the HTTP gateway of a node, and closes it.

Owns the order of things: socket, database and leftovers of a crash first (so that what can fail fails before anything
runs), then the till, then the server; backwards at the end, in less than two seconds.
"""

import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from prometheus_client import CollectorRegistry

from config.errors import LocalError
from config.settings import GatewaySettings
from gateway.accounts import Accounts
from gateway.anchoring import Anchoring
from gateway.app import Site, build_app
from gateway.billing.costs import CostBook
from gateway.billing.keeper import Keeper
from gateway.billing.payment import read_secret
from gateway.certificate import Certificate, certificate_of
from gateway.dashboard.live import Live
from gateway.db import stamps
from gateway.db.migrate import migrate
from gateway.db.session import Database, open_database
from gateway.events import Bus
from gateway.guard import Guard
from gateway.identity.opening import open_identity
from gateway.jobs.addresses import rules_of
from gateway.jobs.courier import Courier
from gateway.jobs.runner import Runner
from gateway.limits import Limits, Metering
from gateway.metrics import Metrics
from gateway.money import FREE, Prices
from gateway.openai.job import Service
from gateway.openai.keyed import Runs
from gateway.openai.remembered import Remembered
from gateway.ports import Anchor, Engine, Health, LedgerView, Spending, Swarm
from gateway.quotas import MemoryLimits
from gateway.resp import Address, Redis
from gateway.server import HttpServer, open_listener, url_of
from gateway.shared import SharedLimits
from gateway.till import Till
from gateway.turns import Turns
from gateway.watch import Watch

_INSTANCE_FILE = "gateway.instance"
_LAST_EVENTS_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """A gateway that serves. ``accounts`` is blocking: call it in threads."""

    url: str
    host: str
    port: int
    accounts: Accounts
    certificate: Certificate | None = None


@asynccontextmanager
async def open_gateway(
    *,
    settings: GatewaySettings,
    data_dir: Path,
    engine: Engine,
    health: Health,
    registry: CollectorRegistry,
    ledger_view: LedgerView | None = None,
    anchor: Anchor | None = None,
    swarm: Swarm | None = None,
    spending: Spending | None = None,
    free: bool = False,
    slots: int = 0,
    version: str = "",
) -> AsyncIterator[Gateway]:
    """Serve the HTTP API while the block runs. ``free``: nothing costs anything, whatever the settings say.
    ``spending``: what the swarm is paid, to be kept with each request; None: nobody counts it.
    ``slots``: how many answers the engine works at; more wait here. 0: they wait in the engine.

    Raises LocalError (``port_taken``, ``unavailable`` for the database, ``local``) or ConfigError.
    """
    rules = rules_of(settings.webhook_allow_networks, http=settings.webhook_http)
    listener = await open_listener(settings.host, settings.port)
    try:
        instance = await trio.to_thread.run_sync(_instance, data_dir)
        database = await trio.to_thread.run_sync(_prepare_database, settings, data_dir)
        till = Till(database, instance)
        try:
            await till.recover()
            if spending is not None:
                till.spending = CostBook(spending, stamps.new_id())
                await till.in_thread(till.spending.begin, database)
            with Metrics(registry) as metrics:
                accounts = Accounts(database, starting_balance=settings.starting_balance)
                certificate = await trio.to_thread.run_sync(certificate_of, settings)
                host, port = listener.socket.getsockname()[:2]
                url = url_of(host, port, tls=certificate is not None)
                guard, identity = await open_identity(settings, data_dir, accounts, till, metrics, url=url)
                service = _service(settings, guard, till, engine, metrics, slots=slots, free=free)
                runner = Runner(service, accounts, lines_at_once=settings.batch_lines_at_once)
                bus = Bus(till)
                till.on_settled = bus.settled
                courier = Courier(till, identity.vault, rules, version=version)
                site = Site(
                    accounts=accounts,
                    identity=identity,
                    home=identity.home,
                    health=health,
                    ledger_view=ledger_view,
                    swarm=swarm,
                    settings=settings,
                    runner=runner,
                    events=bus,
                    courier=courier,
                    upload_bytes_max=settings.file_bytes_max,
                    require_key=settings.require_key,
                    version=version,
                    payment_secret=await trio.to_thread.run_sync(read_secret, settings.billing_payment_secret_file),
                )
                live = Live()
                app = build_app(service, site, live, body_bytes_max=settings.body_bytes_max)
                server = HttpServer(
                    app,
                    listener,
                    connections_per_second=settings.connections_per_second,
                    proxies=frozenset(settings.trusted_proxies),
                    certificate=certificate,
                    on_refused=metrics.observe_refused,
                )
                tasks: list[Callable[[], Awaitable[None]]] = [
                    till.run,
                    till.tick,
                    guard.standing.run,
                    bus.run,
                    service.runs.run,
                    identity.run,
                    Keeper(till).run,
                    partial(live.run, service, site),
                ]
                if isinstance(service.metering.limits, SharedLimits):
                    tasks.append(service.metering.limits.run)
                if swarm is not None:
                    tasks.append(Watch(swarm, bus).run)
                if anchor is not None:
                    tasks.append(Anchoring(till, anchor).run)
                async with _running(server, till, service.runs, bus, tasks, (runner.run, courier.run)):
                    yield Gateway(url=url, host=host, port=port, accounts=accounts, certificate=certificate)
        finally:
            with trio.CancelScope(shield=True):
                await till.drain()
                await trio.to_thread.run_sync(database.close)
    finally:
        await trio.aclose_forcefully(listener)


@asynccontextmanager
async def _running(
    server: HttpServer,
    till: Till,
    runs: Runs,
    bus: Bus,
    tasks: Sequence[Callable[[], Awaitable[None]]],
    jobs: Sequence[Callable[[], Awaitable[None]]],
) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(task)
        nursery.start_soon(server.run)
        working = trio.CancelScope()
        nursery.start_soon(_inside, working, jobs)
        try:
            yield
        finally:
            working.cancel()
            await server.stop()
            await runs.stop()
            till.close()
            with trio.CancelScope(shield=True):
                await till.closed.wait()
                with trio.move_on_after(_LAST_EVENTS_SECONDS):
                    await bus.flush()
            nursery.cancel_scope.cancel()


async def _inside(scope: trio.CancelScope, jobs: Sequence[Callable[[], Awaitable[None]]]) -> None:
    with scope:
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(job)


def _prepare_database(settings: GatewaySettings, data_dir: Path) -> Database:
    database = open_database(settings.database, data_dir, settings.database_replica)
    try:
        migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def _instance(data_dir: Path) -> str:
    """This gateway's name in the database, the same after a restart: it tells whose reservations are left over."""
    path = data_dir / _INSTANCE_FILE
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            text = path.read_text("utf-8").strip()
            if not text:
                raise LocalError("local", f"{path} is empty", "delete it and start again") from None
            return text[:64]
        name = secrets.token_hex(16)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{name}\n")
        except OSError:
            path.unlink()  # a full disk would leave an empty file behind
            raise
        return name
    except OSError as error:
        raise LocalError("local", f"cannot use {path}: {error.strerror}") from error


def _service(
    settings: GatewaySettings, guard: Guard, till: Till, engine: Engine, metrics: Metrics, *, slots: int, free: bool
) -> Service:
    prices = Prices(settings.microcredits_per_million_input_tokens, settings.microcredits_per_million_output_tokens)
    return Service(
        engine=engine,
        guard=guard,
        metering=Metering(_limits(settings), settings),
        turns=_turns(settings, metrics, slots),
        till=till,
        prices=FREE if free else prices,
        # Requests without a key are the operator's own.
        local_prices=FREE,
        metrics=metrics,
        runs=Runs(),
        remembered=Remembered(bytes_max=settings.cache_bytes_max, seconds=settings.cache_seconds),
    )


def _limits(settings: GatewaySettings) -> Limits:
    alone = MemoryLimits()
    return SharedLimits(Redis(Address.parse(settings.redis)), alone) if settings.redis else alone


def _turns(settings: GatewaySettings, metrics: Metrics, slots: int) -> Turns:
    turns = Turns(
        slots=slots,
        waiting_max=settings.queue_max,
        per_user_max=settings.queue_per_user,
        seconds_max=settings.queue_seconds,
    )
    metrics.waiting.set_function(lambda: turns.waiting)
    return turns
