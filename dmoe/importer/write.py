"""Write files as they come into being, and hash them on the way.

Owns: the bytes of an import's files. Does not own: what tensors mean.

Invariants:
1. A shard file has the bytes of :func:`dmoe.shardfile.to_bytes` over the same tensors, but never more than a block of
   one tensor is in memory: the header needs only shapes, and every block goes to its place in the file.
2. The place for the whole file is taken first, so a full disk shows before anything is computed.
3. The hashes are those of the bytes in the file: they are read back, tensor by tensor, while they are still cached.

Fails with OSError.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from config.vocabulary import MIB
from dmoe.core.manifest import CHUNK_BYTES, ModelFile
from dmoe.importer.rows import Rows, rows_axis
from dmoe.shardfile import ShardFile, header

Array = NDArray[Any]
Entries = Sequence[tuple[str, "Rows | Array"]]
"""What a file holds, in order: a layer's name (its parts get a suffix each) or a tensor's."""
Wrote = Callable[[int], None]
"""Called after every block with how many bytes it has in the file."""
Shapes = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


def shapes_of(entries: Entries) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Every tensor of a file, by its full name, in order."""
    found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    for name, entry in entries:
        if isinstance(entry, Rows):
            found |= {f"{name}.{suffix}": shape for suffix, shape in entry.shapes().items()}
        else:
            found[name] = entry.dtype, entry.shape
    return found


def size_of(shapes: Shapes) -> int:
    """Bytes of a shard file with such tensors."""
    return len(header(shapes)) + sum(_bytes(*shape) for shape in shapes.values())


def weights_in(shapes: Shapes) -> int:
    """How many of the model's parameters a file holds; scales and offsets are none."""
    counts = (
        math.prod(shape) * (2 if name.endswith(".q4") else 1)
        for name, (_, shape) in shapes.items()
        if not name.endswith((".s", ".c"))
    )
    return sum(counts)


def widened_in(shapes: Shapes) -> int:
    """Bytes that a file's weights of 16 bits take in memory beside their size: they run as f32."""
    return sum(_bytes(*shape) for name, shape in shapes.items() if name.endswith((".h", ".b")))


class Target(Protocol):
    """Where an import's files go."""

    def create(self, name: str, size: int) -> BinaryIO:
        """A new file of so many bytes, unbuffered, for writing and reading; the caller closes it. Raises OSError."""

    def written(self, name: str) -> ShardFile:
        """A shard file that was written."""


@dataclass(frozen=True, slots=True)
class FolderTarget:
    """A folder."""

    root: Path

    def create(self, name: str, size: int) -> BinaryIO:
        """See :class:`Target`."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("x+b", buffering=0)
        try:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
        except BaseException:
            file.close()
            raise
        return file

    def written(self, name: str) -> ShardFile:
        """See :class:`Target`."""
        return ShardFile(self.root / name)


def write_shard(target: Target, name: str, entries: Entries, wrote: Wrote) -> tuple[ModelFile, int]:
    """Write the file ``name``. Returns it with the number of parameters that it holds."""
    shapes = shapes_of(entries)
    head = header(shapes)
    with target.create(name, size_of(shapes)) as file:
        hashes = _Hashes(file)
        _put(file, 0, head)
        hashes.advance(len(head))
        wrote(len(head))
        for key, entry in entries:
            start = hashes.done
            if isinstance(entry, Rows):
                hashes.advance(_write_rows(file, start, entry, wrote))
            else:
                _put(file, start, np.ascontiguousarray(entry).data)
                hashes.advance(_bytes(*shapes[key]))
                wrote(entry.nbytes)
    return hashes.file(name), weights_in(shapes)


def write_file(target: Target, name: str, data: bytes) -> ModelFile:
    """Write a small file at once."""
    with target.create(name, len(data)) as file:
        _put(file, 0, data)
        hashes = _Hashes(file)
        hashes.advance(len(data))
    return hashes.file(name)


def _write_rows(file: BinaryIO, start: int, layer: Rows, wrote: Wrote) -> int:
    """Write a layer's parts one behind the other. Returns their bytes."""
    places, end = {}, start
    for suffix, (dtype, shape) in layer.shapes().items():
        places[suffix] = end
        end += _bytes(dtype, shape)
    for rows, block in layer.blocks():
        for suffix, part in block.parts.items():
            if rows_axis(suffix) == 0:
                _put(file, places[suffix] + rows.start * (part.nbytes // len(part)), np.ascontiguousarray(part).data)
            else:
                for index, line in enumerate(np.ascontiguousarray(part)):
                    offset = (index * layer.rows + rows.start) * part.itemsize
                    _put(file, places[suffix] + offset, line.data)
        wrote(block.size_bytes)
    return end - start


def _put(file: BinaryIO, offset: int, data: bytes | memoryview) -> None:
    left = memoryview(data).cast("B")
    while left:
        count = os.pwrite(file.fileno(), left, offset)
        left, offset = left[count:], offset + count


def _bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


@dataclass(slots=True, eq=False)
class _Hashes:
    """The sha256 of a growing file, whole and by chunk."""

    on: BinaryIO
    done: int = 0
    whole: Any = field(default_factory=sha256)
    chunk: Any = field(default_factory=sha256)
    chunks: list[str] = field(default_factory=list)

    def advance(self, count: int) -> None:
        """Take the next ``count`` bytes in, from the file."""
        end = self.done + count
        while self.done < end:
            room = CHUNK_BYTES - self.done % CHUNK_BYTES
            data = os.pread(self.on.fileno(), min(room, end - self.done, MIB), self.done)
            assert data, "the file is shorter than what was written"
            self.whole.update(data)
            self.chunk.update(data)
            self.done += len(data)
            if self.done % CHUNK_BYTES == 0:
                self._close_chunk()

    def file(self, name: str) -> ModelFile:
        """The finished file."""
        if self.done % CHUNK_BYTES:
            self._close_chunk()
        digest = self.whole.hexdigest()
        return ModelFile(path=name, sha256=digest, size_bytes=self.done, chunks=tuple(self.chunks))

    def _close_chunk(self) -> None:
        self.chunks.append(self.chunk.hexdigest())
        self.chunk = sha256()
