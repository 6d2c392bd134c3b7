"""Headers of calls: small msgpack maps.

Invariants:
1. A header is a map with string keys, at most :data:`HEADER_BYTES_MAX` long.
2. Decoding hostile bytes only ever raises :class:`IntegrityError`, and allocates no more than the bytes justify: a byte
   can stand for a map of 64, so there may be :data:`PARTS_MAX` maps and lists, or one for :data:`PART_BYTES_MIN` bytes.
"""

from collections.abc import Mapping
from typing import Any

import msgpack  # type: ignore[import-untyped]

from config.errors import IntegrityError, RequestError

HEADER_BYTES_MAX = 1 << 20
PARTS_MAX, PART_BYTES_MIN = 32 << 10, 16

_packb = msgpack.packb
_unpackb = msgpack.unpackb


def pack(header: Mapping[str, Any]) -> bytes:
    """The bytes of a header. Raises RequestError (``too_large``, ``invalid_request``) for one that cannot travel."""
    try:
        data: bytes = _packb(header if isinstance(header, dict) else dict(header))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError("invalid_request", f"this header cannot be sent: {error}") from error
    if len(data) > HEADER_BYTES_MAX:
        raise RequestError("too_large", f"a header of {len(data)} bytes exceeds the limit of {HEADER_BYTES_MAX}")
    if len(data) > PARTS_MAX:  # nobody would take one of too many parts, and its sender would be blamed
        try:
            unpack(data)
        except IntegrityError as error:
            raise RequestError("too_large", error.message) from error
    return data


def unpack(data: bytes | memoryview) -> dict[str, Any]:
    """The header in ``data``."""
    size = len(data)
    count = None if size <= PARTS_MAX else _Counter(max(PARTS_MAX, size // PART_BYTES_MIN))
    try:
        header = _unpackb(
            data,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=size,
            max_map_len=size // 2,
            max_ext_len=0,
            object_hook=count,
            list_hook=count,
        )
    except (ValueError, TypeError, RecursionError, MemoryError, msgpack.exceptions.UnpackException) as error:
        raise IntegrityError("protocol", f"malformed header: {error}") from error
    if type(header) is not dict:
        raise IntegrityError("protocol", "a header must be a map")
    return header


class _Counter:
    """Counts the maps and lists of a header. Raises ValueError for one too many."""

    __slots__ = ("_left",)

    def __init__(self, left: int) -> None:
        self._left = left

    def __call__(self, part: Any) -> Any:  # noqa: ANN401 - passed on
        self._left -= 1
        if self._left < 0:
            raise ValueError("too many maps and lists for its size")
        return part
