"""A hostile HTTP client: attacks a gateway until its time is over.

Not a test. Arguments: attack, host, port, seconds, an API key ("" for none), its own address. Prints "begin" once it
attacks, at the end what it was answered, as JSON (status or how the connection ended -> times).
"""

import gzip
import json
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable

import trio

KIND, HOST, PORT, SECONDS, KEY = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
SOURCE = sys.argv[6]
SOCKETS = 300
TOLD: Counter[str] = Counter()


def head(*more: str, path: str = "/v1/chat/completions", key: str = KEY) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: test", f"authorization: Bearer {key}", "content-type: application/json"]
    return "\r\n".join([*lines, *more, "", ""]).encode()


async def dial() -> trio.SocketStream:
    made = trio.socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await made.bind((SOURCE, 0))
    await made.connect((HOST, PORT))
    return trio.SocketStream(made)


async def hear(stream: trio.SocketStream) -> None:
    """Count what comes."""
    try:
        said = await stream.receive_some(65536)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        TOLD["reset"] += 1
        return
    TOLD[said.split(b" ", 2)[1].decode() if said.startswith(b"HTTP/") else "closed"] += 1


async def drip(first: bytes, then: bytes, pause_s: float) -> None:
    """Say the beginning, then a byte from time to time."""
    stream = await dial()
    async with stream, trio.open_nursery() as nursery:

        async def listen() -> None:
            await hear(stream)
            nursery.cancel_scope.cancel()

        await stream.send_all(first)
        nursery.start_soon(listen)
        for n in range(len(then)):
            await stream.send_all(then[n : n + 1])
            await trio.sleep(pause_s)


async def whole(data: bytes) -> None:
    """Say everything at once, hear the answer."""
    async with await dial() as stream:
        await stream.send_all(data)
        await hear(stream)


async def never_read() -> None:
    """Ask for a long stream and read none of it."""
    question = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "stream": True}
    body = json.dumps(question).encode()
    async with await dial() as stream:
        await stream.send_all(head(f"content-length: {len(body)}") + body)
        await trio.sleep(1.0)


def posted(body: bytes, *more: str) -> bytes:
    return head(f"content-length: {len(body)}", *more) + body


BOMB = gzip.compress(bytes(20 << 20), 9)
DEEP = b'{"model": "tiny", "messages": ' + b"[" * 500_000
ATTACKS: dict[str, Callable[[], Awaitable[None]]] = {
    "silent": lambda: drip(b"", b"", 1.0),
    "slow_head": lambda: drip(b"POST /v1/chat/completions HTTP/1.1\r\nx-a: ", b"a" * 1000, 0.2),
    "slow_body": lambda: drip(head("content-length: 100000"), b" " * 1000, 0.2),
    "slow_chunks": lambda: drip(head("transfer-encoding: chunked"), b"1\r\n \r\n" * 1000, 0.2),
    "half_body": lambda: drip(head("content-length: 4000000") + b" " * 3_900_000, b" " * 1000, 0.2),
    "huge_length": lambda: whole(head("content-length: 1000000000000000") + b"{" * 1000),
    "huge_chunk": lambda: whole(head("transfer-encoding: chunked") + b"FFFFFFFFFFFF\r\n" + b"{" * 1000),
    "huge_head": lambda: whole(b"GET / HTTP/1.1\r\nx: " + b"a" * (1 << 20)),
    "gzip_bomb": lambda: whole(posted(BOMB, "content-encoding: gzip")),
    "deep_json": lambda: whole(posted(DEEP)),
    "never_read": never_read,
}


async def again(attack: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await attack()
        except* OSError:
            TOLD["refused"] += 1
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            TOLD["reset"] += 1
        await trio.sleep(0.1)


async def main() -> None:
    with trio.move_on_after(SECONDS):
        async with trio.open_nursery() as nursery:
            print("begin", flush=True)
            quiet = KIND.startswith(("silent", "slow", "half"))
            for _ in range(SOCKETS if quiet and KIND != "half_body" else 40 if quiet else 8):
                nursery.start_soon(again, ATTACKS[KIND])
                await trio.sleep(0.002)
    print(json.dumps(TOLD), flush=True)


if __name__ == "__main__":
    trio.run(main)
