"""Relaying: connections to and from peers that nobody can dial, through a public peer that is willing.

Owns: this node's reservations at relays, its part as caller, as called peer and as relay. Does not own: the books
(``core.relay``), the bytes (``splice``), links.

``relay.reserve``: a private node keeps a place at a relay that it has a link to. ``relay.connect``: a caller asks that
relay for the peer. The relay first has the peer dial the caller (connection reversal), if the caller has an address
that leads to it; else both ends dial the relay with a token and it splices them (``relay.incoming`` tells the peer).

Invariants:
1. A relay dials nobody; it tells a peer to dial only an address of the very host that the caller's connection comes
   from. A peer follows only relays that it reserved at, :data:`INCOMING_PER_S` times a second.
2. Relays are used over direct links only: there is no relaying of relayed connections.
3. A relay that is lost or runs full is replaced by another; the advert names only those with a reservation.
4. A caller follows :data:`WAYS_MAX` ways of a peer's advert at most, and only through relays whose own advert it has,
   at the addresses that these give: nobody makes it dial whom it would not dial anyhow.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from os import urandom
from typing import Any, Protocol

import trio

from config.errors import BusyError, IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from p2p.core import addresses, reach
from p2p.core.advert import TEXT_CHARS_MAX, Advert
from p2p.core.backoff import Backoff
from p2p.core.buckets import Bucket
from p2p.core.relay import RESERVATION_S, TOKEN_BYTES, Books
from p2p.face import Buffer, Call, Header, Reply
from p2p.guarded import Nursery
from p2p.splice import enter

log = logging.getLogger(__name__)

RELAYS_WANTED = 2
ADDRESSES_PER_RELAY = 2
WAYS_MAX = 3
ASKED_AT_ONCE = 4
REFUSED_RETRY_S = (15.0, 600.0)
"""Between two tries at a relay that gave no place."""
FAILED_KEPT_MAX = 1024
LOOK_S = 5.0
ASK_MS = 5000
CONNECT_MS = 9000
REVERSAL_S = 3.0
ARRIVAL_S = 2.0
INCOMING_PER_S, INCOMING_BURST = 8.0, 32.0


class Ends(Protocol):
    """What relaying needs of links and calls."""

    def peers(self) -> Sequence[PeerId]:
        """Linked peers."""

    def host_of(self, peer_id: PeerId) -> str:
        """The host at the other end of the direct link to a peer; empty if it is relayed or there is none."""

    def round_trip_s(self, peer_id: PeerId) -> float:
        """The last round trip to a linked peer."""

    def may_dial(self, peer_id: PeerId) -> bool:
        """Whether one peer more may be dialled only because it leads to another."""

    async def dial_at(self, peer_id: PeerId, texts: Sequence[str], *, spare: bool = False) -> None:
        """Have a direct link to a peer, dialled at these addresses; a ``spare`` one makes room for others. Raises
        RemoteError ``unavailable``."""

    async def adopt(
        self, socket: trio.socket.SocketType, peer_id: PeerId, relay: PeerId, far: str, *, initiator: bool
    ) -> None:
        """Make a link of a socket that leads to a peer through a relay, which sees it come from the host ``far``; owns
        it from now on."""

    async def wait_linked(self, peer_id: PeerId) -> None:
        """Return when there is a link to a peer."""

    async def call(
        self, peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer] = (), *, deadline_ms: int
    ) -> Reply:
        """Call one."""


@dataclass(slots=True)
class _Reservation:
    renew_at: float
    expires: float


class Relay:
    """All three parts. ``changed`` is called when :meth:`addresses` became others."""

    def __init__(
        self,
        own: PeerId,
        ends: Ends,
        books: Books,
        nursery: Nursery,
        *,
        adverts: Callable[[], Mapping[PeerId, Advert]],
        dialable: Callable[[], Sequence[str]],
        willing: Callable[[], bool],
        needed: Callable[[], bool],
        changed: Callable[[], None],
    ) -> None:
        self._own = own
        self._ends = ends
        self.books = books
        self._nursery = nursery
        self._adverts = adverts
        self._dialable = dialable
        self.willing = willing
        self._needed = needed
        self._changed = changed
        self._reserved: dict[PeerId, _Reservation] = {}
        self._failed = Backoff(*REFUSED_RETRY_S, growth=2, kept_max=FAILED_KEPT_MAX)
        self._incoming = Bucket(INCOMING_PER_S, INCOMING_BURST)
        self._wake = trio.Event()
        self.reversed = self.spliced = 0

    # -- reservations of this node

    @property
    def relays(self) -> Sequence[PeerId]:
        """Where this node has a reservation."""
        return tuple(self._reserved)

    def addresses(self) -> tuple[str, ...]:
        """The ways to this node through its relays."""
        found = []
        for relay in self._reserved:
            advert = self._adverts().get(relay)
            for address in _direct(advert)[:ADDRESSES_PER_RELAY] if advert else ():
                found.append(f"{address.partition('/p2p/')[0]}/p2p/{relay}/p2p-circuit/p2p/{self._own}")
        # a relay with an overlong name must not spoil this node's advert
        return tuple(text for text in found if len(text) <= TEXT_CHARS_MAX)

    def look(self) -> None:
        """Something changed: look at the reservations at once."""
        self._wake.set()

    def link_down(self, peer_id: PeerId) -> None:
        """A peer is gone: as a relay, and as one that reserved here."""
        self.books.release(peer_id)
        if self._reserved.pop(peer_id, None) is not None:
            log.info("relay %s is lost", peer_id)
            self._changed()
            self.look()

    async def run(self) -> None:
        """Keep reservations while they are needed, for ever."""
        while True:
            self._wake = trio.Event()
            before = self.addresses()
            if self._needed():
                await self._reserve()
            else:
                self._reserved.clear()
            if self.addresses() != before:
                self._changed()
            with trio.move_on_after(LOOK_S):
                await self._wake.wait()

    async def _reserve(self) -> None:
        now = trio.current_time()
        async with trio.open_nursery() as nursery:
            for relay, kept in list(self._reserved.items()):
                if kept.expires <= now or not self._ends.host_of(relay):
                    del self._reserved[relay]
                elif kept.renew_at <= now:
                    nursery.start_soon(self._ask_for_place, relay)
            nursery.start_soon(self._find_places)

    async def _find_places(self) -> None:
        """Ask a few peers at a time until there are relays enough."""
        candidates = iter(self._candidates())

        async def ask_on() -> None:
            for relay in candidates:
                if len(self._reserved) < RELAYS_WANTED:
                    await self._ask_for_place(relay)
                if len(self._reserved) >= RELAYS_WANTED:
                    nursery.cancel_scope.cancel()
                    return

        async with trio.open_nursery() as nursery:
            for _ in range(ASKED_AT_ONCE):
                nursery.start_soon(ask_on)

    def _candidates(self) -> list[PeerId]:
        """Linked peers that pass on and did not fail just now, the nearest first, those not measured yet last."""
        adverts, now = self._adverts(), trio.current_time()
        found = [
            peer
            for peer in self._ends.peers()
            if peer not in self._reserved
            and peer in adverts
            and adverts[peer].relay
            and self._ends.host_of(peer)
            and self._failed.is_due(peer, now)
        ]
        return sorted(found, key=self._distance_s)

    def _distance_s(self, peer_id: PeerId) -> float:
        return self._ends.round_trip_s(peer_id) or inf

    async def _ask_for_place(self, relay: PeerId) -> None:
        try:
            answer = await self._ends.call(relay, "relay.reserve", {}, deadline_ms=ASK_MS)
        except RiosError as error:
            log.debug("relay %s gives no place: %s", relay, error)
            self._failed.put_off(relay, trio.current_time(), random.uniform(0.7, 1.3))
            return
        seconds = answer.header.get("seconds")
        lasts = min(seconds, RESERVATION_S) if isinstance(seconds, int) and seconds > 0 else 0
        now = trio.current_time()
        if lasts:
            self._failed.forget(relay)
            if relay not in self._reserved and len(self._reserved) >= RELAYS_WANTED:
                return  # others that were asked at the same time were faster
            self._reserved[relay] = _Reservation(now + lasts / 2, now + lasts)
        else:
            self._failed.put_off(relay, now, random.uniform(0.7, 1.3))

    # -- as relay

    async def serve_reserve(self, call: Call) -> Reply:
        """``relay.reserve``: a place for the caller."""
        await trio.lowlevel.checkpoint()
        if not self.willing():
            raise RemoteError("forbidden", "this node passes nothing on (p2p.relay is off, or it is not public itself)")
        if not self._ends.host_of(call.peer_id):
            raise RemoteError("forbidden", "a relay is reserved over a direct connection only")
        return Reply({"seconds": self.books.reserve(call.peer_id, trio.current_time())})

    async def serve_connect(self, call: Call) -> Reply:
        """``relay.connect``: bring the caller together with a peer that reserved here."""
        target, wanted = call.header.get("peer"), call.header.get("addresses")
        if not isinstance(target, str) or not isinstance(wanted, list):
            raise IntegrityError("protocol", "relay.connect: 'peer' must be a peer id, 'addresses' a list")
        host = self._ends.host_of(call.peer_id)
        if not self.willing() or not host:
            raise RemoteError("forbidden", "this node passes nothing on, or not for a relayed caller")
        peer_id = PeerId(target)
        self.books.ask(call.peer_id, peer_id, trio.current_time())
        told: dict[str, Any] = {"peer": call.peer_id, "host": host, "addresses": list(reach.allowed(wanted, host))}
        if told["addresses"]:
            answer = await self._ends.call(peer_id, "relay.incoming", told, deadline_ms=ASK_MS)
            if answer.header.get("reversed") is True:
                self.reversed += 1
                return Reply({"reversed": True})
        token, theirs = urandom(TOKEN_BYTES), urandom(TOKEN_BYTES)
        tokens = {token: call.peer_id, theirs: peer_id}
        circuit = self.books.open(tokens, call.peer_id, peer_id, trio.current_time())
        try:
            await self._ends.call(peer_id, "relay.incoming", {**told, "token": theirs}, deadline_ms=ASK_MS)
        except RiosError:
            self.books.close(circuit)
            raise
        return Reply({"token": token, "host": self._ends.host_of(peer_id)})

    # -- as the called peer

    async def serve_incoming(self, call: Call) -> Reply:
        """``relay.incoming``: a relay of ours says that somebody wants us."""
        caller, token, wanted = (call.header.get(key) for key in ("peer", "token", "addresses"))
        if call.peer_id not in self._reserved:
            raise RemoteError("forbidden", "this node has no reservation there")
        if not isinstance(caller, str) or caller == self._own:
            raise IntegrityError("protocol", "relay.incoming: 'peer' must be another peer's id")
        if not self._incoming.take(1, trio.current_time()):
            raise BusyError("too many callers at once (limit: relay.incoming per second)", retry_after_ms=500)
        if isinstance(token, bytes) and len(token) == TOKEN_BYTES:
            far = self._believed(call.peer_id, call.header.get("host"))
            self._nursery.start_soon(self._enter, call.peer_id, token, PeerId(caller), far)
            return Reply({"coming": True})
        host = self._believed(call.peer_id, call.header.get("host"))
        texts = reach.allowed(wanted, host) if isinstance(wanted, list) else ()
        return Reply({"reversed": await self._dial_caller(PeerId(caller), texts)})

    def _believed(self, relay: PeerId, host: object) -> str:
        """The host that a relay says an end comes from; empty for what a node need not dial at anybody's word: names,
        and addresses on its own site unless the relay stands there, too."""
        if not isinstance(host, str) or not reach.is_ip(host):
            return ""
        here = reach.is_site(self._ends.host_of(relay))
        return host if here or not reach.is_site(host) else ""

    async def _dial_caller(self, caller: PeerId, texts: Sequence[str]) -> bool:
        with trio.move_on_after(REVERSAL_S):
            try:
                await self._ends.dial_at(caller, texts)
                return True
            except RiosError as error:
                log.debug("reversal to %s: %s", caller, error)
        return False

    async def _enter(self, relay: PeerId, token: bytes, caller: PeerId, far: str) -> None:
        try:
            address = self._entrance(relay)
            socket = await enter(*address, token, relay)
            await self._ends.adopt(socket, caller, relay, far, initiator=False)
        except RiosError as error:
            log.debug("circuit from %s: %s", caller, error)

    def _entrance(self, relay: PeerId) -> tuple[str, int]:
        """Where a relay's front door is: the host that the link to it leads to, at an advertised port."""
        host = self._ends.host_of(relay)
        advert = self._adverts().get(relay)
        for text in advert.addresses if advert else ():
            parsed = addresses.parse(text)
            if parsed is not None and not parsed.relay and (parsed.host == host or not host or not parsed.is_ip):
                return parsed.host, parsed.port
        raise RemoteError("unavailable", f"no address of the relay {relay} is known", peer_id=relay)

    # -- as the caller

    async def connect(self, peer_id: PeerId, texts: Sequence[str]) -> None:
        """Have a link to a peer that is reached through relays. Raises RemoteError ``unavailable``."""
        problem = RemoteError("unavailable", f"no relay leads to {peer_id}", peer_id=peer_id)
        for relay, own in self._ways(texts):
            try:
                await self._connect(peer_id, relay, own)
                return
            except RiosError as error:
                problem = RemoteError("unavailable", f"through {relay}: {error.message}", peer_id=peer_id)
        raise problem

    def _ways(self, texts: Sequence[str]) -> list[tuple[PeerId, tuple[str, ...]]]:
        """Relays in the addresses and where they are, linked ones first, then those with the shortest round trip."""
        adverts, linked = self._adverts(), set(self._ends.peers())
        found: dict[PeerId, tuple[str, ...]] = {}
        for relay, address in named(texts):
            advert = adverts.get(relay)
            if relay in found or relay == self._own or advert is None:
                continue
            if relay in linked or (advert.relay and self._ends.may_dial(relay)):
                own = _direct(advert)
                # the called peer knows which of its relay's addresses works for others; it cannot add to them
                found[relay] = tuple(sorted(own, key=lambda text: text.partition("/p2p/")[0] != address))
        ways = ((relay, own) for relay, own in found.items() if own)
        return sorted(ways, key=lambda way: (way[0] not in linked, self._distance_s(way[0])))[:WAYS_MAX]

    async def _connect(self, peer_id: PeerId, relay: PeerId, own: Sequence[str]) -> None:
        if not self._ends.host_of(relay):
            if not self._ends.may_dial(relay):
                raise RemoteError("unavailable", "this node has peers enough", peer_id=relay)
            await self._ends.dial_at(relay, own[:ADDRESSES_PER_RELAY], spare=True)
        asked = {"peer": peer_id, "addresses": [a.partition("/p2p/")[0] for a in self._dialable()]}
        answer = await self._ends.call(relay, "relay.connect", asked, deadline_ms=CONNECT_MS)
        token = answer.header.get("token")
        if isinstance(token, bytes) and len(token) == TOKEN_BYTES:
            doors = [parsed for text in own if (parsed := addresses.parse(text)) is not None]
            host = self._ends.host_of(relay)
            door = next((parsed for parsed in doors if parsed.host == host), doors[0])
            socket = await enter(door.host, door.port, token, relay)
            far = self._believed(relay, answer.header.get("host"))
            await self._ends.adopt(socket, peer_id, relay, far, initiator=True)
            self.spliced += 1
            return
        with trio.move_on_after(ARRIVAL_S):
            await self._ends.wait_linked(peer_id)
            return
        raise RemoteError("unavailable", f"{peer_id} did not call back", peer_id=peer_id)

    def statistics(self) -> dict[str, Any]:
        """Numbers for status and metrics."""
        return {
            "relays": list(self._reserved),
            "willing": self.willing(),
            "reversed": self.reversed,
            **self.books.statistics(),
        }


def named(texts: Sequence[str]) -> list[tuple[PeerId, str]]:
    """The relays that these addresses lead through, and where they are said to be (without ``/p2p/...``)."""
    ways = []
    for text in texts:
        parsed = addresses.parse(text)
        if parsed is not None and parsed.relay:
            ways.append((PeerId(parsed.relay), text.partition("/p2p/")[0]))
    return ways


def _direct(advert: Advert) -> tuple[str, ...]:
    return tuple(a for a in advert.addresses if (parsed := addresses.parse(a)) is not None and not parsed.relay)
