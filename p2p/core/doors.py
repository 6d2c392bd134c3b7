"""The doors: how much a peer, an address and a subnet may have and do. Pure: time comes in as an argument.

A connection is an :class:`Entry`: *undecided* from accept until its handshake has proved a peer id, then *open* until
it leaves. Each limit counts at three places: what one peer may have, an address may have :data:`ADDRESS_TIMES` as
much of, and a subnet :data:`SUBNET_TIMES`. So a flooder gains nothing by inventing identities, and honest peers behind
the same NAT keep what they have.

Owns: limits on connections, handshakes, streams, calls and bytes, and the bounded tables behind them. Does not own:
scores and bans (``standing``), sockets.

Invariants:
1. Memory is bounded whatever arrives: a table holds at most :data:`TABLE_MIN` parties or twice as many as there may
   be connections; those without a connection are forgotten, the one seen longest ago first.
2. What is counted up is counted down exactly once, in :meth:`Doors.leave`, whatever came in between.
3. A full set of undecided handshakes does not lock the door: the oldest one past its grace is ousted for a newcomer.
4. Connections of this very machine count for no address and subnet while ``loopback_exempt`` is set.
5. Every refusal names its limit; a limit's name is ``<what>_per_<whom>`` or ``<what>``.
"""

from collections import OrderedDict
from dataclasses import dataclass

from p2p.core.buckets import Bucket
from p2p.core.places import Place, place_of

ADDRESS_TIMES, SUBNET_TIMES = 4, 8
TABLE_MIN = 4096
GRACE_S = 2.0
"""An undecided handshake younger than this is not ousted: an honest one over a bad link needs that long."""
STRICT_PER_MINUTE = 12
"""Handshakes a minute that a place in disgrace still gets: a flooder's neighbours come in through these."""
SHAKES_PER_SECOND, SHAKES_BURST = 20.0, 16.0
"""Handshakes of one address that begin; a lane's counts as 1. Those above are not refused but wait for their turn: who
wants many at once takes a share of this node's time, not all of it."""
SHAKE_WAIT_S_MAX = 3.0
"""Longer than that nobody waits for his turn but is refused: the other side gives up after five seconds."""
SHARED = frozenset(("connections_per_second", "undecided"))
"""Limits that are nobody's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is allowed; per peer, unless the name says otherwise. 0 switches a rate off."""

    connections_max: int = 1024
    connections_per_peer_max: int = 8
    connections_per_address_max: int = 64
    connections_per_subnet_max: int = 128
    connections_per_minute: int = 120
    """New ones, from one address; a subnet may make :data:`SUBNET_TIMES` / :data:`ADDRESS_TIMES` as many."""
    connections_per_second: int = 200
    """From everywhere: a handshake costs about a millisecond of CPU."""
    undecided_max: int = 256
    undecided_per_address_max: int = 16
    undecided_per_subnet_max: int = 48
    streams_max: int = 256
    streams_per_second: int = 100
    calls_max: int = 256
    calls_per_second: int = 20_000
    bytes_per_second: int = 1 << 30
    loopback_exempt: bool = True


@dataclass(frozen=True, slots=True)
class Refusal:
    """``limit`` is the name in metrics; ``text`` is for people."""

    limit: str
    text: str


class Party:
    """What one peer, address or subnet has and did lately."""

    __slots__ = ("arrivals", "bytes", "calls", "calls_rate", "key", "open", "streams", "streams_rate", "times", "whom")

    def __init__(self, whom: str, key: str, times: int, limits: Limits) -> None:
        self.whom = whom
        self.key = key
        self.times = times
        self.open = 0
        self.streams = 0
        self.calls = 0
        self.arrivals: dict[Entry, None] = {}  # undecided, oldest first
        self.streams_rate = _bucket(limits.streams_per_second * times, 2)
        self.calls_rate = _bucket(limits.calls_per_second * times, 1)
        self.bytes = _bucket(limits.bytes_per_second * times, 1)

    def idle(self, now: float) -> bool:
        """Whether forgetting it changes nothing."""
        if self.open or self.streams or self.calls or self.arrivals:
            return False
        return all(b is None or b.idle(now) for b in (self.streams_rate, self.calls_rate, self.bytes))


class Source(Party):
    """An address or a subnet: also counts arrivals."""

    __slots__ = ("entered", "shakes", "strict_rate")

    def __init__(self, whom: str, key: str, times: int, limits: Limits) -> None:
        super().__init__(whom, key, times, limits)
        per_minute = limits.connections_per_minute * times / ADDRESS_TIMES
        self.entered = _bucket(per_minute / 60, 30)
        self.strict_rate = Bucket(STRICT_PER_MINUTE / 60, 4)
        self.shakes = Bucket(SHAKES_PER_SECOND, SHAKES_BURST)

    def idle(self, now: float) -> bool:
        """Whether forgetting it changes nothing."""
        return super().idle(now) and all(
            b is None or b.idle(now) for b in (self.entered, self.strict_rate, self.shakes)
        )


