"""Where a model comes from: a GGUF file, read lazily, tensor by tensor.

Owns: opening, bounds and types of a GGUF's tensors. Does not own: what they mean (``architectures``) or their numbers
(``quantise``). Fails with IntegrityError naming the file, the tensor and its offset; never reads past the file.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError, LocalError
from config.vocabulary import MIB
from dmoe.core.linear import Linear
from dmoe.core.manifest import Quantisation
from dmoe.importer.quantise import LOSSLESS_TYPES, convert, quantise_int8, to_float, transcode

Array = NDArray[Any]

_FLOATS = frozenset({"F32", "F16", "BF16"})


class GgufSource:
    """An open GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise LocalError("not_found", f"{path} is not a file", "give the path of a .gguf file")
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, MemoryError) as error:
            raise IntegrityError("integrity", f"{path} is not a whole GGUF file: {error}", _AGAIN) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """All metadata keys with their values."""
        return {key: field.contents() for key, field in self._fields.items() if not key.startswith("GGUF.")}

    def sha256(self) -> str:
        """The whole file's hash, hex."""
        digest = sha256()
        with self.path.open("rb") as file:
            while block := file.read(8 * MIB):
                digest.update(block)
        return digest.hexdigest()

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
        if self.shape(name) != (size,) or kind not in _FLOATS:
            raise self._fault(name, f"is {kind}{list(self.shape(name))}, not a float vector of {size}")
        return to_float(kind, data, size)

    def linear(self, name: str, rows: int, columns: int, quantisation: Quantisation) -> Linear:
        """A weight matrix ``[rows, columns]`` in the wanted form."""
        kind, data = self._data(name)
        if self.shape(name) != (rows, columns):
            raise self._fault(name, f"has shape {list(self.shape(name))}, expected {[rows, columns]}")
        return self._convert(name, kind, data, (rows, columns), quantisation)

    def linears(self, name: str, count: int, rows: int, columns: int, quantisation: Quantisation) -> list[Linear]:
        """A stack of weight matrices ``[count, rows, columns]``, one per expert."""
        kind, data = self._data(name)
        if self.shape(name) != (count, rows, columns):
            raise self._fault(name, f"has shape {list(self.shape(name))}, expected {[count, rows, columns]}")
        return [self._convert(name, kind, part, (rows, columns), quantisation) for part in data]

    def _convert(
        self, name: str, kind: str, data: Array, shape: tuple[int, int], quantisation: Quantisation
    ) -> Linear:
        if kind in LOSSLESS_TYPES:
            layer = convert(transcode(kind, data, *shape), quantisation)
        elif quantisation == "source":
            raise self._fault(name, f"is {kind}, which cannot be kept as it is", "import with --weights int8")
        else:
            try:
                weights = gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(shape)
            except (NotImplementedError, ValueError) as error:
                raise self._fault(name, f"is {kind}, which is not supported") from error
            layer = Linear({"w": weights}) if quantisation == "fp32" else quantise_int8(weights)
        scales = layer.parts.get("s", layer.parts.get("w"))
        if not np.isfinite(scales).all() or not np.isfinite(layer.parts.get("c", np.zeros(1))).all():
            raise self._fault(name, "holds numbers that are not finite")
        return layer

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


_AGAIN = "the file is truncated, altered or of another kind; download it again"
