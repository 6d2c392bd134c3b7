"""What a lane's handshake messages carry, encrypted: libp2p's Noise payload, and an offer of ours beside it.

The libp2p part is the protobuf of https://github.com/libp2p/specs/tree/master/noise (identity_key 1, identity_sig 2);
the offer is a small msgpack map in field :data:`OFFER_FIELD`. Unknown fields and unknown keys are skipped, so that
later versions can say more.

Invariants:
1. Hostile bytes only ever raise IntegrityError (``protocol``).
2. Only Ed25519 keys in the prime-order group, only signatures over exactly this static key are accepted.
"""

from collections.abc import Mapping
from typing import Any

from config.errors import IntegrityError
from config.vocabulary import PeerId
from p2p.core import headers
from p2p.core.identity import Identity, peer_id_of, verify

SIGNED = b"noise-libp2p-static-key:"
IDENTITY_KEY, IDENTITY_SIG, OFFER_FIELD = 1, 2, 100
PAYLOAD_BYTES_MAX = 4096
# libp2p's PublicKey protobuf: Type 1 = Ed25519, Data = 32 bytes
_KEY_PREFIX = b"\x08\x01\x12\x20"


def encode(identity: Identity, static_key: bytes, offer: Mapping[str, Any]) -> bytes:
    """The payload in which ``identity`` vouches for its Noise static key (32 bytes)."""
    return b"".join(
        (
            _field(IDENTITY_KEY, _KEY_PREFIX + identity.public_key),
            _field(IDENTITY_SIG, identity.sign(SIGNED, static_key)),
            _field(OFFER_FIELD, headers.pack(offer)),
        )
    )


def decode(data: bytes, static_key: bytes) -> tuple[PeerId, dict[str, Any]]:
    """Who vouches for this static key, and the offer."""
    fields = _fields(data)
    key, signature = fields.get(IDENTITY_KEY, b""), fields.get(IDENTITY_SIG, b"")
    if not key.startswith(_KEY_PREFIX) or len(key) != len(_KEY_PREFIX) + 32:
        raise IntegrityError("protocol", "lane: the peer's identity is not an Ed25519 key")
    public_key = key[len(_KEY_PREFIX) :]
    if not verify(public_key, SIGNED, static_key, signature):
        raise IntegrityError("protocol", "lane: the identity's signature over the handshake key is wrong")
    offer = fields.get(OFFER_FIELD)
    return peer_id_of(public_key), headers.unpack(offer) if offer else {}


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(data: bytes) -> dict[int, bytes]:
    """Length-delimited fields by number; varint fields are skipped, the rest is refused."""
    found: dict[int, bytes] = {}
    at = 0
    if len(data) > PAYLOAD_BYTES_MAX:
        raise IntegrityError("too_large", f"lane: a handshake payload of {len(data)} bytes")
    while at < len(data):
        tag, at = _read_varint(data, at)
        size, at = _read_varint(data, at)
        if tag & 7 == 2:
            if size > len(data) - at:
                raise IntegrityError("protocol", "lane: a handshake payload that is cut off")
            found[tag >> 3] = data[at : at + size]
            at += size
        elif tag & 7 != 0:
            raise IntegrityError("protocol", f"lane: wire type {tag & 7} in a handshake payload")
    return found


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IntegrityError("protocol", "lane: a handshake payload with a broken number")
