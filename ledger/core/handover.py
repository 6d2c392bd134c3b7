"""What one committee leaves to the next: handovers, checked and counted; sans-IO.

Owns rules 7 and 8 on the receiving side. A handover counts only once everything up to its frontier is applied here:
a frontier that nobody can prove is never reached and holds nobody up, and whatever was final for the old witness is
final here, so that its locks need to cover nothing but the rest.

Invariants: one handover per old witness (the first). Locks and bans are those that enough of the counted handovers
report; as more come in they only ever become fewer. Vouchers prove themselves, so the highest of any handover counts.
"""

from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from config.errors import IntegrityError
from ledger.core import quorums
from ledger.core.errors import RuleError
from ledger.core.objects import (
    HANDOVER_BYTES_MAX,
    Entry,
    Frontier,
    Handover,
    Held,
    Item,
    Shown,
    Signed,
    id_of,
    open_signed,
    parse,
)
from ledger.core.rules import check_entry_signature, proves_total
from ledger.core.state import State
from p2p.core import codec
from p2p.core.identity import verify

Slot = tuple[bytes, int]


def frontier_of(state: State) -> Frontier:
    """What a state has applied."""
    accounts = tuple((key, a.seq) for key, a in sorted(state.accounts.items()) if a.seq)
    channels = ((key, c.paid) for key, c in sorted(state.channels.items()) if c.closed_at is None and c.paid)
    return Frontier(accounts, tuple(channels))


def open_handover(state: State, signed: Signed) -> Handover:
    """A handover by a witness of its epoch.

    Raises :class:`config.errors.IntegrityError` if it is anything else.
    """
    body = codec.decode(Handover, signed.body, bytes_max=HANDOVER_BYTES_MAX)
    if body.net != state.committees.net or body.witness not in state.committees.of(body.epoch).members:
        raise RuleError("handover", "a handover is not by a witness of this network's epoch")
    if open_signed(Handover, signed, body.witness, HANDOVER_BYTES_MAX) is None:
        raise RuleError("signature", "a handover is not signed by its witness")
    return body


def lock_evidence(state: State, signed: Signed) -> Item | None:
    """Rule 7: a lock counts only as an entry that its payer signed."""
    try:
        item = parse(signed)
        entry = item.object
        if not isinstance(entry, Entry) or entry.net != state.committees.net:
            return None
        check_entry_signature(item, entry)
    except IntegrityError:
        return None
    return item


def freeze_evidence(state: State, held: Held) -> bool:
    """Rule 7: a freeze counts only for an open channel, and above zero only with the payer's voucher of its total.

    It may lie above the lock as it is known here: of a final claim whose top-up has not come yet.
    """
    channel = state.channels.get(held.channel)
    if channel is None or channel.closed_at is not None:
        return False
    voucher, signature = (held.shown.voucher, held.shown.signature) if held.shown else (None, None)
    return proves_total(state.committees.net, channel.payer, held.channel, held.total, voucher, signature)


def voucher_evidence(state: State, shown: Shown) -> bool:
    """Rule 7: a claim counts as the voucher its payer signed, within the lock of an open channel."""
    voucher = shown.voucher
    channel = state.channels.get(voucher.channel)
    if channel is None or channel.closed_at is not None or voucher.net != state.committees.net:
        return False
    return voucher.cumulative <= channel.lock and verify(channel.payer, b"", id_of(voucher), shown.signature)


@dataclass(frozen=True, slots=True)
class _Counted:
    """What a handover says that has evidence."""

    locks: dict[Slot, dict[bytes, Item]]
    freezes: dict[bytes, Held]
    shown: tuple[Shown, ...]


class Arriving:
    """A handover on its way to its frontier: each line is looked at once it is reached, in order, never again."""

    __slots__ = ("_left", "_next", "handover")

    def __init__(self, state: State, handover: Handover) -> None:
        self.handover = handover
        self._left = _lines(state, handover)
        self._next = next(self._left, None)

    def advance(self) -> bool:
        """Whether nothing is missing any more."""
        while self._next is not None and _is_applied(*self._next):
            self._next = next(self._left, None)
        return self._next is None


def is_reached(arriving: Arriving) -> bool:
    """Rule 7: whether everything that was final for the old witness is applied here."""
    return arriving.advance()


def _lines(state: State, handover: Handover) -> Iterator[tuple[State, bytes, int, bool]]:
    for key, seq in handover.frontier.accounts:
        yield state, key, seq, True
    for key, paid in handover.frontier.channels:
        yield state, key, paid, False


def _is_applied(state: State, key: bytes, value: int, is_account: bool) -> bool:
    if is_account:
        account = state.accounts.get(key)
        return account is not None and account.seq >= value
    channel = state.channels.get(key)
    # the accounts come first, so an open channel of an honest author's was opened here too: one that is missing was
    # closed below the checkpoint this state started from. What a liar invents it could have left out
    return channel is None or channel.paid >= value or channel.closed_at is not None


