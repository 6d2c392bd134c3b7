"""A node process under attack, for ``test_doors_processes``. Not a test.

Arguments: data folder, P2pSettings as JSON. Prints its peer id and address, then one JSON line of numbers for each line
it reads.
"""

import json
import sys
from pathlib import Path

import psutil
import trio

from config.settings import P2pSettings
from p2p import keyfile
from p2p.face import Call, Reply
from p2p.network import PeerNetwork, open_network


async def echo(call: Call) -> Reply:
    return Reply({}, call.buffers)


async def slow(call: Call) -> Reply:
    await trio.sleep_forever()
    raise AssertionError


async def large(call: Call) -> Reply:
    return Reply({}, [bytes(call.header["size"])])


def numbers(network: PeerNetwork) -> dict:
    doors = network.doors
    return {
        "rss": psutil.Process().memory_info().rss,
        "out": [row.subject for row in doors.bans()],
        "peers": list(network.peers()),
        **doors.statistics(),
    }


async def main() -> None:
    folder, more = Path(sys.argv[1]), json.loads(sys.argv[2])
    settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), **more)
    async with open_network(keyfile.create(folder / "key"), settings, data_dir=folder, version="test") as network:
        for name, handler in (("echo", echo), ("slow", slow), ("large", large)):
            network.serve(name, handler)
        print(json.dumps({"peer_id": network.peer_id, "address": network.addresses[0]}), flush=True)
        async for _ in trio.lowlevel.FdStream(0):
            print(json.dumps(numbers(network)), flush=True)


if __name__ == "__main__":
    trio.run(main)
