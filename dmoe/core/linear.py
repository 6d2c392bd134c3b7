"""A linear layer's weights in the one form that is stored, cut, joined and run.

Owns: the three forms and how they are cut into neuron blocks and joined again. Does not own: where the numbers come
from (``dmoe/importer/quantise``) or the operators that run them (``dmoe/graphs``).

For ``y = x @ W^T`` with ``W`` of shape ``[N, K]``:

- ``fp32``: ``w f32[N, K]``
- ``int8``: ``q8 u8[N, K/32, 32]``, ``s f32[N, K/32]``; ``W = s * (q8 - 128)``
- ``int4``: ``q4 u8[N, K/32, 16]`` (two weights a byte, the even one low), ``s f32[N, K/32]`` and, where the source
  has block minima ``m``, ``c f32[K/32, N] = (m + 8 s)^T``; ``W = s * (q4 - 8) + c^T`` per block, so that
  ``y = matmul(x, s * (q4 - 8)) + blocksums(x) @ c`` is the source's own arithmetic: nothing is quantised again.

Invariant: cutting rows or whole blocks and joining them again gives back the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError
from dmoe.core.manifest import BLOCK

Array = NDArray[Any]

_DTYPES = {"w": np.float32, "q4": np.uint8, "q8": np.uint8, "s": np.float32, "c": np.float32}
_FORMS = (("w",), ("q8", "s"), ("q4", "s"), ("q4", "s", "c"))


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """``parts`` holds one of the forms above, by suffix."""

    parts: Mapping[str, Array]

    @property
    def form(self) -> tuple[str, ...]:
        """Which parts there are: the layer's signature as far as a graph is concerned."""
        return tuple(self.parts)

    @property
    def rows(self) -> int:
        """N, the outputs."""
        return int(next(iter(self.parts.values())).shape[0])

    @property
    def columns(self) -> int:
        """K, the inputs."""
        if "w" in self.parts:
            return int(self.parts["w"].shape[1])
        return int(self.parts["s"].shape[1]) * BLOCK

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def take_rows(self, rows: slice) -> Self:
        """Some outputs."""
        return type(self)({k: part[:, rows] if k == "c" else part[rows] for k, part in self.parts.items()})

    def take_columns(self, columns: slice) -> Self:
        """Some inputs: whole blocks only."""
        step = 1 if "w" in self.parts else BLOCK
        assert columns.start % step == columns.stop % step == 0, "a block of weights cannot be cut"
        blocks = slice(columns.start // step, columns.stop // step)
        return type(self)({k: part[blocks] if k == "c" else part[:, blocks] for k, part in self.parts.items()})

    def tensors(self, name: str) -> dict[str, Array]:
        """The parts as named tensors, e.g. ``layer.3.qkv.q4``."""
        return {f"{name}.{suffix}": np.ascontiguousarray(part) for suffix, part in self.parts.items()}

    def dequantised(self) -> NDArray[np.float32]:
        """``W`` as ``f32[N, K]``."""
        parts = self.parts
        if "w" in parts:
            return np.asarray(parts["w"], np.float32)
        if "q8" in parts:
            weights = (parts["q8"].astype(np.float32) - 128) * parts["s"][..., None]
        else:
            codes = np.stack([parts["q4"] & 15, parts["q4"] >> 4], axis=-1).reshape(self.rows, -1, BLOCK)
            weights = (codes.astype(np.float32) - 8) * parts["s"][..., None]
            if "c" in parts:
                weights += parts["c"].T[..., None]
        dense: NDArray[np.float32] = weights.reshape(self.rows, self.columns)
        return dense

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """``W[rows]``: an embedding lookup."""
        return self.take(rows).dequantised()

    def take(self, rows: NDArray[np.int64]) -> Self:
        """The given outputs, in that order."""
        return type(self)({k: part[:, rows] if k == "c" else part[rows] for k, part in self.parts.items()})


def join_rows(layers: Sequence[Linear]) -> Linear:
    """Layers of one form that read the same input, as one. Raises IntegrityError if their forms differ."""
    return _join(layers, axis=0)


def join_columns(layers: Sequence[Linear]) -> Linear:
    """Layers of one form whose outputs are added, as one."""
    return _join(layers, axis=1)


def _join(layers: Sequence[Linear], axis: int) -> Linear:
    forms = {layer.form for layer in layers}
    if len(forms) != 1:
        raise IntegrityError("integrity", f"weights to be joined are in different forms: {sorted(forms)}")
    if len(layers) == 1:
        return layers[0]
    return Linear(
        {
            suffix: np.concatenate([layer.parts[suffix] for layer in layers], 1 - axis if suffix == "c" else axis)
            for suffix in layers[0].form
        }
    )


def find(tensors: Mapping[str, Array], name: str, rows: int, columns: int) -> Linear:
    """The linear layer called ``name`` among a file's tensors, its dtypes and shapes checked.

    Raises IntegrityError naming the tensor at fault.
    """
    for form in reversed(_FORMS):
        if all(f"{name}.{suffix}" in tensors for suffix in form):
            layer = Linear({suffix: tensors[f"{name}.{suffix}"] for suffix in form})
            for suffix, part in layer.parts.items():
                _check_part(f"{name}.{suffix}", part, suffix, rows, columns)
            return layer
    raise IntegrityError("integrity", f"tensor {name} is missing", "get the shard again")


def vector(tensors: Mapping[str, Array], name: str, size: int) -> Array:
    """The f32 vector called ``name``. Raises IntegrityError if it is missing or malformed."""
    found = tensors.get(name)
    if found is None or found.dtype != np.float32 or found.shape != (size,):
        raise IntegrityError("integrity", f"tensor {name} is not f32[{size}]", "get the shard again")
    return found


def _check_part(name: str, part: Array, suffix: str, rows: int, columns: int) -> None:
    blocks = columns // BLOCK
    shape = {
        "w": (rows, columns),
        "q4": (rows, blocks, BLOCK // 2),
        "q8": (rows, blocks, BLOCK),
        "s": (rows, blocks),
        "c": (blocks, rows),
    }[suffix]
    if part.shape != shape or part.dtype != _DTYPES[suffix]:
        raise IntegrityError(
            "integrity", f"tensor {name} is {part.dtype}{list(part.shape)}, not {_DTYPES[suffix].__name__}{list(shape)}"
        )
