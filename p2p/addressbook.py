"""Where peers can be dialled, kept from what py-libp2p writes beside it.

The library's peerstore takes every address that identify, a peer record or a DHT answer names: ``0.0.0.0`` of a peer
that listens everywhere (a dial to this very machine), the old addresses of one that says it cannot be dialled; a peer
record replaces all addresses, and an address where another peer answers clears them.

Invariants:
1. Of a peer that :meth:`AddressBook.learn` was called for (its advert, or a seed), only those addresses are dialled.
2. Of others no address is dialled that leads nowhere in particular.
"""

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

LEARNED_MAX = 20_000
LIFE_SECONDS = 24 * 3600


class AddressBook:
    """Stands before a peerstore's address methods."""

    def __init__(self, store: Any) -> None:  # noqa: ANN401 - the library's, whose methods are replaced
        self._store = store
        self._learned: dict[ID, tuple[Multiaddr, ...]] = {}
        self._add, self._clear, self._consume = store.add_addrs, store.clear_addrs, store.consume_peer_record
        store.add_addrs, store.clear_addrs, store.consume_peer_record = self.add, self.clear, self.consume

    def learn(self, peer_id: ID, addresses: Sequence[Multiaddr]) -> None:
        """A peer can be dialled at these addresses, and nowhere else."""
        self._learned.pop(peer_id, None)
        self._learned[peer_id] = tuple(addresses)
        while len(self._learned) > LEARNED_MAX:
            del self._learned[next(iter(self._learned))]
        self._write(peer_id)

    def _write(self, peer_id: ID) -> None:
        self._clear(peer_id)
        if self._learned[peer_id]:
            self._add(peer_id, list(self._learned[peer_id]), LIFE_SECONDS)

    # -- in the place of the library's own

    def add(self, peer_id: ID, addresses: Sequence[Multiaddr], ttl: int = 0) -> None:
        """The library heard of addresses."""
        usable = [address for address in addresses if leads_somewhere(address)]
        if usable and peer_id not in self._learned:
            self._add(peer_id, usable, ttl)

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
