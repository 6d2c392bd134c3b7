"""What a call costs: the complete RPC over the direct lane and over a libp2p stream, beside a bare trio TCP echo.

Two processes on loopback, in interleaved rounds. The bare echo sends the same bytes, length-prefixed, through
``trio.SocketStream``; ``tcp`` encrypts them with ChaCha20-Poly1305 in one piece and decrypts them, at both ends,
``tcp_plain`` does not. The echo is served as experts are, by a quick handler; ``*_task`` is an ordinary async handler.
``library`` is the carrier without our part of it: an echo over one long-lived stream of an untouched py-libp2p host
(TCP, Noise, yamux; buffered reads), without any RPC.

Ratios, all of medians: ``lane_vs_tcp_*`` is lane time / tcp time (encrypted), ``lane_vs_stream_*`` is how many times
faster the lane is than our libp2p carrier (stream time / lane time), ``lane_vs_library_*`` the same against the
library's stream. ``p99_vs_p50_64callers`` is over the lane at 128 B. The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import trio
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.exceptions import MuxedStreamError
from multiaddr import Multiaddr

from config.settings import P2pSettings
from p2p.core.identity import Identity
from p2p.face import Call, Reply
from p2p.network import PeerNetwork, open_network

SIZES = {"128B": 128, "16KiB": 16 << 10, "64KiB": 64 << 10, "256KiB": 256 << 10}
LISTEN = ("/ip4/127.0.0.1/tcp/0",)
HEADER = {"layer": 3, "rows": 1, "dtype": "f16"}
CALLERS = 64
KEY = bytes(range(32))
ROUNDS = 10
ECHO = TProtocol("/bench/echo/1.0.0")


class Bare:
    """Length-prefixed blocks on a TCP stream, each encrypted in one piece or not."""

    def __init__(self, stream: trio.SocketStream, encrypted: bool) -> None:
        self._stream = stream
        self._cipher = ChaCha20Poly1305(KEY) if encrypted else None
        self._sent = self._received = 0

    async def send(self, data: bytes) -> None:
        if self._cipher is not None:
            self._sent += 1
            data = self._cipher.encrypt(self._sent.to_bytes(12, "little"), data, None)
        await self._stream.send_all(len(data).to_bytes(4, "big") + data)

    async def receive(self) -> bytes:
        data = await self._stream.receive_some(1 << 18)
        if not data:
            raise EOFError
        size = 4 + int.from_bytes(data[:4], "big")
        if len(data) < size:
            data = bytearray(data)
            while len(data) < size:
                part = await self._stream.receive_some(size - len(data))
                if not part:
                    raise EOFError
                data += part
        if self._cipher is None:
            return data[4:]
        self._received += 1
        return self._cipher.decrypt(self._received.to_bytes(12, "little"), memoryview(data)[4:], None)


async def serve_bare(encrypted: bool, stream: trio.SocketStream) -> None:
    bare = Bare(stream, encrypted)
    try:
        while True:
            await bare.send(await bare.receive())
    except (EOFError, trio.BrokenResourceError):
        await stream.aclose()


def library_host() -> IHost:
    keys = create_new_key_pair(os.urandom(32))
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair=keys, sec_opt={NOISE_ID: noise}, muxer_preference="YAMUX")


async def read_block(stream: INetStream) -> bytes:
    """One block at a time travels, so whatever there is belongs to it."""
    data = await stream.read(1 << 20)
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        data += await stream.read(1 << 20)
    return data[4:]


async def serve_library(stream: INetStream) -> None:
    with suppress(StreamError, MuxedStreamError):
        while True:
            data = await read_block(stream)
            await stream.write(len(data).to_bytes(4, "big") + data)


async def echo(call: Call) -> Reply:
    return Reply({"ok": 1}, call.buffers)


def quick_echo(call: Call) -> Reply:
    return Reply({"ok": 1}, call.buffers)


async def cpu(call: Call) -> Reply:
    return Reply({"seconds": time.process_time()})


async def open_node(stack: AsyncExitStack, *, lane: bool, seeds: tuple[str, ...] = ()) -> PeerNetwork:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    identity = Identity.from_seed(os.urandom(32))
    settings = P2pSettings(listen=LISTEN, seeds=seeds, lane=lane)
    return await stack.enter_async_context(open_network(identity, settings, data_dir=folder, version="bench"))


async def server() -> None:
    async with AsyncExitStack() as stack:
        nodes = [await open_node(stack, lane=lane) for lane in (True, False)]
        for node in nodes:
            node.serve("task", echo)
            node.serve("quick", echo, quick=quick_echo)
            node.serve("cpu", cpu)
        nursery = await stack.enter_async_context(trio.open_nursery())
        ports = []
        for encrypted in (True, False):
            listeners = await nursery.start(
                partial(trio.serve_tcp, partial(serve_bare, encrypted), 0, host="127.0.0.1")
            )
            ports.append(listeners[0].socket.getsockname()[1])
        host = library_host()
        await stack.enter_async_context(host.run([Multiaddr(LISTEN[0])]))
        host.set_stream_handler(ECHO, serve_library)
        print(*(node.addresses[0] for node in nodes), str(host.get_addrs()[0]), *ports, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


async def timed(one: Callable[[], Awaitable[None]], seconds: float) -> list[float]:
    """Round trips in seconds, for about that long."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        await one()
        times.append(time.perf_counter() - start)
    return times


