"""Private swarms: the key that its members share, and the invite that hands it on as one line of text.

Owns the two records and their bytes. Does not own: files (``p2p/swarmfile``), what the key does (``p2p/secure``).

An invite is ``rios1-`` and base64url: blocks of :data:`BLOCK_DATA` bytes, each with :data:`CHECK_BYTES` of
``sha256(tag || block number || data)``, so that a mistyped or lost character is named by its place. Line breaks and
spaces in it do not count.

Invariants:
1. The key stands in no ``repr``, no error message and no public name: :attr:`Swarm.id` is a hash of it.
2. What is read is bounded, checked block by block, and canonical.
"""

import base64
import binascii
import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated

import msgspec
from msgspec import Meta

from config.errors import ConfigError, IntegrityError
from p2p.core import codec

KEY_BYTES = 32
SEEDS_MAX = 32
NAME_CHARS_MAX = 64
GENESIS_BYTES_MAX = 64 << 10
INVITE_CHARS_MAX = 128 << 10
PREFIX = "rios1-"
BLOCK_DATA, CHECK_BYTES = 21, 3
BLOCK_CHARS = 4 * (BLOCK_DATA + CHECK_BYTES) // 3
_ID_TAG, _CHECK_TAG = b"rios/swarm/1\0", b"rios/invite/1\0"
_HINT = "ask for the invite again, and copy all of it; it begins with " + PREFIX


@dataclass(frozen=True, slots=True)
class Swarm:
    """A private swarm as a member knows it. ``seeds``: multiaddrs with ``/p2p/...`` to join through; ``allow``: whom
    this member admits (empty: everybody who has the key), which is its own affair and in no invite."""

    key: bytes = field(repr=False)
    name: str = ""
    seeds: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Tells swarms apart without telling the key: 16 hex digits."""
        return sha256(_ID_TAG + self.key).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Invite:
    """What a new member gets: the swarm, and the genesis file of its ledger (its bytes, empty if it has none)."""

    swarm: Swarm
    genesis: bytes = b""


class _Body(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    version: int
    key: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    name: Annotated[str, Meta(max_length=NAME_CHARS_MAX)]
    seeds: Annotated[tuple[Annotated[str, Meta(max_length=256)], ...], Meta(max_length=SEEDS_MAX)]
    genesis: Annotated[bytes, Meta(max_length=GENESIS_BYTES_MAX)]


def dumps(invite: Invite) -> str:
    """The invite as text."""
    swarm = invite.swarm
    body = codec.encode(_Body(1, swarm.key, swarm.name, swarm.seeds, invite.genesis))
    count = -(-len(body) // BLOCK_DATA)
    blocks = []
    for index in range(count):
        data = body[index * BLOCK_DATA : (index + 1) * BLOCK_DATA]
        blocks.append(data + _check(index, count, data))
    return PREFIX + base64.urlsafe_b64encode(b"".join(blocks)).decode().rstrip("=")


def loads(text: str) -> Invite:
    """The invite in a text. Raises ConfigError that says what is wrong with it, and where; never with a part of it."""
    text = "".join(text.split())
    if not text.startswith(PREFIX):
        number = re.match(r"rios(\d+)-", text)
        if number:
            raise _wrong(f"it is of version {number[1]}, which this program does not know", "use a newer rios")
        raise _wrong(f"it does not begin with {PREFIX}", _HINT)
    if len(text) > INVITE_CHARS_MAX:
        raise _wrong(f"it is longer than {INVITE_CHARS_MAX} characters", _HINT)
    body = _body(text[len(PREFIX) :])
    try:
        read = codec.decode(_Body, body, bytes_max=INVITE_CHARS_MAX)
    except IntegrityError as error:
        raise _wrong("its checksums are right, its content is not", "use a newer rios, or ask again") from error
    if read.version != 1:
        raise _wrong(f"its content is of version {read.version}", "use a newer rios")
    return Invite(Swarm(read.key, read.name, read.seeds), read.genesis)


def _body(text: str) -> bytes:
    odd = re.search(r"[^A-Za-z0-9_-]", text)
    if odd:
        raise _wrong(f"character {len(PREFIX) + odd.start() + 1} is {odd[0]!r}, which no invite has", _HINT)
    count = -(-len(text) // BLOCK_CHARS)
    data = []
    for index in range(count):
        piece = text[index * BLOCK_CHARS : (index + 1) * BLOCK_CHARS]
        try:
            block = base64.urlsafe_b64decode(piece + "=" * (-len(piece) % 4))
        except binascii.Error:
            block = b""
        data.append(block[:-CHECK_BYTES])
        if len(block) <= CHECK_BYTES or block[-CHECK_BYTES:] != _check(index, count, data[-1]):
            raise _mistyped(text, index, count)
    return b"".join(data)


def _mistyped(text: str, index: int, count: int) -> ConfigError:
    """Say where: in this block, or, if it would be right in an invite of another length, that some is missing."""
    first = len(PREFIX) + index * BLOCK_CHARS + 1
    last = min(first + BLOCK_CHARS - 1, len(PREFIX) + len(text))
    if index == 0 and count > 1:
        block = base64.urlsafe_b64decode(text[:BLOCK_CHARS])
        lengths = range(1, 4 * count + 64)
        if any(block[-CHECK_BYTES:] == _check(0, other, block[:-CHECK_BYTES]) for other in lengths):
            return _wrong(f"it is cut short or has text too many: {len(PREFIX) + len(text)} characters came", _HINT)
    return _wrong(f"there is a typing error between characters {first} and {last}", _HINT)


def _check(index: int, count: int, data: bytes) -> bytes:
    return sha256(_CHECK_TAG + index.to_bytes(4, "big") + count.to_bytes(4, "big") + data).digest()[:CHECK_BYTES]


def _wrong(what: str, hint: str) -> ConfigError:
    return ConfigError("usage", f"this is no invite as `rios swarm invite` prints it: {what}", hint)
