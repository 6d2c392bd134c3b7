"""Joins the parts of being reached: finding out (``reach``), relays (``relay``, ``splice``), and what the advert says.

Owns: the advert's ``addresses``, ``reach`` and ``relay``; whether this node serves the DHT; which addresses of others
are worth a dial. Does not own: links, rounds, books.

Invariants:
1. A node that nobody can dial advertises no address that is known not to work, serves no DHT queries (a client only),
   and is not taken into the routing tables of others.
2. A peer that says it cannot be dialled is not dialled, except through its relays and on this machine's own networks.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
import trio

from config.errors import RemoteError
from config.settings import P2pSettings
from config.vocabulary import PeerId
from p2p.core import reach
from p2p.core.relay import Books, Limits
from p2p.directory import PeerDirectory
from p2p.face import Buffer, Call, Header, Reply
from p2p.front import PROBE, SPLICE, Front
from p2p.guarded import Guarded
from p2p.host import Host
from p2p.links import Links
from p2p.networks import own_networks
from p2p.punch import Punch
from p2p.reach import Place, Reach
from p2p.relay import Relay, named
from p2p.splice import Splicer

READ_UP_S = 5.0

CallPeer = Callable[..., Awaitable[Reply]]


class _Ends:
    """:class:`p2p.relay.Ends` and :class:`p2p.reach.Neighbours`."""

    def __init__(self, links: Links, call: CallPeer) -> None:
        self.peers = links.peers
        self.host_of = links.host_of
        self.round_trip_s = links.round_trip_s
        self.may_dial = links.may_dial
        self.dial_at = links.dial_at
        self.adopt = links.adopt
        self.wait_linked = links.wait_linked
        self.far_host = links.far_host
        self._call = call

    async def call(
        self, peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer] = (), *, deadline_ms: int
    ) -> Reply:
        """Call a peer."""
        return await self._call(peer_id, method, header, buffers, deadline_ms=deadline_ms)


class Reachability:
    """How this node is reached, and how it reaches those who cannot be dialled."""

    def __init__(
        self,
        own: PeerId,
        settings: P2pSettings,
        front: Front,
        host: Host,
        links: Links,
        directory: PeerDirectory,
        call: CallPeer,
        nursery: Guarded,
        listening: Callable[[], tuple[str, ...]],
    ) -> None:
        self._own = own
        self._host = host
        self._links = links
        self._directory = directory
        self._nursery = nursery
        self._auto = settings.relay == "auto"
        first = listening()
        self._loopback = all(reach.is_loopback(reach.host_of(address)) for address in first)
        self._port = next((int(address.rpartition("/")[2]) for address in first), 0)
        ends = _Ends(links, call)
        place = Place(listening, self._port, settings.announce, self._loopback, settings.upnp)
        self.reach = Reach(own, ends, place, self._changed)
        limits = Limits(**{name: getattr(settings, name) for name in Limits.__dataclass_fields__})
        self.relay = Relay(
            own,
            ends,
            Books(limits),
            nursery,
            adverts=directory.adverts,
            dialable=lambda: self.reach.state.addresses or listening(),
            willing=lambda: self._auto and self.reach.state.reach == reach.PUBLIC,
            needed=lambda: self._auto and self.reach.state.reach == reach.PRIVATE,
            changed=self._changed,
        )
        self.punch = Punch(ends, nursery, lambda: self._port)
        host.keep_out(self._is_client)
        links.detour, links.straighten = self.connect, self.straighten
        front.accept(PROBE, self.reach.on_probe)
        splicer = Splicer(self.relay.books)
        front.accept(SPLICE, splicer.serve)
        front.doors.on_ban(splicer.end)
        self._changed()

    def handlers(self) -> Mapping[str, Callable[[Call], Awaitable[Reply]]]:
        """What is served, by method."""
        return {
            "reach.observed": self.reach.serve_observed,
            "reach.probe": self.reach.serve_probe,
            "reach.punch": self.punch.serve,
            "relay.reserve": self.relay.serve_reserve,
            "relay.connect": self.relay.serve_connect,
            "relay.incoming": self.relay.serve_incoming,
        }

    def run(self) -> None:
        """Start the background work."""
        self._nursery.keep(self.reach.run)
        self._nursery.keep(self.relay.run)

    # -- the own advert

    def _changed(self) -> None:
        """Say in the advert what is known now."""
        state = self.reach.state
        relayed = self.relay.addresses() if state.reach == reach.PRIVATE else ()
        word = reach.RELAYED if relayed else state.reach
        bare = reach.advertised(state, self.reach.listening(), relayed)
        texts = tuple(a if reach.CIRCUIT in a else f"{a}/p2p/{self._own}" for a in bare)[: reach.CANDIDATES_MAX]
        willing = self.relay.willing()
        own = self._directory.own()
        if (own.addresses, own.reach, own.relay) != (texts, word, willing):
            self._directory.update(
                lambda advert: msgspec.structs.replace(advert, addresses=texts, reach=word, relay=willing)
            )
        self._host.serve_dht(state.reach != reach.PRIVATE)
        self.relay.look()

    # -- others

    def link_up(self, peer_id: PeerId) -> None:
        """A peer was reached."""
        self.reach.link_up()
        self.relay.look()

    def link_down(self, peer_id: PeerId) -> None:
        """A peer is gone."""
        self.relay.link_down(peer_id)

    async def connect(self, peer_id: PeerId) -> None:
        """Have a link to a peer through its relays. Raises RemoteError ``unavailable``."""
        known = self._directory.adverts()
        advert = known.get(peer_id)
        if advert is None or advert.reach != reach.RELAYED:
            raise RemoteError("unavailable", f"no relay leads to {peer_id}", peer_id=peer_id)
        relays = [relay for relay, _ in named(advert.addresses)]
        if relays and not any(relay in known for relay in relays):
            with trio.move_on_after(READ_UP_S):  # in a swarm that is larger than the view
                await self._directory.finder.read_up(relays[0])
        await self.relay.connect(peer_id, advert.addresses)

    async def straighten(self, peer_id: PeerId) -> None:
        """Try to have a direct link beside a relayed one: both ends dial what the advert says; who opened the relayed
        link asks for a hole. Raises RemoteError if the dial fails."""
        advert = self._directory.adverts().get(peer_id)
        texts = reach.worth_dialling(advert.addresses, advert.reach, own_networks) if advert else ()
        if texts:
            await self._links.dial_at(peer_id, texts)
            return
        link = self._links.ready(peer_id)
        if link is not None and link.carrier.outbound:
            await self.punch.to(peer_id)

    def _is_client(self, peer_id: PeerId) -> bool:
        advert = self._directory.adverts().get(peer_id)
        return advert is not None and advert.reach in (reach.RELAYED, reach.PRIVATE)

    # -- for people

    def standing(self) -> dict[str, Any]:
        """Public, relayed or private, why, and what to do: for ``rios status`` and ``rios doctor``."""
        here = next((reach.host_of(a) for a in self.reach.listening()), "this machine")
        word, why, fix = reach.explain(
            self.reach.state, relays=self.relay.relays, port=self._port, host=here, loopback=self._loopback
        )
        if self.reach.declared and not self._loopback:
            word, why = reach.PUBLIC, "p2p.announce says so; nobody was asked"
        if word == reach.PRIVATE and not self._auto:
            fix += "; or set p2p.relay to auto"
        return {"reach": word, "why": why, "fix": fix, "advertised": list(self._directory.own().addresses)}

    def statistics(self) -> dict[str, Any]:
        """Numbers."""
        return {
            "reach": self.reach.state.reach,
            **self.reach.statistics(),
            "relay": self.relay.statistics(),
            "holes_punched": self.punch.opened,
        }
