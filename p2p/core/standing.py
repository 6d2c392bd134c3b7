"""What peers and places did wrong, and who is shut out for how long.

Owns: the table of faults, scores that heal, bans that expire and grow. Does not own: who is connected.

Every subject (a peer id, an address, a subnet) has demerits: a fault adds its weight, time halves them. At
:data:`BAN_AT` the subject is banned; each further ban of it lasts :data:`GROWTH` times longer.

Invariants:
1. Soft faults (slowness, missed deadlines) alone never ban: an overloaded peer is used less, not shut out.
2. Identities are free, so a peer's hard faults also count, diluted, against its address and its subnet. A place that
   was banned by that is in *disgrace*: a trickle of handshakes is all it gets, so that the neighbours behind one NAT
   still come in, sooner or later. Who is in stays in.
3. Only the operator shuts a place out entirely, and only the operator's word ends an operator's ban early.
4. Tables are bounded; forgotten first are those of whom least is known, and the bans nearest to their end.
5. What the operator trusts is never banned by itself: the doors revoke such a ban.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Fault(NamedTuple):
    """How bad it is; ``hard``: no honest peer does this."""

    weight: int
    hard: bool


FAULTS: Mapping[str, Fault] = {
    "protocol": Fault(50, True),  # bytes that no implementation sends
    "bad_advert": Fault(10, True),  # its own signature, sequence or bounds are wrong
    "bad_record": Fault(10, True),  # a DHT record its rule refuses
    "bad_chunk": Fault(34, True),  # bytes that do not have the hash they were asked by
    "flood": Fault(25, True),  # goes on above a limit it was told of
    "handshake": Fault(7, True),  # opened a connection and proved nothing
    "cheat": Fault(1000, True),  # proved wrong about its work
    "refused": Fault(2, False),  # comes back although refused
    "slow": Fault(4, False),
    "deadline": Fault(2, False),
}

BAN_AT = 100
SOFT_MAX = 60
"""Demerits that soft faults can reach."""
HALF_LIFE_MS = 10 * 60_000
BAN_MS = 10 * 60_000
BAN_MS_MAX = 7 * 24 * 3600_000
CHEAT_MS = 24 * 3600_000
GROWTH = 4
REMEMBERED_MS = 30 * 24 * 3600_000
"""A ban counts towards the length of the next one for so long."""
ADDRESS_SHARE, SUBNET_SHARE = 0.25, 0.0625
"""How much of a peer's hard faults counts against where it comes from."""
TABLE_MAX = 8192
BANS_MAX = 4096
TENURE_MAX_MS = 24 * 3600_000
TENURE_KEPT_MS = 10 * 60_000
"""Who was linked so long in total is kept in a full table like one that is about to be banned."""


@dataclass(slots=True)
class Ban:
    """``until_ms`` is unix time; ``count`` is the how manieth it is. Kept a while after its end, for the next one."""

    until_ms: int
    reason: str
    count: int
    by_operator: bool = False


class _Record:
    __slots__ = ("at_ms", "demerits", "tenure_ms", "worst")

    def __init__(self, at_ms: int) -> None:
        self.at_ms = at_ms
        self.demerits = 0.0
        self.tenure_ms = 0
        self.worst = ""


