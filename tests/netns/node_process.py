"""A node process of the rig: opens a network, takes one JSON command a line on stdin, answers on stdout.

Not a test. Arguments: data folder, the p2p settings as JSON. Ends when its standard input closes.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import trio

from config.errors import RiosError
from config.settings import P2pSettings
from p2p import keyfile
from p2p.face import Call, Reply
from p2p.network import PeerNetwork, open_network


async def echo(call: Call) -> Reply:
    return Reply({"from": call.peer_id}, call.buffers)


async def _call(network: PeerNetwork, command: dict) -> dict:
    """``count`` calls of ``size`` bytes, one after another: seconds of each, and the errors."""
    seconds, errors = [], []
    for _ in range(command.get("count", 1)):
        started = time.monotonic()
        data = b"x" * command.get("size", 10)
        try:
            reply = await network.call(command["peer"], "echo", {}, [data], deadline_ms=command["deadline_ms"])
            assert reply.header["from"] == network.peer_id
            assert bytes(reply.buffers[0]) == data
        except RiosError as error:
            errors.append(f"{error.code}: {error.message}")
        seconds.append(round(time.monotonic() - started, 6))
    link = network.links.ready(command["peer"])
    return {"seconds": seconds, "errors": errors, "link": link.statistics() if link else None}


async def do(network: PeerNetwork, command: dict) -> dict:
    if command["op"] == "call":
        return await _call(network, command)
    if command["op"] == "view":
        return {"view": sorted(network.directory.adverts())}
    assert command["op"] == "look"
    look = {"peers": list(network.peers()), "statistics": dict(network.statistics())}
    return {**look, "standing": network.standing()}


async def main() -> None:
    logging.basicConfig(level=os.environ.get("NETNS_LOG", "INFO"))
    folder, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    settings = P2pSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    path = folder / "key"
    identity = keyfile.load(path) if path.exists() else keyfile.create(path)
    async with open_network(identity, settings, data_dir=folder, version="test") as network:
        network.serve("echo", echo)
        print(json.dumps({"peer_id": network.peer_id, "addresses": network.addresses}), flush=True)
        line = b""
        async for part in trio.lowlevel.FdStream(0):
            line += part
            while b"\n" in line:
                command, _, line = line.partition(b"\n")
                print(json.dumps(await do(network, json.loads(command))), flush=True)


if __name__ == "__main__":
    trio.run(main)
