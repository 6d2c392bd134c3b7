"""What the swarm was paid, request by request and for what was no request, in the accounts database.

Owns: those rows, and their sums in the usage rows. Does not own: counting (the engine, behind ``Spending``), the
channels (the ledger).

An amount is kept as microcredits and billionths of one (``nano``), as the ledger counts. What a node counted before
this gateway kept costs is booked as ``earlier`` when it starts; what a crash took out of the books, or out of the
node's own count (less than 0 then), as ``restart``.

Invariants:
1. A row holds a whole sum, not a change: written twice, it is right.
2. A usage row's cost is the sum of its rows, whenever they come.
"""

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from config.accountbook import Spent
from config.generation import Cost
from config.vocabulary import KFLOP_PER_TFLOP as NANO
from gateway.db.billing import swarm_costs
from gateway.db.models import usages
from gateway.db.session import Database
from gateway.money import Costs
from gateway.ports import Spending

REQUEST = "request"
EARLIER, RESTART = "earlier", "restart"

_DROP = sa.delete(swarm_costs).where(
    swarm_costs.c.bill == sa.bindparam("b"),
    swarm_costs.c.purpose == sa.bindparam("p"),
    swarm_costs.c.channel == sa.bindparam("c"),
)
_ADD = sa.insert(swarm_costs)
_SUMS = (
    sa.select(swarm_costs.c.bill, sa.func.sum(swarm_costs.c.microcredits), sa.func.sum(swarm_costs.c.nano))
    .where(swarm_costs.c.bill.in_(sa.bindparam("names", expanding=True)), swarm_costs.c.purpose == REQUEST)
    .group_by(swarm_costs.c.bill)
)
_SET = (
    sa.update(usages)
    .where(usages.c.id == sa.bindparam("name"))
    .values(swarm_microcredits=sa.bindparam("whole"), swarm_nano=sa.bindparam("part"))
)


class CostBook:
    """What a running gateway has yet to write. ``run`` names it, and is its own."""

    def __init__(self, spending: Spending, run: str) -> None:
        self._spending = spending
        self._run = run
        self._unwritten: dict[tuple[str, str], dict[str, Cost]] = {}

    def begin(self, database: Database) -> None:
        """Book what the node counted that is in no row: once, before anything else is written. Blocking."""
        with database.write() as connection:
            database.take_time(connection)
            known = by_channel(connection)
            gaps: dict[str, list[Cost]] = {EARLIER: [], RESTART: []}
            for each in self._spending.opening():
                gap = each.nano - known.get(each.channel, 0)
                if gap:
                    line = Cost(channel=each.channel, peer_id=each.peer_id, calls=0, nano=gap)
                    gaps[RESTART if each.channel in known else EARLIER].append(line)
            spent = [Spent(bill="", purpose=name, costs=tuple(lines)) for name, lines in gaps.items()]
            write(connection, Costs(self._run, spent), int(self._run[:12], 16))

    def has_changed(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._unwritten) or self._spending.has_changed()

    def take(self, names: Collection[str] | None) -> Costs:
        """What is to be written, of everything or of these requests. Only the one who writes may take, in the order of
        writing: a sum must not be followed by an older one."""
        keys = [key for key in self._unwritten if names is None or key[0] in names]
        found = {key: self._unwritten.pop(key) for key in keys}
        for each in self._spending.take(names):
            found.setdefault((each.bill, each.purpose), {}).update({cost.channel: cost for cost in each.costs})
        return Costs(
            self._run, [Spent(bill=b, purpose=p, costs=tuple(lines.values())) for (b, p), lines in found.items()]
        )

    def put_back(self, costs: Costs) -> None:
        """It could not be written. Nothing was taken since."""
        for each in costs.spent:
            self._unwritten[each.bill, each.purpose] = {cost.channel: cost for cost in each.costs}


def write(connection: sa.Connection, costs: Costs, now: int) -> set[str]:
    """Keep sums in place of older ones; the bills of the requests among them."""
    rows = [_row(each, costs.run, cost, now) for each in costs.spent for cost in each.costs]
    if rows:
        connection.execute(_DROP, [{"b": row["bill"], "p": row["purpose"], "c": row["channel"]} for row in rows])
        connection.execute(_ADD, rows)
    return {each.bill for each in costs.spent if each.purpose == REQUEST}


def _row(spent: Spent, run: str, cost: Cost, now: int) -> dict[str, Any]:
    microcredits, nano = divmod(cost.nano, NANO)
    return {
        "bill": spent.bill or run,
        "purpose": spent.purpose,
        "channel": cost.channel,
        "peer_id": cost.peer_id,
        "calls": cost.calls,
        "microcredits": microcredits,
        "nano": nano,
        "updated_at_ms": now,
    }


def add_up(connection: sa.Connection, names: Sequence[str]) -> None:
    """Bring the costs in these usage rows up to date; those that have none yet get it when they are written."""
    rows = []
    for name, microcredits, nano in connection.execute(_SUMS, {"names": names}):
        whole, part = divmod(total(microcredits, nano), NANO)
        rows.append({"name": name, "whole": whole, "part": part})
    if rows:
        connection.execute(_SET, rows)


def total(microcredits: Any, nano: Any) -> int:  # noqa: ANN401 - sums are decimals on PostgreSQL, None of nothing
    """Nanocredits of two sums."""
    return int(microcredits or 0) * NANO + int(nano or 0)


def by_channel(connection: sa.Connection) -> dict[str, int]:
    """All that was ever written, nanocredits per channel."""
    return {channel: nano for (channel,), nano in _summed(connection, swarm_costs.c.channel).items()}


def by_purpose(connection: sa.Connection) -> dict[str, int]:
    """The same by what it was for."""
    return {purpose: nano for (purpose,), nano in _summed(connection, swarm_costs.c.purpose).items()}


def _summed(connection: sa.Connection, *groups: "sa.Column[str]") -> dict[tuple[str, ...], int]:
    sums = sa.func.sum(swarm_costs.c.microcredits), sa.func.sum(swarm_costs.c.nano)
    query = sa.select(*groups, *sums).group_by(*groups)
    return {tuple(row[:-2]): total(*row[-2:]) for row in connection.execute(query)}


def of_request(connection: sa.Connection, name: str) -> Sequence[dict[str, Any]]:
    """What stands behind a request's cost, the dearest channel first."""
    query = sa.select(swarm_costs).where(swarm_costs.c.bill == name, swarm_costs.c.purpose == REQUEST)
    rows = [
        {
            "channel": row["channel"],
            "peer_id": row["peer_id"],
            "calls": row["calls"],
            "nano": total(row["microcredits"], row["nano"]),
        }
        for row in connection.execute(query).mappings()
    ]
    return sorted(rows, key=lambda row: (-row["nano"], row["channel"]))
