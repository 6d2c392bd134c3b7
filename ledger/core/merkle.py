"""Merkle trees over 32-byte ids: batches of votes and the answers under a receipt.

A leaf is ``sha256(0x00 || id)``, a node ``sha256(0x01 || left || right)``; a level of odd length is filled up with
:data:`PAD`. The bits of a leaf's index say on which side each sibling of its path stands.
"""

from collections.abc import Sequence
from hashlib import sha256

PAD = bytes(32)
EMPTY_ROOT = bytes(32)


def leaf_hash(item: bytes) -> bytes:
    """The hash of a leaf."""
    return sha256(b"\0" + item).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node."""
    return sha256(b"\1" + left + right).digest()


def build(items: Sequence[bytes]) -> list[list[bytes]]:
    """Every level of the tree, leaves first, the root last (a single level for one item)."""
    # leaf_hash and node_hash, inlined: this runs for every answer that is paid, on both sides
    level = [sha256(b"\0" + item).digest() for item in items]
    levels = [level]
    while len(level) > 1:
        if len(level) % 2:
            level.append(PAD)
        pairs = iter(level)
        level = [sha256(b"\1" + left + right).digest() for left, right in zip(pairs, pairs, strict=True)]
        levels.append(level)
    return levels


def root_of(items: Sequence[bytes]) -> bytes:
    """The root; :data:`EMPTY_ROOT` for no items."""
    return build(items)[-1][0] if items else EMPTY_ROOT


def path_of(levels: Sequence[Sequence[bytes]], index: int) -> tuple[bytes, ...]:
    """The siblings from leaf ``index`` up to below the root."""
    path = []
    for level in levels[:-1]:
        path.append(level[index ^ 1])
        index >>= 1
    return tuple(path)


def climb(item: bytes, index: int, path: Sequence[bytes]) -> bytes:
    """The root that ``path`` leads to from ``item`` at ``index``."""
    node = leaf_hash(item)
    for sibling in path:
        node = node_hash(sibling, node) if index & 1 else node_hash(node, sibling)
        index >>= 1
    return node