def _run(weighing: Generator[None, None, _Counted], checks: int | None) -> _Counted | None:
    """Go on for so many steps; the result if that was the end."""
    try:
        for _ in count() if checks is None else range(checks):
            next(weighing)
    except StopIteration as end:
        result: _Counted = end.value
        return result
    return None


class Inheritance:
    """The handovers of epoch ``epoch - 1`` as a witness of ``epoch`` has them."""

    def __init__(self, state: State, epoch: int) -> None:
        self._state = state
        self.old = state.committees.of(epoch - 1)
        self._arriving: dict[bytes, Arriving] = {}
        self._weighing: dict[bytes, Generator[None, None, _Counted]] = {}
        self._counted: dict[bytes, _Counted] = {}
        self.locks: dict[Slot, dict[bytes, Item]] = {}
        """Slots with the ids that may have been certified there."""
        self.bans: dict[bytes, Held] = {}
        """Channels that may have been frozen by a quorum, with the highest total reported."""

    # accessors

    @property
    def received(self) -> frozenset[bytes]:
        """The old witnesses whose handovers are here, counted or not."""
        return frozenset((*self._arriving, *self._weighing, *self._counted))

    @property
    def is_weighing(self) -> bool:
        """Whether :meth:`settle` was cut short by its limit."""
        return bool(self._weighing)

    @property
    def counted(self) -> int:
        """m: how many handovers count."""
        return len(self._counted)

    @property
    def ready(self) -> bool:
        """Rule 7: 2f + 1 handovers (of the old f) with everything up to their frontiers applied."""
        return self.counted >= self.old.quorum

    def shown(self) -> Iterable[Shown]:
        """Every voucher that was handed over with evidence."""
        for each in self._counted.values():
            yield from each.shown

    # transitions

    def author_of(self, signed: Signed) -> bytes | None:
        """Who handed over; None if it is known. The caller persists it before :meth:`receive`.

        Raises :class:`config.errors.IntegrityError` for a wrong one.
        """
        body = self._open(signed)
        return body.witness if body.witness not in self.received else None

    def receive(self, signed: Signed) -> bytes | None:
        """Take a handover: who handed over, None if it is known. Raises as :meth:`author_of`."""
        body = self._open(signed)
        if body.witness in self.received:
            return None
        self._arriving[body.witness] = Arriving(self._state, body)
        return body.witness

    def _open(self, signed: Signed) -> Handover:
        body = open_handover(self._state, signed)
        if body.epoch != self.old.epoch:
            raise RuleError("epoch", f"a handover of epoch {body.epoch} where {self.old.epoch} is due")
        return body

    def settle(self, checks: int | None = None) -> bool:
        """Count what has reached its frontier since; whether anything changed.

        ``checks`` limits how many signatures are checked for each handover in one go: liars may send many. Call it
        again while :attr:`is_weighing`.
        """
        for witness, arriving in list(self._arriving.items()):
            if is_reached(arriving):
                del self._arriving[witness]
                self._weighing[witness] = self._weigh(arriving.handover)
        done = False
        for witness, weighing in list(self._weighing.items()):
            counted = _run(weighing, checks)
            if counted is not None:
                del self._weighing[witness]
                self._counted[witness] = counted
                done = True
        if done:
            self._count()
        return done

    def _weigh(self, handover: Handover) -> Generator[None, None, _Counted]:
        """What of a handover has evidence; stops after every check."""
        locks: dict[Slot, dict[bytes, Item]] = defaultdict(dict)
        for signed in handover.locks:
            item = lock_evidence(self._state, signed)
            if item is not None and isinstance(item.object, Entry) and not self._is_filled(item.object):
                locks[item.object.account, item.object.seq][item.id] = item
            yield
        freezes: dict[bytes, Held] = {}
        for held in handover.freezes:
            if freeze_evidence(self._state, held):
                freezes[held.channel] = held
            yield
        shown: list[Shown] = []
        for each in (*handover.claims, *(held.shown for held in freezes.values() if held.shown is not None)):
            if voucher_evidence(self._state, each):
                shown.append(each)
            yield
        return _Counted(dict(locks), freezes, tuple(shown))

    def _is_filled(self, entry: Entry) -> bool:
        account = self._state.accounts.get(entry.account)
        return account is not None and entry.seq <= account.seq

    def _count(self) -> None:
        """Rule 8."""
        entries: Counter[bytes] = Counter()
        freezes: Counter[bytes] = Counter()
        for each in self._counted.values():
            entries.update(key for ids in each.locks.values() for key in ids)
            freezes.update(each.freezes.keys())
        m, f = self.counted, self.old.f
        locks: dict[Slot, dict[bytes, Item]] = defaultdict(dict)
        bans: dict[bytes, Held] = {}
        for each in self._counted.values():
            for slot, ids in each.locks.items():
                locks[slot] |= {key: item for key, item in ids.items() if quorums.survives(entries[key], m, f)}
            for key, held in each.freezes.items():
                if quorums.survives(freezes[key], m, f) and (key not in bans or bans[key].total < held.total):
                    bans[key] = held
        self.locks = {slot: ids for slot, ids in locks.items() if ids}
        self.bans = bans
