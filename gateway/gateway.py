"""The package's face: opens the HTTP gateway of a node, and closes it.

Owns the order of things: socket, database and leftovers of a crash first (so that what can fail fails before anything
runs), then the till, then the server; backwards at the end, in less than two seconds.
"""

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from prometheus_client import CollectorRegistry

from config.errors import LocalError
from config.settings import GatewaySettings
from gateway.accounts import Accounts
from gateway.app import Site, build_app
from gateway.db.migrate import migrate
from gateway.db.session import Database, open_database
from gateway.guard import Guard
from gateway.limits import Limits
from gateway.metrics import Metrics
from gateway.money import FREE, Prices
from gateway.openai.job import Service
from gateway.openai.keyed import Runs
from gateway.ports import Engine, Health, LedgerView
from gateway.server import HttpServer, open_listener, url_of
from gateway.till import Till

_INSTANCE_FILE = "gateway.instance"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """A gateway that serves. ``accounts`` is blocking: call it in threads."""

    url: str
    host: str
    port: int
    accounts: Accounts


@asynccontextmanager
async def open_gateway(
    *,
    settings: GatewaySettings,
    data_dir: Path,
    engine: Engine,
    health: Health,
    registry: CollectorRegistry,
    ledger_view: LedgerView | None = None,
    free: bool = False,
    version: str = "",
) -> AsyncIterator[Gateway]:
    """Serve the HTTP API while the block runs. ``free``: nothing costs anything, whatever the settings say.

    Raises LocalError (``port_taken``, ``unavailable`` for the database, ``local``) or ConfigError.
    """
    listener = await open_listener(settings.host, settings.port)
    try:
        database = await trio.to_thread.run_sync(_prepare_database, settings, data_dir)
        try:
            instance = await trio.to_thread.run_sync(_instance, data_dir)
            till = Till(database, instance)
            await till.recover()
            with Metrics(registry) as metrics:
                accounts = Accounts(database, starting_balance=settings.starting_balance)
                service = _service(settings, accounts, till, engine, metrics, free=free)
                site = Site(
                    accounts=accounts,
                    health=health,
                    ledger_view=ledger_view,
                    require_key=settings.require_key,
                    version=version,
                )
                app = build_app(service, site, body_bytes_max=settings.body_bytes_max)
                server = HttpServer(app, listener, connections_per_second=settings.connections_per_second)
                async with _running(server, till, service.runs):
                    host, port = server.address
                    yield Gateway(url=url_of(host, port), host=host, port=port, accounts=accounts)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(database.close)
    finally:
        await trio.aclose_forcefully(listener)


@asynccontextmanager
async def _running(server: HttpServer, till: Till, runs: Runs) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(till.run)
        nursery.start_soon(till.tick)
        nursery.start_soon(runs.run)
        nursery.start_soon(server.run)
        try:
            yield
        finally:
            await server.stop()
            await runs.stop()
            till.close()
            with trio.CancelScope(shield=True):
                await till.closed.wait()
            nursery.cancel_scope.cancel()


def _prepare_database(settings: GatewaySettings, data_dir: Path) -> Database:
    database = open_database(settings.database, data_dir)
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
    settings: GatewaySettings, accounts: Accounts, till: Till, engine: Engine, metrics: Metrics, *, free: bool
) -> Service:
    prices = Prices(settings.microcredits_per_million_input_tokens, settings.microcredits_per_million_output_tokens)
    return Service(
        engine=engine,
        guard=Guard(accounts, till, require_key=settings.require_key),
        limits=Limits(
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            concurrent_per_key=settings.concurrent_per_key,
        ),
        till=till,
        prices=FREE if free else prices,
        # Requests without a key are the operator's own.
        local_prices=FREE,
        metrics=metrics,
        runs=Runs(),
    )
