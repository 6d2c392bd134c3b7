"""The doors of a running node: who may come in, what was refused, who is shut out and why.

Owns: the clock and the counters around ``core/doors`` (limits), ``core/standing`` (scores, bans) and ``core/slots``
(who gives up a place), their log and their file. Does not own: sockets; whoever has one gives its :class:`Visit` a way
to hang up.

Invariants:
1. A banned peer has no connection: its visits are hung up when the ban begins, and new ones are refused.
2. Every refusal is counted under the name of its limit (``refusals``); one that goes on is a flood.
3. Bans and long acquaintance survive a restart; a damaged file is said and ignored.
4. Nothing here raises at a peer's doing, and nothing waits.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from config.errors import IntegrityError, RequestError
from config.vocabulary import PeerId
from p2p import banfile
from p2p.core.doors import SHARED, Entry, Limits, Refusal
from p2p.core.doors import Doors as Limiter
from p2p.core.identity import public_key_of
from p2p.core.places import place_of, subject_of
from p2p.core.slots import Seat, choose_victim
from p2p.core.standing import ADDRESS_SHARE, BAN_AT, FAULTS, SUBNET_SHARE, TENURE_MAX_MS, Ban, Standing
from p2p.counting import PeerMeter
from p2p.pace import NO_LIMITS, Paces
from p2p.refusals import Refusals
from p2p.sieve import Sieve

log = logging.getLogger("rios.security.doors")

SAVE_SECONDS = 5.0
TENURE_SECONDS = 60.0
TENURES_KEPT = 512
EVICTED_SECONDS = 60.0
"""For so long a peer that gave up its place is not dialled."""
OPERATOR_MS_MAX = 10 * 365 * 24 * 3600_000


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class BanRow:
    """A ban as the operator sees it. ``subject``: a peer id, an address or a subnet."""

    subject: str
    reason: str
    left_s: int
    count: int
    by_operator: bool


class Visit:
    """One connection, from accept (or dial) to its end."""

    __slots__ = ("_close", "_doors", "_ended", "entry", "hung_up", "peer_id", "proven", "since", "spare")

    def __init__(self, doors: "Doors", entry: Entry) -> None:
        self._doors = doors
        self._close: Callable[[], None] = _nothing
        self._ended = False
        self.entry = entry
        self.peer_id = PeerId("")
        self.hung_up = False
        self.proven = False
        """Whether the handshake succeeded, also if the peer was refused then."""
        self.since = trio.current_time()
        self.spare = False
        """Dialled from here for another peer's sake: it makes room like one that came."""

    def on_hang_up(self, close: Callable[[], None]) -> None:
        """How this connection is ended when the doors want it; called at most once, at once if they do already."""
        self._close = close
        if self.hung_up:
            close()

    def known(self, peer_id: str) -> bool:
        """The handshake proved who it is; False: hang up."""
        self.proven = True
        return self._doors.known(self, PeerId(peer_id))

    async def turn(self, cost: float) -> bool:
        """Wait until its address may begin another handshake of this cost (a lane's is 1); False: it is hung up."""
        wait_s = self._doors.wait_of(self, cost)
        if wait_s is None:
            self.hang_up()
            return False
        if wait_s:
            came = False
            try:
                await trio.sleep(wait_s)
                came = True
            finally:
                if not came:
                    self._doors.limiter.give_back(self.entry, cost, trio.current_time())
        return True

    def blame(self, fault: str) -> None:
        """Something is wrong with it before (or without) a proven peer: the place answers for that."""
        self._doors.blame_place(self.entry, fault)

    def leave(self) -> None:
        """It is closed. May be called twice."""
        if not self._ended:
            self._ended = True
            self._doors.left(self)

    def hang_up(self) -> None:
        """End it."""
        if not self.hung_up:
            self.hung_up = True
            self._close()


