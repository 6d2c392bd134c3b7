"""Lines with delay between processes of one machine: a TCP proxy that holds every byte back for a while.

Not a benchmark. Arguments: delay each way in ms, then ``port=target port`` for each line, all on 127.0.0.1. Whoever
dials ``port`` talks to ``target port``, both ways late by the delay. Ends when its standard input closes.
"""

import sys
from collections import deque
from functools import partial

import trio

CHUNK_BYTES = 1 << 16
WAITING_MAX = 4096
"""Chunks on one line: what the sender's socket holds back beyond."""


async def carry(source: trio.SocketStream, sink: trio.SocketStream, delay_s: float) -> None:
    """One direction of one connection."""
    waiting: deque[tuple[float, bytes]] = deque()
    moved = trio.Event()
    ended = False

    async def take() -> None:
        nonlocal moved, ended
        async for data in source:
            waiting.append((trio.current_time() + delay_s, data))
            moved.set()
            while len(waiting) > WAITING_MAX:  # noqa: ASYNC110 - rare, and nothing else would wake it
                await trio.sleep(delay_s / 10)
        ended = True
        moved.set()

    async def give() -> None:
        nonlocal moved
        while waiting or not ended:
            if not waiting:
                await moved.wait()
                moved = trio.Event()
                continue
            due, data = waiting.popleft()
            await trio.sleep_until(due)
            await sink.send_all(data)
        await sink.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        nursery.start_soon(give)


async def connect(stream: trio.SocketStream, port: int, delay_s: float) -> None:
    """One connection, until either side is gone."""
    stream.setsockopt(6, 1, 1)  # TCP_NODELAY
    try:
        async with stream, await trio.open_tcp_stream("127.0.0.1", port) as target, trio.open_nursery() as nursery:
            target.setsockopt(6, 1, 1)
            nursery.start_soon(carry, stream, target, delay_s)
            nursery.start_soon(carry, target, stream, delay_s)
    except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # either end closed the line


async def main(delay_ms: float, lines: list[str]) -> None:
    """Carry until standard input closes."""
    async with trio.open_nursery() as nursery:
        for line in lines:
            port, target = map(int, line.split("="))
            handler = partial(connect, port=target, delay_s=delay_ms / 1000)
            await nursery.start(partial(trio.serve_tcp, handler, port, host="127.0.0.1"))
        print("up", flush=True)  # whoever started it waits for this
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, float(sys.argv[1]), sys.argv[2:])
