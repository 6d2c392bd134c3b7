"""Who caused what this node owes its peers: a bill for each answer, and one for each purpose that is no answer's.

Owns: the sums, exact, and which of them changed. Does not own: counting (``purse``), channels and vouchers (the
ledger), keeping the sums (the gateway).

Invariants:
1. What is counted for payment is put on bills at the same moment, the whole of it, to the nanocredit.
2. A bill only grows, also after its answer has ended: hedges and hosts of stages tell of work later.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args
from weakref import WeakValueDictionary

from config.accountbook import Spent
from config.generation import Cost
from config.vocabulary import PeerId
from dmoe.core.calls import Indices
from dmoe.core.sharing import Chosen, split, weights_of

Purpose = Literal["asked", "audit", "probe", "hosting", "kept"]
"""``asked``: questions that came without a bill of their own. ``audit``: answers asked for again elsewhere; ``probe``:
replicas tried out. ``hosting``: experts elsewhere of a stage that is served to others here. ``kept``: caches filled
again that were kept when their answer had ended."""
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


class Bill:
    """What one answer, or one purpose, cost so far. ``name`` is empty for a purpose."""

    __slots__ = ("__weakref__", "_bills", "_fresh", "_lines", "name", "purpose")

    def __init__(self, bills: "Bills", name: str, purpose: str) -> None:
        self.name = name
        self.purpose = purpose
        self._bills = bills
        self._lines: dict[bytes, tuple[PeerId, int, int]] = {}
        self._fresh: dict[bytes, None] = {}

    def add(self, peer: PeerId, channel: bytes, nano: int) -> None:
        """A call that was made for it, or its share of one."""
        _, calls, before = self._lines.get(channel, (peer, 0, 0))
        self._lines[channel] = peer, calls + 1, before + nano
        self._fresh[channel] = None
        self._bills.changed[self] = None

    def costs(self) -> tuple[Cost, ...]:
        """All of it, per channel."""
        return self._of(self._lines)

    def take(self) -> tuple[Cost, ...]:
        """The channels that something was added to since this was last asked: all of what each cost."""
        fresh, self._fresh = self._fresh, {}
        return self._of(fresh)

    def _of(self, channels: Iterable[bytes]) -> tuple[Cost, ...]:
        lines = ((channel, *self._lines[channel]) for channel in channels)
        return tuple(Cost(channel=c.hex(), peer_id=peer, calls=calls, nano=nano) for c, peer, calls, nano in lines)


class Bills:
    """A node's. Bills of answers are forgotten when nobody holds them and what they say was taken."""

    def __init__(self) -> None:
        self.changed: dict[Bill, None] = {}
        """Since they were last taken."""
        self._purposes: Mapping[str, Bill] = {purpose: Bill(self, "", purpose) for purpose in PURPOSES}
        self._named: WeakValueDictionary[str, Bill] = WeakValueDictionary()

    def of(self, name: str) -> Bill:
        """The bill under a name; without one, that of ``asked``."""
        if not name:
            return self._purposes["asked"]
        bill = self._named.get(name)
        if bill is None:
            bill = self._named[name] = Bill(self, name, "request")
        return bill

    def purpose(self, purpose: Purpose) -> Bill:
        """The bill of what is done for no answer."""
        return self._purposes[purpose]

    def take(self, names: Collection[str] | None = None) -> Sequence[Spent]:
        """What changed since it was last taken, of all bills or of these: of the channels that changed the whole sums,
        not the changes."""
        if names is None:
            taken = list(self.changed)
        else:
            known = [self._named.get(name) for name in names]
            taken = [bill for bill in known if bill is not None and bill in self.changed]
        for bill in taken:
            del self.changed[bill]
        return [Spent(bill=bill.name, purpose=bill.purpose, costs=bill.take()) for bill in taken]


@dataclass(frozen=True, slots=True)
class Payers:
    """For whom a pass is computed: each one's bill and how many rows of the pass are its own, in their order."""

    bills: Sequence[Bill | None]
    """None: of nobody any more, which is on ``spare``."""
    counts: Sequence[int]
    spare: Bill

    def pay(
        self,
        peer: PeerId,
        channel: bytes,
        nano: int,
        rows: int,
        experts: Indices | None,
        work: tuple[Sequence[Sequence[int]], Sequence[int]],
        at: tuple[int, Chosen],
    ) -> None:
        """Share a call. ``work``: members and costs of its groups; ``at``: the first row and those chosen, as in
        :func:`dmoe.core.sharing.weights_of`."""
        if len(self.bills) < 2:  # all of it is one's
            only = self.bills[0] if self.bills else None
            (only or self.spare).add(peer, channel, nano)
            return
        weights = weights_of(self.counts, at[0], at[1], rows, *work, experts)
        shares: dict[Bill, int] = {}  # a bill may have several sequences
        for bill, weight, part in zip(self.bills, weights, split(nano, weights), strict=True):
            if weight or part:
                shares[bill or self.spare] = shares.get(bill or self.spare, 0) + part
        for payer, share in shares.items():
            payer.add(peer, channel, share)
