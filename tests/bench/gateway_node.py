"""The gateway over an engine that costs nothing, in a process of its own. Arguments: DATA_DIR DATABASE CHUNKS PAUSE_MS.

Prints its port and a key as JSON; ends when its input does. A whole answer is one piece; of the model ``stream`` come
CHUNKS pieces, PAUSE_MS apart. Keys, limits, turns, reservations, settlements and the log are as in a real node.
"""

import gc
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from prometheus_client import CollectorRegistry

from config.generation import Delta, Finished, GenerationEvent, GenerationRequest, ModelInfo, Route
from config.settings import GatewaySettings
from gateway.gateway import open_gateway

DATA_DIR, DATABASE, CHUNKS, PAUSE_MS = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
WHOLE_TOKENS = 9
PLENTY = 1 << 30


@dataclass(frozen=True)
class Prepared:
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    route: Route
    pieces: int


class Engine:
    """Stands for the real one, which costs a thousand times more than what is measured."""

    def models(self) -> tuple[ModelInfo, ...]:
        names = ("whole", "stream")
        return tuple(ModelInfo(id=n, name=n, context_tokens=4096, created=0, ready=True) for n in names)

    async def prepare(self, request: GenerationRequest) -> Prepared:
        pieces = CHUNKS if request.model == "stream" else 1
        return Prepared(tuple(range(9)), request.sampling.max_tokens or 256, "local", pieces)

    @asynccontextmanager
    async def stream(self, prepared: Prepared) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        async with aclosing(self._events(prepared)) as events:
            yield events

    async def _events(self, prepared: Prepared) -> AsyncIterator[GenerationEvent]:
        tokens = (7,) * (1 if prepared.pieces > 1 else WHOLE_TOKENS)
        text = "tok " if prepared.pieces > 1 else "hello there"
        for _ in range(prepared.pieces):
            if PAUSE_MS:
                await trio.sleep(PAUSE_MS / 1000)
            yield Delta(text=text, tokens=tokens)
        yield Finished(
            reason="stop",
            prompt_tokens=9,
            completion_tokens=prepared.pieces * len(tokens),
            prefill_seconds=0.0,
            decode_seconds=0.0,
            route="local",
            expert_rows={},
            serving={},
            retries=0,
        )


class Health:
    def ready(self) -> tuple[bool, tuple[str, ...]]:
        return True, ()


async def main() -> None:
    log = DATA_DIR / "log"
    logging.basicConfig(filename=log, level=logging.INFO)
    settings = GatewaySettings(
        port=0,
        database=DATABASE,
        requests_per_minute=PLENTY,
        tokens_per_minute=1 << 40,
        concurrent_per_key=1 << 20,
        connections_per_second=0,
    )
    async with open_gateway(
        settings=settings,
        data_dir=DATA_DIR,
        engine=Engine(),
        health=Health(),
        registry=CollectorRegistry(),
        slots=1024,
    ) as gateway:

        def account() -> str:
            gateway.accounts.create_user("load")
            gateway.accounts.credit("load", 1 << 50)
            return gateway.accounts.create_key("load").secret

        key = await trio.to_thread.run_sync(account)
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(0.0005)  # the daemon does as much
        print(json.dumps({"port": gateway.port, "key": key}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


trio.run(main)
