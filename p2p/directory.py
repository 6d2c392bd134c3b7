"""Adverts of the swarm: a local view that answers at once, kept fresh in the background.

Owns: the own advert's life (change, sign, publish, heartbeat), how adverts come and go. Does not own: the view's rules
(``core.view``), finding what the view does not know (``finding``), links, dialling.

Adverts spread in four ways, because none is enough: pushed to linked peers, gossiped, pulled from a few peers every
:data:`PULL_SECONDS` and on every new link (anti-entropy), and put into the DHT for strangers. Between two adverts a
change of the load alone travels as a heartbeat (``core.heartbeat``).

Invariants:
1. Only verified, unexpired adverts stand in the view; a higher ``seq`` wins.
2. A peer reported down leaves the view, and comes back only with a newer advert or a live link.
3. The view never depends on the DHT answering.
4. A bad advert is dropped, counted by kind, and blamed on whoever sent it; an old or expired one is only counted, and
   its signature is not looked at.
5. What a peer's adverts and questions may cost is limited by :mod:`p2p.checks`; what is above is dropped and counted.
"""

import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
import trio

from config.errors import BusyError, IntegrityError, RiosError
from config.vocabulary import PeerId
from p2p.checks import READING, Checks
from p2p.core import addresses, heartbeat
from p2p.core.advert import Advert, BadAdvert, check_advert, open_advert, peer_of, read_advert, sign
from p2p.core.heartbeat import Heartbeat
from p2p.core.identity import Identity
from p2p.core.providing import GAP_MS, Announcements
from p2p.core.reach import PRIVATE, RELAYED, worth_dialling
from p2p.core.strangers import NOBODY
from p2p.core.view import VIEW_MAX, View, is_news
from p2p.face import Buffer, Call, RecordRule, Reply
from p2p.finding import NAMESPACE, Caller, Finder, sample
from p2p.host import Host
from p2p.networks import own_networks

log = logging.getLogger(__name__)

TOPIC = "rios/advert/1"
BEAT_TOPIC = "rios/heartbeat/1"
COLLECT_SECONDS = 0.1
PUBLISH_GAP_SECONDS = 0.5
"""Between two publications; others take :data:`p2p.core.view.CHANGES_BURST` in a row and then fewer."""
BEAT_GAP_SECONDS = 1.0
PULL_SECONDS = 10.0
PULL_PEERS = 2
PUSH_PEERS = 16
LIVES = 5
"""Heartbeats an advert lives."""
SMALL_SWARM = 8
SETTLE_SECONDS = (3.0, 12.0)
EXCHANGE_BYTES_MAX = 1 << 20
BUFFERS_MAX = 200
CHECKS_AT_ONCE = 16
"""Then others run: they take about a millisecond."""
TOO_MANY = "too_many"
FAULTS = frozenset(("malformed", "too_large", "signature", "absurd"))
"""What only a peer that does not check, or lies, passes on."""


Publish = Callable[[str, bytes], Awaitable[None]]


def now_ms() -> int:
    """Unix time in ms."""
    return time.time_ns() // 1_000_000


def _blame_nobody(_peer_id: PeerId, _fault: str) -> None:
    """Where nobody keeps scores."""


def _unknown(_peer_id: PeerId) -> float | None:
    """How far a peer is before anything was measured."""
    return None


