"""Where a model comes from: a GGUF file, or several that it was split into, read lazily, tensor by tensor.

Owns: opening, bounds and types of a GGUF's tensors. Does not own: what they mean (``architectures``) or their numbers
(``quantise``). Fails with IntegrityError naming the file, the tensor and its offset; never reads past the file.
"""

import math
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError, LocalError
from dmoe.core.linear import Linear
from dmoe.core.manifest import Quantisation
from dmoe.importer import ggufscan
from dmoe.importer.blocks import BLOCK_TYPES, FLOAT_TYPES, block_size, transcode
from dmoe.importer.files import DiskFiles, SourceFiles, hash_of, mapped, opened, size_of
from dmoe.importer.quantise import convert, float_layer, to_float

Array = NDArray[Any]

_ALL = slice(None)
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PARTS_MAX = 1000
_AGAIN = "the file is truncated, altered or of another kind; download it again"


class _Reader(gguf.GGUFReader):
    """The package's reader, four times as fast: it makes several arrays for each of a tokenizer's 100,000 strings, and
    numpy's memory maps are slow to slice. Reading past the end raises ValueError. ``map``: the file's memory map."""

    map: mmap.mmap

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, np.memmap):
            super().__setattr__("map", value._mmap)  # type: ignore[attr-defined]
            value = value.view(np.ndarray)
        super().__setattr__(name, value)

    def _get(
        self,
        offset: int,
        dtype: Any,  # noqa: ANN401 - whatever numpy takes
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> Array:
        if self.byte_order != "I" or override_order is not None:
            found: Array = super()._get(offset, dtype, count, override_order)
            return found
        return np.frombuffer(self.data, dtype, int(count), int(offset))


class _File:
    """One open GGUF file."""

    def __init__(self, files: SourceFiles, name: str) -> None:
        path = files.folder / name
        if not files.has(name):
            raise LocalError("not_found", f"{path} is not a file", "give the path of a .gguf file")
        _scan(files, name)
        try:
            with opened(files, name) as file:
                reader = _Reader(file)  # type: ignore[arg-type] # it hands it to numpy, which takes files too
            own = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in own.items()}
        except OSError as error:
            raise LocalError("local", f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
            raise IntegrityError("integrity", f"{path} is not a whole GGUF file: {error}", _AGAIN) from error
        self.path = path
        self.name = name
        self.map = reader.map
        self.tensors: dict[str, gguf.ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}


def _scan(files: SourceFiles, name: str) -> None:
    """The bounds of a file, before anything is made of it."""
    path = files.folder / name
    try:
        with mapped(files, name) as data:
            ggufscan.scan(data)
    except ValueError as error:
        raise IntegrityError("integrity", f"{path} is not a whole GGUF file: {error}", _AGAIN) from error
    except OSError as error:
        raise LocalError("local", f"cannot read {path}: {error.strerror or error}") from error


class GgufSource:
    """An open GGUF file, or all parts of one that was split (``NAME-00001-of-00003.gguf`` and so on) by its first.
    ``metadata``: all keys with their values, of the first part."""

    def __init__(self, path: Path, files: SourceFiles | None = None) -> None:
        """``files``: it and its parts, where they are open already."""
        self.path = path
        self.files = files or DiskFiles(path.parent, path.name)
        self._files = [_File(self.files, part) for part in part_names(path, self.files)]
        self.metadata: Mapping[str, Any] = self._files[0].metadata
        self._tensors: dict[str, gguf.ReaderTensor] = {}
        self._places: dict[str, Path] = {}
        for number, file in enumerate(self._files):
            self._check_part(number, file)
            for name, tensor in file.tensors.items():
                if name in self._tensors:
                    raise IntegrityError("integrity", f"{file.path}: tensor {name[:80]} is in another part too", _AGAIN)
                self._tensors[name] = tensor
                self._places[name] = file.path

    def _check_part(self, number: int, file: _File) -> None:
        count = file.metadata.get("split.count", 1 if len(self._files) == 1 else None)
        if count != len(self._files) or file.metadata.get("split.no", number) != number:
            fault = f"{file.path} is not part {number + 1} of {len(self._files)}, as its metadata tells"
            raise IntegrityError("integrity", fault, "keep the names that the parts had")

    @property
    def size_bytes(self) -> int:
        """Of what :meth:`sha256` reads."""
        return sum(size_of(self.files, file.name) for file in self._files)

    def sha256(self, read: Callable[[int], None] = lambda count: None) -> str:
        """The file's hash, hex; of a split one, the hash over its parts' hashes. ``read`` is called after every block
        with its bytes."""
        digests = [hash_of(self.files, file.name, read) for file in self._files]
        if len(digests) == 1:
            return digests[0].hexdigest()
        return sha256(b"".join(digest.digest() for digest in digests)).hexdigest()

    def release_pages(self) -> None:
        """Give back the memory of what was read so far; it is read again when touched."""
        for file in self._files:
            file.map.madvise(mmap.MADV_DONTNEED)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._tensors

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first (GGUF lists it the other way round)."""
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def vector(self, name: str, size: int) -> NDArray[np.float32]:
        """A float vector. Raises IntegrityError if it is not one of that size."""
        kind, data = self._data(name)
        if self.shape(name) != (size,) or kind not in FLOAT_TYPES:
            raise self._fault(name, f"is {kind}{list(self.shape(name))}, not a float vector of {size}")
        return to_float(kind, data, size)

    def linear(
        self, name: str, shape: tuple[int, int], quantisation: Quantisation, part: tuple[slice, slice] = (_ALL, _ALL)
    ) -> Linear:
        """A weight matrix of ``shape`` (rows, columns) in the wanted form, or only the rows and columns in ``part``. A
        vector is a matrix of one row, a stack of matrices one of all their rows."""
        kind, data = self._data(name)
        found = self.shape(name)
        if (math.prod(found[:-1]), found[-1]) != shape:
            raise self._fault(name, f"has shape {list(found)}, expected {list(shape)}")
        return self._convert(name, kind, data.reshape(shape[0], -1)[part[0]], shape[1], quantisation, part[1])

    def linear_of(
        self, name: str, index: int, shape: tuple[int, int, int], quantisation: Quantisation, rows: slice = _ALL
    ) -> Linear:
        """Rows of matrix ``index`` of a stack of ``shape`` (count, rows, columns): one expert's."""
        kind, data = self._data(name)
        if self.shape(name) != shape:
            raise self._fault(name, f"has shape {list(self.shape(name))}, expected {list(shape)}")
        return self._convert(name, kind, data[index][rows], shape[2], quantisation, _ALL)

    def _convert(
        self, name: str, kind: str, data: Array, width: int, quantisation: Quantisation, columns: slice
    ) -> Linear:
        """Rows of ``width`` numbers, of which ``columns`` are wanted."""
        if kind in FLOAT_TYPES:
            layer = _cut(float_layer(kind, data, -1, width), columns)
        elif kind in BLOCK_TYPES:
            layer = self._transcode(kind, data, width, columns)
        else:
            raise self._fault(name, f"is {kind}, which is not supported", f"known: {', '.join(sorted(BLOCK_TYPES))}")
        if not layer.is_finite():
            raise self._fault(name, "holds numbers that are not finite", _AGAIN)
        return convert(layer, quantisation)

    def _transcode(self, kind: str, rows: Array, columns: int, wanted: slice) -> Linear:
        size = block_size(kind)
        blocks = rows.reshape(len(rows), columns // size, -1)
        if wanted == _ALL:
            return transcode(kind, blocks)
        first = wanted.start // size
        layer = transcode(kind, blocks[:, first : -(-wanted.stop // size)])
        return _cut(layer, slice(wanted.start - first * size, wanted.stop - first * size))

    def _tensor(self, name: str) -> gguf.ReaderTensor:
        if name not in self._tensors:
            raise IntegrityError("integrity", f"{self.path} lacks tensor {name}", _AGAIN)
        return self._tensors[name]

    def _data(self, name: str) -> tuple[str, Array]:
        tensor = self._tensor(name)
        return tensor.tensor_type.name, np.asarray(tensor.data)

    def _fault(self, name: str, what: str, hint: str = "") -> IntegrityError:
        offset = int(self._tensors[name].data_offset)
        return IntegrityError("integrity", f"{self._places[name]}: tensor {name} at offset {offset} {what}", hint)


def part_names(path: Path, files: SourceFiles) -> list[str]:
    """All files of a model that was split, by the name of its first; else the file itself."""
    found = _PART.fullmatch(path.name)
    if found is None or not files.has(path.name):
        return [path.name]
    count = int(found["count"])
    names = [f"{found['stem']}-{number + 1:05d}-of-{count:05d}.gguf" for number in range(min(count, _PARTS_MAX))]
    if path.name != names[0]:
        fault = f"{path} is part {int(found['number'])} of {count}"
        raise LocalError("not_found", fault, f"give the first part: {path.with_name(names[0])}")
    for name in names:
        if not files.has(name):
            raise LocalError("not_found", f"{path.with_name(name)} is missing", "keep all parts in one folder")
    return names


def _cut(layer: Linear, columns: slice) -> Linear:
    return layer if columns == _ALL else layer.take_columns(columns)
