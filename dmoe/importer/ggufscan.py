"""A first look at a stranger's GGUF file, before the library reads it: counts, lengths, types, places.

Owns: the bounds. Does not own: values and what they mean (``sources``).

The library makes several objects of every array element and follows nested arrays by recursion; a file that claims too
much would cost memory and time without end. This scan skips arrays of numbers at once and strings one by one, and makes
nothing of what it reads.

Rules: at most :data:`KEYS_MAX` keys, :data:`TENSORS_MAX` tensors, :data:`ELEMENTS_MAX` array elements in all; no array
of arrays; no key and no tensor twice; names of 1 to 256 bytes; sizes of at most 2^44 numbers; tensors lie within the
file, aligned, and do not overlap.

Fails with ValueError naming the rule.
"""

import math
import mmap
import struct

import gguf
from gguf.constants import GGML_QUANT_SIZES, GGUFValueType

KEYS_MAX = 1 << 16
TENSORS_MAX = 1 << 18
ELEMENTS_MAX = 1 << 23
NAME_BYTES_MAX = 256
TEXT_BYTES_MAX = 16 << 20
DIMENSIONS_MAX = 4
ALIGNMENT_MAX = 1 << 16
_NUMBERS_MAX = 1 << 44
_MAGIC = b"GGUF"
_SIZES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


def scan(data: mmap.mmap) -> None:
    """Look at a whole file. Raises ValueError."""
    _Scan(data).run()


class _Scan:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0
        self._order = "<"
        self._elements = 0
        self._alignment = 32

    def run(self) -> None:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:  # written by a machine with the other byte order
            self._order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known")
        tensors, keys = self._number("Q"), self._number("Q")
        if keys > KEYS_MAX or tensors > TENSORS_MAX:
            raise ValueError(f"it counts {keys} keys and {tensors} tensors, more than {KEYS_MAX} and {TENSORS_MAX}")
        seen: set[bytes] = set()
        for _ in range(keys):
            self._key(seen)
        places = self._tensors(tensors)
        self._check_places(places)

    def _key(self, seen: set[bytes]) -> None:
        name = self._name("key", seen)
        kind = self._type(name)
        if kind == GGUFValueType.ARRAY:
            inner, count = self._type(name), self._number("Q")
            self._elements += count
            if inner == GGUFValueType.ARRAY:
                raise ValueError(f"key {_shown(name)} is an array of arrays")
            if self._elements > ELEMENTS_MAX:
                raise ValueError(f"its arrays have more than {ELEMENTS_MAX} elements (key {_shown(name)})")
            if inner == GGUFValueType.STRING:
                for _ in range(count):
                    self._text(name)
            else:
                self._skip(count * _SIZES[inner])
        elif kind == GGUFValueType.STRING:
            self._text(name)
        elif name == b"general.alignment" and kind == GGUFValueType.UINT32:
            self._alignment = self._number("I")
            if self._alignment.bit_count() != 1 or self._alignment > ALIGNMENT_MAX:
                raise ValueError(f"general.alignment = {self._alignment}")
        else:
            self._skip(_SIZES[kind])

    def _tensors(self, count: int) -> list[tuple[int, int, bytes]]:
        """Per tensor: its place behind the header, its size, its name."""
        places, seen = [], set[bytes]()
        for _ in range(count):
            name = self._name("tensor", seen)
            dimensions = self._number("I")
            if not 1 <= dimensions <= DIMENSIONS_MAX:
                raise ValueError(f"tensor {_shown(name)} has {dimensions} dimensions")
            shape = [self._number("Q") for _ in range(dimensions)]
            numbers = math.prod(shape)
            if not 0 < numbers <= _NUMBERS_MAX:
                raise ValueError(f"tensor {_shown(name)} has an impossible shape: {shape}")
            raw = self._number("I")
            try:
                block, block_bytes = GGML_QUANT_SIZES[gguf.GGMLQuantizationType(raw)]
            except (KeyError, ValueError) as error:
                raise ValueError(f"tensor {_shown(name)} is of an unknown type ({raw})") from error
            if shape[0] % block:
                raise ValueError(f"tensor {_shown(name)} has rows of {shape[0]}, which blocks of {block} do not fill")
            places.append((self._number("Q"), numbers // block * block_bytes, name))
        return places

    def _check_places(self, places: list[tuple[int, int, bytes]]) -> None:
        start = -(-self._at // self._alignment) * self._alignment
        end = 0
        for place, size, name in sorted(places):
            if place % self._alignment:
                raise ValueError(f"tensor {_shown(name)} is not aligned to {self._alignment}")
            if place < end:
                raise ValueError(f"tensor {_shown(name)} overlaps another one")
            end = place + size
            if start + end > self._size:
                raise ValueError(f"tensor {_shown(name)} lies outside the file")

    # --- bytes

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise ValueError("it ends in the middle of its header")
        found = self._data[self._at : self._at + count]
        self._at += count
        return found

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise ValueError("it ends in the middle of its header")
        self._at += count

    def _number(self, kind: str) -> int:
        value: int = struct.unpack(self._order + kind, self._take(struct.calcsize(kind)))[0]
        return value

    def _text(self, name: bytes) -> None:
        size = self._number("Q")
        if size > TEXT_BYTES_MAX:
            raise ValueError(f"key {_shown(name)} holds a text of {size} bytes")
        self._skip(size)

    def _type(self, name: bytes) -> GGUFValueType:
        raw = self._number("I")
        try:
            return GGUFValueType(raw)
        except ValueError as error:
            raise ValueError(f"key {_shown(name)} is of an unknown type ({raw})") from error

    def _name(self, what: str, seen: set[bytes]) -> bytes:
        size = self._number("Q")
        if not 0 < size <= NAME_BYTES_MAX:
            raise ValueError(f"a {what}'s name has {size} bytes")
        name = self._take(size)
        if name in seen:
            raise ValueError(f"it holds the {what} {_shown(name)} twice")
        seen.add(name)
        return name


def _shown(name: bytes) -> str:
    return repr(name[:80].decode(errors="replace"))
