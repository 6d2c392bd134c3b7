"""Provider records in the DHT: the keys, and which of this node's are due.

A record says "this peer has something of that key". Keys are sha2-256 multihashes (``0x12 0x20`` and 32 bytes), which
every libp2p implementation takes for a CID's multihash:

- a model: the model id itself, which is the sha256 of its manifest;
- a shard: ``sha256("rios/shard/1" 0x00 || model id (32 bytes) || index in the manifest (4 bytes, big endian))``.

Invariants:
1. A node announces every model it has something of, and at most :data:`SHARD_KEYS_MAX` shards, those with the fewest
   known providers first. What is not announced shard by shard is found through its model's key and the adverts.
2. One key every :data:`GAP_MS`: a receiver takes ten records of one peer in ten seconds (py-libp2p drops the rest).
3. A key announced while the swarm was small lies with few peers: it is announced again each time the swarm has doubled,
   until it can lie with :data:`KEEPERS`.
4. Records live :data:`LIFE_MS`, are announced again after :data:`REPUBLISH_MS`, and no more once the shard is dropped.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256

from p2p.core.advert import ModelOffer

SHARD_TAG = b"rios/shard/1\0"
SHARD_KEYS_MAX = 256
GAP_MS = 1500
REPUBLISH_MS = 3600 * 1000
LIFE_MS = 2 * REPUBLISH_MS
KEEPERS = 20
"""Peers that keep a record (Kademlia's k)."""
INDEX_MAX = (1 << 16) - 1
_MULTIHASH = b"\x12\x20"


def model_key(model_id: str) -> bytes:
    """The DHT key of a model (64 hex digits)."""
    return _MULTIHASH + bytes.fromhex(model_id)


def shard_key(model_id: str, index: int) -> bytes:
    """The DHT key of one shard of a model."""
    return _MULTIHASH + sha256(SHARD_TAG + bytes.fromhex(model_id) + index.to_bytes(4, "big")).digest()


class Announcements:
    """What this node announces, and when each key is due again."""

    def __init__(self) -> None:
        self._offers: tuple[ModelOffer, ...] = ()
        self._due_ms: dict[bytes, int] = {}
        self.announced: dict[bytes, int] = {}
        """Keys that were announced and not withdrawn, with the number of peers known then."""

    def follow(self, offers: tuple[ModelOffer, ...], rarity: Callable[[str, int], int]) -> Sequence[bytes]:
        """Take note of what is offered now; returns the keys to withdraw. ``rarity``: known providers of a shard."""
        if offers == self._offers:
            return ()
        self._offers = offers
        wanted = [model_key(offer.model_id) for offer in offers if any(offer.shards)]
        shards = [(offer.model_id, index) for offer in offers for index in _indices(offer.shards)]
        shards.sort(key=lambda shard: rarity(*shard))
        wanted += [shard_key(*shard) for shard in shards[:SHARD_KEYS_MAX]]
        self._due_ms = {key: self._due_ms.get(key, 0) for key in wanted}
        dropped = tuple(key for key in self.announced if key not in self._due_ms)
        for key in dropped:
            del self.announced[key]
        return dropped

    def next(self, now_ms: int, peers: int) -> bytes | None:
        """The key to announce now, if any is due. ``peers``: how many are known."""
        return next(
            (key for key, due_ms in self._due_ms.items() if due_ms <= now_ms or self._has_grown(key, peers)), None
        )

    def _has_grown(self, key: bytes, peers: int) -> bool:
        then = self.announced.get(key, KEEPERS)
        return then < KEEPERS and peers >= min(KEEPERS, 2 * then)

    def done(self, key: bytes, now_ms: int, peers: int) -> None:
        """A key was announced."""
        if key in self._due_ms:
            self._due_ms[key] = now_ms + REPUBLISH_MS
            self.announced[key] = peers

    def failed(self, key: bytes, now_ms: int) -> None:
        """A key could not be announced: the others have their turn first."""
        if key in self._due_ms:
            del self._due_ms[key]
            self._due_ms[key] = now_ms + 10 * GAP_MS


def _indices(shards: bytes) -> list[int]:
    return [8 * at + bit for at, byte in enumerate(shards) for bit in range(8) if byte >> bit & 1]
