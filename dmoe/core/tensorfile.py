"""The header of a safetensors file, strictly: what is in it, and where. Pure; the bytes are a stranger's.

Owns: every rule that a header must keep. Does not own: which types of numbers are wanted (the caller names them), the
file.

Rules: no key twice; names of 1 to 512 characters; at most :data:`TENSORS_MAX` tensors of at most :data:`RANK_MAX`
dimensions; sizes and places are whole numbers that are not negative; a tensor of a known type fills exactly its bytes;
tensors follow one another without gap or overlap and end where the file ends (so no byte is without an owner).

Fails with ValueError naming the rule and the tensor.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TENSORS_MAX = 1 << 18
RANK_MAX = 8
NAME_CHARACTERS_MAX = 512
_NUMBER_MAX = 1 << 44
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: bytes ``begin`` to ``end`` behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header_size(first: bytes, file_bytes: int, most: int) -> int:
    """How long the header is that these 8 bytes announce. Raises ValueError."""
    size = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= size <= most or 8 + size > file_bytes:
        raise ValueError(f"truncated, or not a safetensors file: a header of {size} bytes is impossible")
    return size


def parse(header: bytes, data_bytes: int, item_bytes: Mapping[str, int]) -> dict[str, Entry]:
    """The tensors of a header with ``data_bytes`` behind it. ``item_bytes``: of the types that are known; one that is
    not is passed on with its place checked."""
    try:
        values = json.loads(header, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("the header is not JSON in UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the header is not JSON: {error.msg}") from error
    if not isinstance(values, dict):
        raise ValueError("the header is not an object")
    if len(values) > TENSORS_MAX:
        raise ValueError(f"the header names {len(values)} tensors, more than {TENSORS_MAX}")
    found = {name: _entry(name, value, item_bytes) for name, value in values.items() if name != _METADATA}
    _check_places(found, data_bytes)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1) if len(names) < 1000 else "a name"
        raise ValueError(f"the header holds {twice[:80]!r} twice")
    return found


def _entry(name: str, value: Any, item_bytes: Mapping[str, int]) -> Entry:  # noqa: ANN401 - any JSON
    shown = repr(name[:80])
    if not 0 < len(name) <= NAME_CHARACTERS_MAX:
        raise ValueError(f"tensor {shown}: a name has 1 to {NAME_CHARACTERS_MAX} characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown} is described wrongly")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise ValueError(f"tensor {shown} is described wrongly")
    if len(shape) > RANK_MAX:
        raise ValueError(f"tensor {shown} has {len(shape)} dimensions")
    if not all(type(number) is int and 0 <= number <= _NUMBER_MAX for number in (*shape, *offsets)):
        raise ValueError(f"tensor {shown} has an impossible shape or place")
    begin, end = offsets
    if end < begin:
        raise ValueError(f"tensor {shown} ends before it begins")
    if dtype in item_bytes and end - begin != math.prod(shape) * item_bytes[dtype]:
        raise ValueError(f"tensor {shown} does not fit its bytes")
    return Entry(dtype, tuple(shape), begin, end)


def _check_places(found: Mapping[str, Entry], data_bytes: int) -> None:
    at = 0
    for name, entry in sorted(found.items(), key=lambda each: (each[1].begin, each[1].end)):
        if entry.end > data_bytes:
            raise ValueError(f"tensor {name[:80]!r} lies outside the file")
        if entry.begin != at:
            what = "overlaps another one" if entry.begin < at else "leaves a gap before it"
            raise ValueError(f"tensor {name[:80]!r} {what}")
        at = entry.end
    if at != data_bytes:
        raise ValueError(f"{data_bytes - at} bytes behind the last tensor belong to none")
