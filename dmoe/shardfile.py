"""Shard files: safetensors, read through a memory map without a copy.

Owns: the bytes of one file. Does not own: what tensors mean, or whether a file is the one its manifest names.

The header of a stranger's file is untrusted: its size, dtypes, shapes and offsets are checked before anything is
mapped. Fails with IntegrityError naming the file and the tensor.
"""

import errno
import json
import math
import mmap
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError, LocalError
from config.vocabulary import MIB

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
        """``descriptor``: the file is open already, with ``size`` bytes, and ``path`` only its name; the map keeps a
        copy of it."""
        self.path = path
        try:
            if descriptor is not None:
                self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
            else:
                with path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise LocalError("not_found", f"{path} is missing", "fetch or import the model again") from error
        except OSError as error:  # no word about the file: memory, rights, open files
            full = error.errno == errno.ENOMEM
            hint = "free some memory, or use another route" if full else ""
            raise LocalError("local", f"cannot read {path}: {error.strerror}", hint) from error
        except ValueError as error:  # an empty file cannot be mapped
            raise IntegrityError("integrity", f"{path} cannot be read: {error}") from error
        self.tensors: Mapping[str, Array] = _parse(self._map, path)

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
    def fail(what: str) -> IntegrityError:
        return IntegrityError("integrity", f"{path}: {what}", "remove the file and fetch it again")

    size = int.from_bytes(data[:8], "little")
    start = 8 + size
    if len(data) < 8 or not 2 <= size <= HEADER_BYTES_MAX or start > len(data):
        raise fail("truncated, or not a safetensors file")
    try:
        header = json.loads(data[8:start])
    except (ValueError, RecursionError) as error:
        raise fail("the header is not JSON") from error
    if not isinstance(header, dict):
        raise fail("the header is not an object")
    tensors: dict[str, Array] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _entry(entry, fail, name)
        count = math.prod(shape)
        if end - begin != count * dtype.itemsize or start + end > len(data) or (start + begin) % dtype.itemsize:
            raise fail(f"tensor {name[:80]} does not fit its bytes")
        tensors[name] = np.frombuffer(data, dtype, count, start + begin).reshape(shape)
    return tensors


def _entry(
    entry: Any,  # noqa: ANN401 - any JSON
    fail: Callable[[str], IntegrityError],
    name: str,
) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    try:
        dtype = _DTYPES[entry["dtype"]]
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise fail(f"tensor {name[:80]} is described wrongly") from error
    numbers = (*shape, begin, end)
    if len(shape) > 4 or not all(type(number) is int and 0 <= number <= 1 << 44 for number in numbers):
        raise fail(f"tensor {name[:80]} has an impossible shape or place")
    return dtype, shape, begin, end
