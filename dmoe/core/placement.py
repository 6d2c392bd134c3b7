"""Who holds which shard: every node computes the same answer from the adverts, without a coordinator.

Weighted rendezvous hashing (Thaler and Ravishankar 1998; weights by the logarithm method): a shard ranks the nodes that
offer room by ``-weight / ln(hash(model, shard, node))``; the first ``replicas`` of them take it. The weight is the room
a node offers (quantised in its advert), not what is free at the moment, which would feed back and flap.

Owns: the ranking, the assignment, what a node should fetch next and what it holds in surplus. Does not own: fetching,
limits on this machine, the clock (times come in as arguments).

Invariants:
1. A pure function of its arguments: equal views give equal assignments, in any order of the candidates.
2. A node that leaves moves only the shards it had: every other shard keeps its holders (spread extras aside).
3. A full node is passed over for shards it does not hold, and keeps those it holds. So is a node that has not brought
   up a shard in good time (it may not take this publisher's models, or fail): the next in rank steps in.
4. A surplus shard is named only while enough assigned others have it ready.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import log

from config.vocabulary import PeerId

_SCALE = float(1 << 52)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that offers room. ``ready``: manifest indices of the shards it serves now."""

    peer_id: PeerId
    offered_bytes: int
    full: bool
    ready: frozenset[int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A shard to place: its index in the manifest, its id and how many replicas it should have."""

    index: int
    shard_id: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What one node should do. ``fetch`` is in order of urgency: the fewest ready replicas first."""

    keep: tuple[int, ...]
    fetch: tuple[int, ...]
    surplus: tuple[int, ...]


def score(model_id: str, shard_id: str, peer_id: str, weight: int) -> float:
    """A node's rendezvous score for a shard; higher ranks first."""
    digest = sha256(f"{model_id}\0{shard_id}\0{peer_id}".encode()).digest()
    # 52 bits and a half: exact in a double and never 1.0, whatever peer id somebody has searched for
    uniform = ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / _SCALE
    return -weight / log(uniform)


def rank(model_id: str, shard_id: str, candidates: Collection[Candidate]) -> list[Candidate]:
    """All candidates, best first. Nodes that offer nothing are left out."""
    offering = [c for c in candidates if c.offered_bytes > 0]
    offering.sort(key=lambda c: (-score(model_id, shard_id, c.peer_id, c.offered_bytes), c.peer_id))
    return offering


def assign(
    model_id: str,
    shards: Sequence[Wanted],
    candidates: Collection[Candidate],
    late: Collection[tuple[int, PeerId]] = (),
) -> dict[int, tuple[PeerId, ...]]:
    """Shard index -> the nodes that should hold it, best first.

    A node to which nothing fell takes the shards it ranks best for as extra replicas, up to its fair share: with few
    shards or few nodes chance alone leaves some out. Extras never displace anybody.
    """
    assigned: dict[int, tuple[PeerId, ...]] = {}
    scores: dict[PeerId, list[tuple[float, int]]] = {c.peer_id: [] for c in candidates}
    for shard in shards:
        ranked = rank(model_id, shard.shard_id, candidates)
        fit = [c for c in ranked if shard.index in c.ready or not (c.full or (shard.index, c.peer_id) in late)]
        assigned[shard.index] = tuple(c.peer_id for c in fit[: shard.replicas])
        for place, candidate in enumerate(fit):
            if shard.replicas:
                scores[candidate.peer_id].append((place, shard.index))
    busy = {peer for peers in assigned.values() for peer in peers}
    offered = sum(c.offered_bytes for c in candidates)
    copies = sum(shard.replicas for shard in shards)
    for candidate in sorted(candidates, key=lambda c: c.peer_id):
        if candidate.peer_id in busy or candidate.full or candidate.offered_bytes <= 0:
            continue
        share = max(1, int(copies * candidate.offered_bytes / offered))
        for _, index in sorted(scores[candidate.peer_id])[:share]:
            assigned[index] = (*assigned[index], candidate.peer_id)
    return assigned


def decide(
    me: PeerId,
    model_id: str,
    shards: Sequence[Wanted],
    candidates: Collection[Candidate],
    mine: Collection[int],
    assigned: Mapping[int, tuple[PeerId, ...]] | None = None,
) -> Decision:
    """What ``me`` should keep, fetch and may drop, given that it serves ``mine`` now."""
    if assigned is None:
        assigned = assign(model_id, shards, candidates)
    ready = {shard.index: [c.peer_id for c in candidates if shard.index in c.ready] for shard in shards}
    keep: list[int] = []
    fetch: list[tuple[int, int, int]] = []
    surplus: list[int] = []
    for shard in shards:
        index, should = shard.index, me in assigned[shard.index]
        others = sum(1 for peer in ready[index] if peer != me)
        if index in mine:
            # replicas beyond the wish go, but only when those who should have it do have it
            settled = all(peer in ready[index] for peer in assigned[index])
            drop = not should and settled and others >= min(shard.replicas, len(assigned[index]))
            (surplus if drop else keep).append(index)
        elif should:
            fetch.append((others, assigned[index].index(me), index))
    return Decision(tuple(keep), tuple(index for *_, index in sorted(fetch)), tuple(surplus))


@dataclass(slots=True)
class Holding:
    """Hysteresis: a surplus is dropped only after it has been one without a break for ``hold_ms``."""

    hold_ms: int
    _since_ms: dict[tuple[str, int], int] = field(default_factory=dict)

    def postpone(self, model_id: str, index: int, now_ms: int) -> None:
        """Hold a ripe one once more."""
        self._since_ms[model_id, index] = now_ms

    def ripe(self, model_id: str, surplus: Collection[int], now_ms: int) -> list[int]:
        """Which of the surplus shards may be dropped now; forgets shards that are needed again."""
        for key in [key for key in self._since_ms if key[0] == model_id and key[1] not in surplus]:
            del self._since_ms[key]
        return [
            index for index in surplus if now_ms - self._since_ms.setdefault((model_id, index), now_ms) >= self.hold_ms
        ]


@dataclass(slots=True)
class Patience:
    """Which nodes are late with a shard: assigned it for its time without a break in the view and still not ready.
    A late node is passed over until it is ready or leaves the view; a node never counts itself late."""

    me: PeerId
    _since_ms: dict[tuple[str, int, PeerId], int] = field(default_factory=dict)
    _late: dict[str, set[tuple[int, PeerId]]] = field(default_factory=dict)

    def late(self, model_id: str) -> Collection[tuple[int, PeerId]]:
        """Whom to pass over now."""
        return self._late.get(model_id, ())

    def observe(
        self,
        model_id: str,
        assigned: Mapping[int, tuple[PeerId, ...]],
        candidates: Collection[Candidate],
        patience_ms: Mapping[int, int],
        now_ms: int,
    ) -> bool:
        """Take a view in; True if somebody became late, so that the assignment has to be made again."""
        ready = {c.peer_id: c.ready for c in candidates}
        late = {(index, peer) for index, peer in self.late(model_id) if peer in ready and index not in ready[peer]}
        owed = {
            (model_id, index, peer)
            for index, peers in assigned.items()
            for peer in peers
            if peer != self.me and index not in ready[peer]
        }
        for key in [key for key in self._since_ms if key[0] == model_id and key not in owed]:
            del self._since_ms[key]
        news = False
        for key in owed:
            _, index, peer = key
            if now_ms - self._since_ms.setdefault(key, now_ms) >= patience_ms[index]:
                late.add((index, peer))
                news = True
        self._late[model_id] = late
        return news


def quantised(offered_bytes: int) -> int:
    """Offered room as adverts state it: rounded down to two significant binary digits, so that it rarely changes."""
    if offered_bytes <= 0:
        return 0
    shift = max(0, offered_bytes.bit_length() - 2)
    return offered_bytes >> shift << shift
