"""What hostile peers do, as a process of its own: ``hostile.py KIND HOST PORT PEER_ID SECONDS SOURCE``. Not a test.

Raw kinds have no identity; the others prove one and then misbehave. Everything is bounded in time and number.
"""

import os
import socket as plain_socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from zlib import crc32

import trio

from config.errors import RiosError
from p2p import front, lanes
from p2p.core import frames
from p2p.core.doors import Limits
from p2p.core.identity import Identity
from p2p.core.records import DATA, MAIN
from p2p.doors import Doors
from p2p.front import Front
from p2p.handshake import Keys
from p2p.lane import Lane

HOST, PORT, PEER = sys.argv[2], int(sys.argv[3]), sys.argv[4]
SECONDS, SOURCE = float(sys.argv[5]), sys.argv[6]
SOCKETS_MAX = 400
MULTISTREAM = b"\x13/multistream/1.0.0\n"

OPENINGS: dict[str, Callable[[], bytes]] = {
    "silent": lambda: b"",
    "multistream": lambda: MULTISTREAM[:7],
    "negotiation": lambda: MULTISTREAM + b"\x07/no",
    "libp2p_noise": lambda: MULTISTREAM + b"\x07/noise\n" + b"\x00\x20" + bytes(5),
    "lane_preamble": lambda: front.MAGIC[:3],
    "lane_noise": lambda: front.preamble(front.LANE) + b"\x00\x20" + bytes(5),
    "lane_length": lambda: front.preamble(front.LANE) + b"\xff\xff" + os.urandom(1000),
    "garbage": lambda: os.urandom(500),
    "http": lambda: b"GET / HTTP/1.1\r\n\r\n",
}


async def dial(host: str, port: int) -> trio.socket.SocketType:
    socket = trio.socket.socket()
    await socket.bind((SOURCE, 0))
    await socket.connect((host, port))
    socket.setsockopt(plain_socket.IPPROTO_TCP, plain_socket.TCP_NODELAY, 1)
    return socket


async def hold_sockets(opening: Callable[[], bytes]) -> None:
    """Open connection after connection, say the opening, then a byte from time to time."""
    held: list[trio.socket.SocketType] = []
    while True:
        if len(held) < SOCKETS_MAX:
            try:
                socket = await dial(HOST, PORT)
                held.append(socket)
                await socket.send(opening())
            except OSError:
                await trio.sleep(0.01)
        else:
            held.pop(0).close()
        if len(held) % 50 == 49:
            try:
                await held[-7].send(b"\0")
            except OSError:
                held.pop(-7).close()


@asynccontextmanager
async def lane(n: int):
    """A lane of a fresh identity, whose frames we make ourselves."""
    lanes.connect = dial
    doors = Doors(Limits(), peers_max=8)
    async with trio.open_nursery() as nursery:
        keys = Keys(Identity.from_seed(n.to_bytes(32, "big")))
        made = lanes.Lanes(keys, Front(doors), nursery.start_soon, lambda _: True, frame_bytes_max=64 << 20)
        found: Lane = await made.dial(PEER, [f"/ip4/{HOST}/tcp/{PORT}"])
        for channel in (found.main, found.bulk):
            channel.open(lambda data, channel=channel: channel.consumed(len(data)), lambda: None)
        nursery.start_soon(found.run)
        yield found
        found.fail("done")
        nursery.cancel_scope.cancel()


async def send(to: Lane, data: bytes) -> None:
    """Past every limit that our own side would keep."""
    while to._rest and not to.closed:  # noqa: ASYNC110 - the lane has no event for its raw writer
        await trio.sleep(0.001)
    if not to.closed:
        to.write(DATA + MAIN, data)
    await trio.lowlevel.checkpoint()


async def call_flood(n: int, method: str = "slow") -> None:
    machine = frames.Machine(frame_bytes_max=1 << 20)
    async with lane(n) as found:
        while not found.closed:
            batch = [b"".join(machine.request(method, {}, (), 60_000)[1]) for _ in range(50)]
            await send(found, b"".join(batch))


async def frame_partial(n: int) -> None:
    """Announce the largest frame there is and send none of it."""
    async with lane(n) as found:
        await send(found, frames.HEAD.pack(60 << 20, frames.REQUEST, 4, 0, 1, 1000, (60 << 20) - 4))
        await trio.sleep_forever()