class Entry:
    """One connection on its way through the doors. ``ousted``: who had to make room for it."""

    __slots__ = ("at", "left", "ousted", "outbound", "peer", "place", "sources", "strict")

    def __init__(self, place: Place, sources: tuple["Source", ...], at: float, *, outbound: bool, strict: bool) -> None:
        self.place = place
        self.sources = sources
        self.at = at
        self.outbound = outbound
        self.strict = strict
        self.peer: Party | None = None
        self.ousted: Entry | None = None
        self.left = False

    @property
    def subnet(self) -> str:
        """The subnet it counts for, empty if none."""
        return self.place.subnet if self.sources else ""


class Doors:
    """Every connection of a node. Times are seconds of one monotonic clock."""

    def __init__(self, limits: Limits, *, table_min: int = TABLE_MIN) -> None:
        self.limits = limits
        self._table_max = max(table_min, 2 * (limits.connections_max + limits.undecided_max))
        self._tables: dict[str, OrderedDict[str, Party]] = {w: OrderedDict() for w in ("peer", "address", "subnet")}
        self._undecided: dict[Entry, None] = {}
        self._handshakes = Bucket(limits.connections_per_second, 2 * limits.connections_per_second)
        self.open = 0

    # -- connections

    def enter(self, host: str, now: float, *, strict: bool = False) -> Entry | Refusal:
        """Somebody connects. ``strict``: the place is in disgrace and gets a trickle only."""
        place = place_of(host)
        exempt = place.loopback and self.limits.loopback_exempt
        sources = () if exempt else self._sources(place, now)
        refusal = self._refuse_entry(sources, now, strict=strict)
        if refusal is not None:
            return refusal
        entry = Entry(place, sources, now, outbound=False, strict=strict)
        ousted = self._oust(sources, now)
        if isinstance(ousted, Refusal):
            return ousted
        # last, so that whoever is refused for himself uses up nothing that all share
        if not self._handshakes.take(1, now):
            return Refusal("connections_per_second", f"more than {self.limits.connections_per_second} a second come")
        if ousted is not None:
            self.leave(ousted)
            entry.ousted = ousted
        for source in sources:
            source.arrivals[entry] = None
            if source.entered is not None:
                source.entered.spend(1, now)
        self._undecided[entry] = None
        return entry

    def dialled(self, peer_id: str, host: str, now: float) -> Entry:
        """A connection that this node made: it counts, but is not refused."""
        entry = Entry(place_of(host), (), now, outbound=True, strict=False)
        entry.peer = self._party("peer", peer_id, now)
        entry.peer.open += 1
        self.open += 1
        return entry

    def loose(self, peer_id: str, now: float) -> Entry:
        """What a peer does without a connection that was counted, e.g. over a relayed one: it has no place."""
        entry = Entry(Place("", "", False), (), now, outbound=True, strict=False)
        entry.peer = self._party("peer", peer_id, now)
        entry.left = True
        return entry

    def known(self, entry: Entry, peer_id: str, now: float) -> Refusal | None:
        """The handshake proved who it is. After a refusal only :meth:`leave` remains."""
        limits = self.limits
        assert not entry.left
        self._settle(entry)
        if self.open >= limits.connections_max:
            return Refusal("connections", f"{limits.connections_max} connections are open")
        peer = self._party("peer", peer_id, now)
        if peer.open >= limits.connections_per_peer_max:
            return Refusal("connections_per_peer", f"{peer.open} connections with {peer_id} are open")
        entry.peer = peer
        for party in (peer, *entry.sources):
            party.open += 1
        self.open += 1
        return None

    def begin(self, entry: Entry, cost: float, now: float) -> float | Refusal:
        """Its handshake can begin: in how many seconds it may; its grace begins then. See :meth:`give_back`."""
        if not entry.sources:
            return 0.0
        address = entry.sources[0]
        wait_s = address.shakes.spend(cost, now)
        if wait_s > SHAKE_WAIT_S_MAX:
            self.give_back(entry, cost, now)
            return Refusal("handshakes_per_address", f"{address.key} has too many handshakes to wait for")
        entry.at = now + wait_s
        return wait_s

    def give_back(self, entry: Entry, cost: float, now: float) -> None:
        """It left before its turn: those that come need not wait for it."""
        entry.sources[0].shakes.spend(-cost, now)

    def leave(self, entry: Entry) -> None:
        """It is closed, however far it came."""
        if entry.left:
            return
        entry.left = True
        self._settle(entry)
        if entry.peer is not None:
            self.open -= 1
            for party in (entry.peer, *entry.sources):
                party.open -= 1

    def _settle(self, entry: Entry) -> None:
        self._undecided.pop(entry, None)
        for source in entry.sources:
            source.arrivals.pop(entry, None)

    def _refuse_entry(self, sources: tuple[Source, ...], now: float, *, strict: bool) -> Refusal | None:
        limits = self.limits
        for source in sources:
            most = getattr(limits, f"connections_per_{source.whom}_max")
            if most and source.open >= most:
                return Refusal(
                    f"connections_per_{source.whom}", f"{source.open} connections from {source.key} are open"
                )
            if source.entered is not None and source.entered.wait_s(now):
                return Refusal(f"connections_per_minute_per_{source.whom}", f"{source.key} connects too often")
        if strict and not all(source.strict_rate.take(1, now) for source in sources):
            return Refusal("disgrace", "of the address or its subnet: it gets a few handshakes a minute")
        return None

    def _oust(self, sources: tuple[Source, ...], now: float) -> Entry | Refusal | None:
        """Who makes room among the undecided, if somebody must."""
        limits = self.limits
        for source in sources:
            most = getattr(limits, f"undecided_per_{source.whom}_max")
            if len(source.arrivals) >= most:
                return _oldest(source.arrivals, now) or Refusal(
                    f"undecided_per_{source.whom}", f"{most} handshakes from {source.key} are under way"
                )
        if len(self._undecided) >= limits.undecided_max:
            return _oldest(self._undecided, now) or Refusal(
                "undecided", f"{limits.undecided_max} handshakes are under way"
            )
        return None

    # -- what a connection may do

    def open_stream(self, entry: Entry, now: float) -> Refusal | None:
        """One more stream; count it down with :meth:`close_stream`."""
        limits, parties = self.limits, _parties(entry)
        for party in parties:
            if limits.streams_max and party.streams >= limits.streams_max * party.times:
                return Refusal(f"streams_per_{party.whom}", f"{party.streams} streams of {party.key} are open")
            if party.streams_rate is not None and not party.streams_rate.take(1, now):
                return Refusal(f"streams_per_second_per_{party.whom}", f"{party.key} opens streams too fast")
        for party in parties:
            party.streams += 1
        return None

    def close_stream(self, entry: Entry) -> None:
        """A stream ended."""
        for party in _parties(entry):
            party.streams -= 1

    def start_call(self, entry: Entry) -> Refusal | None:
        """One more call in flight; count it down with :meth:`end_call`."""
        limits, parties = self.limits, _parties(entry)
        for party in parties:
            if party.calls >= limits.calls_max * party.times:
                return Refusal(f"calls_per_{party.whom}", f"{party.calls} calls of {party.key} are in flight")
        for party in parties:
            party.calls += 1
        return None

    def end_call(self, entry: Entry) -> None:
        """A call was answered, or nobody waits for it any more."""
        for party in _parties(entry):
            party.calls -= 1

    def spend(self, entry: Entry, calls: int, size: int, now: float) -> tuple[float, str]:
        """Calls and bytes that arrived: for how many seconds to read no more, and the limit that says so."""
        wait_s, limit = 0.0, ""
        for party in _parties(entry):
            if calls and party.calls_rate is not None:
                over_s = party.calls_rate.spend(calls, now)
                if over_s > wait_s:
                    wait_s, limit = over_s, f"calls_per_second_per_{party.whom}"
            if size and party.bytes is not None:
                over_s = party.bytes.spend(size, now)
                if over_s > wait_s:
                    wait_s, limit = over_s, f"bytes_per_second_per_{party.whom}"
        return wait_s, limit

    # -- tables

    def _sources(self, place: Place, now: float) -> tuple[Source, ...]:
        found = self._source("address", place.address, ADDRESS_TIMES, now)
        return (found, self._source("subnet", place.subnet, SUBNET_TIMES, now))

    def _source(self, whom: str, key: str, times: int, now: float) -> Source:
        table = self._tables[whom]
        party = table.get(key)
        if party is None:
            self._make_room(table, now)
            party = table[key] = Source(whom, key, times, self.limits)
        else:
            table.move_to_end(key)
        assert isinstance(party, Source)
        return party

    def _party(self, whom: str, key: str, now: float) -> Party:
        table = self._tables[whom]
        party = table.get(key)
        if party is None:
            self._make_room(table, now)
            party = table[key] = Party(whom, key, 1, self.limits)
        else:
            table.move_to_end(key)
        return party

    def _make_room(self, table: OrderedDict[str, Party], now: float) -> None:
        """Forget the party used longest ago; one with something open moves to the end instead.

        The parties in use are fewer than the table, so the loop ends.
        """
        # a few idle ones each time: the tables shrink again when a flood is over
        for key in [key for key, _ in zip(table, range(2), strict=False)]:
            if table[key].idle(now):
                del table[key]
        while len(table) >= self._table_max:
            key, party = table.popitem(last=False)
            if party.open or party.streams or party.calls or party.arrivals:
                table[key] = party

    def size(self) -> int:
        """Parties remembered."""
        return sum(len(table) for table in self._tables.values())

    @property
    def undecided(self) -> int:
        """Connections whose peer is not proven yet."""
        return len(self._undecided)


def _parties(entry: Entry) -> tuple[Party, ...]:
    assert entry.peer is not None
    return (entry.peer, *entry.sources)


def _oldest(arrivals: dict[Entry, None], now: float) -> Entry | None:
    return next((entry for entry in arrivals if now - entry.at >= GRACE_S), None)


def _bucket(rate: float, burst_seconds: float) -> Bucket | None:
    return Bucket(rate, max(1.0, rate * burst_seconds)) if rate > 0 else None
