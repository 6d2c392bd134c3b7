"""The files that a model is imported from: opened by name here, or opened already by somebody else.

Owns: which names there are and how they become descriptors. Does not own: what is in the files (``folder``,
``sources``).

A process that reads a stranger's files cannot open any: it is given descriptors (:class:`GivenFiles`), by a parent that
opened them as an import in its own process would (:class:`DiskFiles`).

Fails with IntegrityError for what is not a plain file, LocalError.
"""

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from config.errors import LocalError
from dmoe.importer.hashing import Read, hash_open
from dmoe.plainfile import open_plain

if TYPE_CHECKING:
    from hashlib import _Hash


class SourceFiles(Protocol):
    """Files side by side. ``folder``: where they are, for messages."""

    folder: Path

    def names(self) -> list[str]:
        """All of them, in order."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def open(self, name: str) -> int:
        """A descriptor for reading; the caller closes it."""


class DiskFiles:
    """The files of a folder. ``named``: the operator named this one, so it is read wherever a link leads to."""

    def __init__(self, folder: Path, named: str = "") -> None:
        self.folder = folder
        self._named = named

    def names(self) -> list[str]:
        """See :class:`SourceFiles`."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def has(self, name: str) -> bool:
        """See :class:`SourceFiles`."""
        return (self.folder / name).is_file()

    def open(self, name: str) -> int:
        """See :class:`SourceFiles`. A hub's own cache links every file to its store of contents beside it; any other
        link inside a folder is refused."""
        path = self.folder / name
        if self._named:
            return open_plain(Path(os.path.realpath(path)), links=True)
        if path.is_symlink():
            cache, target = path.parent.parent.parent, Path(os.path.realpath(path))
            if path.parent.parent.name == "snapshots" and target.parent == Path(os.path.realpath(cache / "blobs")):
                return open_plain(target, links=True)
        return open_plain(path, links=True)


class GivenFiles:
    """Files that came as open descriptors."""

    def __init__(self, folder: Path, descriptors: Mapping[str, int]) -> None:
        self.folder = folder
        self._descriptors = descriptors

    def names(self) -> list[str]:
        """See :class:`SourceFiles`."""
        return sorted(self._descriptors)

    def has(self, name: str) -> bool:
        """See :class:`SourceFiles`."""
        return name in self._descriptors

    def open(self, name: str) -> int:
        """See :class:`SourceFiles`."""
        if name not in self._descriptors:
            raise LocalError("not_found", f"{self.folder / name} is missing", "fetch or import the model again")
        return os.dup(self._descriptors[name])


def opened(files: SourceFiles, name: str) -> BinaryIO:
    """A file for reading, from its beginning."""
    file = os.fdopen(files.open(name), "rb")
    file.seek(0)  # a descriptor that was given has one place for all who read it
    return file


def size_of(files: SourceFiles, name: str) -> int:
    """Of a file, in bytes."""
    with opened(files, name) as file:
        return file.seek(0, os.SEEK_END)  # behind walls no file can be asked about, not even an open one


def mapped(files: SourceFiles, name: str) -> mmap.mmap:
    """A file's memory map. Raises ValueError for an empty file, OSError."""
    size = size_of(files, name)
    if not size:
        raise ValueError("it is empty")
    descriptor = files.open(name)
    try:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def hash_of(files: SourceFiles, name: str, read: Read) -> "_Hash":
    """A file's sha256. ``read`` is called after every block with its bytes."""
    with opened(files, name) as file:
        return hash_open(file, read)