async def bad_frames(n: int) -> None:
    async with lane(n) as found:
        await send(found, os.urandom(200))
        await trio.sleep(0.05)
    await bad_frames(n)


BOMBS = (
    b"\x91" * 60_000,  # lists in lists
    b"\x81\xa1a" * 20_000,  # maps in maps
    *(
        b"\x81\xa1a" + mark + b"\xff\xff\xff\xff" for mark in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")
    ),  # 4 GiB, it says
    b"\x81\xa1a\xdd\x00\x0f\x00\x00" + b"\x80" * 0xF0000,  # a million empty maps
)
"""Headers that cost whoever decodes them far more than their bytes."""


async def header_bombs(n: int) -> None:
    """Calls whose msgpack header is a bomb; each in a lane of its own, since most of them end it."""
    for turn, bomb in enumerate(BOMBS):
        async with lane(1000 * n + turn) as found:
            method = b"echo"
            head = frames.HEAD.pack(len(method) + len(bomb), frames.REQUEST, len(method), 0, 1, 1000, len(bomb))
            for start in range(0, len(bomb), 60_000):
                data = bomb[start : start + 60_000]
                await send(found, head + method + data if not start else data)
            await trio.sleep(0.05)


async def half_read(n: int) -> None:
    """Ask for much and never open the window again."""
    machine = frames.Machine(frame_bytes_max=1 << 20)
    async with lane(n) as found:
        found.main._receive = lambda _data: None
        for _ in range(200):
            await send(found, b"".join(machine.request("large", {"size": 256 << 10}, (), 60_000)[1]))
        await trio.sleep_forever()


async def identities(n: int) -> None:
    """One identity after the other, each keeps its lane."""
    async with trio.open_nursery() as nursery:
        for k in range(40):

            async def keep(k: int = k) -> None:
                try:
                    async with lane(1000 * n + k):
                        await trio.sleep_forever()
                except* RiosError:
                    pass

            nursery.start_soon(keep)
            await trio.sleep(0.02)


async def streams(n: int, protocol: str) -> None:
    """Open libp2p streams and say nothing on them."""
    from p2p.host import _id, open_host  # takes long to import, and most attacks do without

    identity = Identity.from_seed(n.to_bytes(32, "big"))
    async with (
        trio.open_nursery() as nursery,
        open_host(identity, listen=("/ip4/127.0.0.1/tcp/0",), peers_max=4, nursery=nursery) as host,
    ):
        host.learn(PEER, [f"/ip4/{HOST}/tcp/{PORT}"])
        await host.connect(PEER)
        for _ in range(400):
            with trio.move_on_after(0.2):
                stream = await host._host.new_stream(_id(PEER), [protocol])
                await stream.write(b"\x05")
        nursery.cancel_scope.cancel()


PEERS: dict[str, Callable[[int], Awaitable[None]]] = {
    "call_flood": call_flood,
    "unknown_methods": lambda n: call_flood(n, "nothing"),
    "frame_partial": frame_partial,
    "bad_frames": bad_frames,
    "half_read": half_read,
    "header_bombs": header_bombs,
    "identities": identities,
    "kad_streams": lambda n: streams(n, "/ipfs/kad/1.0.0"),
    "rpc_streams": lambda n: streams(n, "/rios/rpc/1.0.0"),
}


async def again(attack: Callable[[int], Awaitable[None]], n: int) -> None:
    """Until the time is over, whatever the other side does to us."""
    while True:
        try:
            await attack(n)
        except* Exception as group:  # noqa: BLE001 - what an attacker suffers does not matter, but tell
            print(f"{n}: {group.exceptions[0]!r}", file=sys.stderr)
        await trio.sleep(0.05)


async def main() -> None:
    kind = sys.argv[1]
    with trio.move_on_after(SECONDS):
        async with trio.open_nursery() as nursery:
            print("begin", flush=True)
            if kind in OPENINGS:
                nursery.start_soon(hold_sockets, OPENINGS[kind])
            else:
                first = 1000 * crc32(kind.encode())  # each kind has identities of its own
                for n in range(first, first + 3):
                    nursery.start_soon(again, PEERS[kind], n)


if __name__ == "__main__":
    trio.run(main)
