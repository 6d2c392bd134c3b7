"""The folder inside the store in which an import works, and which ends with it.

Invariants:
1. Whatever ends an import, nothing of it stays: an error or Ctrl-C removes the folder, and what a killed process left
   is removed by the next import.
2. A folder is locked by the import that works in it: one that is still going on is never swept.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import LocalError
from dmoe.store import IMPORTING_PREFIX


@contextmanager
def scratch(root: Path, need_bytes: int) -> Iterator[Path]:
    """A new folder inside ``root``. Raises LocalError ``disk_full`` unless ``need_bytes`` are free."""
    _sweep(root)
    folder = Path(tempfile.mkdtemp(dir=root, prefix=IMPORTING_PREFIX))
    claim = _claim(folder)
    try:
        _check_space(root, need_bytes)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already after a success
        os.close(claim)


def _claim(folder: Path) -> int:
    """A lock on an import's folder that ends with its process, however that ends. The caller closes it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _sweep(root: Path) -> None:
    """Remove what imports that were killed left behind."""
    for folder in root.glob(f"{IMPORTING_PREFIX}*"):
        try:
            claim = _claim(folder)
        except OSError:
            continue  # that import is still going on
        shutil.rmtree(folder, ignore_errors=True)
        os.close(claim)


def _check_space(root: Path, need: int) -> None:
    free = shutil.disk_usage(root).free
    if free < need:
        raise LocalError(
            "disk_full", f"the import needs about {need >> 20} MiB in {root}, {free >> 20} MiB are free", "free some"
        )
