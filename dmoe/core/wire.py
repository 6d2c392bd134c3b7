"""Activations as bytes: what a row of hidden states looks like to the other side.

Owns: the rounding of activations and their encoding. Does not own: frames, headers, or who sends what.

A row travels as little-endian fp16. A row with a value outside fp16's range travels as bf16 instead; a bitmap says
which rows do. Measured on a dense 135M model: fp16 costs a KL of 2e-6 and never changed the most likely token. A model
whose manifest asks for it travels as fp32, unrounded, at twice the size; what travels says so itself.

Invariants:
1. The rounding of a row depends on that row alone, never on the batch it travels in.
2. ``decode(*encode(x)) == rounded(x)`` bit for bit, and ``rounded(rounded(x)) == rounded(x)``.
3. Only finite numbers are encoded or decoded: anything else raises :class:`IntegrityError`.
4. What :func:`encode` gives is memory of its own; what :func:`decode` gives may be its buffer's: it is only read.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError

FloatRows = NDArray[np.float32]
"""``f32[N, H]``: one row per token."""
Dtype = Literal["fp16", "fp32"]
"""What rows are rounded to on the wire (the manifest's ``wire_dtype``)."""

ROWS_MAX = 1 << 20
WIDTH_MAX = 1 << 20

_FP16 = np.dtype("<f2")
_FP32 = np.dtype("<f4")
_FP16_MAX = 65504.0
_BF16_MAX_BITS = 0x7F7F


def rounded(rows: FloatRows, dtype: Dtype = "fp16") -> FloatRows:
    """``f32[N, H] -> f32[N, H]``: the rows as the other side sees them. Raises IntegrityError if not finite."""
    if dtype == "fp32":
        return _checked(rows)
    if _fits_fp16(rows):
        return rows.astype(_FP16).astype(np.float32)
    codes, wide = _mixed(rows)
    return _from_mixed(codes, wide)


def encode(rows: FloatRows, dtype: Dtype = "fp16") -> tuple[dict[str, Any], memoryview]:
    """``f32[N, H]`` as header fields ``{"shape": [N, H], "bf16": bitmap if any row needs it, "dtype": if not fp16}``
    and a buffer of ``2 * N * H`` bytes (fp32: 4). Raises IntegrityError if a value is not finite."""
    count, width = rows.shape
    if dtype == "fp32":
        return {"shape": [count, width], "dtype": "fp32"}, _bytes_of(np.array(_checked(rows), _FP32, order="C"))
    if _fits_fp16(rows):
        return {"shape": [count, width]}, _bytes_of(rows.astype(_FP16, order="C"))
    codes, wide = _mixed(rows)
    bitmap = np.packbits(wide, bitorder="little").tobytes()
    return {"shape": [count, width], "bf16": bitmap}, _bytes_of(codes)


def decode(header: Mapping[str, Any], buffer: bytes | bytearray | memoryview) -> FloatRows:
    """The rows that :func:`encode` made, ``f32[N, H]``. Raises IntegrityError if header or buffer are malformed."""
    count, width = _shape(header)
    dtype = dtype_of(header)
    size_bytes = (2 if dtype == "fp16" else 4) * count * width
    if len(buffer) != size_bytes:
        message = f"activations of shape [{count}, {width}] in {dtype} need {size_bytes} bytes, got {len(buffer)}"
        raise IntegrityError("integrity", message)
    if dtype == "fp32":
        # a view of the frame where it happens to be aligned
        return _checked(np.require(np.frombuffer(buffer, _FP32), np.float32, "A").reshape(count, width))
    bitmap = header.get("bf16")
    if bitmap is None:
        rows = np.frombuffer(buffer, _FP16).reshape(count, width).astype(np.float32)
    else:
        rows = _from_mixed(np.frombuffer(buffer, "<u2").reshape(count, width), _wide_rows(bitmap, count))
    return _checked(rows)


def dtype_of(header: Mapping[str, Any]) -> Dtype:
    """The wire dtype that a header of :func:`encode` names. Raises IntegrityError for one that is not known."""
    dtype = header.get("dtype", "fp16")
    if dtype == "fp16" or dtype == "fp32":
        return dtype  # type: ignore[no-any-return]
    raise IntegrityError("integrity", f"activations in {str(dtype)[:40]!r}; fp16 and fp32 are known here")


def total(partials: Sequence[FloatRows], shape: tuple[int, ...]) -> FloatRows:
    """The sum of rounded partial sums in fp32, in the order given (group order); zeros of ``shape`` if there are none.
    The one place where partial sums are added, so that every route adds alike."""
    if not partials:
        return np.zeros(shape, np.float32)
    result = partials[0].copy()
    for partial in partials[1:]:
        result += partial
    return result


def _fits_fp16(rows: FloatRows) -> bool:
    # a NaN fails every comparison, so the slow path finds and reports it
    if _is_small(rows) and np.vdot(rows, rows) <= _FP16_MAX**2:
        return True  # what a sum of squares bounds, each value obeys: one pass, cheaper than max and min
    return not rows.size or bool(rows.max() <= _FP16_MAX and rows.min() >= -_FP16_MAX)


def _checked(rows: FloatRows) -> FloatRows:
    if not is_finite(rows):
        raise _not_finite(rows)
    return rows


def is_finite(rows: FloatRows) -> bool:
    """Whether every value is a finite number."""
    return bool((_is_small(rows) and np.vdot(rows, rows) < np.inf) or np.isfinite(rows).all())


def _is_small(rows: FloatRows) -> bool:
    return rows.size <= 8192  # larger products may wake a pool of BLAS threads


def _mixed(rows: FloatRows) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """16-bit codes of every row and which rows are bf16."""
    _checked(rows)
    wide = np.abs(rows).max(axis=1) > _FP16_MAX
    codes = np.empty(rows.shape, "<u2")
    codes[~wide] = rows[~wide].astype(_FP16).view("<u2")
    codes[wide] = _bf16_codes(rows[wide])
    return codes, wide


def _bf16_codes(rows: FloatRows) -> NDArray[np.uint16]:
    """Round to nearest even; what would round up to infinity stays at the largest finite number."""
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    codes = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    clamped: NDArray[np.uint16] = (np.minimum(codes & 0x7FFF, _BF16_MAX_BITS) | (codes & 0x8000)).astype(np.uint16)
    return clamped


def _from_mixed(codes: NDArray[np.uint16], wide: NDArray[np.bool_]) -> FloatRows:
    rows = np.empty(codes.shape, np.float32)
    rows[~wide] = codes[~wide].view(_FP16).astype(np.float32)
    rows[wide] = (codes[wide].astype(np.uint32) << 16).view(np.float32)
    return rows


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.data.cast("B") if array.size else memoryview(b"")


def _shape(header: Mapping[str, Any]) -> tuple[int, int]:
    shape = header.get("shape")
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(type(size) is int for size in shape):
        raise IntegrityError("integrity", f"activations without a shape of two integers: {str(shape)[:80]}")
    count, width = shape
    if not 0 <= count <= ROWS_MAX or not 1 <= width <= WIDTH_MAX:
        raise IntegrityError("integrity", f"activations of shape [{count}, {width}] are out of bounds")
    return count, width


def _wide_rows(bitmap: object, count: int) -> NDArray[np.bool_]:
    if not isinstance(bitmap, bytes | bytearray | memoryview) or len(bitmap) != (count + 7) // 8:
        raise IntegrityError("integrity", f"the bf16 bitmap of {count} rows must be {(count + 7) // 8} bytes")
    return np.unpackbits(np.frombuffer(bitmap, np.uint8), count=count, bitorder="little").astype(np.bool_)


def _not_finite(rows: FloatRows) -> IntegrityError:
    row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
    return IntegrityError("integrity", f"activations hold a value that is not finite (row {row} of {len(rows)})")
