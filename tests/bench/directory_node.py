"""A node for ``bench_directory``: a network and nothing above it; one JSON command a line on stdin, answers on stdout.

Arguments: data folder, seeds (comma separated), the first and the number of the shards it says it serves.
"""

import json
import sys
import time
from pathlib import Path

import msgspec
import trio

from config.errors import RiosError
from config.settings import P2pSettings
from p2p import keyfile
from p2p.core.advert import ModelOffer, bitmap
from p2p.face import Call, Reply
from p2p.network import PeerNetwork, open_network

MODEL = "5a" * 32


async def answer(call: Call) -> Reply:
    """What a provider does here: it answers."""
    return Reply({})


async def joined(network: PeerNetwork, adverts: int, seconds: float) -> dict:
    """Wait until the view holds so many adverts and the DHT knows somebody."""
    with trio.move_on_after(seconds):
        while len(network.directory.adverts()) < adverts or not network._host.statistics()["dht_peers"]:  # noqa: ASYNC110 - polled as by a user
            await trio.sleep(0.01)
    return {"at": time.monotonic(), "adverts": len(network.directory.adverts()), **network._host.statistics()}


async def find(network: PeerNetwork, shards: list[int], dht: bool) -> dict:
    """Find each shard's providers, and call the first one that answers: one row per shard."""
    rows = []
    for shard in shards:
        started = time.perf_counter()
        search = network.directory.finder.look_up if dht else network.directory.find_providers
        found = await search(MODEL, shard)
        rows.append({"shard": shard, "seconds": time.perf_counter() - started, "found": list(found)})
    return {"rows": rows}


async def reach(network: PeerNetwork, shards: list[int]) -> dict:
    """The same as a caller does it: find, then call provider after provider until one answers."""
    rows = []
    for shard in shards:
        started, calls, reached = time.perf_counter(), 0, ""
        while not reached and time.perf_counter() - started < 20:
            for peer_id in await network.directory.find_providers(MODEL, shard):
                calls += 1
                try:
                    await network.call(peer_id, "bench.answer", {}, deadline_ms=1000)
                    reached = peer_id
                    break
                except RiosError:
                    continue
        rows.append({"shard": shard, "seconds": time.perf_counter() - started, "calls": calls, "reached": reached})
    return {"rows": rows}


async def do(network: PeerNetwork, command: dict) -> dict:
    op = command["op"]
    if op == "joined":
        return await joined(network, command["adverts"], command["seconds"])
    if op == "find":
        return await find(network, command["shards"], command["dht"])
    if op == "reach":
        return await reach(network, command["shards"])
    if op == "announced":
        return {"announced": len(network.directory.announcements.announced)}
    assert op == "statistics"
    return {"directory": network.directory.statistics(), "peers": len(network.peers())}


async def main() -> None:
    folder, seeds, first, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    await trio.Path(folder).mkdir(parents=True, exist_ok=True)
    identity = keyfile.create(folder / "key")
    settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=tuple(s for s in seeds.split(",") if s))
    async with open_network(identity, settings, data_dir=folder, version="bench") as network:
        network.serve("bench.answer", answer)
        if count:
            offer = ModelOffer(MODEL, bitmap(set(range(first, first + count))), 1, 0, 0)
            network.directory.update(lambda own: msgspec.structs.replace(own, models=(offer,)))
        print(
            json.dumps({"peer_id": network.peer_id, "address": network.addresses[0], "at": time.monotonic()}),
            flush=True,
        )
        line = b""
        async for part in trio.lowlevel.FdStream(0):
            line += part
            while b"\n" in line:
                command, _, line = line.partition(b"\n")
                print(json.dumps(await do(network, json.loads(command))), flush=True)


if __name__ == "__main__":
    trio.run(main)
