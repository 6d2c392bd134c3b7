"""A node process for the tests beside: opens a network, takes one JSON command a line on stdin, answers on stdout.

Not a test. Arguments: data folder, listen address, seeds (comma separated), the key of a private swarm (hex, optional).
"""

import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import trio

from config.errors import RiosError
from config.settings import P2pSettings
from config.vocabulary import PeerId
from p2p import keyfile
from p2p.core.advert import ModelOffer
from p2p.face import Call, Header, Reply
from p2p.network import PeerNetwork, open_network


async def echo(call: Call) -> Reply:
    return Reply({"from": call.peer_id, **call.header}, call.buffers)


async def traced(call: Call) -> Reply:
    return Reply({"trace": call.trace, "fields": list(call.header)})


async def count(call: Call, send: Callable[[Reply], Awaitable[None]]) -> Header:
    for number in range(call.header["items"]):
        await send(Reply({"n": number}, [bytes(1000)]))
    return {"total": call.header["items"]}


async def crash(call: Call) -> Reply:
    raise ZeroDivisionError


async def slow(call: Call) -> Reply:
    await trio.sleep_forever()
    raise AssertionError


async def do(network: PeerNetwork, command: dict) -> dict:
    if command["op"] == "call":
        started = time.monotonic()
        try:
            reply = await network.call(
                command["peer"],
                command["method"],
                {"n": 1},
                [b"x" * command.get("size", 10)],
                deadline_ms=command["deadline_ms"],
            )
        except RiosError as error:
            return {"error": error.code, "seconds": time.monotonic() - started}
        return {"from": reply.header["from"], "size": len(reply.buffers[0])}
    if command["op"] == "wait":  # until exactly these peers (and this node) stand in the view
        with trio.move_on_after(command["seconds"]):
            while set(network.directory.adverts()) != {network.peer_id, *command["peers"]}:
                await network.directory.wait_change()
        return {"view": sorted(network.directory.adverts())}
    if command["op"] == "offer":  # serve shard 0 of a model, as far as the advert says
        offer = ModelOffer(command["model"], b"\x01", 1, 7, 9)
        network.directory.update(lambda own: msgspec.structs.replace(own, models=(offer,)))
        return {"seq": network.directory.own().seq}
    if command["op"] == "load":
        network.directory.update(lambda own: msgspec.structs.replace(own, load=command["rows"]))
        return {}
    if command["op"] == "region":  # wait for a peer's advert that names this region
        with trio.move_on_after(command["seconds"]):
            while _region(network, command["peer"]) != command["region"]:
                await network.directory.wait_change()
        return {"region": _region(network, command["peer"])}
    if command["op"] == "find":
        found: list[str] = []
        await network._host.find_providers(
            bytes.fromhex("1220" + command["digest"]), lambda peer: bool(found.append(peer))
        )
        return {"providers": found}
    assert command["op"] == "peers"
    return {"peers": list(network.peers())}


def _region(network: PeerNetwork, peer_id: str) -> str | None:
    advert = network.directory.adverts().get(PeerId(peer_id))
    return advert.region if advert else None


async def main() -> None:
    folder, listen, seeds = Path(sys.argv[1]), sys.argv[2], [s for s in sys.argv[3].split(",") if s]
    path = folder / "key"
    identity = keyfile.load(path) if path.exists() else keyfile.create(path)
    settings = P2pSettings(listen=(listen,), seeds=tuple(seeds))
    key = bytes.fromhex(sys.argv[4]) if len(sys.argv) > 4 else None
    async with open_network(identity, settings, data_dir=folder, version="test", swarm_key=key) as network:
        for name, handler in (("echo", echo), ("traced", traced), ("crash", crash), ("slow", slow)):
            network.serve(name, handler)
        network.serve_stream("count", count)
        print(json.dumps({"peer_id": network.peer_id, "address": network.addresses[0]}), flush=True)
        stdin = trio.lowlevel.FdStream(0)
        line = b""
        async for part in stdin:
            line += part
            while b"\n" in line:
                command, _, line = line.partition(b"\n")
                print(json.dumps(await do(network, json.loads(command))), flush=True)


if __name__ == "__main__":
    trio.run(main)
