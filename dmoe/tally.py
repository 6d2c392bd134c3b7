"""Who computed what: of a pass, split among its sequences, and of a sequence since it was opened."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

from dmoe.bills import Bill, Purpose
from dmoe.core.manifest import Manifest
from dmoe.runner import Report

MISSING_TOLD_MAX = 256
"""Missing experts that a report names."""


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence's part of a pass. ``rows``: per peer, its rows times the sum groups computed there; ``places``:
    which (layer, sum group) each peer computed; ``retries``: calls that were repeated in that pass."""

    rows: Mapping[str, int]
    places: Mapping[str, AbstractSet[tuple[int, int]]]
    retries: int = 0
    missing: AbstractSet[tuple[int, int]] = frozenset()
    """(layer, expert) that its rows had to do without."""


class Meter(Protocol):
    """Whoever computes a model's experts and knows who did."""

    async def open(self) -> None:
        """One more sequence is about to start."""

    def begin(self, bills: Sequence[Bill | None], counts: Sequence[int], spare: Purpose = "kept") -> None:
        """The next pass is for sequences with so many rows each, in the order of the rows: who pays. None: nobody any
        more, which is booked as ``spare``."""

    def take(self, counts: Sequence[int]) -> list[Share]:
        """The last pass, split among sequences with so many rows each, in the order of the rows."""


class OwnMeter:
    """Everything is computed here, and counted as calls to peers are."""

    def __init__(self, manifest: Manifest, peer_id: str) -> None:
        arch = manifest.architecture
        self._peer_id = peer_id
        groups = range(len(manifest.sum_groups))
        self._places = {peer_id: frozenset((layer, group) for layer in arch.sparse_layers for group in groups)}

    async def open(self) -> None:
        """See :class:`Meter`."""

    def begin(self, bills: Sequence[Bill | None], counts: Sequence[int], spare: Purpose = "kept") -> None:
        """See :class:`Meter`: nobody is paid."""

    def take(self, counts: Sequence[int]) -> list[Share]:
        """See :class:`Meter`."""
        groups = len(self._places[self._peer_id])
        return [Share({self._peer_id: count * groups}, self._places) for count in counts]


@dataclass(slots=True)
class Tally:
    """One sequence's account."""

    rows: dict[str, int] = field(default_factory=dict)
    places: dict[str, set[tuple[int, int]]] = field(default_factory=dict)
    retries: int = 0
    missing: set[tuple[int, int]] = field(default_factory=set)

    def add(self, share: Share) -> None:
        """Count a pass."""
        for peer, rows in share.rows.items():
            self.rows[peer] = self.rows.get(peer, 0) + rows
        for peer, places in share.places.items():
            known = self.places.setdefault(peer, set())
            if not places <= known:
                known |= places
        self.retries += share.retries
        self.missing |= share.missing

    def report(self, manifest: Manifest) -> Report:
        """In the form of an answer's last event."""
        serving = {}
        for peer, places in self.places.items():
            groups = {group for _, group in places}
            serving[peer] = {
                "layers": sorted({layer for layer, _ in places}),
                "experts": sorted(expert for group in groups for expert in manifest.sum_groups[group]),
            }
        missing = tuple(sorted(self.missing)[:MISSING_TOLD_MAX])
        return Report(expert_rows=dict(self.rows), serving=serving, retries=self.retries, missing=missing)
