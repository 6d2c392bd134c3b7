"""Who serves a shard, when the local view does not know: linked peers are asked, then the DHT.

Owns: one search and its deadlines. Does not own: the view (``directory``), DHT queries (``kademlia``).

Invariants:
1. What the view knows is answered at once; a peer counts as a provider only by its own verified advert.
2. A search takes at most :data:`PEERS_SECONDS` for linked peers and :data:`DHT_SECONDS` for the DHT, and ends with the
   first provider found. A peer that the DHT names must answer itself; one that does not counts (by the advert it left
   in the DHT) only if none does.
"""

import logging
import random
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import trio

from config.errors import BusyError, RequestError, RiosError
from config.vocabulary import PeerId
from p2p.checks import Checks
from p2p.core.providing import INDEX_MAX, model_key, shard_key
from p2p.core.view import View
from p2p.face import Buffer, Call, Header, Reply
from p2p.host import Host

log = logging.getLogger(__name__)

NAMESPACE = "node"
"""Of adverts in the DHT, by peer id."""
ASKED_PEERS = 6
PEERS_SECONDS = 1.0
DHT_SECONDS = 12.0
SEARCHES_MAX = 8
"""DHT look-ups at the same time; others wait within their time."""
GIVEN_MAX = 8
CONTACT_MS = 2000
CONTACTS_MAX = 20


class Caller(Protocol):
    """What the directory needs of the network."""

    def peers(self) -> Sequence[PeerId]:
        """Linked peers."""

    def is_linked(self, peer_id: PeerId) -> bool:
        """Whether a peer is linked."""

    async def call(
        self, peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer] = (), *, deadline_ms: int
    ) -> Reply:
        """Call one."""


class Adverts(Protocol):
    """What a search needs of the directory."""

    view: View
    checks: Checks

    def providers(self, model_id: str, index: int) -> Sequence[PeerId]:
        """Who serves a shard, as far as the view knows."""

    async def take(self, sender: PeerId, buffers: Sequence[Buffer]) -> None:
        """Take adverts in."""

    def take_found(self, data: bytes) -> None:
        """Take one from the DHT in."""

    async def exchange(self, peer_id: PeerId, *, deadline_ms: int) -> None:
        """Exchange adverts with a peer."""


