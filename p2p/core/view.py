"""What a node knows of the others: the adverts it verified, and who holds which shard.

Owns: which adverts stand in the view, their bounds, the index (model, shard) -> peers, the count of what was refused.
Does not own: signatures (``core.advert``), how adverts travel (``p2p/directory``), who makes room (``core.strangers``).

Invariants:
1. Taking an advert costs time by its own size, not by that of the view. :meth:`View.adverts` copies the view at most
   once after a change, and what it handed out never changes.
2. The view is bounded in number and bytes. When it is full, whoever comes in pushes out a stranger, never a linked
   peer. A known peer's newer advert always fits: linked peers alone may exceed the bytes.
3. The index holds only models and shards this node asked for (at most :data:`ASKED_MAX`): what strangers claim to hold
   costs no more memory than their adverts.
4. A peer that was reported gone comes back only with a newer advert or a live link.
5. One peer's advert changes at most :data:`CHANGES_BURST` times at once and then once in :data:`CHANGE_MS`.
6. A stranger's advert counts for :data:`STRANGER_MS` from when it was made, whatever it says; and those whom one peer
   introduced take at most one part in :data:`SHARE` of the bytes.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

import msgspec

from config.vocabulary import PeerId
from p2p.core.advert import Advert, SignedAdvert, peer_of
from p2p.core.heartbeat import Heartbeat
from p2p.core.strangers import NOBODY, Strangers

VIEW_MAX = 10_000
VIEW_BYTES_MAX = 32 << 20
SHARE = 2
STRANGER_MS = 75 * 60_000
"""Every honest advert is renewed sooner (``p2p.advert_seconds`` is an hour at most)."""
CHANGES_BURST = 20
CHANGE_MS = 400
ASKED_MAX = 1 << 16
OFFERED_SLOTS = 1 << 16

_Shard = tuple[str, int]


class _Entry:
    """One peer's advert as it was signed, and as it stands with the heartbeats that came after it."""

    __slots__ = ("advert", "beat_seq", "changed_ms", "credit_ms", "signed")

    def __init__(self, signed: SignedAdvert, now_ms: int) -> None:
        self.signed = signed
        self.advert = signed.advert
        self.beat_seq = signed.advert.seq
        self.changed_ms = now_ms
        self.credit_ms = CHANGES_BURST * CHANGE_MS

    def may_change(self, now_ms: int) -> bool:
        """Take one change out of what this peer may still do; False when it is used up."""
        gained = max(0, now_ms - self.changed_ms)
        credit_ms = min(CHANGES_BURST * CHANGE_MS, self.credit_ms + gained)
        self.changed_ms = now_ms
        if credit_ms < CHANGE_MS:
            self.credit_ms = credit_ms
            return False
        self.credit_ms = credit_ms - CHANGE_MS
        return True


