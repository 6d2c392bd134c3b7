"""Where peers can be dialled, kept from what py-libp2p writes beside it.

The library's peerstore takes every address that identify, a peer record or a DHT answer names: ``0.0.0.0`` of a peer
that listens everywhere (a dial to this very machine), the old addresses of one that says it cannot be dialled; a peer
record replaces all addresses, and an address where another peer answers clears them. Above 1000 peers it forgets those
that came first: this node's own keys, then its seeds.

Invariants:
1. Of a peer that :meth:`AddressBook.learn` was called for (its advert, or a seed), only those addresses are dialled.
2. Of others no address is dialled that leads nowhere in particular.
3. This node itself, connected and learned peers are never forgotten for others. Of those that were only heard of
   :data:`HEARD_MAX` are kept, the latest. Making room for one costs the same whatever the number of peers.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from typing import Any

from libp2p.peer.id import ID
from libp2p.peer.peerdata import PeerData
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from multiaddr import Multiaddr  # type: ignore[import-untyped]

LEARNED_MAX = 20_000
HEARD_MAX = 4096
HEARD_ADDRESSES_MAX = 16
"""Of one peer that was only heard of."""
FOR_EVER = 0
"""The library's ttl of what does not expire."""


class _Peers(dict[ID, PeerData]):
    """The library's table, which grows by ``setdefault`` only. What stands in it at first is this node's own."""

    def __init__(self, own: dict[ID, PeerData], entered: Callable[[ID], None]) -> None:
        super().__init__(own)
        self._entered = entered

    def setdefault(self, peer_id: ID, default: PeerData) -> PeerData:
        """The data of a peer, which may be new."""
        known = self.get(peer_id)
        if known is not None:
            return known
        self[peer_id] = default
        self._entered(peer_id)
        return default


class AddressBook:
    """Stands before a peerstore's address methods, and decides whom it forgets."""

    def __init__(self, store: PeerStore, connected: Callable[[ID], bool]) -> None:
        self._store = store
        self._connected = connected
        self._own = frozenset(store.peer_data_map)
        self._learned: dict[ID, tuple[Multiaddr, ...]] = {}
        self._heard: dict[ID, None] = {}
        """In the store, but not learned; the first came first."""
        store.peer_data_map = self._peers = _Peers(store.peer_data_map, self._entered)
        store.max_peers = sys.maxsize
        self._add, self._clear, self._consume = store.add_addrs, store.clear_addrs, store.consume_peer_record
        methods: Any = store
        methods.add_addrs, methods.clear_addrs, methods.consume_peer_record = self.add, self.clear, self.consume
        methods.peer_ids = self.peer_ids

    def learn(self, peer_id: ID, addresses: Sequence[Multiaddr]) -> None:
        """A peer can be dialled at these addresses, and nowhere else."""
        if peer_id in self._own:
            return
        self._learned.pop(peer_id, None)
        self._learned[peer_id] = tuple(addresses)
        for old in self._oldest(self._learned, LEARNED_MAX):
            del self._learned[old]
            if old in self._peers:
                self._entered(old)
        self._write(peer_id)

    def addresses(self, peer_id: ID) -> Sequence[Multiaddr]:
        """Where a peer can be dialled, as far as is known."""
        if peer_id in self._learned:
            return self._learned[peer_id]
        try:
            return self._store.addrs(peer_id)
        except PeerStoreError:
            return ()

    def _write(self, peer_id: ID) -> None:
        self._clear(peer_id)
        if self._learned[peer_id]:
            self._add(peer_id, list(self._learned[peer_id]), FOR_EVER)
        self._heard.pop(peer_id, None)

    # -- who is forgotten

    def _entered(self, peer_id: ID) -> None:
        """A peer that was not learned stands in the store."""
        if peer_id in self._learned:
            return
        self._heard[peer_id] = None
        for old in self._oldest(self._heard, HEARD_MAX):
            del self._heard[old]
            self._peers.pop(old, None)
            self._store.peer_record_map.pop(old, None)

    def _oldest(self, table: dict[ID, Any], most: int) -> Iterable[ID]:
        """The first ones, as long as there are too many, to be taken out. Connected peers move to the end, so that they
        are looked at once in a while only."""
        looked_at = 0
        while len(table) > most and looked_at < len(table):
            looked_at += 1
            first = next(iter(table))
            if self._connected(first):
                table[first] = table.pop(first)
            else:
                yield first

    # -- in the place of the library's own

    def add(self, peer_id: ID, addresses: Sequence[Multiaddr], ttl: int = 0) -> None:
        """The library heard of addresses."""
        usable = [address for address in addresses if leads_somewhere(address)]
        known = self._peers.get(peer_id)
        room = HEARD_ADDRESSES_MAX - (len(known.get_addrs()) if known is not None else 0)
        if usable and peer_id not in self._learned:
            self._add(peer_id, usable[: max(0, room)], ttl)

    def peer_ids(self) -> list[ID]:
        """Whom the DHT may ask and store at beside its routing table, while that is short: connected peers. Of
        thousands that are merely known the nearest to a key would push those out, alive or not."""
        return [peer_id for peer_id in self._peers if self._connected(peer_id)]

    def clear(self, peer_id: ID) -> None:
        """The library does not trust a peer's addresses any more."""
        if peer_id not in self._learned:
            self._clear(peer_id)

    def consume(self, envelope: Any, ttl: int) -> bool:  # noqa: ANN401 - the library's
        """A signed peer record came; the library clears the peer's addresses and adds those in it."""
        accepted = bool(self._consume(envelope, ttl))
        peer_id = envelope.record().peer_id if accepted else None
        if peer_id in self._learned:
            self._write(peer_id)
        return accepted


def leads_somewhere(address: Multiaddr) -> bool:
    """Whether an address is not the unspecified one."""
    try:
        name = address.protocols()[0].name
        return name not in ("ip4", "ip6") or not ip_address(address.value_for_protocol(name)).is_unspecified
    except (ValueError, LookupError):
        return False
