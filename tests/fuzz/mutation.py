"""Ways to spoil bytes and values; all choices come from one seeded generator, so that every input can be made again."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

EDGES = (0, 1, 2, 3, 15, 16, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 1 << 24, (1 << 31) - 1, 1 << 31)
EDGES_32 = (*EDGES, (1 << 32) - 2, (1 << 32) - 1)
EDGES_64 = (*EDGES_32, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
TEXTS = (
    "",
    "a",
    "\0",
    "é",
    "𝄞" * 3,
    "/ip4/127.0.0.1/tcp/1",
    "x" * 255,
    "x" * 256,
    "x" * 257,
    "\ud7ff",
    "../..",
    "m" * 64,
)
# msgpack that claims far more than it carries, nests deeply, or is no map
LIES = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\x91" * 2000,
    b"\x81\xa1a" * 1500,
    b"\xc1",
    b"\x82\xa1a\x01\xa1a\x02",
    b"\x81\x01\x02",
    b"\xd9\x02\xff\xfe",
)


def number(random: Random, edges: Sequence[int], below: int) -> int:
    """A small, an odd or any number below ``below``."""
    pick = random.random()
    if pick < 0.5:
        return random.choice(edges) % below
    return random.randrange(min(below, 64)) if pick < 0.8 else random.randrange(below)


def text(random: Random) -> str:
    """A short odd text."""
    if random.random() < 0.5:
        return random.choice(TEXTS)
    return "".join(
        chr(random.choice((random.randrange(32, 127), random.randrange(0xD800)))) for _ in range(random.randrange(9))
    )


def value(random: Random, depth: int = 3) -> Any:
    """Any value that msgpack can carry."""
    kind = random.randrange(10 if depth else 7)
    if kind == 0:
        return None
    if kind == 1:
        return random.random() < 0.5
    if kind == 2:
        return number(random, EDGES_64, 1 << 64)
    if kind == 3:
        return -number(random, EDGES, 1 << 63)
    if kind == 4:
        return random.choice((0.0, -1.5, float("inf"), float("nan"), 1e308))
    if kind == 5:
        return text(random)
    if kind == 6:
        return random.randbytes(random.choice((0, 1, 5, 32, 64, 300)))
    if kind < 9:
        return [value(random, depth - 1) for _ in range(random.randrange(4))]
    return {text(random): value(random, depth - 1) for _ in range(random.randrange(4))}


def spoil(random: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """``data`` after one to four small accidents."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        random.choice(_ACCIDENTS)(random, out, others)
    return bytes(out)


def _flip(random: Random, out: bytearray, _others: Sequence[bytes]) -> None:
    if out:
        out[random.randrange(len(out))] ^= 1 << random.randrange(8)


def _byte(random: Random, out: bytearray, _others: Sequence[bytes]) -> None:
    if out:
        out[random.randrange(len(out))] = random.choice((0, 1, 0x7F, 0x80, 0xC1, 0xDD, 0xFF, random.randrange(256)))


def _word(random: Random, out: bytearray, _others: Sequence[bytes]) -> None:
    size = random.choice((2, 4, 8))
    at = random.randrange(len(out) + 1)
    out[at : at + size] = number(random, EDGES_64, 1 << 8 * size).to_bytes(size, "big")


def _cut(random: Random, out: bytearray, _others: Sequence[bytes]) -> None:
    del out[random.randrange(len(out) + 1) :]


def _drop(random: Random, out: bytearray, _others: Sequence[bytes]) -> None:
    at = random.randrange(len(out) + 1)
    del out[at : at + random.randrange(1, 17)]


def _insert(random: Random, out: bytearray, _others: Sequence[bytes]) -> None:
    at = random.randrange(len(out) + 1)
    out[at:at] = random.choice((random.randbytes(random.randrange(1, 33)), random.choice(LIES)))


def _repeat(random: Random, out: bytearray, _others: Sequence[bytes]) -> None:
    at = random.randrange(len(out) + 1)
    out[at:at] = out[at : at + random.randrange(1, 65)]


def _splice(random: Random, out: bytearray, others: Sequence[bytes]) -> None:
    if others:
        other = random.choice(others)
        at = random.randrange(len(other) + 1)
        out[random.randrange(len(out) + 1) :] = other[at:]


_ACCIDENTS: tuple[Callable[[Random, bytearray, Sequence[bytes]], None], ...] = (
    _flip,
    _flip,
    _byte,
    _word,
    _word,
    _cut,
    _drop,
    _insert,
    _repeat,
    _splice,
)


def split(random: Random, data: bytes) -> list[bytes]:
    """``data`` in parts, as a socket might hand them out."""
    how = random.random()
    if how < 0.5 or len(data) < 2:
        return [data]
    if how < 0.6 and len(data) < 200:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted(random.randrange(len(data) + 1) for _ in range(random.randrange(1, 5)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
