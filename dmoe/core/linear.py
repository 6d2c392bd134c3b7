"""A linear layer's weights in the one form that is stored, cut, joined and run.

Owns: the forms and how they are cut into neuron blocks and joined again. Does not own: where the numbers come
from (``dmoe/importer/quantise``) or the operators that run them (``dmoe/graphs``).

For ``y = x @ W^T`` with ``W`` of shape ``[N, K]``, and blocks of ``B`` weights (32, or 16) that share a scale:

- ``w f32[N, K]``; ``h f16[N, K]`` and ``b u16[N, K]`` (the bits of bfloat16): storage only, run as f32
- ``q8 u8[N, K/B, B]``, ``s f32[N, K/B]``; ``W = s * (q8 - 128)``
- ``q4 u8[N, K/B, B/2]`` (two weights a byte, the even one low), ``s f32[N, K/B]``; ``W = s * (q4 - 8)``
- either with ``c f32[K/B, N]``, an offset added to the weights of a block: ``y = matmul(x, s * (q - z)) + blocksums(x)
  @ c`` is then the arithmetic of a source with block minima: nothing is quantised again.
- any with ``bias f32[N]``, added to ``y``

Invariant: cutting rows or whole blocks and joining them again gives back the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError
from dmoe.core.manifest import BLOCK

Array = NDArray[Any]

BLOCKS = (BLOCK, BLOCK // 2)
"""Weights per scale that there are."""
_DTYPES: dict[str, type[np.generic]] = {
    "w": np.float32,
    "h": np.float16,
    "b": np.uint16,
    "q4": np.uint8,
    "q8": np.uint8,
    "s": np.float32,
    "c": np.float32,
    "bias": np.float32,
}
_FORMS = (("w",), ("h",), ("b",), ("q8", "s"), ("q8", "s", "c"), ("q4", "s"), ("q4", "s", "c"))


class Form(NamedTuple):
    """A layer's signature as far as a graph is concerned: which parts there are, and the weights per scale."""

    suffixes: tuple[str, ...]
    block: int = BLOCK

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        """Each part's dtype and shape in a layer of ``rows`` outputs and ``columns`` inputs."""
        blocks = columns // self.block
        every = {
            "w": (rows, columns),
            "h": (rows, columns),
            "b": (rows, columns),
            "q4": (rows, blocks, self.block // 2),
            "q8": (rows, blocks, self.block),
            "s": (rows, blocks),
            "c": (blocks, rows),
            "bias": (rows,),
        }
        return {suffix: (_DTYPES[suffix], every[suffix]) for suffix in self.suffixes}


def floats_of(part: Array) -> NDArray[np.float32]:
    """A float part as f32; ``u16`` holds the bits of bfloat16."""
    if part.dtype == np.uint16:
        return (part.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(part, np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """``parts`` holds one of the forms above, by suffix."""

    parts: Mapping[str, Array]

    @property
    def form(self) -> Form:
        """See :class:`Form`."""
        return Form(tuple(self.parts), self.block)

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8; 0 in a float form."""
        return 4 if "q4" in self.parts else 8 if "q8" in self.parts else 0

    @property
    def block(self) -> int:
        """How many weights share a scale."""
        return int(self.parts[f"q{self.bits}"].shape[2]) * 8 // self.bits if self.bits else BLOCK

    @property
    def codes(self) -> NDArray[np.uint8]:
        """The quantised weights ``u8[N, K/B, B]`` with zero point 8 (4 bits) or 128."""
        if self.bits == 8:
            return self.parts["q8"]
        packed = self.parts["q4"]
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)

    @property
    def rows(self) -> int:
        """N, the outputs."""
        return int(next(iter(self.parts.values())).shape[0])

    @property
    def columns(self) -> int:
        """K, the inputs."""
        if not self.bits:
            return int(next(iter(self.parts.values())).shape[1])
        return int(self.parts["s"].shape[1]) * self.block

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def is_finite(self) -> bool:
        """Whether every number is one. Codes always are."""
        values = [floats_of(part) for part in self.parts.values() if part.dtype != np.uint8]
        return all(bool(np.isfinite(numbers).all()) for numbers in values)

    def take_rows(self, rows: slice) -> Self:
        """Some outputs."""
        return type(self)({k: part[:, rows] if k == "c" else part[rows] for k, part in self.parts.items()})

    def take_columns(self, columns: slice) -> Self:
        """Some inputs: whole blocks only."""
        assert "bias" not in self.parts, "a bias would be added once per part"
        step = self.block if self.bits else 1
        assert columns.start % step == columns.stop % step == 0, "a block of weights cannot be cut"
        blocks = slice(columns.start // step, columns.stop // step)
        return type(self)({k: part[blocks] if k == "c" else part[:, blocks] for k, part in self.parts.items()})

    def with_bias(self, bias: Array) -> Self:
        """The same layer with ``bias f32[N]``."""
        return type(self)({**self.parts, "bias": bias})

    def tensors(self, name: str) -> dict[str, Array]:
        """The parts as named tensors, e.g. ``layer.3.qkv.q4``."""
        return {f"{name}.{suffix}": np.ascontiguousarray(part) for suffix, part in self.parts.items()}

    def dequantised(self) -> NDArray[np.float32]:
        """``W`` as ``f32[N, K]``."""
        parts = self.parts
        if not self.bits:
            return floats_of(next(iter(parts.values())))
        weights = (self.codes.astype(np.float32) - (1 << self.bits - 1)) * parts["s"][..., None]
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


def alike(layers: Sequence[Linear]) -> list[Linear]:
    """Layers that are to be joined, in one form that holds each of them without loss."""
    if len({layer.form for layer in layers}) == 1:
        return list(layers)
    if not all(layer.bits for layer in layers):
        return [_again({"w": layer.dequantised()}, layer) for layer in layers]
    block = min(layer.block for layer in layers)
    offset = any("c" in layer.parts for layer in layers)
    return [_widened(layer, block, offset) for layer in layers]


def _widened(layer: Linear, block: int, offset: bool) -> Linear:
    """8-bit codes with the same values, in blocks of ``block``."""
    rows, repeat = layer.rows, layer.block // block
    codes = (layer.codes + np.uint8(128 - (1 << layer.bits - 1))).reshape(rows, -1, block)
    parts = {"q8": codes, "s": layer.parts["s"].repeat(repeat, axis=1)}
    if offset:
        blocks = codes.shape[1]
        found = layer.parts.get("c")
        parts["c"] = np.zeros((blocks, rows), np.float32) if found is None else found.repeat(repeat, axis=0)
    return _again(parts, layer)


def _again(parts: Mapping[str, Array], layer: Linear) -> Linear:
    """Other parts with the bias of a layer."""
    bias = layer.parts.get("bias")
    return Linear(parts if bias is None else {**parts, "bias": bias})


def pack(codes: Array) -> NDArray[np.uint8]:
    """4-bit codes ``u8[..., B]`` two a byte, the even one low."""
    packed: NDArray[np.uint8] = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return packed


def _join(layers: Sequence[Linear], axis: int) -> Linear:
    forms = {layer.form for layer in layers}
    if len(forms) != 1:
        raise IntegrityError("integrity", f"weights to be joined are in different forms: {sorted(forms)}")
    if len(layers) == 1:
        return layers[0]
    return Linear(
        {
            suffix: np.concatenate([layer.parts[suffix] for layer in layers], 1 - axis if suffix == "c" else axis)
            for suffix in layers[0].parts
        }
    )


def find(tensors: Mapping[str, Array], name: str, rows: int, columns: int, *, bias: bool = False) -> Linear:
    """The linear layer called ``name`` among a file's tensors, with its bias or without, its dtypes and shapes checked.

    Raises IntegrityError naming the tensor at fault.
    """
    for suffixes in reversed(_FORMS):
        if all(f"{name}.{suffix}" in tensors for suffix in suffixes):
            layer = Linear({suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes})
            if bias:
                layer = layer.with_bias(vector(tensors, f"{name}.bias", rows))
            _check(name, layer, rows, columns)
            return layer
    raise IntegrityError("integrity", f"tensor {name} is missing", "get the shard again")


def vector(tensors: Mapping[str, Array], name: str, size: int) -> Array:
    """The f32 vector called ``name``. Raises IntegrityError if it is missing or malformed."""
    found = tensors.get(name)
    if found is None or found.dtype != np.float32 or found.shape != (size,):
        raise IntegrityError("integrity", f"tensor {name} is not f32[{size}]", "get the shard again")
    return found


def _check(name: str, layer: Linear, rows: int, columns: int) -> None:
    """Each part must have one of the shapes that there are for its form; blocks are counted by the scales."""
    suffixes, scales = tuple(layer.parts), layer.parts.get("s")
    blocks = BLOCKS if scales is None or scales.ndim != 2 else [b for b in BLOCKS if scales.shape[1] * b == columns]
    wanted = Form(suffixes, *blocks[:1]).shapes(rows, columns)
    for suffix, part in layer.parts.items():
        dtype, shape = wanted[suffix]
        if part.shape != shape or part.dtype != dtype:
            found = f"{part.dtype}{list(part.shape)}"
            raise IntegrityError("integrity", f"tensor {name}.{suffix} is {found}, not {dtype.__name__}{list(shape)}")
