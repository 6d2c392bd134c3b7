"""Huge pages for weights: decoding reads all of them for every token, and with 4 KiB pages much of that time is spent
looking addresses up (measured: 1.15 to 1.2 times the tokens per second on one thread).

ONNX Runtime allocates what it packed by itself, so its memory is found afterwards: private, anonymous, in use. Memory
that is only reserved, like free cache slots, is left alone. Where the system has no such pages, or was told never to
use them, nothing happens.

A cell may open nothing and ask little: it opens its list of memory beforehand (:class:`Ahead`), and goes by what the
list says of each piece as a whole.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_HUGE_BYTES = 2 << 20
_PAGES = _HUGE_BYTES // 4096
_PAGES_MIN = _PAGES * 9 // 10
_MADV_COLLAPSE = 25
_READ_BYTES = 1 << 16
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> int:
    """Move memory that is in use to huge pages, now. Returns how many there are of it, in bytes. Thread-safe."""
    if sys.platform != "linux" or not _is_allowed():
        return 0
    libc = ctypes.CDLL(None)
    resident = (ctypes.c_ubyte * _PAGES)()
    count = 0
    for start, end in _anonymous():
        first = -(-start // _HUGE_BYTES) * _HUGE_BYTES
        for address in range(first, end - _HUGE_BYTES + 1, _HUGE_BYTES):
            place, size = ctypes.c_void_p(address), ctypes.c_size_t(_HUGE_BYTES)
            # another thread may unmap it meanwhile: then both calls fail, and change nothing
            if libc.mincore(place, size, resident) or bytes(resident).count(1) < _PAGES_MIN:
                continue
            count += libc.madvise(place, size, _MADV_COLLAPSE) == 0
    return count * _HUGE_BYTES


class Ahead:
    """The same for a process that will be allowed to open no file, nor to ask which pages are in use."""

    def __init__(self) -> None:
        """Open the list; nothing happens where that is not possible. ``descriptor`` is to stay open; None: none."""
        self.descriptor: int | None = None
        if sys.platform == "linux" and _is_allowed():
            try:
                self.descriptor = os.open("/proc/self/smaps", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return  # not in this container
            self._madvise = ctypes.CDLL(None).madvise

    def use_huge_pages(self) -> int:
        """As :func:`use_huge_pages`, for pieces of memory that are in use nearly as a whole."""
        if self.descriptor is None:
            return 0
        count = 0
        for start, end in _filled(self._read()):
            first = -(-start // _HUGE_BYTES) * _HUGE_BYTES
            for address in range(first, end - _HUGE_BYTES + 1, _HUGE_BYTES):
                count += self._madvise(ctypes.c_void_p(address), ctypes.c_size_t(_HUGE_BYTES), _MADV_COLLAPSE) == 0
        return count * _HUGE_BYTES

    def _read(self) -> str:
        assert self.descriptor is not None
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        parts = []
        while part := os.read(self.descriptor, _READ_BYTES):
            parts.append(part)
        return b"".join(parts).decode(errors="replace")


def _filled(smaps: str) -> Iterator[tuple[int, int]]:
    """Of a list with sizes: private writable memory without a file that is in use nearly as a whole, by address."""
    start = end = 0
    for line in smaps.splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = _private(line)
        elif first == "Rss:" and end > start and int(rest[0]) << 10 >= (end - start) // 10 * 9:
            yield start, end


def _is_allowed() -> bool:
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def _anonymous() -> Iterator[tuple[int, int]]:
    """Private writable memory without a file, by address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = _private(line)
        if end:
            yield start, end


def _private(line: str) -> tuple[int, int]:
    """Where a piece of memory is, or zeros if it is not private, writable and without a file."""
    place, rights, _, _, inode, *name = line.split(maxsplit=5)
    if rights != "rw-p" or inode != "0" or (name and name[0] != "[heap]"):
        return 0, 0
    start, end = place.split("-")
    return int(start, 16), int(end, 16)
