"""Adverts of the swarm: a local view that answers at once, kept fresh in the background.

Owns: the view, the own advert's life (change, sign, publish, heartbeat). Does not own: links, dialling.

Adverts spread in four ways, because none is enough: pushed to linked peers, gossiped, pulled from a few peers every
:data:`PULL_SECONDS` and on every new link (anti-entropy), and put into the DHT for strangers.

Invariants:
1. Only verified, unexpired adverts stand in the view; a higher ``seq`` wins.
2. A peer reported down leaves the view, and comes back only with a newer advert or a live link.
3. The view never depends on the DHT answering.
4. The view is bounded in number and bytes. When it is full, linked peers push out strangers, never the other way.
"""

import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import msgspec
import trio

from config.errors import IntegrityError, RiosError
from config.vocabulary import PeerId
from p2p.core.advert import Advert, SignedAdvert, newer, open_advert, peer_of, sign
from p2p.core.identity import Identity
from p2p.face import Buffer, Call, Header, RecordRule, Reply
from p2p.host import Host

log = logging.getLogger(__name__)

TOPIC = "rios/advert/1"
NAMESPACE = "node"
COLLECT_SECONDS = 0.1
PULL_SECONDS = 10.0
PULL_PEERS = 2
PUSH_PEERS = 16
LIVES = 5
"""Heartbeats an advert lives."""
DHT_HEARTBEATS = 5
VIEW_MAX = 10_000
VIEW_BYTES_MAX = 32 << 20
EXCHANGE_BYTES_MAX = 1 << 20
BUFFERS_MAX = 200


class Caller(Protocol):
    """What the directory needs of the network."""

    def peers(self) -> Sequence[PeerId]:
        """Linked peers."""

    async def call(
        self, peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer] = (), *, deadline_ms: int
    ) -> Reply:
        """Call one."""


def now_ms() -> int:
    """Unix time in ms."""
    return time.time_ns() // 1_000_000


