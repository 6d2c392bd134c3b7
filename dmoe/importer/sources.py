"""Where a model comes from: a GGUF file, read lazily, tensor by tensor.

Owns: opening, bounds and types of a GGUF's tensors. Does not own: what they mean (``architectures``) or their numbers
(``quantise``). Fails with IntegrityError naming the file, the tensor and its offset; never reads past the file.
"""

import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError, LocalError
from dmoe.core.linear import Linear
from dmoe.core.manifest import Quantisation
from dmoe.importer.blocks import BLOCK_TYPES, FLOAT_TYPES, block_size, transcode
from dmoe.importer.hashing import hash_file
from dmoe.importer.quantise import convert, float_layer, to_float

Array = NDArray[Any]

_ALL = slice(None)
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


class GgufSource:
    """An open GGUF file. ``metadata``: all keys with their values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise LocalError("not_found", f"{path} is not a file", "give the path of a .gguf file")
        try:
            reader = _Reader(path)
            own = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
            self.metadata: Mapping[str, Any] = {key: field.contents() for key, field in own.items()}
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, MemoryError) as error:
            raise IntegrityError("integrity", f"{path} is not a whole GGUF file: {error}", _AGAIN) from error
        self._map = reader.map
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def size_bytes(self) -> int:
        """Of what :meth:`sha256` reads."""
        return self.path.stat().st_size

    def sha256(self, read: Callable[[int], None] = lambda count: None) -> str:
        """The whole file's hash, hex. ``read`` is called after every block with its bytes."""
        return hash_file(self.path, read).hexdigest()

    def release_pages(self) -> None:
        """Give back the memory of what was read so far; it is read again when touched."""
        self._map.madvise(mmap.MADV_DONTNEED)

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
        """A weight matrix of ``shape`` (rows, columns) in the wanted form, or only the rows and columns in ``part``."""
        kind, data = self._data(name)
        if self.shape(name) != shape:
            raise self._fault(name, f"has shape {list(self.shape(name))}, expected {list(shape)}")
        return self._convert(name, kind, data[part[0]], shape[1], quantisation, part[1])

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
        return IntegrityError("integrity", f"{self.path}: tensor {name} at offset {offset} {what}", hint)


def _cut(layer: Linear, columns: slice) -> Linear:
    return layer if columns == _ALL else layer.take_columns(columns)
