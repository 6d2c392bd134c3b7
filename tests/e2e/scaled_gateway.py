"""A gateway of several in a process of its own: arguments are DATA_DIR and settings as JSON.

Prints its port and a key; ends when its input does. An answer of the fake engine has seven pieces, 0.2 s apart.
"""

import json
import logging
import sys
from pathlib import Path

import trio
from fake_engine import FakeEngine
from gateway_rig import serving


async def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    data_dir, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    async with serving(data_dir, engine=FakeEngine(pause_seconds=0.2), **settings) as rig:
        print(rig.gateway.port, rig.key, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


trio.run(main)
