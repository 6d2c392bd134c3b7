"""Round trips of the complete RPC over libp2p streams between two processes on loopback, beside a bare trio TCP echo of
the same bytes in the same run. The last line of stdout is one JSON object."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

from config.settings import P2pSettings
from p2p.core.identity import Identity
from p2p.face import Call, Reply
from p2p.network import open_network

SIZES = {"128B": 128, "16KiB": 16 << 10, "64KiB": 64 << 10, "256KiB": 256 << 10}
LISTEN = ("/ip4/127.0.0.1/tcp/0",)


async def serve_tcp(stream: trio.SocketStream) -> None:
    """Send every block of 4 + n bytes back."""
    try:
        while True:
            size = int.from_bytes(await exactly(stream, 4), "big")
            data = await exactly(stream, size)
            await stream.send_all(size.to_bytes(4, "big") + data)
    except (EOFError, trio.BrokenResourceError):
        await stream.aclose()


async def exactly(stream: trio.SocketStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


async def server() -> None:
    async def echo(call: Call) -> Reply:
        return Reply({"ok": 1}, call.buffers)

    with tempfile.TemporaryDirectory() as folder:
        identity = Identity.from_seed(os.urandom(32))
        settings = P2pSettings(listen=LISTEN)
        async with open_network(identity, settings, data_dir=Path(folder), version="bench") as network:
            network.serve("echo", echo)
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            print(network.addresses[0], port, flush=True)
            with trio.move_on_after(60):
                await trio.serve_listeners(serve_tcp, listeners)


async def timed(one, seconds: float) -> list[float]:
    """Round trips in seconds, for about that long."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end and len(times) < 5000:
        await one()
        times.append(time.perf_counter() - start)
    return times


async def client(address: str, port: int, seconds: float) -> dict[str, dict[str, float]]:
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        identity = Identity.from_seed(os.urandom(32))
        settings = P2pSettings(listen=LISTEN, seeds=(address,))
        async with open_network(identity, settings, data_dir=Path(folder), version="bench") as network:
            peer = address.rpartition("/")[2]
            await network.call(peer, "echo", {}, deadline_ms=20_000)
            bare = await trio.open_tcp_stream("127.0.0.1", port)
            for name, size in SIZES.items():
                data = os.urandom(size)

                async def rpc(data: bytes = data) -> None:
                    reply = await network.call(
                        peer, "echo", {"layer": 3, "rows": 1, "dtype": "f16"}, [data], deadline_ms=5000
                    )
                    assert len(reply.buffers[0]) == len(data)

                async def tcp(data: bytes = data) -> None:
                    await bare.send_all(len(data).to_bytes(4, "big") + data)
                    await exactly(bare, 4)
                    await exactly(bare, len(data))

                await timed(rpc, 0.2)
                await timed(tcp, 0.1)
                streams: list[float] = []
                sockets: list[float] = []
                for _ in range(3):  # interleaved, so that both see the same noise
                    streams += await timed(rpc, seconds)
                    sockets += await timed(tcp, seconds / 2)
                figures[name] = {
                    "stream_p50_ms": round(statistics.median(streams) * 1000, 4),
                    "stream_p99_ms": round(statistics.quantiles(streams, n=100)[98] * 1000, 4),
                    "tcp_p50_ms": round(statistics.median(sockets) * 1000, 4),
                    "calls": len(streams),
                }
                print(f"{name:>7}: {figures[name]}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("server",), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.8, help="per size and round")
    arguments = parser.parse_args()
    if arguments.role:
        trio.run(server)
        return
    with subprocess.Popen([sys.executable, __file__, "--role", "server"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address, port = process.stdout.readline().split()
            figures = trio.run(client, address, int(port), arguments.seconds)
        finally:
            process.terminate()
    ratios = {f"stream_vs_tcp_{name}": round(f["stream_p50_ms"] / f["tcp_p50_ms"], 3) for name, f in figures.items()}
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"name": "rpc", "machine": machine, "figures": figures, "ratios": ratios}))


if __name__ == "__main__":
    main()
