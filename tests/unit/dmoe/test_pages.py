"""Huge pages change where memory is, not what is in it, and commit nothing that was only reserved."""

import mmap
from pathlib import Path

import numpy as np

from dmoe.pages import use_huge_pages


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_used_memory_keeps_its_bytes_and_reserved_memory_stays_reserved():
    used = np.random.default_rng(0).integers(0, 255, 12 << 20, np.uint8)
    before = used.copy()
    reserved = mmap.mmap(-1, 512 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    resident = resident_bytes()
    moved = use_huge_pages()
    assert moved % (2 << 20) == 0
    assert (used == before).all()
    assert resident_bytes() - resident < 64 << 20
    assert reserved[0] == 0
