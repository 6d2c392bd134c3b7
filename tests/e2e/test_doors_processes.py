"""A real node under attack by real processes: an honest caller behind the same address keeps getting its answers."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from config.errors import RiosError
from config.settings import P2pSettings
from p2p.core.identity import Identity
from p2p.network import PeerNetwork, open_network

SECONDS, STREAMS_SECONDS = 0.6, 2.5
"""How long an attack lasts at least; those over libp2p take a while to begin."""
PATIENCE_SECONDS = 60.0
"""How long it may take to run into its limit, and honest calls to be answered, on a machine that does other things."""
CALLS_MIN = 5
GROWTH_BYTES_MAX = 160 << 20
NEIGHBOUR = "127.0.0.1"
"""The honest caller's own address: as behind one NAT."""

# kind -> limits of which at least one must have been hit; each comes from a /24 of its own
RAW = {
    "silent": {"undecided", "undecided_per_address", "connections_per_minute_per_address"},
    "multistream": {"undecided", "undecided_per_address", "connections_per_minute_per_address"},
    "negotiation": {"undecided", "undecided_per_address", "connections_per_minute_per_address"},
    "libp2p_noise": {"undecided", "undecided_per_address", "connections_per_minute_per_address"},
    "lane_preamble": {"undecided", "undecided_per_address", "connections_per_minute_per_address"},
    "lane_noise": {"undecided", "undecided_per_address", "connections_per_minute_per_address"},
    "lane_length": {"disgrace", "connections_per_minute_per_address"},
    "garbage": {"disgrace", "connections_per_minute_per_address"},
    "http": {"disgrace", "connections_per_minute_per_address"},
}
PROVEN = {
    "call_flood": {"calls_per_connection"},
    "unknown_methods": {"calls_of_unknown_methods"},
    "frame_partial": set(),
    "bad_frames": {"ban", "disgrace"},
    "half_read": set(),
    "header_bombs": {"ban", "disgrace"},
    "identities": {"peers", "connections_per_address"},
    "kad_streams": {"streams_kad_per_peer", "streams_per_second_per_connection"},
    "rpc_streams": set(),
}


class Server:
    """The node under attack."""

    def __init__(self, folder: Path) -> None:
        settings = {"loopback_limits": True, "peers_max": 24, "connections_per_address_max": 32}
        self.errors = (folder / "stderr").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("doors_node.py")), str(folder), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        hello = self._line()
        self.peer_id, self.address = hello["peer_id"], hello["address"]
        _, _, self.host, _, self.port, *_ = self.address.split("/")

    def _line(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the node under attack died"
        return json.loads(line)

    def numbers(self) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return self._line()

    def attack(self, kind: str, source: str) -> subprocess.Popen:
        program = str(Path(__file__).with_name("hostile.py"))
        return subprocess.Popen(
            [sys.executable, program, kind, self.host, self.port, self.peer_id, str(PATIENCE_SECONDS), source],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@contextmanager
def running(folder: Path):
    server = Server(folder)
    try:
        yield server
        assert server.process.poll() is None
    finally:
        server.process.stdin.close()
        try:
            server.process.wait(10)
        finally:
            server.process.kill()
            server.process.wait()
            server.process.stdout.close()
            server.errors.close()


async def besiege(server: Server, honest: PeerNetwork, kind: str, source: str, wanted: set[str]) -> None:
    """One attack, until it has run into a limit and for some time: the honest peer keeps calling and every call is
    answered."""
    before = await trio.to_thread.run_sync(server.numbers)
    attacker = server.attack(kind, source)
    latencies: list[float] = []
    try:
        assert attacker.stdout is not None
        assert await trio.to_thread.run_sync(attacker.stdout.readline)
        look_at = trio.current_time() + (STREAMS_SECONDS if kind.endswith("_streams") else SECONDS)
        while attacker.poll() is None:
            started = trio.current_time()
            reply = await honest.call(server.peer_id, "echo", {}, [b"x" * 100], deadline_ms=20_000)
            latencies.append(trio.current_time() - started)
            assert len(reply.buffers[0]) == 100
            if trio.current_time() > look_at:
                look_at += SECONDS
                seen = refused_since(before, await trio.to_thread.run_sync(server.numbers))
                if len(latencies) >= CALLS_MIN and (not wanted or wanted & seen.keys()):
                    break
            await trio.sleep(0.01)
    finally:
        attacker.kill()
        _, errors = await trio.to_thread.run_sync(attacker.communicate)
    after = await trio.to_thread.run_sync(server.numbers)
    latencies.sort()
    refused = refused_since(before, after)
    grown = after["rss"] - before["rss"]
    told = f"{kind} from {source}: {len(latencies)} calls"
    if latencies:
        told += f", median {latencies[len(latencies) // 2] * 1000:.1f} ms, worst {latencies[-1] * 1000:.0f} ms"
    print(f"{told}; grown {grown / 1e6:.1f} MB; refused {refused}", flush=True)
    assert len(latencies) >= CALLS_MIN, told
    assert grown < GROWTH_BYTES_MAX, told
    assert honest.peer_id in after["peers"], f"{kind}: the honest peer keeps its place"
    assert honest.peer_id not in after["out"]
    assert not wanted or wanted & refused.keys(), f"{kind}: {refused} {after['faults']} {errors[-2000:]}"


def refused_since(before: dict, after: dict) -> dict[str, int]:
    refused = {limit: times - before["refused"].get(limit, 0) for limit, times in after["refused"].items()}
    return {limit: times for limit, times in refused.items() if times}


@asynccontextmanager
async def honest_peer(server: Server, folder: Path) -> AsyncIterator[PeerNetwork]:
    settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=(server.address,))
    async with open_network(Identity.from_seed(os.urandom(32)), settings, data_dir=folder, version="test") as network:
        with trio.fail_after(30):
            while True:
                try:
                    await network.call(server.peer_id, "echo", {}, [b"first"], deadline_ms=10_000)
                    break
                except RiosError:
                    await trio.sleep(0.5)
        yield network


@pytest.mark.parametrize("group", ["raw", "proven"])
async def test_honest_peers_are_answered_under_attack(tmp_path, group):
    kinds = RAW if group == "raw" else PROVEN
    with running(tmp_path) as server:
        async with honest_peer(server, tmp_path / "honest") as honest:
            first = await trio.to_thread.run_sync(server.numbers)
            for n, (kind, wanted) in enumerate(kinds.items()):
                await besiege(server, honest, kind, f"127.9.{n}.9", wanted)
            if group == "raw":
                await besiege(server, honest, "silent", NEIGHBOUR, set())
            last = await trio.to_thread.run_sync(server.numbers)
            assert last["rss"] - first["rss"] < GROWTH_BYTES_MAX
            async with honest_peer(server, tmp_path / "new"):
                pass  # newcomers get in, also from the address of an attack that is over
