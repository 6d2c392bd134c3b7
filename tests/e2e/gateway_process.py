"""A gateway in a process of its own, to be killed: ``python gateway_process.py DATA_DIR DATABASE``.

Prints its port and a key; streams hang at their fourth token. Ends when its input does.
"""

import sys
from pathlib import Path

import trio
from fake_engine import FakeEngine
from gateway_rig import serving


async def main() -> None:
    data_dir, database = Path(sys.argv[1]), sys.argv[2]
    async with serving(data_dir, engine=FakeEngine(hang_at=3), database=database) as rig:
        print(rig.gateway.port, rig.key, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


trio.run(main)
