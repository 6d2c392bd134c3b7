"""Shard files: safetensors, read through a memory map without a copy.

Owns: the bytes of one file. Does not own: what tensors mean, or whether a file is the one its manifest names.

The header of a stranger's file is untrusted: its size, dtypes, shapes and offsets are checked before anything is
mapped (``core/tensorfile``), and what its name leads to before it is opened (``plainfile``). Fails with IntegrityError
naming the file and the tensor.
"""

import errno
import json
import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError, LocalError
from config.vocabulary import MIB
from dmoe.core import tensorfile
from dmoe.plainfile import open_plain

Array = NDArray[Any]

HEADER_BYTES_MAX = 8 * MIB
_ALIGNMENT = 64
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16: these are its bits
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}
_RANK_MAX = 4
_EXPONENTS = {"F32": (0x7F800000, 0x007FFFFF), "F16": (0x7C00, 0x03FF), "BF16": (0x7F80, 0x007F)}
"""Bits of the exponent and of the fraction."""
_SCAN_NUMBERS = 1 << 18
_TINY_MIN = 64
"""So many subnormal numbers are an accident of rounding in any tensor."""


def header(shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> bytes:
    """A file's first bytes, padded so that data starts aligned. The tensors follow in the order given (their sizes are
    multiples of 4, so every tensor starts aligned too)."""
    entries: dict[str, object] = {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        assert end % 4 == 0, f"{name} would leave the next tensor unaligned"
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def to_bytes(tensors: Mapping[str, Array]) -> list[bytes | memoryview]:
    """A file's bytes in pieces: the header, then the tensors."""
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    head = header({name: (array.dtype, array.shape) for name, array in arrays.items()})
    return [head, *(array.data.cast("B") for array in arrays.values())]


class ShardFile:
    """An open shard file: ``tensors`` are read-only views into its memory map."""

    def __init__(self, path: Path, descriptor: int | None = None, size: int = 0) -> None:
        """``descriptor``: the file is open already, with ``size`` bytes (0: all it has), and ``path`` only its name; it
        stays the caller's, as the map keeps a copy of it."""
        self.path = path
        own = open_plain(path) if descriptor is None else descriptor
        try:
            self._map = mmap.mmap(own, size, access=mmap.ACCESS_READ)
        except OSError as error:  # no word about the file: memory, rights, open files
            full = error.errno == errno.ENOMEM
            hint = "free some memory, or use another route" if full else ""
            raise LocalError("local", f"cannot read {path}: {error.strerror}", hint) from error
        except ValueError as error:  # an empty file cannot be mapped
            raise IntegrityError("integrity", f"{path} cannot be read: {error}") from error
        finally:
            if descriptor is None:
                os.close(own)
        self.tensors: Mapping[str, Array] = _parse(self._map, path)

    def check_numbers(self) -> None:
        """Raise IntegrityError for weights that are not finite, or mostly subnormal (a hundred times slower). Reads the
        whole file once."""
        for name, array in self.tensors.items():
            if fault := _fault_of(name, array):
                raise IntegrityError("integrity", f"{self.path}: {fault}", "get the model from another publisher")
        self.release_pages()

    def release_pages(self) -> None:
        """Give the pages read so far back to the system; they are read again when touched."""
        self._map.madvise(mmap.MADV_DONTNEED)


class Spool:
    """Arrays in nameless files: like a shard file's, their pages can be given back and are read again when touched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: list[mmap.mmap] = []

    def keep(self, array: Array) -> Array:
        """A read-only copy of ``array``. Raises LocalError if the disk is full."""
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                file.write(np.ascontiguousarray(array).data)
                file.flush()
                kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            raise LocalError("disk_full" if full else "local", f"cannot write in {self._folder}: {error}") from error
        self._maps.append(kept)
        return np.frombuffer(kept, array.dtype).reshape(array.shape)

    def release_pages(self) -> None:
        """As :meth:`ShardFile.release_pages`."""
        for kept in self._maps:
            kept.madvise(mmap.MADV_DONTNEED)


class FixedSpool(Spool):
    """The same in one file of a fixed size that somebody else has made and opened."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._map = mmap.mmap(descriptor, size)
        self._maps = [self._map]
        self._used = 0

    def keep(self, array: Array) -> Array:
        """See :class:`Spool`. Raises LocalError if the file is full."""
        if self._used + array.nbytes > len(self._map):
            raise LocalError("local", f"{array.nbytes} bytes of joined weights do not fit where they belong")
        kept = np.frombuffer(self._map, array.dtype, array.size, self._used).reshape(array.shape)
        kept[:] = array
        self._used += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        kept.flags.writeable = False
        return kept


def _parse(data: mmap.mmap, path: Path) -> dict[str, Array]:
    hint = "remove the file and fetch it again"
    try:
        size = tensorfile.header_size(data[:8], len(data), HEADER_BYTES_MAX)
        start = 8 + size
        entries = tensorfile.parse(data[8:start], len(data) - start, _ITEM_BYTES)
        return {name: _view(data, name, entry, start) for name, entry in entries.items()}
    except ValueError as error:
        raise IntegrityError("integrity", f"{path}: {error}", hint) from error


def _view(data: mmap.mmap, name: str, entry: tensorfile.Entry, start: int) -> Array:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise ValueError(f"tensor {name[:80]!r} is {entry.dtype[:20]!r}, not one of {', '.join(_DTYPES)}")
    if not 0 < len(entry.shape) <= _RANK_MAX or 0 in entry.shape:
        raise ValueError(f"tensor {name[:80]!r} has an impossible shape: {list(entry.shape)}")
    if (start + entry.begin) % dtype.itemsize:
        raise ValueError(f"tensor {name[:80]!r} is not aligned")
    return np.frombuffer(data, dtype, math.prod(entry.shape), start + entry.begin).reshape(entry.shape)


def _fault_of(name: str, array: Array) -> str:
    """What is wrong with a tensor's numbers; empty if nothing is."""
    kind = _NAMES.get(array.dtype)
    if kind not in _EXPONENTS:
        return ""
    mask, rest = _EXPONENTS[kind]
    bits: Array = array.reshape(-1).view(np.uint32 if kind == "F32" else np.uint16)
    tiny = 0
    for start in range(0, len(bits), _SCAN_NUMBERS):
        part = bits[start : start + _SCAN_NUMBERS]
        exponents = part & mask
        if (exponents == mask).any():
            return f"tensor {name[:80]!r} holds numbers that are not finite"
        if kind != "F16":  # widened to F32, the small numbers of F16 are ordinary ones
            tiny += int(np.count_nonzero((exponents == 0) & ((part & rest) != 0)))
    if tiny > max(_TINY_MIN, len(bits) // 100):
        return f"tensor {name[:80]!r} has {tiny} of {len(bits)} numbers so small that computing with them crawls"
    return ""