class Client:
    """Everything that is timed."""

    def __init__(self, nodes: dict[str, tuple[PeerNetwork, str]], bare: dict[str, Bare], library: INetStream) -> None:
        self._nodes = nodes
        self._bare = bare
        self._library = library

    async def library(self, data: bytes) -> None:
        await self._library.write(len(data).to_bytes(4, "big") + data)
        assert len(await read_block(self._library)) == len(data)

    async def rpc(self, carrier: str, method: str, data: bytes) -> None:
        node, peer = self._nodes[carrier]
        reply = await node.call(peer, method, HEADER, [data], deadline_ms=10_000)
        assert len(reply.buffers[0]) == len(data)

    async def tcp(self, name: str, data: bytes) -> None:
        bare = self._bare[name]
        await bare.send(data)
        assert len(await bare.receive()) == len(data)

    async def sizes(self, seconds: float) -> dict[str, dict[str, float]]:
        figures = {}
        for name, size in SIZES.items():
            data = os.urandom(size)
            ways: dict[str, Callable[[], Awaitable[None]]] = {
                "lane": partial(self.rpc, "lane", "quick", data),
                "tcp": partial(self.tcp, "tcp", data),
                "stream": partial(self.rpc, "stream", "quick", data),
                "library": partial(self.library, data),
                "tcp_plain": partial(self.tcp, "tcp_plain", data),
                "lane_task": partial(self.rpc, "lane", "task", data),
                "stream_task": partial(self.rpc, "stream", "task", data),
            }
            times: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(ROUNDS + 1):  # interleaved, so that all see the same noise; the first round warms up
                for way, one in ways.items():
                    some = await timed(one, seconds)
                    times[way] += some if turn else []
            figures[name] = {f"{way}_p50_ms": round(statistics.median(t) * 1000, 4) for way, t in times.items()}
            figures[name] |= {f"{way}_p99_ms": _p99(times[way]) for way in ("lane", "stream", "tcp")}
            print(f"{name:>7}: {figures[name]}", flush=True)
        return figures

    async def callers(self, carrier: str, seconds: float) -> dict[str, float]:
        """Many callers at once: spread of the times, and whether somebody is left behind."""
        times: list[float] = []
        counts: list[int] = []
        data = os.urandom(128)

        async def caller() -> None:
            some = await timed(partial(self.rpc, carrier, "quick", data), seconds)
            times.extend(some)
            counts.append(len(some))

        async with trio.open_nursery() as nursery:
            for _ in range(CALLERS):
                nursery.start_soon(caller)
        return {
            "p50_ms": round(statistics.median(times) * 1000, 3),
            "p99_ms": _p99(times),
            "calls_per_s": round(len(times) / seconds),
            "least_calls_of_a_caller": min(counts),
            "most_calls_of_a_caller": max(counts),
        }

    async def cpu(self, carrier: str, size: int, seconds: float) -> dict[str, float]:
        """Processor time of a call at both ends."""
        node, peer = self._nodes[carrier]
        data = os.urandom(size)
        there = (await node.call(peer, "cpu", {}, deadline_ms=5000)).header["seconds"]
        here = time.process_time()
        calls = len(await timed(partial(self.rpc, carrier, "quick", data), seconds))
        spent = time.process_time() - here
        served = (await node.call(peer, "cpu", {}, deadline_ms=5000)).header["seconds"] - there
        return {"caller_us": round(spent / calls * 1e6, 1), "server_us": round(served / calls * 1e6, 1)}


