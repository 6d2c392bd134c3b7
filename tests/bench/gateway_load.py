"""Streams at the same time, each on a connection of its own. Arguments: PORT KEY CALLERS TOTAL [SECONDS].

TOTAL streams by so many callers; with SECONDS every caller asks again until they are over. Prints one JSON object:
streams that ended with [DONE], their number per second, milliseconds to the first piece and to the end, and the pieces
that the slowest and the fastest caller got.
"""

import json
import sys
import time

import trio

PORT, KEY, CALLERS, TOTAL = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
SECONDS = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
BODY = json.dumps({"model": "stream", "stream": True, "messages": [{"role": "user", "content": "hello"}]}).encode()
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    f"authorization: Bearer {KEY}\r\ncontent-length: {len(BODY)}\r\n\r\n"
).encode()


class Found:
    def __init__(self) -> None:
        self.first_ms: list[float] = []
        self.whole_ms: list[float] = []
        self.broken = 0
        self.pieces = [0] * CALLERS


async def stream(found: Found, caller: int) -> None:
    began, first, tail = time.perf_counter(), None, b""
    try:
        async with await trio.open_tcp_stream("127.0.0.1", PORT) as connection:
            await connection.send_all(HEAD + BODY)
            async for data in connection:
                pieces = data.count(b"data: ")
                if pieces and first is None:
                    first = time.perf_counter() - began
                found.pieces[caller] += pieces
                tail = (tail + data)[-60:]
                if b"[DONE]" in tail:
                    break
    except OSError:
        tail = b""
    if b"[DONE]" not in tail or first is None:
        found.broken += 1
        return
    found.first_ms.append(first * 1000)
    found.whole_ms.append((time.perf_counter() - began) * 1000)


async def caller(found: Found, number: int, ends: float) -> None:
    left = TOTAL // CALLERS
    while time.perf_counter() < ends if SECONDS else left > 0:
        await stream(found, number)
        left -= 1


def at(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) if ordered else -1.0


async def main() -> None:
    found, began = Found(), time.perf_counter()
    async with trio.open_nursery() as nursery:
        for number in range(CALLERS):
            nursery.start_soon(caller, found, number, began + SECONDS)
    spent = time.perf_counter() - began
    done = len(found.whole_ms)
    print(
        json.dumps(
            {
                "streams": done,
                "broken": found.broken,
                "streams_per_s": round(done / spent, 1),
                "first_ms_p50": at(found.first_ms, 0.5),
                "first_ms_p99": at(found.first_ms, 0.99),
                "whole_ms_p50": at(found.whole_ms, 0.5),
                "whole_ms_p99": at(found.whole_ms, 0.99),
                "pieces_min": min(found.pieces),
                "pieces_max": max(found.pieces),
            }
        )
    )


trio.run(main)
