"""One writer: two daemons never share a data folder, nor one key.

The second lock stands in the user's state folder and is named by the key: a copied data folder is noticed on the same
machine before two wallets sign for one slot. Across machines the witnesses notice.
"""

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config import paths
from config.errors import LocalError
from config.files import naming

log = logging.getLogger("rios.node")


@contextmanager
def data_folder(lock: Path) -> Iterator[None]:
    """Held by the daemon that uses a data folder. Raises LocalError if another one does."""
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _held(lock, f"a node is already running with the data folder {lock.parent}", "use another node.data_dir"):
        yield


@contextmanager
def key(peer_id: str) -> Iterator[None]:
    """Held by the daemon that signs with a key. Raises LocalError if another one of this user does."""
    folder = paths.state_dir(os.environ, Path.home()) / "keys"
    lock = folder / f"{hashlib.sha256(peer_id.encode()).hexdigest()[:32]}.lock"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.touch(mode=0o600)
    except OSError as error:  # a service without a home: its data folder is its own
        log.debug("no lock for the key in %s: %s", folder, error)
        yield
        return
    what = f"a node with the key of {peer_id} is already running from another data folder"
    with _held(lock, what, "one key is for one node: make another with rios init"):
        yield


@contextmanager
def _held(lock: Path, what: str, otherwise: str) -> Iterator[None]:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode(errors="replace").strip()
            raise LocalError("local", f"{what} (pid {pid or 'unknown'})", f"stop it, or {otherwise}") from None
        with naming(lock):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
