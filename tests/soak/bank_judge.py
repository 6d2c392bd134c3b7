"""Says whether a run of the bank test was right: from what clients were told, what was read, and the ledger files.

Not a test. Does its own arithmetic: balances are counted again from the final objects, in no particular order,
without the product's ``State``.

Invariants: a violation is never forgotten; nothing that a client was only *not* told counts as a violation.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.errors import RiosError
from ledger.core.genesis import Genesis
from ledger.core.objects import Claim, Entry, Grant, Item, Open, Reclaim, TopUp, Transfer, channel_id, parse
from ledger.store import Store
from ledger.verify import Report, verify_file
from p2p.core.identity import peer_id_of

TOLD_MAX = 40
Slot = tuple[str, int]


@dataclass
class Judge:
    """Collects; see the module."""

    acknowledged: dict[Slot, str] = field(default_factory=dict)
    claims: dict[str, int] = field(default_factory=dict)
    granted: int = 0
    """Microcredits of grants that somebody was told are final."""
    tried_grants: int = 0
    """Microcredits of grants that were asked for: the supply can be no more."""
    reads: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    _seqs: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wrong(self, what: str) -> None:
        """Keep a violation."""
        with self._lock:
            if what not in self.violations and len(self.violations) < TOLD_MAX:
                self.violations.append(what)

    # what clients were told

    def final(self, account: str, seq: int, entry: str) -> None:
        """An entry was acknowledged, or a certificate for it was seen."""
        with self._lock:
            known = self.acknowledged.setdefault((account, seq), entry)
            self._seqs[account] = max(self._seqs[account], seq)
        if known != entry:
            self.wrong(f"I1: two final entries in slot {seq} of {account[:16]}: {known[:16]} and {entry[:16]}")

    def claimed(self, channel: str, paid: int) -> None:
        """A payee was told that its channel is paid so far."""
        with self._lock:
            self.claims[channel] = max(paid, self.claims.get(channel, 0))

    def seq_of(self, account: str) -> int:
        """The last entry of an account that somebody was told of."""
        return self._seqs.get(account, 0)

    # what was read

    def read(self, name: str, told: Mapping[str, Any], own: str, floor: int) -> None:
        """A node's whole state. ``floor``: what its own client ``own`` was told of before this was asked."""
        self.reads[name] += 1
        balances = {key: balance for key, (_, _, balance) in told["accounts"].items()}
        locked = 0
        for key, (_, _, lock, paid, _, _) in told["channels"].items():
            if not 0 <= paid <= lock:
                self.wrong(f"I4: {name} reads channel {key[:16]} as paid {paid} of {lock}")
            locked += lock - paid
        for key, balance in balances.items():
            if balance < 0:
                self.wrong(f"I3: {name} reads a balance of {balance} for {key[:16]}")
        total = sum(balances.values()) + locked
        if total != told["supply"]:
            self.wrong(f"I2: {name} reads {total} in all, its supply is {told['supply']}")
        if told["supply"] > self.tried_grants:
            self.wrong(f"I2: {name} reads a supply of {told['supply']}, {self.tried_grants} were granted at most")
        for why in told["broken"]:
            self.wrong(f"{name}: a certified object breaks a rule: {why}")
        seq = told["accounts"].get(own, [0])[0]
        if seq < floor:
            self.wrong(f"{name} reads entry {seq} of its own account after entry {floor} was acknowledged")

    # what is on disk at the end

    def files(self, paths: Mapping[str, Path], genesis: Genesis) -> dict[str, Any]:
        """Check every node's file; what they hold."""
        reports: dict[str, Report] = {}
        for name, path in paths.items():
            try:
                reports[name] = verify_file(path, genesis)
                self._file(name, path, genesis, reports[name])
            except RiosError as error:
                self.wrong(f"{name}: {error}")
        if len({report.digest for report in reports.values()}) > 1:
            self.wrong(f"I5: digests differ: { {name: r.digest[:16] for name, r in reports.items()} }")
        if not reports:
            return {}
        report = next(iter(reports.values()))
        return {
            "files": len(reports),
            "entries": report.entries,
            "claims": report.claims,
            "supply": report.supply,
            "locked": report.locked,
        }

    def _file(self, name: str, path: Path, genesis: Genesis, report: Report) -> None:
        if not report.verified or not report.sum_ok:
            self.wrong(f"{name}: verify finds {list(report.problems)}")
        if report.waiting:
            self.wrong(f"{name}: {report.waiting} final objects wait for others at the end")
        store = Store(path, genesis.net, read_only=True)
        try:
            items = [item for item, _, _ in store.finals(proofs=False)]
        finally:
            store.close()
        counted = count(items)
        self._compare(name, counted, report)
        for (account, seq), entry in self.acknowledged.items():
            found = counted.slots.get((account, seq))
            if found != entry:
                self.wrong(f"{name}: entry {seq} of {account[:16]} was {entry[:16]}, the file has {str(found)[:16]}")
        for channel, paid in self.claims.items():
            if counted.paid.get(channel, 0) < paid:
                self.wrong(f"{name}: channel {channel[:16]} was paid {paid}, the file has {counted.paid.get(channel)}")

    def _compare(self, name: str, counted: "Counted", report: Report) -> None:
        for why in counted.wrong:
            self.wrong(f"{name}: {why}")
        mine = {peer_id_of(bytes.fromhex(key)): amount for key, amount in counted.balances.items()}
        theirs = dict(report.balances)
        odd = {key for key in mine.keys() | theirs.keys() if mine.get(key, 0) != theirs.get(key, 0)}
        if odd:
            self.wrong(f"{name}: counted again, {len(odd)} balances differ, e.g. of {min(odd)}")
        if counted.supply != report.supply or counted.locked != report.locked:
            self.wrong(
                f"{name}: counted {counted.supply} and {counted.locked} locked, verify {report.supply}, {report}"
            )
        if sum(counted.balances.values()) + counted.locked != counted.supply:
            self.wrong(f"I2: {name}: balances and locks are not the supply")
        for key, amount in counted.balances.items():
            if amount < 0:
                self.wrong(f"I3: {name}: {key[:16]} ends with {amount}")
        if not self.granted <= counted.supply <= self.tried_grants:
            self.wrong(f"{name}: supply {counted.supply}, granted were {self.granted} to {self.tried_grants}")


