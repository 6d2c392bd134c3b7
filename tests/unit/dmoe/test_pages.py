"""Huge pages change where memory is, not what is in it, and commit nothing that was only reserved."""

import mmap
import os
from pathlib import Path

import numpy as np

from dmoe import pages
from dmoe.pages import Ahead, use_huge_pages


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


def test_a_process_that_may_open_nothing_does_it_with_a_list_it_opened_before():
    ahead = Ahead()
    used = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    filled = np.frombuffer(used, np.uint8)
    filled[:] = np.random.default_rng(0).integers(0, 255, filled.size, np.uint8)
    before = filled.copy()
    reserved = mmap.mmap(-1, 512 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    resident = resident_bytes()
    moved = ahead.use_huge_pages()
    assert (moved > 0) == (ahead.descriptor is not None and use_huge_pages() > 0)
    assert moved % (2 << 20) == 0
    assert (filled == before).all()
    assert resident_bytes() - resident < 128 << 20
    assert reserved[0] == 0
    if ahead.descriptor is not None:
        os.close(ahead.descriptor)


def test_only_memory_that_is_filled_private_and_without_a_file_is_moved():
    def piece(place, rights, inode, name, size_kb, rss_kb):
        return f"{place} {rights} 00000000 00:00 {inode} {name}\nSize: {size_kb} kB\nRss: {rss_kb} kB\nVmFlags: rd wr\n"

    smaps = "".join(
        [
            piece("1000-401000", "rw-p", 0, "", 4096, 4096),
            piece("500000-900000", "rw-p", 0, "[heap]", 4096, 3700),
            piece("a00000-e00000", "rw-p", 0, "", 4096, 3600),  # in use in part
            piece("1000000-1400000", "r--p", 0, "", 4096, 4096),
            piece("1500000-1900000", "rw-s", 7, "/memfd:rios-cell", 4096, 4096),
            piece("1a00000-1e00000", "rw-p", 0, "[stack]", 4096, 4096),
        ]
    )
    assert list(pages._filled(smaps)) == [(0x1000, 0x401000), (0x500000, 0x900000)]