class Finder:
    """Searches beyond the local view."""

    def __init__(self, directory: Adverts, host: Host, caller: Caller) -> None:
        self._directory = directory
        self._host = host
        self._caller = caller
        self.searches = 0
        self.dht_searches = 0
        self._searching = trio.CapacityLimiter(SEARCHES_MAX)

    async def find(self, model_id: str, index: int | None) -> Sequence[PeerId]:
        """See :meth:`p2p.face.Directory.find_providers`."""
        _check(model_id, index)
        if found := self._known(model_id, index):
            return found
        self.searches += 1
        if index is not None:
            with trio.move_on_after(PEERS_SECONDS):
                await self._ask_peers(model_id, index)
            if found := self._known(model_id, index):
                return found
        await self.look_up(model_id, index)
        return self._known(model_id, index)

    def _known(self, model_id: str, index: int | None) -> Sequence[PeerId]:
        if index is not None:
            return self._directory.providers(model_id, index)
        return [peer for peer, advert in self._directory.view.adverts().items() if advert.offer(model_id) is not None]

    # -- linked peers

    async def serve(self, call: Call) -> Reply:
        """``advert.find``: some adverts of who serves ``shard`` of ``model``, as far as this node's view goes."""
        model_id, index = call.header.get("model"), call.header.get("shard")
        if not isinstance(model_id, str) or type(index) is not int:
            raise RequestError("invalid_request", "advert.find: 'model' is a model id and 'shard' a number")
        _check(model_id, index)
        view = self._directory.view
        if not self._directory.checks.may_look(call.peer_id, view.looks(model_id, index)):
            raise BusyError("advert.find: too many searches", retry_after_ms=1000)
        found = (view.signed(peer) for peer in view.some_providers(model_id, index, GIVEN_MAX))
        return Reply({}, [signed.data for signed in found if signed is not None])

    async def _ask_peers(self, model_id: str, index: int) -> None:
        """Ask some linked peers at once; returns at the first that knows a provider."""

        async def ask(peer_id: PeerId) -> None:
            header = {"model": model_id, "shard": index}
            try:
                reply = await self._caller.call(peer_id, "advert.find", header, deadline_ms=int(PEERS_SECONDS * 1000))
            except RiosError as error:
                log.debug("asking %s for providers: %s", peer_id, error)
                return
            await self._directory.take(peer_id, reply.buffers[:GIVEN_MAX])
            if self._known(model_id, index):
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for peer_id in sample(self._caller.peers(), ASKED_PEERS):
                nursery.start_soon(ask, peer_id)

    # -- the DHT

    async def look_up(self, model_id: str, index: int | None) -> Sequence[PeerId]:
        """Ask the DHT, whatever the view knows; the providers it led to. The shard's key and the model's are looked up
        at once: a node with very many shards announces only the rarest one by one."""
        _check(model_id, index)
        self.dht_searches += 1
        keys = [model_key(model_id)] + ([shard_key(model_id, index)] if index is not None else [])
        search = _Search(self, model_id, index)
        with trio.move_on_after(DHT_SECONDS):
            async with self._searching, trio.open_nursery() as nursery:
                for key in keys:
                    nursery.start_soon(self._host.find_providers, key, partial(search.named, nursery))
        return tuple(search.confirmed or search.unheard)

    async def contact(self, peer_id: PeerId) -> bool:
        """Hear from a provider itself; whether it lives and the view has its advert."""
        if not self._caller.is_linked(peer_id):
            await self._directory.exchange(peer_id, deadline_ms=CONTACT_MS)
        return self._caller.is_linked(peer_id) and peer_id in self._directory.view

    async def read_up(self, peer_id: PeerId) -> None:
        """Bring the advert of a peer that does not answer here from the DHT: it may be out of our reach only."""
        if peer_id not in self._directory.view:
            data = await self._host.get_record(NAMESPACE, peer_id)
            if data is not None:
                self._directory.take_found(data)

    def serves(self, peer_id: PeerId, model_id: str, index: int | None) -> bool:
        """Whether a peer's advert says so."""
        advert = self._directory.view.get(peer_id)
        offer = advert.offer(model_id) if advert else None
        return offer is not None and (index is None or offer.holds(index))


class _Search:
    """One look-up in the DHT under several keys: contacts whom it names, ends with the first who serves the shard."""

    def __init__(self, finder: Finder, model_id: str, index: int | None) -> None:
        self._finder = finder
        self._model_id = model_id
        self._index = index
        self._named: set[PeerId] = set()
        self.confirmed: list[PeerId] = []
        self.unheard: list[PeerId] = []

    def named(self, nursery: trio.Nursery, peer_id: PeerId) -> bool:
        """Contact a peer that somebody named, once; the look-up goes on meanwhile."""
        if peer_id not in self._named and len(self._named) < CONTACTS_MAX:
            self._named.add(peer_id)
            nursery.start_soon(self._confirm, peer_id, nursery)
        return False

    async def _confirm(self, peer_id: PeerId, nursery: trio.Nursery) -> None:
        if await self._finder.contact(peer_id):
            if self._finder.serves(peer_id, self._model_id, self._index):
                self.confirmed.append(peer_id)
                nursery.cancel_scope.cancel()
            return
        await self._finder.read_up(peer_id)
        if self._finder.serves(peer_id, self._model_id, self._index):
            self.unheard.append(peer_id)


def _check(model_id: str, index: int | None) -> None:
    if len(model_id) != 64 or not set(model_id) <= set("0123456789abcdef"):
        raise RequestError("invalid_request", f"{model_id[:80]!r} is not a model id", "64 hex digits: rios model list")
    if index is not None and not 0 <= index <= INDEX_MAX:
        raise RequestError("invalid_request", f"{index} is not a shard's index", f"0 to {INDEX_MAX}")


def sample(peers: Sequence[PeerId], count: int) -> list[PeerId]:
    """At most ``count`` of them, by chance."""
    return random.sample(list(peers), min(count, len(peers)))
