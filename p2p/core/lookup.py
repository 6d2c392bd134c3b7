"""One Kademlia look-up on several disjoint paths (S/Kademlia, Baumgart and Mies 2007, section 4.4).

Owns: whom to ask next, and when there is nobody left worth asking. Does not own: the queries.

Invariants:
1. Every peer is asked at most once, on one path only: who controls some peers of one path cannot steer the others.
2. A path ends when the :data:`CLOSE` closest peers it knows have answered or failed; at most :data:`ASKED_MAX` are
   asked in all.
3. A peer may name at most :data:`NAMED_MAX` others.
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256

PATHS = 3
WIDTH = 2
"""Queries under way per path."""
CLOSE = 6
ASKED_MAX = 60
NAMED_MAX = 20


def distance(key: bytes, peer: bytes) -> int:
    """XOR distance of a key and a peer id (both raw bytes) in the Kademlia key space of libp2p."""
    return int.from_bytes(sha256(key).digest(), "big") ^ int.from_bytes(sha256(peer).digest(), "big")


class _Path:
    __slots__ = ("failed", "known", "waiting")

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}
        self.waiting: set[bytes] = set()
        self.failed: set[bytes] = set()

    def closest(self) -> list[bytes]:
        """The peers that count now."""
        usable = (peer for peer in self.known if peer not in self.failed)
        return sorted(usable, key=self.known.__getitem__)[:CLOSE]


class Lookup:
    """Feed it what peers answered; :meth:`next` says whom to ask."""

    def __init__(self, key: bytes, start: Sequence[bytes], own: bytes) -> None:
        """``start``: the closest peers known, raw peer ids; they are dealt to the paths in turn."""
        self._key = key
        self._own = own
        self._asked: dict[bytes, _Path] = {}
        self._paths = [_Path() for _ in range(PATHS)]
        for number, peer in enumerate(start):
            self._learn(self._paths[number % PATHS], (peer,))

    @property
    def asked(self) -> int:
        """How many peers were asked so far."""
        return len(self._asked)

    def next(self) -> list[bytes]:
        """Peers to ask now; empty while enough are being asked, or when the look-up is over."""
        found = []
        for path in self._paths:
            for peer in path.closest():
                if len(path.waiting) >= WIDTH or len(self._asked) >= ASKED_MAX:
                    break
                if peer not in self._asked:
                    self._asked[peer] = path
                    path.waiting.add(peer)
                    found.append(peer)
        return found

    @property
    def is_over(self) -> bool:
        """Whether nobody is being asked and nobody is left to ask. Call :meth:`next` before."""
        return not any(path.waiting for path in self._paths)

    def answered(self, peer: bytes, closer: Iterable[bytes]) -> None:
        """A peer answered, and named others."""
        path = self._asked[peer]
        path.waiting.discard(peer)
        self._learn(path, list(closer)[:NAMED_MAX])

    def failed(self, peer: bytes) -> None:
        """A peer did not answer: it stands in nobody's way."""
        path = self._asked[peer]
        path.waiting.discard(peer)
        path.failed.add(peer)

    def _learn(self, path: _Path, peers: Iterable[bytes]) -> None:
        for peer in peers:
            if peer == self._own or peer in path.known:
                continue
            owner = self._asked.get(peer)
            if owner is None or owner is path:
                path.known[peer] = distance(self._key, peer)
