"""Canonical msgpack: one value, one encoding.

Signed bodies are typed array structs (``msgspec.Struct`` with ``array_like=True, forbid_unknown_fields=True``).
They are decoded, encoded again and compared byte for byte: anything non-canonical is refused, so a signed object has
exactly one id.
"""

from hashlib import sha256
from typing import TypeVar

import msgspec

from config.errors import IntegrityError

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[object, msgspec.msgpack.Decoder[object]] = {}


def encode(value: object) -> bytes:
    """The canonical bytes of a typed struct."""
    return _encoder.encode(value)


def decode(kind: type[T], data: bytes, *, bytes_max: int) -> T:
    """The struct of type ``kind`` in ``data``.

    Raises :class:`IntegrityError` if it is longer than ``bytes_max``, not of that type, or not canonical.
    """
    if len(data) > bytes_max:
        raise IntegrityError("too_large", f"{kind.__name__} of {len(data)} bytes exceeds the limit of {bytes_max}")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        value = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError("integrity", f"malformed {kind.__name__}: {error}") from error
    if _encoder.encode(value) != data:
        raise IntegrityError("integrity", f"{kind.__name__} is not in canonical encoding")
    return value  # type: ignore[return-value]


def digest(tag: bytes, body: bytes) -> bytes:
    """``sha256(tag || body)``, the id of a signed object."""
    return sha256(tag + body).digest()
