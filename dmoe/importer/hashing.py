"""The hash of a file that is larger than memory."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from config.vocabulary import MIB

if TYPE_CHECKING:
    from hashlib import _Hash


def hash_file(path: Path, read: Callable[[int], None] = lambda count: None) -> "_Hash":
    """The file's sha256. ``read`` is called after every block with its bytes."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(4 * MIB):
            digest.update(block)
            read(len(block))
    return digest
