"""Who leaves a full view: the adverts of strangers, grouped by who introduced them.

Owns: the groups, what each takes, whom to choose. Does not own: the adverts, who is linked (``core.view``).

Invariants:
1. Of the scarce thing (places or bytes) the group that takes most gives: whoever floods the view pushes out its own.
2. Within a group the largest go first, by size class, and within a class chance decides: an attacker chooses neither
   who goes nor, by being small, who stays (sizes up to :data:`SMALL_BYTES` are one class).
3. Joining and leaving take constant time; at most :data:`GROUPS_MAX` groups are kept apart, the rest share one.
"""

from collections.abc import Callable, Collection

from config.vocabulary import PeerId

GROUPS_MAX = 256
SMALL_BYTES = 4 << 10
CLASSES = 6
"""Each holds sizes up to twice those of the one before."""
NOBODY = PeerId("")
"""Introduces whoever came without a linked peer that answers for him: by gossip, out of the DHT."""


class _Group:
    __slots__ = ("classes", "count", "name", "size")

    def __init__(self, name: PeerId) -> None:
        self.name = name
        self.classes: list[list[PeerId]] = [[] for _ in range(CLASSES)]
        self.count = 0
        self.size = 0


class _Place:
    """Where a peer stands: its group, its class there, its index in that."""

    __slots__ = ("group", "index", "rank", "size")

    def __init__(self, group: _Group, size: int) -> None:
        self.group = group
        self.size = size
        self.rank = min(CLASSES - 1, ((size - 1) // SMALL_BYTES).bit_length())
        self.index = len(group.classes[self.rank])


class Strangers:
    """The groups. ``pick(n)`` gives a random number below n."""

    def __init__(self, pick: Callable[[int], int]) -> None:
        self._pick = pick
        self._groups: dict[PeerId, _Group] = {}
        self._places: dict[PeerId, _Place] = {}

    def group(self, introducer: PeerId) -> PeerId:
        """The group of those whom this peer introduces."""
        return introducer if introducer in self._groups or len(self._groups) < GROUPS_MAX else NOBODY

    def bytes_of(self, name: PeerId) -> int:
        """What a group takes."""
        group = self._groups.get(name)
        return group.size if group else 0

    def put(self, peer_id: PeerId, introducer: PeerId, size: int) -> None:
        """A peer comes in, or has another size; the first who introduced it counts."""
        known = self._places.get(peer_id)
        name = known.group.name if known else self.group(introducer)
        self.remove(peer_id)
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(name)
        place = self._places[peer_id] = _Place(group, size)
        group.classes[place.rank].append(peer_id)
        group.count += 1
        group.size += size

    def remove(self, peer_id: PeerId) -> None:
        """A peer leaves."""
        place = self._places.pop(peer_id, None)
        if place is None:
            return
        group = place.group
        alike = group.classes[place.rank]
        last = alike.pop()
        if last != peer_id:
            alike[place.index] = last
            self._places[last].index = place.index
        group.count -= 1
        group.size -= place.size
        if not group.count:
            del self._groups[group.name]

    def choose(self, keep: Collection[PeerId], *, by_bytes: bool, name: PeerId | None = None) -> PeerId | None:
        """Who should go, of one group or of that which takes most; None if only ``keep`` is left."""

        def takes(group: _Group) -> int:
            return group.size if by_bytes else group.count

        groups = list(self._groups.values()) if name is None else [g for g in (self._groups.get(name),) if g]
        while groups:
            most = max(groups, key=takes)
            if (chosen := self._choose_of(most, keep)) is not None:
                return chosen
            groups.remove(most)
        return None

    def _choose_of(self, group: _Group, keep: Collection[PeerId]) -> PeerId | None:
        for alike in reversed(group.classes):
            start = self._pick(len(alike)) if alike else 0
            for step in range(len(alike)):
                peer_id = alike[start + step - len(alike)]
                if peer_id not in keep:
                    return peer_id
        return None
