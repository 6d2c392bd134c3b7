"""A file on its way: ``<target>.part``, its chunks as they come, and the end at which it gets its name.

Invariants:
1. A chunk is verified before it is written, the whole file before it gets its name; the file is synced before that.
2. Whatever a killed fetch had written is found again: a chunk counts if it verifies, wherever it came from.
3. What a disk can say is raised as LocalError (``disk_full``, ``local``) that names the file.

All methods block: they are called in worker threads.
"""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from config.errors import IntegrityError, LocalError
from p2p.core.chunks import CHUNK_BYTES, chunk_span
from p2p.face import ContentFile


class PartFile:
    """An open part file; ``missing`` are the chunks it lacked when it was opened."""

    def __init__(self, file: ContentFile, target: Path) -> None:
        self.file = file
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self._reading = threading.Lock()
        self._places: dict[bytes, list[int]] = {}
        for index, digest in enumerate(file.chunks):
            self._places.setdefault(digest, []).append(index)
        with self._mapped():
            self._handle, self.missing = _open(self.path, file)
        self.held = set(range(len(file.chunks))) - set(self.missing)
        """Chunks that are here and verified."""

    def size_of(self, index: int) -> int:
        """Bytes of a chunk."""
        return chunk_span(index, self.file.size_bytes)[1]

    def write(self, index: int, chunk: memoryview) -> None:
        """Verify a chunk and write it. Raises IntegrityError if it is not the right one."""
        at, size = chunk_span(index, self.file.size_bytes)
        if len(chunk) != size:
            raise IntegrityError("integrity", f"chunk {index} of {self.target.name} has {len(chunk)} bytes, not {size}")
        digest = self.file.chunks[index]
        if sha256(chunk).digest() != digest:
            raise IntegrityError("integrity", f"chunk {index} does not have the hash {digest.hex()}")
        with self._mapped():
            while chunk:
                count = os.pwrite(self._handle, chunk, at)
                at, chunk = at + count, chunk[count:]
        self.held.add(index)

    def read(self, digest: bytes) -> bytes | None:
        """A chunk that is here already, for others who fetch the same file."""
        with self._reading:  # not while it is closed: the number of the handle may be another file's by then
            for index in self._places.get(digest, ()):
                if index in self.held:
                    at, size = chunk_span(index, self.file.size_bytes)
                    return os.pread(self._handle, size, at)
        return None

    def finish(self) -> None:
        """Verify the whole, sync it, give it its name."""
        with self._mapped():
            os.ftruncate(self._handle, self.file.size_bytes)
            if _digest(self._handle) != self.file.sha256:
                self.path.unlink(missing_ok=True)
                message = f"{self.target.name}: the chunks do not make the file {self.file.sha256}"
                raise IntegrityError("integrity", message)
            os.fsync(self._handle)
            os.replace(self.path, self.target)
            folder = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Done with it; what was written stays."""
        with self._reading:
            self.held.clear()
            os.close(self._handle)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                message = f"the disk is full: {self.path} needs {self.file.size_bytes} bytes"
                raise LocalError("disk_full", message, "free some space; the download goes on from there") from error
            raise LocalError("local", f"cannot write {self.path}: {error.strerror or error}") from error


def is_complete(target: Path, file: ContentFile) -> bool:
    """Whether the file is here, whole and unaltered."""
    try:
        if target.stat().st_size != file.size_bytes:
            return False
        with target.open("rb") as handle:
            return _digest(handle.fileno()) == file.sha256
    except FileNotFoundError:
        return False


def _digest(handle: int) -> str:
    hasher, at = sha256(), 0
    while data := os.pread(handle, CHUNK_BYTES, at):
        hasher.update(data)
        at += len(data)
    return hasher.hexdigest()


def _open(part: Path, file: ContentFile) -> tuple[int, list[int]]:
    """The file being written and the chunks it still lacks."""
    part.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        have = os.fstat(handle)
        if have.st_size > file.size_bytes:
            os.ftruncate(handle, file.size_bytes)
        missing = []
        for index, digest in enumerate(file.chunks):
            at, size = chunk_span(index, file.size_bytes)
            if at >= have.st_size or sha256(os.pread(handle, size, at)).digest() != digest:
                missing.append(index)
        needed = sum(chunk_span(index, file.size_bytes)[1] for index in missing)
        if shutil.disk_usage(part.parent).free + have.st_blocks * 512 < needed:
            raise OSError(errno.ENOSPC, "not enough space")
    except BaseException:
        os.close(handle)
        raise
    return handle, missing