class View:
    """The view of one node; ``own`` is always in it once :meth:`put_own` was called. ``pick(n)`` gives a random number
    below n."""

    def __init__(
        self,
        own: PeerId,
        pick: Callable[[int], int],
        *,
        adverts_max: int = VIEW_MAX,
        bytes_max: int = VIEW_BYTES_MAX,
    ) -> None:
        self._own = own
        self._adverts_max = adverts_max
        self._bytes_max = bytes_max
        self._entries: dict[PeerId, _Entry] = {}
        self._bytes = 0
        self._strangers = Strangers(pick)
        self._snapshot: Mapping[PeerId, Advert] | None = None
        self._models: dict[str, dict[PeerId, int]] = {}
        self._asked: dict[str, int] = {}
        self._holders: dict[_Shard, dict[PeerId, None]] = {}
        self._offered = array("I", bytes(OFFERED_SLOTS * array("I").itemsize))
        """How many offers there are of models whose ids hash alike: says at once that there is none."""
        self._gone: dict[PeerId, int] = {}
        self.refused: Counter[str] = Counter()
        """By reason: what :class:`p2p.core.advert.BadAdvert` names, and ``stale``, ``gone``, ``old``, ``full``,
        ``churn``."""

    # -- looking

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, peer_id: object) -> bool:
        return peer_id in self._entries

    def adverts(self) -> Mapping[PeerId, Advert]:
        """Every advert, as it stands now; the mapping does not change any more."""
        if self._snapshot is None:
            self._snapshot = MappingProxyType({peer: entry.advert for peer, entry in self._entries.items()})
        return self._snapshot

    def get(self, peer_id: PeerId) -> Advert | None:
        """One peer's advert."""
        entry = self._entries.get(peer_id)
        return entry.advert if entry else None

    def signed(self, peer_id: PeerId) -> SignedAdvert | None:
        """One peer's advert with the bytes that prove it."""
        entry = self._entries.get(peer_id)
        return entry.signed if entry else None

    def all_signed(self) -> Iterator[tuple[PeerId, SignedAdvert]]:
        """Every advert with its bytes; the view must not change meanwhile."""
        return ((peer, entry.signed) for peer, entry in self._entries.items())

    def seq(self, peer_id: PeerId) -> int:
        """The number from which on an advert of this peer is news, less one."""
        entry = self._entries.get(peer_id)
        return entry.signed.advert.seq if entry else self._gone.get(peer_id, -1)

    def providers(self, model_id: str, index: int) -> Sequence[PeerId]:
        """Who says that it serves this shard, the own node included; answers at once."""
        holders = self._holders.get((model_id, index))
        if holders is None:
            holders = self._ask(model_id, index)
        return tuple(holders)

    def some_providers(self, model_id: str, index: int, count: int) -> Sequence[PeerId]:
        """The same for a stranger who asks: at most ``count``, and nothing is remembered for it."""
        if not self.looks(model_id, index):
            return tuple(islice(self._holders.get((model_id, index), ()), count))
        held = ((peer, entry.advert.offer(model_id)) for peer, entry in self._entries.items())
        return tuple(islice((peer for peer, offer in held if offer is not None and offer.holds(index)), count))

    def looks(self, model_id: str, index: int) -> int:
        """How many adverts :meth:`some_providers` looks at: none if nobody offers the model."""
        followed = (model_id, index) in self._holders
        return len(self._entries) if not followed and self._offered[_slot(model_id)] else 0

    def _ask(self, model_id: str, index: int) -> dict[PeerId, None]:
        """Start to follow a shard; the one followed longest makes room."""
        while len(self._holders) >= ASKED_MAX:
            self._forget(*next(iter(self._holders)))
        held = self._models.get(model_id)
        if held is None:
            offers = ((peer, entry.advert.offer(model_id)) for peer, entry in self._entries.items())
            held = {peer: int.from_bytes(offer.shards, "little") for peer, offer in offers if offer and offer.shards}
            self._models[model_id] = held
        self._asked[model_id] = self._asked.get(model_id, 0) | 1 << index
        holders = {peer: None for peer, shards in held.items() if shards >> index & 1}
        self._holders[model_id, index] = holders
        return holders

    def _forget(self, model_id: str, index: int) -> None:
        del self._holders[model_id, index]
        self._asked[model_id] &= ~(1 << index)
        if not self._asked[model_id]:
            del self._asked[model_id], self._models[model_id]

    # -- changing

    def put_own(self, signed: SignedAdvert, now_ms: int) -> None:
        """The own advert."""
        self._store(self._own, signed, now_ms)

    def put_live(self, advert: Advert) -> None:
        """The own advert with a change that is not signed yet."""
        self._entries[self._own].advert = advert
        self._snapshot = None

    def offer(
        self,
        signed: SignedAdvert,
        now_ms: int,
        linked: Callable[[], Collection[PeerId]],
        introducer: PeerId = NOBODY,
    ) -> str:
        """Take a verified advert in if it is news. Returns why it was not taken (also counted), or nothing.

        ``linked`` gives the peers with a live link; asked only when the view is full, or the advert old.
        ``introducer`` is the linked peer that sent it, if one did.
        """
        peer_id = peer_of(signed.advert)
        entry = self._entries.get(peer_id)
        reason = self.knows_better(peer_id, signed.advert.seq)
        if reason:
            pass
        elif signed.advert.seq + STRANGER_MS <= now_ms and peer_id not in linked():
            reason = "old"
        elif entry is not None and not entry.may_change(now_ms):
            reason = "churn"
        elif not self._make_room(peer_id, len(signed.data), linked, self._strangers.group(introducer)):
            reason = "full"
        else:
            self._gone.pop(peer_id, None)
            self._store(peer_id, signed, now_ms)
            self._strangers.put(peer_id, introducer, len(signed.data))
            return ""
        self.refused[reason] += 1
        return reason

    def knows_better(self, peer_id: PeerId, seq: int) -> str:
        """Why an advert with this number is no news, if it is none: ``stale`` or ``gone``."""
        entry = self._entries.get(peer_id)
        if peer_id == self._own or (entry is not None and seq <= entry.signed.advert.seq):
            return "stale"
        return "gone" if seq <= self._gone.get(peer_id, -1) else ""

    def beat(self, beat: Heartbeat, now_ms: int) -> str:
        """Bring a known peer's advert up to date with a verified heartbeat. Returns why not (also counted)."""
        reason = self.beat_is_no_news(beat)
        entry = self._entries.get(PeerId(beat.peer_id))
        if reason or entry is None:
            pass
        elif not entry.may_change(now_ms):
            reason = "churn"
        else:
            entry.beat_seq = beat.seq
            entry.advert = beat.applied(entry.advert)
            self._snapshot = None
            return ""
        self.refused[f"beat_{reason}"] += 1
        return reason

    def beat_is_no_news(self, beat: Heartbeat) -> str:
        """Why a heartbeat changes nothing, if it does not: ``unknown`` or ``stale``."""
        entry = self._entries.get(PeerId(beat.peer_id))
        if entry is None:
            return "unknown"
        return "stale" if beat.peer_id == self._own or beat.seq <= entry.beat_seq else ""

    def remove(self, peer_id: PeerId) -> bool:
        """Take a peer's advert out; whether there was one."""
        entry = self._entries.pop(peer_id, None)
        if entry is None:
            return False
        self._bytes -= len(entry.signed.data)
        self._strangers.remove(peer_id)
        self._snapshot = None
        self._index(peer_id, entry.advert, None)
        return True

    def expire(self, now_ms: int, linked: Collection[PeerId] = ()) -> bool:
        """Take out what has expired; whether anything did."""
        keep = {*linked, self._own}
        made_ms = now_ms - STRANGER_MS
        old = [
            peer
            for peer, entry in self._entries.items()
            if entry.advert.expires_ms <= now_ms or (entry.advert.seq <= made_ms and peer not in keep)
        ]
        return any([self.remove(peer) for peer in old if peer != self._own])

    def left(self, peer_id: PeerId) -> bool:
        """A peer is gone: what was known of it counts no more. Whether the view changed."""
        entry = self._entries.get(peer_id)
        if entry is None or peer_id == self._own:
            return False
        self._gone[peer_id] = entry.signed.advert.seq
        if len(self._gone) > self._adverts_max:
            del self._gone[next(iter(self._gone))]
        return self.remove(peer_id)

    def back(self, peer_id: PeerId) -> None:
        """A peer is there (again): its old advert may come back.

        If it had been reported gone, perhaps this node's own line was down: the old adverts of the others may come
        back, too. Those who are gone indeed leave again as soon as they are dialled.
        """
        if self._gone.pop(peer_id, None) is not None:
            self._gone.clear()

    def _make_room(self, peer_id: PeerId, size: int, linked: Callable[[], Collection[PeerId]], group: PeerId) -> bool:
        """Whether the advert may come in; strangers leave for it."""
        known = self._entries.get(peer_id)
        more = size - (len(known.signed.data) if known else 0)
        keep: set[PeerId] | None = None
        while True:
            many = len(self._entries) + (known is None) > self._adverts_max
            large = self._bytes + more > self._bytes_max
            over = known is None and self._strangers.bytes_of(group) + size > self._bytes_max // SHARE
            if not (many or large or over):
                return True
            if keep is None:
                keep = {*linked(), self._own}
                stranger = peer_id not in keep
                keep.add(peer_id)
            if many or large:
                leaves = self._strangers.choose(keep, by_bytes=large)
            elif stranger:
                leaves = self._strangers.choose(keep, by_bytes=True, name=group)
            else:
                return True
            if leaves is None:
                return known is not None
            self.remove(leaves)

    def _store(self, peer_id: PeerId, signed: SignedAdvert, now_ms: int) -> None:
        entry = self._entries.get(peer_id)
        if entry is None:
            self._entries[peer_id] = _Entry(signed, now_ms)
            self._bytes += len(signed.data)
            self._index(peer_id, None, signed.advert)
        else:
            self._bytes += len(signed.data) - len(entry.signed.data)
            self._index(peer_id, entry.advert, signed.advert)
            entry.signed, entry.advert = signed, signed.advert
            entry.beat_seq = max(entry.beat_seq, signed.advert.seq)
        self._snapshot = None

    def _index(self, peer_id: PeerId, old: Advert | None, new: Advert | None) -> None:
        """Follow one peer's change; looks only at shards that changed and that were asked for."""
        before = {offer.model_id: offer.shards for offer in old.models} if old else {}
        after = {offer.model_id: offer.shards for offer in new.models} if new else {}
        for model_id in before.keys() - after.keys():
            self._offered[_slot(model_id)] -= 1
        for model_id in after.keys() - before.keys():
            self._offered[_slot(model_id)] += 1
        for model_id in before.keys() | after.keys():
            had, has = before.get(model_id, b""), after.get(model_id, b"")
            peers = self._models.get(model_id)
            if had == has or peers is None:
                continue
            shards = int.from_bytes(has, "little")
            if shards:
                peers[peer_id] = shards
            else:
                peers.pop(peer_id, None)
            self._follow(model_id, peer_id, shards ^ int.from_bytes(had, "little"), shards)

    def _follow(self, model_id: str, peer_id: PeerId, changed: int, shards: int) -> None:
        changed &= self._asked[model_id]
        while changed:
            index = (changed & -changed).bit_length() - 1
            changed &= changed - 1
            holders = self._holders[model_id, index]
            if shards >> index & 1:
                holders[peer_id] = None
            else:
                holders.pop(peer_id, None)


def _slot(model_id: str) -> int:
    return hash(model_id) % OFFERED_SLOTS


def is_news(old: Advert | None, new: Advert) -> bool:
    """Whether who waits for changes should look again: something other than dates, load and coordinate differs."""
    if old is None:
        return True
    as_before = msgspec.structs.replace(
        new, seq=old.seq, expires_ms=old.expires_ms, load=old.load, coordinate=old.coordinate
    )
    return as_before != old
