"""A witness for ``bench_ledger``: a network, a ledger, and nothing above them; ends when stdin closes.

Arguments: data folder, the number of its key, the genesis file, seeds (comma separated).
"""

import json
import sys
from pathlib import Path

import trio

from config.settings import LedgerSettings, P2pSettings
from ledger.core import genesis as genesis_file
from ledger.ledger import open_ledger
from p2p.core.identity import Identity
from p2p.network import open_network


def identity(number: int) -> Identity:
    """Witness number so and so."""
    return Identity.from_seed((b"witness %d" % number).ljust(32))


async def main() -> None:
    folder, number, file, seeds = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    genesis = genesis_file.from_json(await trio.Path(file).read_text())
    settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=tuple(s for s in seeds.split(",") if s))
    me = identity(number)
    async with open_network(me, settings, data_dir=folder, version="bench") as network, trio.open_nursery() as nursery:
        ledger = await open_ledger(
            network, me, genesis, folder / "ledger.db", LedgerSettings(witness=True, sync_seconds=2), nursery=nursery
        )
        print(json.dumps({"address": network.addresses[0]}), flush=True)
        async for _ in trio.lowlevel.FdStream(0):
            pass
        print(json.dumps({"votes": ledger.voting.votes if ledger.voting else 0}), flush=True)
        await ledger.aclose()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
