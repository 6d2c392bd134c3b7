"""Canonical msgpack: one value, one encoding.

Signed bodies are typed array structs (``msgspec.Struct`` with ``array_like=True, forbid_unknown_fields=True``).
They are decoded, encoded again and compared byte for byte: anything non-canonical is refused, so a signed object has
exactly one id. Records that later versions may extend (adverts) have no id, carry a signature over their raw bytes, and
go through :func:`decode_open`.
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
    value = decode_open(kind, data, bytes_max=bytes_max)
    if _encoder.encode(value) != data:
        raise IntegrityError("integrity", f"{kind.__name__} is not in canonical encoding")
    return value


def decode_open(kind: type[T], data: bytes, *, bytes_max: int) -> T:
    """The same without the comparison. What ``kind`` says about unknown fields holds: types that do not forbid them
    skip what a later version appended, and fields that an earlier version lacks take their defaults.

    Raises :class:`IntegrityError` if it is longer than ``bytes_max``, not of that type, or followed by more bytes.
    """
    if len(data) > bytes_max:
        raise IntegrityError("too_large", f"{kind.__name__} of {len(data)} bytes exceeds the limit of {bytes_max}")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(data)  # type: ignore[return-value]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError("integrity", f"malformed {kind.__name__}: {error}") from error


def digest(tag: bytes, body: bytes) -> bytes:
    """``sha256(tag || body)``, the id of a signed object."""
    return sha256(tag + body).digest()
