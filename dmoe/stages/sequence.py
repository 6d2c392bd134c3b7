"""One sequence over stages: its tokens, and at which peer each stage keeps its cache.

Owns: what is known to lie in each cache. Does not own: calls (``caller``).

Invariants:
1. ``leg.held`` positions of a leg's cache hold the sequence's first tokens, or fewer: never others.
2. ``length`` counts only tokens of passes that succeeded.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from config.vocabulary import PeerId
from dmoe.bills import Bill
from dmoe.core import history, stagecalls
from dmoe.core.history import Said
from dmoe.core.stagecalls import Part
from dmoe.runner import Report
from dmoe.stages.chain import Account, Link
from dmoe.stages.loading import SpreadLayers
from dmoe.stages.tickets import Ticket

HEARD_MAX = 64


@dataclass(slots=True, eq=False)
class Leg:
    """One stage of a sequence: a ticket at a peer, or a cache here. ``held`` positions of it are good."""

    link: Link
    ticket: bytes
    here: Ticket | None = None
    held: int = 0


def spread_report(leg: Leg) -> Report | None:
    """Who computed the experts of a leg here that has them elsewhere; None for every other leg."""
    segment = leg.here.stage.segment if leg.here is not None else None
    return segment.report(leg.here.cache) if leg.here is not None and isinstance(segment, SpreadLayers) else None


def joined(reports: Sequence[Report]) -> Report:
    """Several accounts as one."""
    if len(reports) == 1:
        return reports[0]
    rows: Counter[str] = Counter()
    places: dict[str, dict[str, set[int]]] = {}
    for report in reports:
        rows.update(report.expert_rows)
        for peer, served in report.serving.items():
            known = places.setdefault(peer, {"layers": set(), "experts": set()})
            for what, numbers in served.items():
                known[what].update(numbers)
    return Report(
        expert_rows=dict(rows),
        serving={peer: {what: sorted(numbers) for what, numbers in found.items()} for peer, found in places.items()},
        retries=sum(report.retries for report in reports),
        missing=tuple(sorted({place for report in reports for place in report.missing})),
    )


@dataclass(frozen=True, slots=True)
class Heard:
    """What a host says it did of a sequence's rows, by digest, and what it signs for."""

    link: Link
    part: Part
    device: str
    said: Said

    @property
    def end(self) -> int:
        """Positions it stands for."""
        return self.part.position + self.part.rows

    def leaf(self, model_id: str) -> bytes:
        """What its receipt covers."""
        return stagecalls.leaf(model_id, self.link.layers, self.part, self.device, self.said.came, self.said.went)


@dataclass(slots=True, eq=False)
class StageSequence:
    """A sequence (:class:`dmoe.runner.Sequence`)."""

    capacity: int
    let_go: Callable[[Leg], None]
    """Frees a leg's cache; never blocks."""
    tokens: list[int] = field(default_factory=list)
    legs: dict[int, Leg] = field(default_factory=dict)
    """By stage; those that are not there are opened before the next pass."""
    hub: bool = False
    """Its hosts do not reach each other: every one answers here."""
    patient: bool = False
    """Hosts are waited for to the last moment, though others could take their place: it is a second try."""
    retries: int = 0
    closed: bool = False
    bill: Bill | None = None
    rows: Counter[PeerId] = field(default_factory=Counter)
    served: dict[PeerId, set[int]] = field(default_factory=dict)
    heard: dict[tuple[int, int], Heard] = field(default_factory=dict)
    """By stage and position: the last that was heard."""
    hearing: Callable[[Heard], None] | None = None
    """Told of what is heard, until it wants no more."""
    cuts: int = 0
    """How often it was shortened: what is heard of a pass from before that counts no more."""
    before: list[Report] = field(default_factory=list)
    """Of legs here with their experts elsewhere that were given up."""

    @property
    def length(self) -> int:
        """Positions that are in it."""
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        """See :class:`dmoe.runner.Sequence`."""
        assert 0 <= length <= len(self.tokens)
        self.cuts += length < len(self.tokens)
        del self.tokens[length:]
        for key in [key for key in self.heard if key[1] > length]:
            del self.heard[key]
        for leg in self.legs.values():
            leg.held = min(leg.held, length)

    def report(self) -> Report:
        """Who computed what: rows times layers, as experts are counted in rows times groups and layers."""
        serving: Mapping[PeerId, dict[str, list[int]]] = {
            peer: {"layers": sorted(layers), "experts": []} for peer, layers in self.served.items()
        }
        own = Report(
            expert_rows={str(peer): rows for peer, rows in self.rows.items()},
            serving={str(peer): served for peer, served in serving.items()},
            retries=self.retries,
        )
        spread = [report for leg in self.legs.values() if (report := spread_report(leg)) is not None]
        return joined([own, *self.before, *spread])

    def count(self, link: Link, rows: int) -> None:
        """A stage was run."""
        first, last = link.layers
        self.rows[link.peer] += rows * (last - first + 1)
        self.served.setdefault(link.peer, set()).update(range(first, last + 1))

    def hear(self, heard: Heard, cuts: int) -> None:
        """A host of this sequence said what it did, in a pass before which the sequence had been shortened so often."""
        if cuts != self.cuts:
            return
        key = (heard.link.stage, heard.end)
        self.heard.pop(key, None)
        self.heard[key] = heard
        while len(self.heard) > HEARD_MAX:
            del self.heard[next(iter(self.heard))]
        if self.hearing is not None:
            self.hearing(heard)

    def came(self, stage: int, position: int) -> bytes:
        """The digest of what a stage's host has had before a position; empty if that is not known."""
        if not position:
            return history.START
        heard, leg = self.heard.get((stage, position)), self.legs.get(stage)
        return heard.said.came if heard is not None and leg is not None and heard.part.ticket == leg.ticket else b""

    def told(self, account: Account) -> None:
        """As :meth:`count`."""
        self.count(account.link, account.rows)

    def drop(self, stage: int) -> None:
        """Give a leg up."""
        leg = self.legs.pop(stage, None)
        if leg is not None:
            if (report := spread_report(leg)) is not None:
                self.before.append(report)
            self.let_go(leg)

    def close(self) -> None:
        """See :class:`dmoe.runner.Sequence`."""
        self.closed = True
        for stage in list(self.legs):
            self.drop(stage)
