"""Which replica to ask: estimates and the plan for one layer, as plain state without I/O.

Owns: what this node measured about its peers, the retry budget and the choice itself. Does not own: who rests
(``holds``), who is far off its like (``outliers``), which calls are late (``hedge``), the calls, the clock, the dice:
time (microseconds) and randomness come in as arguments.

The plan of a layer gives every needed sum group to one peer, at most one call per peer, all peers in parallel. Greedy:
each group goes where the layer is then expected to finish first, counting what is in flight, a fixed cost per call (it
occupies the caller) and the price as a mild weight. The own node is a replica like any other, without a round trip.

Invariants:
1. A replica on hold is chosen only if no free one is left (better a probe than an error).
2. After a hold has passed, one probe is let through; its outcome closes the hold or doubles it.
3. A peer that answers, but far worse than its like, rests as well; at most a third of them at a time.
4. Every (peer, shard) is tried now and then (exploration), so no estimate stays stale for ever.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from config.vocabulary import PeerId
from dmoe.core import outliers
from dmoe.core.hedge import Tails
from dmoe.core.holds import HOLD_FIRST_US, HOLD_MAX_US, PEER_WIDE, Holds
from dmoe.core.outliers import Outliers

CALL_US = 150.0
"""What one more remote call costs the caller itself (framing, encryption, a system call, two task switches)."""
ROUND_TRIP_PRIOR_US = 2_000.0
ROW_PRIOR_US = 150.0
EWMA = 0.2
SURPRISE_MAX = 10.0
"""So many times the usual round trip is the most that one call can say about it."""
EXPLORE = 0.02
PRICE_WEIGHT = 0.25
PRICE_RATIO_MAX = 8.0
STRIKES_MAX = 3
"""After so many calls in a row without an answer a peer rests with all its shards."""
RETRIES_MAX = 32
ANSWERS_PER_RETRY = 10
"""So many answers earn one retry."""
PEERS_MAX = 1024


@dataclass(frozen=True, slots=True)
class Replica:
    """A peer that offers a shard, and its price (microcredits per TFLOP)."""

    peer_id: PeerId
    price: int


@dataclass(frozen=True, slots=True)
class Need:
    """One sum group of a layer: the shard that holds it and who offers that shard."""

    group: int
    shard: int
    replicas: tuple[Replica, ...]


@dataclass(slots=True)
class PeerEstimate:
    """What is known about one peer. ``row_us`` is the time for one row of one group."""

    round_trip_us: float = ROUND_TRIP_PRIOR_US
    row_us: float = ROW_PRIOR_US
    in_flight: int = 0
    calls: int = 0
    answered_us: int | None = None
    """When it last answered."""
    strikes: int = 0
    """Calls in a row that were not answered."""

    def finish_us(self, group_rows: int) -> float:
        """Expected time until ``group_rows`` more rows are answered."""
        return self.round_trip_us + (self.in_flight + group_rows) * self.row_us


@dataclass(slots=True)
class Dispatcher:
    """State over all sessions of one node. ``me`` needs no round trip."""

    me: PeerId
    peers: dict[PeerId, PeerEstimate] = field(default_factory=dict)
    holds: Holds = field(default_factory=Holds)
    tails: Tails = field(default_factory=Tails)
    outliers: Outliers = field(default_factory=Outliers)
    retried: int = 0
    """Calls that were made again."""
    _credit: int = RETRIES_MAX * ANSWERS_PER_RETRY

    @property
    def changes(self) -> int:
        """Counts changes of holds: a plan made before the last one may be stale."""
        return self.holds.changes

    @property
    def ejected(self) -> set[PeerId]:
        """Peers that rest, or are on probation, because they are far off their like."""
        return self.holds.ejected()

    def estimate(self, peer: PeerId) -> PeerEstimate:
        """The peer's record, made on first use."""
        known = self.peers.get(peer)
        if known is None:
            known = self.peers[peer] = PeerEstimate(0.0 if peer == self.me else ROUND_TRIP_PRIOR_US)
        return known

    def forget(self, here: Collection[PeerId]) -> None:
        """Drop what is known about peers that have left, once they are many."""
        if len(self.peers) > PEERS_MAX:
            self.peers = {p: known for p, known in self.peers.items() if p in here or p == self.me or known.in_flight}
            self.holds.keep(here)
            self.tails.forget(here)
            self.outliers.keep(here)

    def prior(self, peer: PeerId, row_us: float) -> None:
        """What an advert claims about a peer that was never called."""
        known = self.estimate(peer)
        if not known.calls:
            known.row_us = row_us

    def started(self, peer: PeerId, group_rows: int) -> None:
        """A call left."""
        self.estimate(peer).in_flight += group_rows

    def ended(self, peer: PeerId, group_rows: int) -> None:
        """A call is over, however it ended."""
        self.estimate(peer).in_flight -= group_rows

    def answered(
        self, peer: PeerId, shards: Collection[int], group_rows: int, total_us: float, service_us: float
    ) -> None:
        """A call was answered after ``total_us``, of which the peer says it computed ``service_us``."""
        known = self.estimate(peer)
        service_us = min(max(service_us, 0.0), total_us)
        weight = EWMA if known.calls else 1.0
        if peer != self.me:
            trip_us = total_us - service_us
            if known.calls:  # one stall of seconds must not decide about minutes
                trip_us = min(trip_us, SURPRISE_MAX * max(known.round_trip_us, ROUND_TRIP_PRIOR_US))
            known.round_trip_us += weight * (trip_us - known.round_trip_us)
        known.row_us += weight * (service_us / group_rows - known.row_us)
        known.calls += 1
        known.strikes = 0
        self._credit = min(RETRIES_MAX * ANSWERS_PER_RETRY, self._credit + 1)
        self.holds.answered(peer, shards)

    def answered_at_us(self, peer: PeerId) -> int | None:
        """When a peer last answered; None if never."""
        known = self.peers.get(peer)
        return known.answered_us if known is not None else None

    def seen(self, peer: PeerId, now_us: int) -> None:
        """A peer did something other than answer for experts: it does not rest as a whole any more."""
        self.estimate(peer).answered_us = now_us
        self.estimate(peer).strikes = 0
        self.holds.answered(peer, ())

    def took(self, peer: PeerId, total_us: float, expected_us: float, now_us: int) -> None:
        """An answered call took so long, and this was expected of it when it left."""
        self.estimate(peer).answered_us = now_us
        self.tails.took(peer, total_us, expected_us)
        self._judge(peer, bad=outliers.is_late(total_us, expected_us), now_us=now_us)

    def lagged(self, peer: PeerId, waited_us: float, expected_us: float, now_us: int) -> None:
        """Another replica answered before a call to this peer, which has been out for ``waited_us``: its estimate
        is worse now, and it rests until it answers."""
        known = self.estimate(peer)
        surprise_us = min(waited_us - expected_us, SURPRISE_MAX * max(known.round_trip_us, ROUND_TRIP_PRIOR_US))
        known.round_trip_us += EWMA * max(0.0, surprise_us)
        self.holds.failed(peer, (PEER_WIDE,), now_us)

    def _judge(self, peer: PeerId, *, bad: bool, now_us: int) -> None:
        if self.holds.on_probation(peer):
            self.outliers.clear(peer)
            if bad:
                self.holds.eject(peer, now_us)
            else:
                self.holds.acquit(peer)
            return
        is_due = self.outliers.ended(peer, bad=bad, typical_us=self._typical_us(peer))
        if is_due and self.outliers.is_outlier(peer, self.ejected):
            self.outliers.clear(peer)
            self.holds.eject(peer, now_us)

    def _typical_us(self, peer: PeerId) -> float:
        known = self.estimate(peer)
        return known.round_trip_us + outliers.ROWS * known.row_us

    def failed(self, peer: PeerId, shards: Collection[int], now_us: int) -> None:
        """A call failed: its shards (``(PEER_WIDE,)`` for the whole peer) rest, twice as long as the last time."""
        self.holds.failed(peer, self._struck(peer, shards), now_us)
        if peer != self.me:
            self._judge(peer, bad=True, now_us=now_us)

    def rest(self, peer: PeerId, shards: Collection[int], now_us: int, length_us: int) -> None:
        """A peer asked for patience (busy): no failure, but others come first for ``length_us``, and for twice as long
        as the last time if it asks again and again (a peer must not use up the retries of its callers)."""
        self.holds.rest(peer, self._struck(peer, shards), now_us, length_us)

    def _struck(self, peer: PeerId, shards: Collection[int]) -> Collection[int]:
        """What a failed call says something about: its shards, and the whole peer if it answers nothing any more."""
        known = self.estimate(peer)
        known.strikes += 1
        return (*shards, PEER_WIDE) if known.strikes >= STRIKES_MAX else shards

    def may_retry(self) -> bool:
        """Take one retry from the budget; False if it is used up."""
        if self._credit < ANSWERS_PER_RETRY:
            return False
        self._credit -= ANSWERS_PER_RETRY
        self.retried += 1
        return True

    def held(self, peer: PeerId, shard: int, now_us: int) -> bool:
        """Whether this replica rests now. A hold that has passed lets one probe through at a time."""
        return self.holds.rests(peer, shard, now_us)

    def plan(
        self,
        needs: Sequence[Need],
        rows: int,
        now_us: int,
        dice: float,
        tried: Mapping[int, Collection[PeerId]] | None = None,
    ) -> dict[PeerId, list[int]]:
        """Peer -> positions in ``needs`` it shall answer. ``dice`` in [0, 1) drives exploration; ``tried`` names, per
        group, peers that failed it already. A group nobody can take any more is missing in the answer."""
        chosen: dict[PeerId, list[int]] = {}
        span_us = 0.0
        explore = int(dice / EXPLORE * len(needs)) if dice < EXPLORE and needs else -1
        # scarce groups first: they have no choice, the others arrange themselves around them
        for position in sorted(range(len(needs)), key=lambda p: len(needs[p].replicas)):
            need = needs[position]
            options = self._options(need, now_us, tried)
            if not options:
                continue
            if position == explore:
                replica = options[int(dice / EXPLORE * 9973) % len(options)]
            else:
                replica = self._best(need, options, chosen, rows, span_us)
            peer = replica.peer_id
            chosen.setdefault(peer, []).append(position)
            span_us = max(span_us, self.estimate(peer).finish_us(rows * len(chosen[peer])))
            if self.holds:
                self.holds.probe(peer, need.shard, now_us)
        for positions in chosen.values():
            positions.sort()
        return chosen

    def _options(self, need: Need, now_us: int, tried: Mapping[int, Collection[PeerId]] | None) -> Sequence[Replica]:
        options: Sequence[Replica] = need.replicas
        gone = tried.get(need.group) if tried else None
        if gone:
            options = [replica for replica in options if replica.peer_id not in gone]
            # a retry is no time for experiments: peers that answered before come first
            options = [replica for replica in options if self._is_proven(replica.peer_id)] or options
        if self.holds:
            options = [r for r in options if not self.held(r.peer_id, need.shard, now_us)] or options
        return options

    def _is_proven(self, peer: PeerId) -> bool:
        known = self.peers.get(peer)
        return peer == self.me or (known is not None and known.calls > 0 and not known.strikes)

    def _best(
        self, need: Need, options: Sequence[Replica], chosen: Mapping[PeerId, list[int]], rows: int, span_us: float
    ) -> Replica:
        if len(options) == 1:
            return options[0]
        cheapest = min(replica.price for replica in options)
        best, best_score = options[0], (float("inf"), 0.0, 0)
        for replica in options:
            peer = replica.peer_id
            mine = chosen.get(peer)
            finish = self.estimate(peer).finish_us(rows * (len(mine) + 1 if mine else 1))
            cost = max(span_us, finish) + (CALL_US if mine is None and peer != self.me else 0.0)
            ratio = min((replica.price + 1) / (cheapest + 1), PRICE_RATIO_MAX)
            # equal costs are ordered by a hash that differs per caller, so that callers spread over replicas
            score = (
                cost * (1.0 + PRICE_WEIGHT * (ratio - 1.0)),
                finish,
                crc32(f"{self.me}{peer}{need.group}".encode()),
            )
            if score < best_score:
                best, best_score = replica, score
        return best


__all__ = ["HOLD_FIRST_US", "HOLD_MAX_US", "PEER_WIDE", "Dispatcher", "Need", "PeerEstimate", "Replica"]
