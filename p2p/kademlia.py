"""What py-libp2p's Kad-DHT does not do well, done around it: provider look-ups on disjoint paths, bounded records.

Owns: one look-up's queries and their deadlines, the bounds of the provider store. Does not own: whom to ask next
(``core.lookup``), the DHT itself (``host``).

The library's own look-up asks one sorted list of peers, first for close peers and then again for providers, waits up to
10 s for a dead one, and answers from its local records alone if it has any, were they of dead peers only.

Invariants:
1. A query is waited for :data:`QUERY_SECONDS`, a look-up takes at most :data:`LOOKUP_SECONDS`; no query is cancelled.
2. Provider records are kept for at most :data:`PROVIDED_MAX` keys, and for :data:`p2p.core.providing.LIFE_MS`.
"""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import trio
from libp2p.kad_dht import kad_dht as kad_dht_module
from libp2p.kad_dht import provider_store as provider_store_module
from libp2p.kad_dht.kad_dht import KadDHT
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo

from config.vocabulary import PeerId
from p2p.core.lookup import Lookup
from p2p.core.providing import LIFE_MS, REPUBLISH_MS

log = logging.getLogger(__name__)

QUERY_SECONDS = 2.0
LOOKUP_SECONDS = 10.0
LEFT_SECONDS = 20.0
QUERIES_PER_PEER = 3
LIMITERS_MAX = 1000
START_PEERS = 18
PROVIDED_MAX = 4096
"""Keys of which this node keeps provider records for others."""
PROVIDED_KEY_BYTES_MAX = 256
LOOKUP_KEY_BYTES_MAX = 128

# the library's own are 48 h and 22 h: a node that dropped a shard would be named for two days
provider_store_module.PROVIDER_RECORD_EXPIRATION_INTERVAL = LIFE_MS // 1000
provider_store_module.PROVIDER_RECORD_REPUBLISH_INTERVAL = REPUBLISH_MS // 1000

Found = Callable[[PeerId], bool]
Spawn = Callable[[Callable[[], Awaitable[None]]], object]
T = TypeVar("T")
_limiters: WeakKeyDictionary[KadDHT, dict[bytes, trio.CapacityLimiter]] = WeakKeyDictionary()


class _AnyKey:
    """Which keys a look-up may be for. The library answers FIND_NODE for peer ids and resets the stream for others,
    so nobody's put would find the nodes around its record's key."""

    @staticmethod
    def decode(key: bytes) -> None:
        """Raises ValueError for a key that is too long."""
        if len(key) > LOOKUP_KEY_BYTES_MAX:
            raise ValueError(f"a look-up key of {len(key)} bytes")


kad_dht_module.multihash = _AnyKey  # type: ignore[attr-defined]


def keep_out(dht: KadDHT, kept_out: Callable[[PeerId], bool]) -> None:
    """Never take these peers into the routing table."""
    table: Any = dht.routing_table
    add = table.add_peer

    async def add_peer(peer: PeerInfo | ID, **more: Any) -> bool:  # noqa: ANN401 - passed on
        peer_id = peer if isinstance(peer, ID) else peer.peer_id
        return not kept_out(PeerId(str(peer_id))) and bool(await add(peer, **more))

    table.add_peer = add_peer


def bound_providers(store: ProviderStore) -> None:
    """Keep the records of so many keys at most: anybody may say that he has something of any key."""
    add, kept = store.add_provider, store.providers

    def bounded(key: bytes, provider: PeerInfo) -> None:
        if len(key) > PROVIDED_KEY_BYTES_MAX:
            return
        while key not in kept and len(kept) >= PROVIDED_MAX:
            del kept[next(iter(kept))]
        add(key, provider)

    store.add_provider = bounded  # type: ignore[method-assign]


async def detached(spawn: Spawn, query: Callable[[], Awaitable[T]], *, seconds: float) -> T | None:
    """What a query of the library answers within ``seconds``, else None.

    It runs on when its caller gives up, within :data:`LEFT_SECONDS`: a query that is cancelled leaves its stream open,
    and the peer counts that against us.
    """
    done, answers = trio.Event(), []

    async def run() -> None:
        try:
            with trio.move_on_after(LEFT_SECONDS):
                answers.append(await query())
        except Exception as error:
            log.debug("DHT query: %.200s", error, exc_info=True)
        finally:
            done.set()

    spawn(run)
    with trio.move_on_after(seconds):
        await done.wait()
    return answers[0] if answers else None


async def find_providers(dht: KadDHT, spawn: Spawn, key: bytes, found: Found) -> None:
    """See :meth:`p2p.host.Host.find_providers`."""
    search = _Search(dht, spawn, key, found)
    with trio.move_on_after(LOOKUP_SECONDS):
        await search.run()


def _limiter(dht: KadDHT, peer: bytes) -> trio.CapacityLimiter:
    """What keeps our queries of one peer few: it takes no more than six streams of a peer at once."""
    limiters = _limiters.setdefault(dht, {})
    if len(limiters) > LIMITERS_MAX:
        for idle in [other for other, limiter in limiters.items() if not limiter.borrowed_tokens]:
            del limiters[idle]
    return limiters.setdefault(peer, trio.CapacityLimiter(QUERIES_PER_PEER))


class _Search:
    """One look-up: a few queries at a time until it is enough."""

    def __init__(self, dht: KadDHT, spawn: Spawn, key: bytes, found: Found) -> None:
        self._dht = dht
        self._spawn = spawn
        self._key = key
        self._found = found
        self._named: set[PeerId] = set()
        start = dht.routing_table.find_local_closest_peers(key, START_PEERS)
        if not start:
            start = list(dht.host.get_connected_peers())[:START_PEERS]
        self._lookup = Lookup(key, [peer.to_bytes() for peer in start], dht.local_peer_id.to_bytes())

    async def run(self) -> None:
        if self._take(self._dht.provider_store.get_providers(self._key)):
            return
        async with trio.open_nursery() as nursery:
            self._ask_more(nursery)

    def _ask_more(self, nursery: trio.Nursery) -> None:
        for peer in self._lookup.next():
            nursery.start_soon(self._ask, peer, nursery)

    async def _ask(self, peer: bytes, nursery: trio.Nursery) -> None:
        answer = await detached(self._spawn, partial(self._query, peer), seconds=QUERY_SECONDS)
        providers, closer = answer if answer is not None else ([], [])
        if providers or closer:
            self._lookup.answered(peer, [other.to_bytes() for other in closer])
        else:
            self._lookup.failed(peer)
        if self._take(providers):
            nursery.cancel_scope.cancel()
        else:
            self._ask_more(nursery)

    async def _query(self, peer: bytes) -> tuple[list[PeerInfo], list[ID]]:
        async with _limiter(self._dht, peer):
            return await self._dht.provider_store._get_providers_from_peer_with_closers(ID(peer), self._key)

    def _take(self, providers: list[PeerInfo]) -> bool:
        """Pass new providers on; whether it is enough."""
        enough = False
        for info in providers:
            peer_id = PeerId(str(info.peer_id))
            if peer_id not in self._named:
                self._named.add(peer_id)
                enough = self._found(peer_id) or enough
        return enough
