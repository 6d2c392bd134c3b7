"""Which chunk to ask whom for: rarest first, several in flight per peer, fail-over, help at the end. No I/O, no clock.

Every provider is expected to have every chunk until it says otherwise, so nothing has to be asked before the first
chunk flows. A peer that is fetching the file itself says which chunks it has (:meth:`Plan.has_only`).

Invariants:
1. A chunk is in flight with one peer, or with a second one that helps (:meth:`Plan.help`); a peer has at most
   ``per_peer_max`` in flight.
2. State changes only through the methods; times come in as arguments, in seconds of any clock.
"""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from typing import Generic, TypeVar

CHUNK_BYTES = 1 << 20
HELPERS_MAX = 2
"""Peers that may be asked for the same chunk at the same time."""

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
        self._flying: dict[int, dict[Peer, float]] = {}
        self._load: Counter[Peer] = Counter()
        self._peers: dict[Peer, int] = {}
        self._lacks: dict[Peer, set[int]] = {}
        self._lacking: Counter[int] = Counter()
        self._partial: set[Peer] = set()
        self._queues: dict[Peer, list[int]] = {}
        """What to ask a peer for, the first at the end; what came or left meanwhile is passed over when it is its turn.
        Made again when peers say what they have: sorting for every chunk would cost more than the chunk."""

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
        self._queues.pop(peer, None)
        self._partial.discard(peer)
        self._set_lacks(peer, set())
        for index in [i for i, asked in self._flying.items() if peer in asked]:
            self.again(index, peer)

    # -- what to ask for

    def take(self, peer: Peer, now: float) -> int | None:
        """The next chunk to ask this peer for: the one that the fewest others can give."""
        if not self._is_free(peer):
            return None
        lacks, queue = self._lacks.get(peer, ()), self._queues.get(peer)
        if queue is None:
            queue = self._queues[peer] = self._in_order(peer)
        while queue:
            index = queue.pop()
            if index in self.missing and index not in self._flying and index not in lacks:
                return self._send(index, peer, now)
        return None

    def _in_order(self, peer: Peer) -> list[int]:
        # equally rare chunks: each peer starts somewhere else, so that downloaders do not all fetch the same ones
        turn, lacking = self._peers[peer] * 7919, self._lacking
        return sorted(self.missing, key=lambda index: (lacking[index], -((index * 31 + turn) % 1009), -index))

    def help(self, peer: Peer, now: float, patience: float) -> int | None:
        """A chunk that has been in flight with others for longer than ``patience``, the oldest one, to be asked of this
        peer as well: so a peer that stalls costs the end of a file no more than that."""
        if not self._is_free(peer):
            return None
        lacks, best, since = self._lacks.get(peer, ()), None, now - patience
        for index, asked in self._flying.items():
            if index not in lacks and peer not in asked and len(asked) < HELPERS_MAX and max(asked.values()) < since:
                best, since = index, max(asked.values())
        return None if best is None else self._send(best, peer, now)

    def _is_free(self, peer: Peer) -> bool:
        return peer in self._peers and self._load[peer] < self._per_peer_max

    def _send(self, index: int, peer: Peer, now: float) -> int:
        self._flying.setdefault(index, {})[peer] = now
        self._load[peer] += 1
        return index

    def may_get(self, peer: Peer) -> bool:
        """Whether something in flight with others may still fall to this peer."""
        lacks = self._lacks.get(peer, ())
        return peer in self._peers and any(index not in lacks for index in self._flying)

    # -- what became of it

    def arrived(self, index: int) -> bool:
        """The chunk is here and verified; False if it was already."""
        for peer in self._flying.pop(index, {}):
            self._load[peer] -= 1
        if index not in self.missing:
            return False
        self.missing.remove(index)
        return True

    def again(self, index: int, peer: Peer) -> None:
        """The request came to nothing; anybody may be asked."""
        asked = self._flying.get(index, {})
        if asked.pop(peer, None) is not None:
            self._load[peer] -= 1
            if not asked:
                del self._flying[index]
                for queue in self._queues.values():
                    queue.append(index)

    def lacks(self, peer: Peer, index: int) -> None:
        """The peer does not have this chunk."""
        self.again(index, peer)
        if peer in self._peers:
            self._set_lacks(peer, self._lacks.get(peer, set()) | {index})

    # -- who has what

    def has_only(self, peer: Peer, indices: Collection[int]) -> None:
        """The peer has these chunks and will have others later: it is fetching the file itself."""
        if peer in self._peers:
            self._partial.add(peer)
            lacks = self.missing.difference(indices)
            if lacks != self._lacks.get(peer, set()):
                self._set_lacks(peer, lacks)
                self._queues.clear()

    def is_partial(self, peer: Peer) -> bool:
        """Whether the peer is fetching the file itself."""
        return peer in self._partial

    def forget_lacks(self) -> None:
        """Providers may have got chunks in the meantime: ask them again."""
        self._lacks.clear()
        self._lacking.clear()
        self._queues.clear()

    def _set_lacks(self, peer: Peer, indices: set[int]) -> None:
        old = self._lacks.pop(peer, set())
        self._lacking.subtract(old - indices)
        self._lacking.update(indices - old)
        if indices:
            self._lacks[peer] = indices
