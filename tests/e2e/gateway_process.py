"""A gateway in a process of its own, to be killed: arguments are DATA_DIR DATABASE [STORE [ABANDONED_MS]].

Prints its port and a key; ends when its input does. Streams of the fake engine hang at their fourth token. With a
STORE the real engine answers with the model in it, slowly enough to be killed in the middle. From SIGUSR1 on
what another gateway holds is abandoned after ABANDONED_MS of silence.
"""

import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from fake_engine import FakeEngine
from gateway_rig import serving

from gateway import books, idempotency

TOKEN_SECONDS = 0.02


def real_engine(folder: Path):
    from dmoe.engine import Engine
    from dmoe.models import StoredModels
    from dmoe.runtime import RuntimeOptions
    from dmoe.store import ModelStore

    class SlowEngine(Engine):
        """Pauses before each event."""

        @asynccontextmanager
        async def stream(self, prepared):
            async with super().stream(prepared) as events:
                yield slowly(events)

    options = RuntimeOptions(device="cpu", threads=1)
    return SlowEngine(StoredModels(ModelStore(folder), None, options, "me"), default_route="auto")


async def slowly(events):
    async for event in events:
        await trio.sleep(TOKEN_SECONDS)
        yield event


def impatient(*_: object) -> None:
    books.ABANDONED_MS = idempotency.ABANDONED_MS = int(sys.argv[4])


async def main() -> None:
    signal.signal(signal.SIGUSR1, impatient)
    data_dir, database = Path(sys.argv[1]), sys.argv[2]
    async with trio.open_nursery() as nursery:
        engine = FakeEngine(hang_at=3)
        if len(sys.argv) > 3:
            engine = real_engine(Path(sys.argv[3]))
            await nursery.start(engine.run)
        async with serving(data_dir, engine=engine, database=database) as rig:
            print(rig.gateway.port, rig.key, flush=True)
            await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


trio.run(main)
