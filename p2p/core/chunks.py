"""Which chunk to ask whom for: rarest first, several in flight per peer, with failover. No I/O.

Every provider is expected to have every chunk until it says otherwise, so nothing has to be asked before the first
chunk flows. State changes only through the methods; a chunk is in flight with at most one peer.
"""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

CHUNK_BYTES = 1 << 20

Peer = TypeVar("Peer", bound=Hashable)


def chunk_span(index: int, size_bytes: int) -> tuple[int, int]:
    """Offset and length of a chunk of a file of ``size_bytes``."""
    at = index * CHUNK_BYTES
    return at, min(CHUNK_BYTES, size_bytes - at)


def chunk_count(size_bytes: int) -> int:
    """Chunks of a file."""
    return -(-size_bytes // CHUNK_BYTES)


class Plan(Generic[Peer]):
    """What is missing, and who may be asked for it."""

    def __init__(self, missing: Iterable[int], *, per_peer_max: int) -> None:
        self.missing = set(missing)
        self._per_peer_max = per_peer_max
        self._flying: dict[int, Peer] = {}
        self._peers: dict[Peer, int] = {}
        self._lacks: dict[Peer, set[int]] = {}

    @property
    def done(self) -> bool:
        """Whether every chunk arrived."""
        return not self.missing

    def peers(self) -> tuple[Peer, ...]:
        """Peers that are being asked."""
        return tuple(self._peers)

    def add(self, peer: Peer) -> bool:
        """Take a peer in; False if it is in already."""
        if peer in self._peers:
            return False
        self._peers[peer] = len(self._peers)
        return True

    def drop(self, peer: Peer) -> None:
        """Ask this peer no more; what was in flight with it is free again."""
        self._peers.pop(peer, None)
        for index in [i for i, p in self._flying.items() if p == peer]:
            del self._flying[index]

    def take(self, peer: Peer) -> int | None:
        """The next chunk to ask this peer for: the one that the fewest others can give."""
        if peer not in self._peers or sum(p == peer for p in self._flying.values()) >= self._per_peer_max:
            return None
        lacks = self._lacks.get(peer, set())
        open_ = [index for index in self.missing if index not in self._flying and index not in lacks]
        if not open_:
            return None
        # equally rare chunks: each peer starts somewhere else, so that downloaders do not all fetch the same ones
        turn = self._peers[peer] * 7919
        best = min(open_, key=lambda index: (self._holders(index), (index * 31 + turn) % 1009, index))
        self._flying[best] = peer
        return best

    def may_get(self, peer: Peer) -> bool:
        """Whether something in flight with others may still fall to this peer."""
        lacks = self._lacks.get(peer, set())
        return peer in self._peers and any(index in self.missing and index not in lacks for index in self._flying)

    def _holders(self, index: int) -> int:
        return sum(index not in self._lacks.get(peer, ()) for peer in self._peers)

    def arrived(self, index: int) -> None:
        """The chunk is here and verified."""
        self.missing.discard(index)
        self._flying.pop(index, None)

    def lacks(self, peer: Peer, index: int) -> None:
        """The peer does not have this chunk."""
        self._flying.pop(index, None)
        self._lacks.setdefault(peer, set()).add(index)

    def again(self, index: int) -> None:
        """The request came to nothing; anybody may be asked."""
        self._flying.pop(index, None)

    def forget_lacks(self) -> None:
        """Providers may have got chunks in the meantime: ask them again."""
        self._lacks.clear()
