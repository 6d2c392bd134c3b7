"""A gateway in a process of its own, to be killed: arguments are DATA_DIR DATABASE PORT. Ends when its input does.

The engine is the fake one of the end-to-end tests, which spells its answer in 70 ms: what is tried is the money.
"""

import sys
from pathlib import Path

import trio
from prometheus_client import CollectorRegistry

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from fake_engine import FakeEngine, FakeHealth

from config.settings import GatewaySettings
from gateway.gateway import open_gateway


async def main() -> None:
    settings = GatewaySettings(
        port=int(sys.argv[3]),
        database=sys.argv[2],
        requests_per_minute=1 << 30,
        tokens_per_minute=1 << 40,
        connections_per_second=0,
        microcredits_per_million_input_tokens=1_000_000,
        microcredits_per_million_output_tokens=2_000_000,
    )
    async with open_gateway(
        settings=settings,
        data_dir=Path(sys.argv[1]),
        engine=FakeEngine(pause_seconds=0.01),
        health=FakeHealth(),
        registry=CollectorRegistry(),
    ):
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


if __name__ == "__main__":
    trio.run(main)
