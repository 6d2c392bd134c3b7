"""Huge pages for weights: decoding reads all of them for every token, and with 4 KiB pages much of that time is spent
looking addresses up (measured: 1.15 to 1.2 times the tokens per second on one thread).

ONNX Runtime allocates what it packed by itself, so its memory is found afterwards: private, anonymous, in use. Memory
that is only reserved, like free cache slots, is left alone. Where the system has no such pages, or was told never to
use them, nothing happens.
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_HUGE_BYTES = 2 << 20
_PAGES = _HUGE_BYTES // 4096
_PAGES_MIN = _PAGES * 9 // 10
_MADV_COLLAPSE = 25
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


def _is_allowed() -> bool:
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def _anonymous() -> Iterator[tuple[int, int]]:
    """Private writable memory without a file, by address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, end = place.split("-")
            yield int(start, 16), int(end, 16)
