"""What a stage's cache has gone through: which rows came in and went out at which positions, as two digests.

Owns: the chain of digests, what is kept of the rows that went out. Does not own: caches, calls, what is signed
(``core/stagecalls``).

The digest of ``n`` rows is ``c(0) = sha256("rios/stage-rows/1" 00)``, ``c(i + 1) = sha256(c(i) || row i)``, rows as
they travelled: as fp16 if that holds every number of the row, else as fp32, little-endian. So it depends on rows and
their order alone, not on the pieces or the company they came in; what a host gave on is, by digest, what the next one
got; and the digest of the last row stands for all of them.

Invariants:
1. Rows at a position replace what was there and behind it.
2. ``append`` costs nothing: hashing is done when somebody asks (:attr:`Added.rows` and all others settle what waits),
   in the order of the runs, however tasks are woken.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmoe.core import wire
from dmoe.core.wire import Dtype, FloatRows

DIGEST_BYTES = 32
START = sha256(b"rios/stage-rows/1\0").digest()
WAITING_BYTES_MAX = 8 << 20
"""Rows that wait to be hashed, of one cache: of runs whose callers have gone nobody asks."""


@dataclass(frozen=True, slots=True)
class Said:
    """Digests of everything in a cache: ``came`` in, ``went`` out, and what went out ``before`` the rows that the
    orchestrator gets."""

    came: bytes
    before: bytes
    went: bytes


def digests(rows: FloatRows, start: bytes = START) -> list[bytes]:
    """The digest behind each of ``rows f32[N, H]`` as they travelled."""
    with np.errstate(over="ignore"):  # infinite is not equal
        short = rows.astype("<f2")
    fits = (short == rows).all(axis=1).tolist()
    pairs = zip(np.ascontiguousarray(rows, "<f4"), short, fits, strict=True)
    return _chained((code if is_short else row for row, code, is_short in pairs), start)


def _chained(rows: Iterable[NDArray[Any]], start: bytes) -> list[bytes]:
    found, last = [], start
    for row in rows:
        step = sha256(last)
        step.update(row.data)
        last = step.digest()
        found.append(last)
    return found


def digest(rows: FloatRows, start: bytes = START) -> bytes:
    """The digest behind all of them."""
    found = digests(rows, start)
    return found[-1] if found else start


class Added:
    """Rows that were computed: their digests, once they are asked for."""

    __slots__ = ("_came", "_history", "_went")

    def __init__(self, history: "History") -> None:
        self._history = history
        self._came: Sequence[bytes] = ()
        self._went: Sequence[bytes] = ()

    def fill(self, came: Sequence[bytes], went: Sequence[bytes]) -> None:
        """Digests behind the position before the first row, and behind each row."""
        self._came, self._went = came, went

    def said(self, outputs: int) -> Said:
        """Digests behind the last row; ``outputs``: how many of the rows the orchestrator gets."""
        self._history.settle()
        return Said(self._came[-1], self._went[-1 - outputs], self._went[-1])


class History:
    """Of one cache."""

    def __init__(self, width: int, dtype: Dtype) -> None:
        self._width, self._dtype = width, dtype
        self._came: list[bytes] = [START]
        self._went: list[bytes] = [START]
        self._codes: NDArray[Any] = np.empty((0, width), "<u2" if dtype == "fp16" else "<f4")
        self._wide: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._waiting: list[tuple[Added, int, FloatRows, FloatRows]] = []
        self._waiting_bytes = 0

    def append(self, position: int, x: FloatRows, y: FloatRows) -> Added:
        """Rows ``x f32[N, H]`` came in at a position, ``y`` came of them (not rounded yet). Neither may change."""
        added = Added(self)
        self._waiting_bytes += x.nbytes + y.nbytes
        if self._waiting_bytes > WAITING_BYTES_MAX:
            self.settle()  # who asked for those has gone
            self._waiting_bytes = x.nbytes + y.nbytes
        self._waiting.append((added, position, x, y))
        return added

    @property
    def length(self) -> int:
        """Positions that are known."""
        self.settle()
        return len(self._came) - 1

    def settle(self) -> None:
        """Hash what waits."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        for added, position, x, y in waiting:
            assert position < len(self._came), "rows behind a gap"
            del self._came[position + 1 :], self._went[position + 1 :]
            shape, buffer = wire.encode(y, self._dtype)
            came = digests(x, self._came[-1])
            if self._dtype == "fp16" and "bf16" not in shape:  # so fp16 holds every number
                went = _chained(np.frombuffer(buffer, "<f2").reshape(y.shape), self._went[-1])
            else:
                went = digests(wire.decode(shape, buffer), self._went[-1])
            added.fill([self._came[-1], *came], [self._went[-1], *went])
            self._came += came
            self._went += went
            self._keep(position, len(y), shape, buffer)

    def _keep(self, position: int, count: int, shape: dict[str, Any], buffer: memoryview) -> None:
        end = position + count
        if end > len(self._codes):
            room = max(end, 2 * len(self._codes), 16)
            self._codes = _grown(self._codes, room)
            self._wide = _grown(self._wide, room)
        self._codes[position:end] = np.frombuffer(buffer, self._codes.dtype).reshape(count, self._width)
        bitmap = shape.get("bf16")
        wide = np.frombuffer(bitmap or b"", np.uint8)
        self._wide[position:end] = np.unpackbits(wide, count=count, bitorder="little") if bitmap else False

    def sent(self, first: int, count: int) -> tuple[dict[str, Any], memoryview]:
        """Rows that went out, as :func:`wire.encode` gives them."""
        self.settle()
        assert first + count < len(self._came)
        part = slice(first, first + count)
        shape: dict[str, Any] = {"shape": [count, self._width]}
        if self._dtype == "fp32":
            shape["dtype"] = "fp32"
        elif self._wide[part].any():
            shape["bf16"] = np.packbits(self._wide[part], bitorder="little").tobytes()
        return shape, memoryview(self._codes[part].tobytes())

    def fork(self, length: int) -> "History":
        """A history that begins with the first ``length`` positions of this one."""
        self.settle()
        made = History(self._width, self._dtype)
        made._came, made._went = self._came[: length + 1], self._went[: length + 1]
        made._codes, made._wide = self._codes[:length].copy(), self._wide[:length].copy()
        return made


def position_bytes(width: int, dtype: Dtype) -> int:
    """Memory of a history per position."""
    return width * (2 if dtype == "fp16" else 4) + 1 + 2 * (DIGEST_BYTES + 48)


def _grown(array: NDArray[Any], room: int) -> NDArray[Any]:
    made = np.zeros((room, *array.shape[1:]), array.dtype)
    made[: len(array)] = array
    return made