class Standing:
    """Demerits, tenure and bans by subject. Times are unix ms."""

    def __init__(self, *, table_max: int = TABLE_MAX, bans_max: int = BANS_MAX) -> None:
        self._table_max = table_max
        self._bans_max = bans_max
        self._records: dict[str, _Record] = {}
        self.bans: dict[str, Ban] = {}

    # -- scores

    def blame(self, subject: str, fault: str, now_ms: int, *, share: float = 1.0) -> Ban | None:
        """Count a fault; the ban if that made one. ``fault`` stands in :data:`FAULTS`."""
        kind = FAULTS[fault]
        record = self._record(subject, now_ms)
        _heal(record, now_ms)
        weight = kind.weight if share == 1.0 else min(kind.weight, BAN_AT) * share
        if not kind.hard:
            weight = max(0.0, min(weight, SOFT_MAX - record.demerits))
        record.demerits += weight
        record.worst = fault
        if record.demerits < BAN_AT:
            return None
        record.demerits = BAN_AT / 2  # half a chance when it comes back
        record.tenure_ms = 0
        known = self.bans.get(subject)
        if known is not None and known.until_ms > now_ms:
            return None  # it is out already
        count = known.count + 1 if known is not None else 1
        length_ms = (CHEAT_MS if fault == "cheat" else BAN_MS) * GROWTH ** min(count - 1, 10)
        return self._put(subject, Ban(now_ms + min(length_ms, BAN_MS_MAX), fault, count), now_ms)

    def score(self, subject: str, now_ms: int) -> int:
        """100 is clean, 0 is out."""
        record = self._records.get(subject)
        if record is None:
            return BAN_AT
        _heal(record, now_ms)
        return max(0, BAN_AT - round(record.demerits))

    def worst(self, subject: str) -> str:
        """The last fault of a subject, empty if there was none."""
        record = self._records.get(subject)
        return "" if record is None else record.worst

    def linked(self, subject: str, span_ms: int, now_ms: int) -> None:
        """A peer was linked for so long (again)."""
        if span_ms > 0:
            record = self._record(subject, now_ms)
            record.tenure_ms = min(record.tenure_ms + span_ms, TENURE_MAX_MS)

    def tenure_ms(self, subject: str) -> int:
        """For how long a peer was linked in total."""
        record = self._records.get(subject)
        return 0 if record is None else record.tenure_ms

    def tenures(self, count: int) -> dict[str, int]:
        """The longest known peers."""
        long = [(record.tenure_ms, subject) for subject, record in self._records.items() if record.tenure_ms]
        return {subject: tenure_ms for tenure_ms, subject in sorted(long, reverse=True)[:count]}

    # -- bans

    def banned(self, subject: str, now_ms: int) -> Ban | None:
        """The ban in force, if any."""
        ban = self.bans.get(subject)
        return ban if ban is not None and ban.until_ms > now_ms else None

    def ban(self, subject: str, span_ms: int, reason: str, now_ms: int) -> Ban:
        """The operator shuts a subject out."""
        known = self.bans.get(subject)
        until_ms = now_ms + span_ms
        return self._put(subject, Ban(until_ms, reason, known.count if known else 0, True), now_ms)

    def unban(self, subject: str) -> bool:
        """The operator lets a subject in again, with a clean score; whether it was out."""
        record = self._records.get(subject)
        if record is not None:
            record.demerits, record.worst = 0.0, ""
        return self.bans.pop(subject, None) is not None

    def revoke(self, subject: str) -> None:
        """A ban is not to be; the score stays."""
        self.bans.pop(subject, None)

    def in_force(self, now_ms: int) -> Iterator[tuple[str, Ban]]:
        """Every ban that has not ended."""
        return ((subject, ban) for subject, ban in self.bans.items() if ban.until_ms > now_ms)

    def restore(self, bans: Mapping[str, Ban], tenures: Mapping[str, int], now_ms: int) -> None:
        """What an earlier run left. A ban cannot last longer than one made now could, whatever the clock did."""
        for subject, ban in bans.items():
            if not ban.by_operator:
                ban.until_ms = min(ban.until_ms, now_ms + BAN_MS_MAX)
            self._put(subject, ban, now_ms)
        for subject, tenure_ms in tenures.items():
            self.linked(subject, tenure_ms, now_ms)

    def _put(self, subject: str, ban: Ban, now_ms: int) -> Ban:
        self.bans[subject] = ban
        if len(self.bans) > self._bans_max:
            for old in [s for s, b in self.bans.items() if b.until_ms + REMEMBERED_MS < now_ms]:
                del self.bans[old]
            while len(self.bans) > self._bans_max:
                del self.bans[min(self.bans, key=lambda s: (self.bans[s].by_operator, self.bans[s].until_ms))]
        return ban

    def _record(self, subject: str, now_ms: int) -> _Record:
        record = self._records.get(subject)
        if record is None:
            if len(self._records) >= self._table_max:
                self._forget(now_ms)
            record = self._records[subject] = _Record(now_ms)
        return record

    def _forget(self, now_ms: int) -> None:
        """Drop the least interesting eighth at once, so that a flood of subjects costs little per subject."""
        for record in self._records.values():
            _heal(record, now_ms)

        def weight(subject: str) -> float:
            record = self._records[subject]
            return record.demerits + BAN_AT * record.tenure_ms / TENURE_KEPT_MS

        for subject in sorted(self._records, key=weight)[: max(1, self._table_max // 8)]:
            del self._records[subject]


def _heal(record: _Record, now_ms: int) -> None:
    span_ms = now_ms - record.at_ms
    if span_ms > 0:
        record.demerits *= 0.5 ** (span_ms / HALF_LIFE_MS)
        record.at_ms = now_ms