@dataclass
class _Channel:
    payer: str
    payout: str
    lock: int
    claimed: int = 0
    closed: int | None = None


@dataclass
class Counted:
    """Balances and locks by addition only."""

    balances: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    slots: dict[Slot, str] = field(default_factory=dict)
    paid: dict[str, int] = field(default_factory=dict)
    supply: int = 0
    locked: int = 0
    wrong: list[str] = field(default_factory=list)


def count(items: Sequence[Item]) -> Counted:
    """Add everything up, in whatever order it comes."""
    counted, channels = Counted(), {}
    entries = [(item, item.object) for item in items if isinstance(item.object, Entry)]
    for item, entry in entries:
        if counted.slots.setdefault((entry.account.hex(), entry.seq), item.id.hex()) != item.id.hex():
            counted.wrong.append(f"I1: two entries {entry.seq} of {entry.account.hex()[:16]}")
        channels.update(_opened(item, entry))
    for _, entry in entries:
        _entry(entry, counted, channels)
    for item in items:
        if isinstance(item.object, Claim):
            channel = channels[item.object.voucher.channel]
            channel.claimed = max(channel.claimed, item.object.voucher.cumulative)
    for key, channel in channels.items():
        _close(key.hex(), channel, counted)
    return counted


def _opened(item: Item, entry: Entry) -> Iterable[tuple[bytes, _Channel]]:
    for index, op in enumerate(entry.ops):
        if isinstance(op, Open):
            yield channel_id(item.id, index), _Channel(entry.account.hex(), op.payout.hex(), op.amount)


def _entry(entry: Entry, counted: Counted, channels: Mapping[bytes, _Channel]) -> None:
    account = entry.account.hex()
    for op in entry.ops:
        if isinstance(op, Grant):
            counted.supply += op.amount
            counted.balances[op.to.hex()] += op.amount
        elif isinstance(op, Transfer):
            counted.balances[op.to.hex()] += op.amount
        elif isinstance(op, TopUp):
            channels[op.channel].lock += op.amount
        elif isinstance(op, Reclaim):
            if channels[op.channel].closed is not None:
                counted.wrong.append(f"channel {op.channel.hex()[:16]} is reclaimed twice")
            channels[op.channel].closed = op.total
        if isinstance(op, Transfer | Open | TopUp):
            counted.balances[account] -= op.amount


def _close(key: str, channel: _Channel, counted: Counted) -> None:
    paid = channel.claimed if channel.closed is None else channel.closed
    if channel.claimed > paid or paid > channel.lock:
        counted.wrong.append(f"I4: channel {key[:16]}: claimed {channel.claimed}, paid {paid} of {channel.lock}")
    counted.paid[key] = paid
    counted.balances[channel.payout] += paid
    if channel.closed is None:
        counted.locked += channel.lock - paid
    else:
        counted.balances[channel.payer] += channel.lock - paid


def slot_of(signed: Any) -> tuple[str, int, str]:
    """Account, seq and id of a signed entry."""
    item = parse(signed)
    assert isinstance(item.object, Entry)
    return item.object.account.hex(), item.object.seq, item.id.hex()
