"""Mutated adverts against :func:`p2p.core.advert.open_advert` and a real directory's :meth:`offer`.

Some are spoiled bytes (nearly all fail at the form or the signature), some are signed by their node as they should be
but say absurd things: those reach the rules behind the signature. The directory stays inside its bounds and keeps only
what is valid.
"""

import time
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec

from config.errors import IntegrityError
from p2p import directory as directories
from p2p.core import advert as adverts
from p2p.core import codec
from p2p.core.advert import Advert, Gpu, Hardware, ModelOffer
from p2p.core.identity import Identity
from p2p.directory import PeerDirectory
from tests.fuzz.mutation import EDGES_64, number, spoil, text, value

IDENTITIES = [Identity.from_seed(n.to_bytes(32, "big")) for n in range(1, 33)]
ME = Identity.from_seed(b"m" * 32)
EPISODE = 50


def make_directory() -> PeerDirectory:
    """The real one, on a host and a caller that do nothing."""
    host: Any = SimpleNamespace(accept_records=lambda *_: None, learn=lambda *_: None)
    caller: Any = SimpleNamespace(peers=lambda: (), is_linked=lambda _: False)
    return PeerDirectory(ME, host, caller, Advert(ME.peer_id, 0, 0), advert_seconds=60)


VIEW = make_directory()
_valid: list[bytes] = []


def valid(random: Random, now_ms: int) -> Advert:
    """An advert as a node would send it."""
    identity = random.choice(IDENTITIES)
    shards = random.randbytes(random.randrange(1, 9))
    return Advert(
        identity.peer_id,
        now_ms - random.randrange(1000),
        now_ms + 2 * 3600_000,
        addresses=("/ip4/127.0.0.1/tcp/4701",),
        version="0.1.0",
        hardware=Hardware("cpu", 4, 1 << 34, (Gpu("gpu", 1 << 33),), 1000, 1000),
        models=(ModelOffer("a" * 64, shards, 1, 2, 3),),
    )


def signed(identity: Identity, body: bytes) -> bytes:
    """An envelope around any body, with a good signature."""
    return codec.encode([body, identity.sign(adverts.TAG, body)])


def _spoil_fields(random: Random, fields: list[Any]) -> None:
    """Put something odd somewhere into the nested lists."""
    at = random.randrange(len(fields) + 1)
    if at == len(fields):
        fields.extend(value(random) for _ in range(random.choice((1, 1, 200))))
        return
    inner = fields[at]
    if isinstance(inner, list) and inner and random.random() < 0.6:
        _spoil_fields(random, inner)
        return
    how = random.random()
    if how < 0.55 and inner is not None:
        fields[at] = _alike(random, inner)
    elif how < 0.65:
        fields[at] = value(random)
    elif how < 0.7:
        fields[at] = number(random, EDGES_64, 1 << 64)
    elif how < 0.8:
        fields[at] = text(random)
    elif how < 0.9:
        fields[at] = [inner] * random.choice((2, 17, 65, 300))
    else:
        del fields[at:]


def _alike(random: Random, inner: Any) -> Any:
    """Another value of the same type."""
    if isinstance(inner, bool):
        return not inner
    if isinstance(inner, int):
        return random.choice(
            (number(random, EDGES_64, 1 << 63), (inner + random.choice((-1, 1, 3600_000, 1 << 40))) % (1 << 64))
        )
    if isinstance(inner, str):
        return random.choice(
            (text(random), inner + text(random), spoil(random, inner.encode()).decode(errors="replace"))
        )
    if isinstance(inner, bytes):
        return spoil(random, inner)
    if not isinstance(inner, list):
        return value(random)
    return inner[: random.randrange(len(inner) + 1)] * random.choice((1, 2))


def _next(random: Random, now_ms: int) -> bytes:
    advert = valid(random, now_ms)
    identity = next(each for each in IDENTITIES if each.peer_id == advert.peer_id)
    pick = random.random()
    if pick < 0.35:
        data = random.choice(_valid) if _valid and random.random() < 0.9 else adverts.sign(identity, advert).data
        if len(_valid) < 64:
            _valid.append(data)
        return spoil(random, data, _valid)
    if pick < 0.85:
        fields = msgspec.msgpack.decode(msgspec.msgpack.encode(advert))
        for _ in range(random.choice((1, 1, 2, 5))):
            _spoil_fields(random, fields)
        return signed(identity, msgspec.msgpack.encode(fields))
    if pick < 0.95:
        return signed(random.choice(IDENTITIES), spoil(random, codec.encode(advert)))
    return adverts.sign(identity, advert).data


def run(random: Random) -> int:
    """One episode: the number of adverts."""
    # the clock may not decide what happens: seconds of today, so that a seed shows the same again
    now_ms = int(time.time()) // 3600 * 3600_000
    for _ in range(EPISODE):
        data = _next(random, now_ms)
        try:
            opened = adverts.open_advert(data, now_ms=now_ms)
        except IntegrityError:
            opened = None
        else:
            assert opened.advert.expires_ms > now_ms
            assert opened.data == data
        try:
            VIEW.offer(data)
        except IntegrityError:
            assert opened is None or opened.advert.expires_ms <= directories.now_ms()
    assert len(VIEW.adverts()) <= len(IDENTITIES) + 1
    return EPISODE
