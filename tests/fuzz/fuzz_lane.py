"""Hostile bytes against a direct lane: records (as a peer with the right key, and as somebody on the way), and the
handshake's payload and preamble.

The lane is the real one on a socket pair (not trio's: no loop runs here); its doors are a fake that counts. What a lane
delivers must be what was sealed, in order; whatever else comes ends it, with nothing left over.
"""

import socket
from random import Random
from types import SimpleNamespace
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from config.errors import IntegrityError
from config.vocabulary import PeerId
from p2p.core import payload
from p2p.core.addresses import parse
from p2p.core.records import HEAD_BYTES, RECORD_BYTES_MAX, Key
from p2p.handshake import Secured
from p2p.lane import Lane, Scratch
from p2p.lanechannel import WINDOW_BYTES
from p2p.pace import NO_LIMITS
from tests.fuzz.fuzz_adverts import IDENTITIES
from tests.fuzz.mutation import EDGES_32, number, split, spoil, text

PEER = PeerId(IDENTITIES[0].peer_id)
SCRATCH = Scratch()
SEAL_ROOM = memoryview(bytearray(HEAD_BYTES + RECORD_BYTES_MAX + 16))
RECORDS_MAX = 30
HANDSHAKES = 10


class _Plain:
    """What a lane needs of a trio socket outside its reader."""

    def __init__(self, inner: socket.socket) -> None:
        self.fileno, self.close = inner.fileno, inner.close

    def setsockopt(self, *_option: int) -> None:
        return

    def getpeername(self) -> tuple[str, int]:
        return "203.0.113.7", 4701


class _Ends:
    """A lane, and the key of the peer at its other end."""

    def __init__(self, random: Random) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        near: Any = _Plain(self.near)
        key = random.randbytes(32)
        nothing = lambda *_: None  # noqa: E731
        self.visit = SimpleNamespace(on_hang_up=nothing, leave=nothing, blame=nothing)
        self.blamed: list[str] = []
        secured = Secured(PEER, "ChaCha20-Poly1305", ChaCha20Poly1305(random.randbytes(32)), ChaCha20Poly1305(key))
        visit: Any = self.visit
        self.lane = Lane(
            near,
            secured,
            visit,
            SCRATCH,
            NO_LIMITS,
            outbound=False,
            spawn=lambda task: None,
            frame_bytes_max=1 << 16,
            blame=lambda peer, fault: self.blamed.append(fault),
        )
        self.got = bytearray()
        for channel in (self.lane.main, self.lane.bulk):
            channel.open(self.got.extend, lambda: None)
        self.key = Key(ChaCha20Poly1305(key))

    def close(self) -> None:
        self.lane.fail("over")
        self.near.close()
        self.far.close()


def _records(random: Random, ends: _Ends) -> int:
    sent, spoilt = 0, False
    expected = bytearray()
    hostility = random.choice((0.05, 0.3, 0.8))
    while sent < RECORDS_MAX and not ends.lane.closed:
        sent += 1
        kind = random.choice((0, 0, 0, 1, 2, 3))
        plain = random.randbytes(random.choice((0, 1, 4, 100, 5000)))
        if kind >= 2:
            plain = number(random, EDGES_32, 1 << 32).to_bytes(4, "big")
        if random.random() < hostility:
            kind = random.choice((kind, 4, 7, 127, 128, 255))
            plain = random.choice((plain, plain[:3], random.randbytes(RECORD_BYTES_MAX // 64)))
        record = bytes(ends.key.seal(kind, plain, SEAL_ROOM))
        if random.random() < hostility / 2:
            damaged = spoil(random, record, (record,))
            spoilt = spoilt or damaged != record
            record = damaged
        if kind < 2 and not spoilt:
            expected += plain
        for part in split(random, record):
            _feed(ends, part)
    if not spoilt:
        assert expected.startswith(ends.got)
    assert len(ends.got) <= 2 * (WINDOW_BYTES + (1 << 18))
    assert len(ends.lane._partial) <= HEAD_BYTES + RECORD_BYTES_MAX + 16
    assert len(ends.lane._head) < HEAD_BYTES
    return sent


def _feed(ends: _Ends, part: bytes) -> None:
    """What the lane's reader does with bytes that came."""
    if part and not ends.lane.closed:
        ends.far.sendall(part)
        left = len(part)
        while left > 0 and not ends.lane.closed:
            left -= ends.lane._read()[0]


def _handshake(random: Random) -> None:
    """The payload of the handshake's messages, and the address parser that dials."""
    static = random.randbytes(32)
    good = payload.encode(random.choice(IDENTITIES), static, {"aes": True})
    try:
        peer_id, offer = payload.decode(spoil(random, good, (good,)), static)
    except IntegrityError:
        pass
    else:
        assert peer_id in {identity.peer_id for identity in IDENTITIES}
        assert isinstance(offer, dict)
    address = spoil(random, f"/ip4/127.0.0.1/tcp/4701/p2p/{PEER}".encode()).decode(errors="replace")
    for candidate in (address, text(random)):
        parsed = parse(candidate)
        assert parsed is None or 0 <= parsed.port < 1 << 16


def run(random: Random) -> int:
    """One lane and some handshakes: the number of records and payloads."""
    ends = _Ends(random)
    try:
        done = _records(random, ends)
    finally:
        ends.close()
    for _ in range(HANDSHAKES):
        _handshake(random)
    return done + HANDSHAKES