class PeerDirectory:
    """:class:`p2p.face.Directory` over the swarm."""

    def __init__(
        self,
        identity: Identity,
        host: Host,
        caller: Caller,
        own: Advert,
        *,
        advert_seconds: int,
        blame: Callable[[PeerId, str], None] = _blame_nobody,
        banned: Callable[[PeerId], bool] = lambda peer_id: False,
    ) -> None:
        self._identity = identity
        self._host = host
        self._caller = caller
        self._blame = blame
        self._banned = banned
        self._heartbeat_s = float(advert_seconds)
        self._life_ms = max(LIVES * advert_seconds, 30) * 1000
        self.view = View(identity.peer_id, random.randrange)
        self.announcements = Announcements()
        self.finder = Finder(self, host, caller)
        self.measure: Callable[[PeerId], float | None] = _unknown
        self.checks = Checks(caller.is_linked)
        self._changed = trio.Event()
        self._dirty = trio.Event()
        self._beat_due = trio.Event()
        self._own = self._told = own
        self._beat_seq = 0
        self._renew()
        host.accept_records(NAMESPACE, RecordRule(_check_record, _select_record))

    # -- face

    def adverts(self) -> Mapping[PeerId, Advert]:
        """Every advert in the view."""
        return self.view.adverts()

    def own(self) -> Advert:
        """The own advert."""
        return self._own

    def update(self, change: Callable[[Advert], Advert]) -> None:
        """Change the own advert; the view shows it at once, the others soon."""
        before, self._own = self._own, change(self._own)
        if msgspec.structs.replace(self._own, load=before.load, coordinate=before.coordinate) != before:
            self._renew()
            self._dirty.set()
        else:
            self.view.put_live(self._own)
            if heartbeat.is_worth_sending(self._told, self._own):
                self._beat_due.set()

    async def wait_change(self) -> None:
        """Return after the next change of the view (other than of loads)."""
        await self._changed.wait()

    def providers(self, model_id: str, index: int) -> Sequence[PeerId]:
        """See :meth:`p2p.face.Directory.providers`."""
        found = self.view.providers(model_id, index)
        return found if len(found) < 2 else sorted(found, key=self._is_far)

    def _is_far(self, peer_id: PeerId) -> bool:
        return peer_id != self._identity.peer_id and not self._caller.is_linked(peer_id)

    async def find_providers(self, model_id: str, index: int | None = None) -> Sequence[PeerId]:
        """See :meth:`p2p.face.Directory.find_providers`."""
        return await self.finder.find(model_id, index)

    def distance_ms(self, peer_id: PeerId) -> float | None:
        """See :meth:`p2p.face.Directory.distance_ms`."""
        return self.measure(peer_id)

    def accept_records(self, namespace: str, rule: RecordRule) -> None:
        """See :meth:`p2p.face.Directory.accept_records`."""
        self._host.accept_records(namespace, rule)

    async def put_record(self, namespace: str, key: str, value: bytes) -> None:
        """See :meth:`p2p.face.Directory.put_record`."""
        await self._host.put_record(namespace, key, value)

    async def get_record(self, namespace: str, key: str) -> bytes | None:
        """See :meth:`p2p.face.Directory.get_record`."""
        return await self._host.get_record(namespace, key)

    def statistics(self) -> Mapping[str, Any]:
        """Numbers for ``rios status`` and metrics."""
        return {
            "adverts": len(self.view),
            "refused": dict(self.view.refused),
            "announced": len(self.announcements.announced),
            "searches": self.finder.searches,
            "dht_searches": self.finder.dht_searches,
        }

    # -- the view

    def offer(self, data: bytes) -> bool:
        """Take an advert in if it is valid and news; whether it was. Raises BadAdvert."""
        return not self._offer(data)

    def _offer(self, data: bytes, sender: PeerId = NOBODY) -> str:
        claim = read_advert(data)
        peer_id = peer_of(claim.advert)
        reason = self.view.knows_better(peer_id, claim.advert.seq)
        if self._banned(peer_id):
            reason = "banned"
        elif not reason and claim.advert.expires_ms <= now_ms():
            reason = "expired"
        elif not reason and not self.checks.may_check(sender, len(data)):
            reason = TOO_MANY
        if reason:
            self.view.refused[reason] += 1
            return reason
        signed = check_advert(claim, now_ms=now_ms())
        introducer = sender if sender and self._caller.is_linked(sender) else NOBODY
        before = self.view.get(peer_id)
        reason = self.view.offer(signed, now_ms(), self._caller.peers, introducer)
        if reason:
            return reason
        advert = signed.advert
        self._host.learn(peer_id, worth_dialling(direct(advert.addresses), advert.reach, own_networks))
        if advert.reach in (RELAYED, PRIVATE):
            self._host.leave(peer_id)
        if is_news(before, signed.advert):
            self._wake()
        return ""

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    def _renew(self) -> None:
        """Sign the own advert again, with a higher number and a new end of life."""
        seq = max(now_ms(), self._own.seq + 1, self._beat_seq + 1)
        self._own = self._told = msgspec.structs.replace(
            self._own, peer_id=self._identity.peer_id, seq=seq, expires_ms=seq + self._life_ms
        )
        self.view.put_own(sign(self._identity, self._own), seq)
        self._wake()

    def link_down(self, peer_id: PeerId) -> None:
        """A peer is gone: what was known of it counts no more."""
        self._host.leave(peer_id)
        if self.view.left(peer_id):
            self._wake()

    def link_up(self, peer_id: PeerId) -> None:
        """A peer is there (again)."""
        self.view.back(peer_id)

    # -- exchange

    async def serve_exchange(self, call: Call) -> Reply:
        """``advert.exchange``: takes the caller's adverts; gives those it lacks and names those it has newer."""
        await self.take(call.peer_id, call.buffers)
        known = call.header.get("known")
        if not isinstance(known, dict) or len(known) > VIEW_MAX:
            raise IntegrityError("protocol", "advert.exchange: 'known' must map peer ids to numbers")
        if not self.checks.may_look(call.peer_id, len(self.view) + len(known)):
            raise BusyError("advert.exchange: too many", retry_after_ms=1000)
        give: list[bytes] = []
        size = 0
        for peer_id, signed in self.view.all_signed():
            seq = known.get(peer_id, -1)
            if not isinstance(seq, int) or signed.advert.seq > seq:
                size += len(signed.data)
                if size > EXCHANGE_BYTES_MAX or len(give) >= BUFFERS_MAX:
                    break
                give.append(signed.data)
        want = [peer for peer, seq in known.items() if isinstance(seq, int) and seq > self.view.seq(peer)]
        return Reply({"want": want[:BUFFERS_MAX]}, give)

    async def serve_push(self, call: Call) -> Reply:
        """``advert.push``: takes adverts."""
        await self.take(call.peer_id, call.buffers)
        return Reply({})

    async def serve_beat(self, call: Call) -> Reply:
        """``advert.beat``: takes heartbeats."""
        await self._take_all(call.peer_id, call.buffers, self._take_beat)
        return Reply({})

    async def take(self, sender: PeerId, buffers: Sequence[Buffer]) -> None:
        """Take adverts that a peer sent."""
        await self._take_all(sender, buffers, self._take)

    async def _take_all(self, sender: PeerId, buffers: Sequence[Buffer], take: Callable[[PeerId, bytes], bool]) -> None:
        for number, data in enumerate(buffers[:BUFFERS_MAX]):
            if number % CHECKS_AT_ONCE == CHECKS_AT_ONCE - 1:
                await trio.lowlevel.checkpoint()
            if not take(sender, bytes(data)):
                self._blame(sender, "refused")
                return

    def take_found(self, data: bytes) -> None:
        """Take an advert from the DHT, where nobody is to blame for it."""
        self._take(NOBODY, data)

    def _take(self, sender: PeerId, data: bytes) -> bool:
        """Whether the sender may go on."""
        if not self.checks.may_check(sender, len(data), READING):
            self.view.refused[TOO_MANY] += 1
            return False
        try:
            reason = self._offer(data, sender)
        except BadAdvert as error:
            self._refuse(sender, error)
            return True
        if reason == "churn":
            log.debug("an advert from %s changes too often", sender)
        return reason != TOO_MANY

    def _take_beat(self, sender: PeerId, data: bytes) -> bool:
        """Whether the sender may go on."""
        if not self.checks.may_check(sender, len(data), READING):
            self.view.refused[TOO_MANY] += 1
            return False
        try:
            claim = heartbeat.read_heartbeat(data)
            if reason := self.view.beat_is_no_news(claim.beat):
                self.view.refused[f"beat_{reason}"] += 1
                return True
            if not self.checks.may_check(sender, len(data)):
                self.view.refused[TOO_MANY] += 1
                return False
            beat = heartbeat.check_heartbeat(claim, now_ms=now_ms())
        except BadAdvert as error:
            self._refuse(sender, error)
            return True
        before = self.view.get(PeerId(beat.peer_id))
        if not self.view.beat(beat, now_ms()) and before is not None and beat.applied(before).models != before.models:
            self._wake()
        return True

    def _refuse(self, sender: PeerId, error: BadAdvert) -> None:
        self.view.refused[error.kind] += 1
        log.debug("%s sent a bad advert: %s", sender, error)
        if error.kind in FAULTS and sender != NOBODY:
            self._blame(sender, "bad_advert")

    async def exchange(self, peer_id: PeerId, *, deadline_ms: int = 5000) -> None:
        """One round of anti-entropy with a peer."""
        known = {peer: signed.advert.seq for peer, signed in self.view.all_signed()}
        own = self._own_data()
        try:
            reply = await self._caller.call(
                peer_id, "advert.exchange", {"known": known}, [own], deadline_ms=deadline_ms
            )
            await self.take(peer_id, reply.buffers)
            want = reply.header.get("want")
            wanted = want[:BUFFERS_MAX] if isinstance(want, list) else []
            data = [signed.data for p in wanted if isinstance(p, str) and (signed := self.view.signed(PeerId(p)))]
            if data:
                await self._caller.call(peer_id, "advert.push", {}, data, deadline_ms=deadline_ms)
        except RiosError as error:
            log.debug("exchanging adverts with %s: %s", peer_id, error)

    async def on_gossip(self, sender: PeerId, payload: bytes) -> None:
        """An advert from the topic; the sender is the one who published it, who may pass on another's."""
        self._take(sender, payload)

    async def on_beat(self, sender: PeerId, payload: bytes) -> None:
        """A heartbeat from its topic."""
        self._take_beat(sender, payload)

    def _own_data(self) -> bytes:
        signed = self.view.signed(self._identity.peer_id)
        assert signed is not None
        return signed.data

    # -- tasks

    async def run(self, publish: Publish) -> None:
        """Publish the own advert on change and as a heartbeat, and a load that changed much in between, forever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_beats, publish, nursery)
            while True:
                with trio.move_on_after(self._heartbeat_s * random.uniform(0.9, 1.1)) as waited:
                    await self._dirty.wait()
                await trio.sleep(COLLECT_SECONDS)
                self._dirty = trio.Event()
                if waited.cancelled_caught:
                    self._renew()
                self._spread(nursery, publish, TOPIC, "advert.push", self._own_data())
                await trio.sleep(PUBLISH_GAP_SECONDS - COLLECT_SECONDS)

    async def _run_beats(self, publish: Publish, nursery: trio.Nursery) -> None:
        while True:
            await self._beat_due.wait()
            self._beat_due = trio.Event()
            own = self._own
            if heartbeat.is_worth_sending(self._told, own):  # else an advert told it meanwhile
                self._beat_seq = max(now_ms(), own.seq + 1, self._beat_seq + 1)
                self._told = own
                beat = Heartbeat(own.peer_id, self._beat_seq, own.load, own.paused)
                self._spread(nursery, publish, BEAT_TOPIC, "advert.beat", heartbeat.sign(self._identity, beat))
            await trio.sleep(BEAT_GAP_SECONDS)

    def _spread(self, nursery: trio.Nursery, publish: Publish, topic: str, method: str, data: bytes) -> None:
        """Hand something to some linked peers, and gossip it; a peer that hangs keeps nobody waiting."""
        for peer_id in sample(self._caller.peers(), PUSH_PEERS):
            nursery.start_soon(self._push, peer_id, method, data)
        nursery.start_soon(_publish, publish, topic, data)

    async def _push(self, peer_id: PeerId, method: str, data: bytes) -> None:
        try:
            await self._caller.call(peer_id, method, {}, [data], deadline_ms=2000)
        except RiosError as error:
            log.debug("%s to %s: %s", method, peer_id, error)

    async def run_upkeep(self) -> None:
        """Expire adverts and pull from a few peers, forever."""
        pull_at = trio.current_time() + PULL_SECONDS
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(1.0 * random.uniform(0.9, 1.1))
                if self.view.expire(now_ms(), self._caller.peers()):
                    self._wake()
                if trio.current_time() >= pull_at:
                    pull_at = trio.current_time() + PULL_SECONDS
                    for peer_id in sample(self._caller.peers(), PULL_PEERS):
                        nursery.start_soon(self.exchange, peer_id)

    async def run_dht(self) -> None:
        """Keep the own advert and the provider records in the DHT, forever; slow, and nothing waits for it."""
        stored_seq = 0
        while True:
            await trio.sleep(GAP_MS / 1000 * random.uniform(1.0, 1.2))
            for key in self.announcements.follow(self._own.models, self._rarity):
                self._host.withdraw(key)
            if not self._caller.peers():
                continue
            if not stored_seq and len(self.view) > SMALL_SWARM:
                await trio.sleep(random.uniform(*SETTLE_SECONDS))  # first links, then records; not everybody at once
            signed = self.view.signed(self._identity.peer_id)
            assert signed is not None
            if not stored_seq or signed.advert.seq - stored_seq > self._life_ms // 2:
                if await self._store_advert(signed.data):
                    stored_seq = signed.advert.seq
                continue
            key_due = self.announcements.next(now_ms(), len(self._caller.peers()))
            if key_due is not None:
                await self._announce(key_due)

    def _rarity(self, model_id: str, index: int) -> int:
        return len(self.view.providers(model_id, index))

    async def _store_advert(self, data: bytes) -> bool:
        try:
            await self._host.put_record(NAMESPACE, self._identity.peer_id, data)
            return True
        except RiosError as error:
            log.debug("storing the own advert in the DHT: %s", error)
            await trio.sleep(10.0)
            return False

    async def _announce(self, key: bytes) -> None:
        peers = len(self._caller.peers())
        try:
            await self._host.provide(key)
            self.announcements.done(key, now_ms(), peers)
        except RiosError as error:
            log.debug("announcing %s: %s", key.hex(), error)
            self.announcements.failed(key, now_ms())


def direct(listed: Sequence[str]) -> list[str]:
    """The addresses that are the peer's own; one through a relay starts with the relay's."""
    return [text for text in listed if (address := addresses.parse(text)) is not None and not address.relay]


async def _publish(publish: Publish, topic: str, data: bytes) -> None:
    try:
        await publish(topic, data)
    except RiosError as error:
        log.debug("gossip on %s: %s", topic, error)


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
