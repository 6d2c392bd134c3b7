"""The hash of a file that is larger than memory."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from config.vocabulary import MIB

if TYPE_CHECKING:
    from hashlib import _Hash


Read = Callable[[int], None]
"""Called after every block with its bytes."""


def hash_file(path: Path, read: Read = lambda count: None) -> "_Hash":
    """The file's sha256."""
    with path.open("rb") as file:
        return hash_open(file, read)


def hash_open(file: BinaryIO, read: Read = lambda count: None) -> "_Hash":
    """The same of an open file, from where it is."""
    digest = sha256()
    while block := file.read(4 * MIB):
        digest.update(block)
        read(len(block))
    return digest