class PeerDirectory:
    """:class:`p2p.face.Directory` over the swarm."""

    def __init__(self, identity: Identity, host: Host, caller: Caller, own: Advert, *, advert_seconds: int) -> None:
        self._identity = identity
        self._host = host
        self._caller = caller
        self._heartbeat_s = float(advert_seconds)
        self._life_ms = max(LIVES * advert_seconds, 30) * 1000
        self._view: dict[PeerId, SignedAdvert] = {}
        self._view_bytes = 0
        self._adverts: dict[PeerId, Advert] = {}
        self._gone: dict[PeerId, int] = {}
        self._changed = trio.Event()
        self._dirty = trio.Event()
        self._provided: set[str] = set()
        self._own = own
        self._renew()
        host.accept_records(NAMESPACE, RecordRule(_check_record, _select_record))

    # -- face

    def adverts(self) -> Mapping[PeerId, Advert]:
        """Every advert in the view."""
        return MappingProxyType(self._adverts)

    def own(self) -> Advert:
        """The own advert."""
        return self._own

    def update(self, change: Callable[[Advert], Advert]) -> None:
        """Change the own advert; the view shows it at once, the others soon."""
        self._own = change(self._own)
        self._renew()
        self._dirty.set()

    async def wait_change(self) -> None:
        """Return after the next change of the view."""
        await self._changed.wait()

    async def find_providers(self, model_id: str) -> None:
        """Ask the DHT who serves a model and take their adverts in."""
        for peer_id in await self._host.find_providers(model_id):
            if peer_id not in self._view and peer_id != self._identity.peer_id:
                data = await self._host.get_record(NAMESPACE, peer_id)
                if data is not None:
                    self.offer(data)

    def accept_records(self, namespace: str, rule: RecordRule) -> None:
        """See :meth:`p2p.face.Directory.accept_records`."""
        self._host.accept_records(namespace, rule)

    async def put_record(self, namespace: str, key: str, value: bytes) -> None:
        """See :meth:`p2p.face.Directory.put_record`."""
        await self._host.put_record(namespace, key, value)

    async def get_record(self, namespace: str, key: str) -> bytes | None:
        """See :meth:`p2p.face.Directory.get_record`."""
        return await self._host.get_record(namespace, key)

    # -- the view

    def offer(self, data: bytes) -> bool:
        """Take an advert in if it is valid and new; whether it was."""
        signed = open_advert(data, now_ms=now_ms())
        peer_id = peer_of(signed.advert)
        if peer_id == self._identity.peer_id or signed.advert.seq <= self._gone.get(peer_id, -1):
            return False
        known = self._view.get(peer_id)
        if newer(known, signed) is known or not self._make_room(peer_id, known, len(data)):
            return False
        self._gone.pop(peer_id, None)
        self._host.learn(peer_id, signed.advert.addresses)
        self._store(peer_id, signed)
        return True

    def _make_room(self, peer_id: PeerId, known: SignedAdvert | None, size: int) -> bool:
        """Whether the advert may come in; strangers leave for a linked peer's."""
        more = size - (len(known.data) if known else 0)

        def fits() -> bool:
            return len(self._view) + (known is None) <= VIEW_MAX and self._view_bytes + more <= VIEW_BYTES_MAX

        if fits():
            return True
        linked = {*self._caller.peers(), self._identity.peer_id}
        if peer_id in linked:
            for stranger in [peer for peer in self._view if peer not in linked]:
                self._remove(stranger)
                if fits():
                    return True
        return False

    def _store(self, peer_id: PeerId, signed: SignedAdvert) -> None:
        known = self._view.get(peer_id)
        self._view_bytes += len(signed.data) - (len(known.data) if known else 0)
        self._view[peer_id] = signed
        # a new dict each time: whoever looked at the old view keeps it
        self._adverts = {**self._adverts, peer_id: signed.advert}
        self._wake()

    def _remove(self, peer_id: PeerId) -> None:
        gone = self._view.pop(peer_id, None)
        if gone is not None:
            self._view_bytes -= len(gone.data)
            self._adverts = {peer: advert for peer, advert in self._adverts.items() if peer != peer_id}
            self._wake()

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    def _renew(self) -> None:
        """Sign the own advert again, with a higher number and a new end of life."""
        seq = max(now_ms(), self._own.seq + 1)
        self._own = msgspec.structs.replace(
            self._own, peer_id=self._identity.peer_id, seq=seq, expires_ms=seq + self._life_ms
        )
        self._store(self._identity.peer_id, sign(self._identity, self._own))

    def link_down(self, peer_id: PeerId) -> None:
        """A peer is gone: what was known of it counts no more."""
        signed = self._view.get(peer_id)
        if signed is not None and peer_id != self._identity.peer_id:
            self._gone[peer_id] = signed.advert.seq
            if len(self._gone) > VIEW_MAX:
                del self._gone[next(iter(self._gone))]
            self._remove(peer_id)

    def link_up(self, peer_id: PeerId) -> None:
        """A peer is there (again)."""
        self._gone.pop(peer_id, None)

    # -- exchange

    async def serve_exchange(self, call: Call) -> Reply:
        """``advert.exchange``: takes the caller's adverts; gives those it lacks and names those it has newer."""
        self._offer_all(call.peer_id, call.buffers)
        known = call.header.get("known")
        if not isinstance(known, dict) or len(known) > VIEW_MAX:
            raise IntegrityError("protocol", "advert.exchange: 'known' must map peer ids to numbers")
        give: list[bytes] = []
        size = 0
        for peer_id, signed in self._view.items():
            seq = known.get(peer_id, -1)
            if not isinstance(seq, int) or signed.advert.seq > seq:
                size += len(signed.data)
                if size > EXCHANGE_BYTES_MAX or len(give) >= BUFFERS_MAX:
                    break
                give.append(signed.data)
        want = [peer for peer, seq in known.items() if isinstance(seq, int) and seq > self._seq(peer)]
        return Reply({"want": want[:BUFFERS_MAX]}, give)

    def _seq(self, peer_id: Any) -> int:  # noqa: ANN401 - a stranger's key
        signed = self._view.get(peer_id)
        return signed.advert.seq if signed else self._gone.get(peer_id, -1)

    async def serve_push(self, call: Call) -> Reply:
        """``advert.push``: takes adverts."""
        self._offer_all(call.peer_id, call.buffers)
        return Reply({})

    def _offer_all(self, sender: PeerId, buffers: Sequence[Buffer]) -> None:
        for data in buffers:
            self._try_offer(sender, bytes(data))

    def _try_offer(self, sender: PeerId, data: bytes) -> None:
        try:
            self.offer(data)
        except IntegrityError as error:
            log.debug("%s sent a bad advert: %s", sender, error)

    async def exchange(self, peer_id: PeerId) -> None:
        """One round of anti-entropy with a linked peer."""
        known = {peer: signed.advert.seq for peer, signed in self._view.items()}
        own = self._view[self._identity.peer_id].data
        try:
            reply = await self._caller.call(peer_id, "advert.exchange", {"known": known}, [own], deadline_ms=5000)
            self._offer_all(peer_id, reply.buffers)
            want = reply.header.get("want")
            data = [self._view[p].data for p in want if p in self._view] if isinstance(want, list) else []
            if data:
                await self._caller.call(peer_id, "advert.push", {}, data[:BUFFERS_MAX], deadline_ms=5000)
        except RiosError as error:
            log.debug("exchanging adverts with %s: %s", peer_id, error)

    async def on_gossip(self, sender: PeerId, payload: bytes) -> None:
        """An advert from the topic; the sender is the one who published it, who may pass on another's."""
        self._try_offer(sender, payload)

    # -- tasks

    async def run(self, publish: Callable[[str, bytes], Awaitable[None]]) -> None:
        """Publish the own advert on change and as a heartbeat, forever."""
        beats = 0
        while True:
            with trio.move_on_after(self._heartbeat_s * random.uniform(0.9, 1.1)) as waited:
                await self._dirty.wait()
            await trio.sleep(COLLECT_SECONDS)
            self._dirty = trio.Event()
            if waited.cancelled_caught:
                self._renew()
                beats += 1
            data = self._view[self._identity.peer_id].data
            async with trio.open_nursery() as nursery:
                for peer_id in _sample(self._caller.peers(), PUSH_PEERS):
                    nursery.start_soon(self._push, peer_id, data)
                nursery.start_soon(_publish, publish, data)
            if beats >= DHT_HEARTBEATS:
                beats = 0
                self._provided.clear()

    async def _push(self, peer_id: PeerId, data: bytes) -> None:
        try:
            await self._caller.call(peer_id, "advert.push", {}, [data], deadline_ms=2000)
        except RiosError as error:
            log.debug("pushing the own advert to %s: %s", peer_id, error)

    async def run_upkeep(self) -> None:
        """Expire adverts and pull from a few peers, forever."""
        pull_s = 0.0
        while True:
            await trio.sleep(1.0 * random.uniform(0.9, 1.1))
            now = now_ms()
            for peer_id in [p for p, s in self._view.items() if s.advert.expires_ms <= now]:
                if peer_id != self._identity.peer_id:
                    self._remove(peer_id)
            pull_s += 1
            if pull_s >= PULL_SECONDS:
                pull_s = 0.0
                for peer_id in _sample(self._caller.peers(), PULL_PEERS):
                    await self.exchange(peer_id)

    async def run_dht(self) -> None:
        """Keep the own advert and the provider records in the DHT, forever; slow, and nothing waits for it."""
        stored_seq = 0
        while True:
            await trio.sleep(2.0 * random.uniform(0.8, 1.2))
            if not self._caller.peers():
                continue
            offered = {offer.model_id for offer in self._own.models if offer.shards}
            if stored_seq and offered == self._provided and self._own.seq - stored_seq < self._life_ms // 2:
                continue
            try:
                for model_id in sorted(offered - self._provided):
                    await self._host.provide(model_id)
                signed = self._view[self._identity.peer_id]
                await self._host.put_record(NAMESPACE, self._identity.peer_id, signed.data)
                stored_seq, self._provided = signed.advert.seq, offered
            except RiosError as error:
                log.debug("storing the own advert in the DHT: %s", error)
                await trio.sleep(10.0)


async def _publish(publish: Callable[[str, bytes], Awaitable[None]], data: bytes) -> None:
    try:
        await publish(TOPIC, data)
    except RiosError as error:
        log.debug("gossiping the own advert: %s", error)


def _sample(peers: Sequence[PeerId], count: int) -> list[PeerId]:
    return random.sample(list(peers), min(count, len(peers)))


def _check_record(name: str, value: bytes) -> None:
    signed = open_advert(value, now_ms=now_ms())
    if signed.advert.peer_id != name:
        raise IntegrityError("integrity", f"the advert stored for {name[:80]} is {signed.advert.peer_id}'s")


def _select_record(_name: str, values: Sequence[bytes]) -> int:
    best, best_seq = 0, -1
    for index, value in enumerate(values):
        try:
            seq = open_advert(value, now_ms=now_ms()).advert.seq
        except IntegrityError:
            continue
        if seq > best_seq:
            best, best_seq = index, seq
    return best