def _p99(times: list[float]) -> float:
    return round(statistics.quantiles(times, n=100)[98] * 1000, 4)


async def client(addresses: list[str], ports: list[int], seconds: float) -> dict[str, object]:
    async with AsyncExitStack() as stack:
        nodes = {}
        for carrier, address in zip(("lane", "stream"), addresses[:2], strict=True):
            node = await open_node(stack, lane=carrier == "lane", seeds=(address,))
            peer = address.rpartition("/")[2]
            await node.call(peer, "quick", {}, deadline_ms=20_000)
            used = node.statistics()["links"][peer]
            assert used["carrier"] == carrier, used
            nodes[carrier] = node, peer
            print(f"{carrier}: {used['cipher']}")
        bare = {}
        for name, port in zip(("tcp", "tcp_plain"), ports, strict=True):
            stream = await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port))
            bare[name] = Bare(stream, name == "tcp")
        host = library_host()
        await stack.enter_async_context(host.run([]))
        target = info_from_p2p_addr(Multiaddr(addresses[2]))
        await host.connect(target)
        timing = Client(nodes, bare, await host.new_stream(target.peer_id, [ECHO]))
        figures: dict[str, object] = dict(await timing.sizes(seconds))
        for carrier in nodes:
            figures[f"{carrier}_{CALLERS}callers"] = await timing.callers(carrier, 20 * seconds)
            for name, size in SIZES.items():
                figures[f"{carrier}_cpu_{name}"] = await timing.cpu(carrier, size, 8 * seconds)
        return figures


def ratios_of(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    def over(size: str, above: str, below: str) -> float:
        return round(figures[size][f"{above}_p50_ms"] / figures[size][f"{below}_p50_ms"], 3)

    lane = {f"lane_vs_tcp_{size}": over(size, "lane", "tcp") for size in SIZES}
    stream = {f"lane_vs_stream_{size}": over(size, "stream", "lane") for size in SIZES}
    library = {f"lane_vs_library_{size}": over(size, "library", "lane") for size in SIZES}
    many = figures[f"lane_{CALLERS}callers"]
    return {**lane, **stream, **library, f"p99_vs_p50_{CALLERS}callers": round(many["p99_ms"] / many["p50_ms"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("server",), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.1, help="per way, size and round")
    arguments = parser.parse_args()
    if arguments.role:
        trio.run(server)
        return
    command = [sys.executable, __file__, "--role", "server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            *addresses, tcp, plain = process.stdout.readline().split()
            figures = trio.run(client, addresses, [int(tcp), int(plain)], arguments.seconds)
        finally:
            process.terminate()
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"name": "rpc", "machine": machine, "figures": figures, "ratios": ratios_of(figures)}))


if __name__ == "__main__":
    main()