class Doors:
    """Everything the node lets in or keeps out. Made once, before anything listens."""

    def __init__(self, limits: Limits, *, peers_max: int, file: Path | None = None, paces: Paces = NO_LIMITS) -> None:
        self.limiter = Limiter(limits)
        self.standing = Standing()
        self.paces = paces
        """This node's own limits on bandwidth, for its carriers."""
        self._limits = limits
        self._peers_max = peers_max
        self._file = file
        self._visits: dict[PeerId, dict[Visit, None]] = {}
        self._anonymous: dict[Entry, Visit] = {}
        self._pinned: set[str] = set()
        self._homes: dict[str, str] = {}
        """Where those that keep their places were last seen."""
        self._spared: frozenset[str] = frozenset()
        """These addresses: whatever else comes from there, nobody is shunned or has to wait."""
        self._evicted: dict[str, float] = {}
        self._bans_watched: list[Callable[[PeerId], None]] = []
        self._tenure_at = trio.current_time()
        self._dirty = False
        self.refusals = Refusals()
        self.sieve = Sieve()
        """Of every listening socket that is given to it."""
        self.faults: Counter[str] = Counter()
        self.bans_made = 0
        if file is not None:
            self.standing.restore(*banfile.load(file), _now_ms())

    # -- connections

    def enter(self, host: str) -> Visit | None:
        """Somebody connects from ``host``; None: close the socket."""
        place, now_ms = place_of(host), _now_ms()
        strict = False
        if not (place.loopback and self._limits.loopback_exempt):
            for key in (place.address, place.subnet):
                ban = self.standing.banned(key, now_ms)
                if ban is not None and ban.by_operator:
                    self.refused(Refusal("ban", f"{key} is banned by the operator"), key)
                    self.sieve.refuse(host)
                    return None
                strict = strict or ban is not None
        outcome = self.limiter.enter(host, trio.current_time(), strict=strict)
        if isinstance(outcome, Refusal):
            self.refused(outcome, place.address)
            if outcome.limit not in SHARED and place.address not in self._spared:  # it was refused for itself
                self.sieve.refuse(host)
            return None
        visit = self._anonymous[outcome] = Visit(self, outcome)
        if outcome.ousted is not None:
            self.refused(Refusal("undecided", "the oldest handshake made room"), outcome.ousted.place.address)
            ousted = self._anonymous.pop(outcome.ousted, None)
            outcome.ousted = None
            if ousted is not None:
                ousted.hang_up()
        return visit

    def wait_of(self, visit: Visit, cost: float) -> float | None:
        """For how many seconds its handshake has to wait; None: too many wait already."""
        if visit.entry.place.address in self._spared:
            return 0.0
        outcome = self.limiter.begin(visit.entry, cost, trio.current_time())
        if isinstance(outcome, Refusal):
            self.refused(outcome, visit.entry.place.address)
            return None
        return outcome

    def dialled(self, peer_id: str, host: str) -> Visit | None:
        """This node connected to a peer; None if the peer is banned: close it."""
        peer = PeerId(peer_id)
        if self.banned(peer):
            self.refused(Refusal("ban", f"{peer} is banned"), peer)
            return None
        visit = Visit(self, self.limiter.dialled(peer, host, trio.current_time()))
        self._add(visit, peer)
        return visit

    def known(self, visit: Visit, peer_id: PeerId) -> bool:
        """See :meth:`Visit.known`."""
        if visit.entry.left or visit.hung_up:
            return False
        self._anonymous.pop(visit.entry, None)
        refusal = self._refuse_peer(peer_id)
        if refusal is None and peer_id not in self._visits:
            refusal = self._make_room(visit.entry, peer_id)
        if refusal is None:
            refusal = self.limiter.known(visit.entry, peer_id, trio.current_time())
        if refusal is not None:
            self.refused(refusal, peer_id)
            self.limiter.leave(visit.entry)
            return False
        self._add(visit, peer_id)
        return True

    def _refuse_peer(self, peer_id: PeerId) -> Refusal | None:
        now_ms = _now_ms()
        ban = self.standing.banned(peer_id, now_ms)
        if ban is not None:
            return Refusal("ban", f"banned: {ban.reason}")
        return None

    def _make_room(self, entry: Entry, peer_id: PeerId) -> Refusal | None:
        """A place for a peer that comes in, at the cost of another one if need be."""
        seats = self._seats()
        inbound = sum(not seat.keeps for seat in seats)
        places = self._peers_max - self._peers_max // 4  # the rest is for those we dial
        crowded = inbound >= places or len(seats) >= self._peers_max
        if not crowded and self.limiter.open < self._limits.connections_max:
            return None
        now_ms = _now_ms()
        worth = self._worth(peer_id, now_ms)
        newcomer = Seat(peer_id, entry.subnet, worth, trio.current_time(), peer_id in self._pinned)
        victim = choose_victim(seats, newcomer)
        if victim is None:
            return Refusal("peers", f"{len(seats)} peers are connected")
        self.refused(Refusal("peers", f"{victim.peer_id} made room for {peer_id}"), victim.peer_id)
        self._evicted[victim.peer_id] = trio.current_time() + EVICTED_SECONDS
        while len(self._evicted) > self._peers_max:
            del self._evicted[next(iter(self._evicted))]
        self.hang_up(PeerId(victim.peer_id))
        return None

    def _seats(self) -> list[Seat]:
        now_ms = _now_ms()
        return [
            Seat(
                peer_id,
                next((v.entry.subnet for v in visits if v.entry.subnet), ""),
                self._worth(peer_id, now_ms),
                min(v.since for v in visits),
                any(v.entry.outbound and not v.spare for v in visits) or peer_id in self._pinned,
            )
            for peer_id, visits in self._visits.items()
        ]

    def _worth(self, peer_id: str, now_ms: int) -> float:
        """Score and time together: a day of acquaintance is worth a whole score."""
        return self.standing.score(peer_id, now_ms) + BAN_AT * self.standing.tenure_ms(peer_id) / TENURE_MAX_MS

    def _add(self, visit: Visit, peer_id: PeerId) -> None:
        visit.peer_id = peer_id
        self._visits.setdefault(peer_id, {})[visit] = None
        if peer_id in self._pinned and self._homes.get(peer_id) != visit.entry.place.address:
            self._homes[peer_id] = visit.entry.place.address
            self._spared = frozenset(self._homes.values())

    def left(self, visit: Visit) -> None:
        """See :meth:`Visit.leave`."""
        self._anonymous.pop(visit.entry, None)
        self.limiter.leave(visit.entry)
        visits = self._visits.get(visit.peer_id)
        if visits is None or visits.pop(visit, self) is self or visits:
            return
        del self._visits[visit.peer_id]
        # while a peer is linked its time is counted by ``_count_tenure``, from its last tick or its coming
        span_s = trio.current_time() - max(visit.since, self._tenure_at)
        self.standing.linked(visit.peer_id, int(span_s * 1000), _now_ms())

    def pin(self, peer_id: str) -> None:
        """This peer (a seed, or one of p2p.allow) keeps its place, and only the operator bans it."""
        self._pinned.add(peer_id)
        ban = self.standing.banned(peer_id, _now_ms())
        if ban is not None and not ban.by_operator:
            self.standing.revoke(peer_id)

    def spare(self, peer_id: PeerId) -> None:
        """What was dialled of this peer until now leads to others: it gives up its place if need be."""
        for visit in self._visits.get(peer_id, ()):
            visit.spare = True

    def meter(self, peer_id: PeerId) -> PeerMeter:
        """What a peer's calls and streams are counted by."""
        visits = self._visits.get(peer_id)
        entry = next(iter(visits)).entry if visits else self.limiter.loose(peer_id, trio.current_time())
        return PeerMeter(self, peer_id, entry)

    def hang_up(self, peer_id: PeerId) -> None:
        """End every connection of a peer."""
        for visit in list(self._visits.get(peer_id, ())):
            visit.hang_up()
            visit.leave()

    # -- faults and bans

    def blame(self, peer_id: str, fault: str, detail: str = "") -> None:
        """A peer did something of the table ``core/standing.FAULTS``."""
        now_ms = _now_ms()
        self.faults[fault] += 1
        entries = [visit.entry for visit in self._visits.get(PeerId(peer_id), ()) if visit.entry.sources]
        ban = self.standing.blame(peer_id, fault, now_ms)
        log.debug("%s: %s %s", peer_id, fault, detail)
        if peer_id in self._pinned:
            if ban is not None:
                self.standing.revoke(peer_id)
                log.warning("%s, which is trusted here, would be banned: %s %s", peer_id, fault, detail)
            return
        if FAULTS[fault].hard and entries:
            self._blame_places(entries[0], fault, now_ms, peers=True)
        if ban is not None:
            self._begin(peer_id, ban, detail)

    def blame_place(self, entry: Entry, fault: str) -> None:
        """Something came from there without a proven peer."""
        self.faults[fault] += 1
        self._blame_places(entry, fault, _now_ms(), peers=False)

    def _blame_places(self, entry: Entry, fault: str, now_ms: int, *, peers: bool) -> None:
        for source in entry.sources:
            near = source.whom == "address"
            share = (ADDRESS_SHARE if near else SUBNET_SHARE) * (1 if peers else 4)
            ban = self.standing.blame(source.key, fault, now_ms, share=share)
            if ban is not None:
                self._begin(source.key, ban, "")

    def _begin(self, subject: str, ban: Ban, detail: str) -> None:
        self.bans_made += 1
        self._dirty = True
        left_s = (ban.until_ms - _now_ms()) // 1000
        log.warning("%s is banned for %d s: %s %s", subject, left_s, ban.reason, detail)
        peer_id = PeerId(subject)
        if ban.by_operator or peer_id in self._visits or _is_peer(subject):
            self._shut(subject)

    def _shut(self, subject: str) -> None:
        """Hang up on a peer, or on everybody who came from a place."""
        if _is_peer(subject):
            self.hang_up(PeerId(subject))
            for watch in self._bans_watched:
                watch(PeerId(subject))
            return
        for visit in [*self._anonymous.values(), *(v for visits in self._visits.values() for v in visits)]:
            if subject in (visit.entry.place.address, visit.entry.place.subnet):
                visit.hang_up()
                visit.leave()

    def on_ban(self, banned: Callable[[PeerId], None]) -> None:
        """Call ``banned`` whenever a peer is shut out."""
        self._bans_watched.append(banned)

    def banned(self, peer_id: str) -> bool:
        """Whether a peer is shut out now."""
        return self.standing.banned(peer_id, _now_ms()) is not None

    def unwanted(self, peer_id: str) -> bool:
        """Whether this node should not dial a peer: it is shut out, or just gave up its place."""
        until = self._evicted.get(peer_id)
        if until is not None:
            if trio.current_time() < until:
                return True
            del self._evicted[peer_id]
        return self.banned(peer_id)

    def ban(self, text: str, minutes: int) -> BanRow:
        """The operator shuts a peer, an address or a subnet out. Raises RequestError for anything else."""
        subject = _subject(text)
        if self._limits.loopback_exempt and place_of(text.strip().partition("/")[0]).loopback:
            hint = "ban the peer's id; p2p.loopback_limits = true counts this machine like any other"
            raise RequestError("invalid_request", f"{text} is this very machine, which is let in", hint)
        span_ms = min(minutes * 60_000, OPERATOR_MS_MAX)
        ban = self.standing.ban(subject, span_ms, "by the operator", _now_ms())
        self._begin(subject, ban, "")
        return self._row(subject, ban)

    def unban(self, text: str) -> bool:
        """The operator lets one in again, with a clean score; whether it was out. Raises RequestError."""
        self._dirty = True
        subject = _subject(text)
        was_out = self.standing.unban(subject)
        if was_out:
            log.info("%s may come in again: by the operator", subject)
        return was_out

    def bans(self) -> list[BanRow]:
        """Every ban in force, the longest first."""
        rows = [self._row(subject, ban) for subject, ban in self.standing.in_force(_now_ms())]
        return sorted(rows, key=lambda row: -row.left_s)

    @staticmethod
    def _row(subject: str, ban: Ban) -> BanRow:
        left_s = max(0, (ban.until_ms - _now_ms() + 999) // 1000)
        return BanRow(subject, ban.reason, left_s, ban.count, ban.by_operator)

    # -- counting

    def refused(self, refusal: Refusal, who: str, times: int = 1) -> bool:
        """Count a refusal under its limit's name; whether that makes a flood, which a peer is blamed for."""
        flood = self.refusals.count(refusal, who, trio.current_time(), times)
        if flood and PeerId(who) in self._visits:
            self.blame(who, "flood", refusal.limit)
        return flood

    def peer(self, peer_id: PeerId) -> dict[str, Any]:
        """What ``rios peers`` shows of one peer."""
        now_ms = _now_ms()
        ban = self.standing.banned(peer_id, now_ms)
        return {
            "score": self.standing.score(peer_id, now_ms),
            "fault": self.standing.worst(peer_id),
            "linked_s": self.standing.tenure_ms(peer_id) // 1000,
            "connections": len(self._visits.get(peer_id, ())),
            "limits_hit": dict(self.refusals.of(peer_id)),
            "ban": None if ban is None else asdict(self._row(peer_id, ban)),
        }

    def statistics(self) -> dict[str, Any]:
        """Numbers for status and metrics."""
        now_ms = _now_ms()
        return {
            "open": self.limiter.open,
            "undecided": self.limiter.undecided,
            "remembered": self.limiter.size(),
            "refused": dict(self.refusals.by_limit),
            "faults": dict(self.faults),
            "waited": {name: pace.waited for name, pace in self.paces._asdict().items() if pace is not None},
            "banned": sum(1 for _ in self.standing.in_force(now_ms)),
            "bans_made": self.bans_made,
            "shunned": self.sieve.times,
        }

    # -- the file

    async def run(self) -> None:
        """Count acquaintance and keep the file, forever."""
        while True:
            await trio.sleep(SAVE_SECONDS)
            if trio.current_time() - self._tenure_at >= TENURE_SECONDS:
                self._count_tenure()
            if self._dirty:
                await self.save()

    def _count_tenure(self) -> None:
        now, now_ms = trio.current_time(), _now_ms()
        for peer_id, visits in self._visits.items():
            since = max(self._tenure_at, min(visit.since for visit in visits))
            self.standing.linked(peer_id, int((now - since) * 1000), now_ms)
        self._tenure_at = now
        self._dirty = self._dirty or bool(self._visits)

    async def save(self) -> None:
        """Write bans and acquaintance down."""
        if self._file is not None:
            self._dirty, saved = False, False  # what happens while it is written is for the next time
            bans, tenures = dict(self.standing.bans), self.standing.tenures(TENURES_KEPT)
            try:
                saved = await trio.to_thread.run_sync(banfile.save, self._file, bans, tenures)
            finally:
                self._dirty = self._dirty or not saved


def _is_peer(text: str) -> bool:
    try:
        public_key_of(text)
    except IntegrityError:
        return False
    return True


def _subject(text: str) -> str:
    if _is_peer(text):
        return text
    subject = subject_of(text)
    if subject is None:
        hint = "a peer id (12D3KooW...), an IP address, or a subnet: a /24 like 203.0.113.0/24 (IPv6: a /64 or /56)"
        raise RequestError("invalid_request", f"{text[:80]!r} is neither a peer nor an address", hint)
    return subject
