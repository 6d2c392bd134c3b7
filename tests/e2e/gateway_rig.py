"""A real gateway on a free port over the fake engine, for tests, and what they do with it."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import openai
import sqlalchemy as sa
import trio
from fake_engine import FakeEngine, FakeHealth
from prometheus_client import CollectorRegistry

from config.settings import GatewaySettings
from gateway.accounts import Accounts, Balance
from gateway.gateway import Gateway, open_gateway
from gateway.ports import LedgerView, Spending, Swarm

T = TypeVar("T")

INPUT_PRICE, OUTPUT_PRICE = 1_000_000, 2_000_000
"""One microcredit per prompt token, two per token of the answer."""


@dataclass
class Rig:
    gateway: Gateway
    engine: FakeEngine
    health: FakeHealth
    registry: CollectorRegistry
    key: str

    @property
    def accounts(self) -> Accounts:
        return self.gateway.accounts

    async def balance(self, user: str = "ada") -> Balance:
        return await trio.to_thread.run_sync(self.accounts.balance, user)

    async def with_openai(self, use: Callable[[openai.OpenAI], T], *, key: str | None = None) -> T:
        """Use the real client in a thread."""

        def run() -> T:
            with openai.OpenAI(
                base_url=f"{self.gateway.url}/v1", api_key=key or self.key, max_retries=0, timeout=20
            ) as client:
                return use(client)

        return await trio.to_thread.run_sync(run)

    def http(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.gateway.url, headers=headers, timeout=20)

    async def raw(self, path: str, body: object, **headers: str) -> trio.SocketStream:
        """A bare connection on which a request was just written."""
        stream = await trio.open_tcp_stream(self.gateway.host, self.gateway.port)
        await stream.send_all(request_bytes(path, json.dumps(body).encode(), self.key, **headers))
        return stream


def request_bytes(path: str, body: bytes, key: str, **headers: str) -> bytes:
    fields = {"host": "test", "authorization": f"Bearer {key}", "content-length": str(len(body))}
    fields.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def read_until(stream: trio.SocketStream, marker: bytes) -> bytes:
    """All that comes, up to and with ``marker``; fails if the connection ends first."""
    data = b""
    with trio.fail_after(10):
        while marker not in data:
            part = await stream.receive_some()
            assert part, f"closed before {marker!r}: {data[-300:]!r}"
            data += part
    return data


async def read_all(stream: trio.SocketStream) -> bytes:
    data = b""
    with trio.fail_after(10):
        async for part in stream:
            data += part
    return data


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - it looks at things that tell nobody when they change
            await trio.sleep(0.01)


@contextmanager
def listening(event: str, to: Callable[..., None]) -> Iterator[None]:
    """Tell ``to`` of an event of the databases that are opened meanwhile: an engine that threads use already takes no
    listener without spoiling what they do at that moment."""
    sa.event.listen(sa.Engine, event, to)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, event, to)


@asynccontextmanager
async def serving(
    data_dir: Path,
    *,
    engine: FakeEngine | None = None,
    credit: int = 1_000_000,
    free: bool = False,
    ledger_view: LedgerView | None = None,
    slots: int = 0,
    swarm: Swarm | None = None,
    spending: Spending | None = None,
    **settings: object,
) -> AsyncIterator[Rig]:
    """A gateway with a user ada, her key and her credit."""
    engine, health, registry = engine or FakeEngine(), FakeHealth(), CollectorRegistry()
    prices = {
        "microcredits_per_million_input_tokens": INPUT_PRICE,
        "microcredits_per_million_output_tokens": OUTPUT_PRICE,
    }
    async with open_gateway(
        settings=GatewaySettings(**{"port": 0, **prices, **settings}),
        data_dir=data_dir,
        engine=engine,
        health=health,
        registry=registry,
        free=free,
        ledger_view=ledger_view,
        slots=slots,
        swarm=swarm,
        spending=spending,
    ) as gateway:
        key = await trio.to_thread.run_sync(_ada, gateway.accounts, credit)
        yield Rig(gateway=gateway, engine=engine, health=health, registry=registry, key=key)


def _ada(accounts: Accounts, credit: int) -> str:
    if not any(user.name == "ada" for user in accounts.list_users()):
        accounts.create_user("ada")
        if credit:
            accounts.credit("ada", credit)
    return accounts.create_key("ada", "test").secret
