"""Does all the money tie? Blocking, in one read transaction, so a running gateway may go on meanwhile.

Each :class:`Difference` names what does not; an empty list is the proof that every rule of the books holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from config.accountbook import PaidChannel
from config.vocabulary import KFLOP_PER_TFLOP as NANO
from gateway.billing import budgets, costs, invoices
from gateway.billing.budget import month_begins_ms, next_month
from gateway.db.billing import budgets as budgets_table
from gateway.db.billing import invoice_head, swarm_costs
from gateway.db.billing import invoices as invoices_table
from gateway.db.models import FUNDING, REVENUE, accounts, postings, reservations, transactions, usages
from gateway.db.session import Database

DIFFERENCES_MAX = 1000
COUNTED, PROMISED = "what a channel counts is booked (nano)", "vouchers are for what was counted"
IN_FLIGHT = frozenset((COUNTED, PROMISED))
"""Rules that a running node may break for a moment."""


@dataclass(frozen=True, slots=True)
class Difference:
    """``rule``: what should hold; ``subject``: where it does not."""

    rule: str
    subject: str
    expected: int
    found: int


def reconcile(database: Database, channels: Sequence[PaidChannel] | None = None) -> dict[str, Any]:
    """All sums, and every difference (at most :data:`DIFFERENCES_MAX`); ``ties``: there is none.

    ``swarm_nano``: what was paid, by what for, in billionths of a microcredit. With ``channels``, all on which the node
    ever paid as of their newest vouchers: ``counted_nano`` there, of which ``elsewhere_nano`` (other nodes' channels)
    is no part; ``vouchers`` signed; ``in_flight_nano``: counted and not booked yet, or (less than 0) booked and not in
    a voucher's count yet."""
    with database.read() as connection:
        if database.is_postgresql:
            connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        database.take_time(connection)
        found: list[Difference] = []
        for rule in (_supply, _transactions, _balances, _reserved, _charges, _budgets, _invoices, _costs):
            for difference in rule(connection):
                if len(found) < DIFFERENCES_MAX:
                    found.append(difference)
        totals = _totals(connection)
        spent = costs.by_purpose(connection)
        cost = sum(spent.values()) // NANO
        totals |= {"swarm_nano": spent, "swarm_cost": cost, "margin": totals["charges"] - cost}
        if channels is not None:
            running = bool(connection.execute(sa.select(reservations.c.id).limit(1)).first())
            differences, more = tie_channels(channels, costs.by_channel(connection), running=running)
            found, totals = found + differences, totals | more
    return {"ties": not found, **totals, "differences": [asdict(each) for each in found]}


def tie_channels(
    channels: Sequence[PaidChannel], booked: Mapping[str, int], *, running: bool
) -> tuple[list[Difference], dict[str, int]]:
    """What was booked against what the node counted, and that against its vouchers. ``booked``: nanocredits per
    channel; ``running``: requests are answered now, of which more may be counted than is booked."""
    found, in_flight = [], 0
    for each in channels:
        here = booked.get(each.channel, 0)
        gap = each.nano - here
        if (gap > 0 and not running) or -gap > each.ahead * NANO:
            found.append(Difference(COUNTED, each.channel, each.nano, here))
        else:
            in_flight += gap
        counted = each.nano // NANO
        if not counted - each.behind <= each.promised <= counted + each.ahead:
            found.append(Difference(PROMISED, each.channel, counted, each.promised))
    own = {each.channel for each in channels}
    return found, {
        "counted_nano": sum(each.nano for each in channels),
        "in_flight_nano": in_flight,
        "elsewhere_nano": sum(nano for channel, nano in booked.items() if channel not in own),
        "vouchers": sum(each.promised for each in channels),
    }


def _sum(column: Any) -> Any:  # noqa: ANN401 - a column of any table
    return sa.func.coalesce(sa.func.sum(column), 0)


def _totals(connection: sa.Connection) -> dict[str, Any]:
    def scalar(query: Any) -> int:  # noqa: ANN401
        return int(connection.execute(query).scalar_one())

    of = sa.select(_sum(accounts.c.balance))
    return {
        "users": scalar(sa.select(sa.func.count()).where(accounts.c.user_id.is_not(None))),
        "requests": scalar(sa.select(sa.func.count()).select_from(usages)),
        "charges": scalar(sa.select(_sum(usages.c.microcredits))),
        "paid_in": -scalar(of.where(accounts.c.id == FUNDING)),
        "revenue": scalar(of.where(accounts.c.id == REVENUE)),
        "owed_to_users": scalar(of.where(accounts.c.user_id.is_not(None))),
        "reserved": scalar(sa.select(_sum(accounts.c.reserved))),
    }


def _supply(connection: sa.Connection) -> Iterator[Difference]:
    total = int(connection.execute(sa.select(_sum(accounts.c.balance))).scalar_one())
    if total:
        yield Difference("all balances add up to 0", "accounts", 0, total)


def _transactions(connection: sa.Connection) -> Iterator[Difference]:
    total = _sum(postings.c.amount)
    query = sa.select(transactions.c.id, total).outerjoin(postings, postings.c.transaction_id == transactions.c.id)
    query = query.group_by(transactions.c.id).having(sa.or_(total != 0, sa.func.count(postings.c.amount) < 2))
    for name, amount in connection.execute(query.limit(DIFFERENCES_MAX)):
        yield Difference("the postings of a transaction are two or more and add up to 0", name, 0, int(amount))


def _balances(connection: sa.Connection) -> Iterator[Difference]:
    total = _sum(postings.c.amount)
    query = sa.select(accounts.c.id, accounts.c.balance, total)
    query = query.outerjoin(postings, postings.c.account_id == accounts.c.id)
    query = query.group_by(accounts.c.id, accounts.c.balance).having(accounts.c.balance != total)
    for name, balance, amount in connection.execute(query.limit(DIFFERENCES_MAX)):
        yield Difference("a balance is the sum of its postings", name, int(amount), balance)


def _reserved(connection: sa.Connection) -> Iterator[Difference]:
    total = _sum(reservations.c.microcredits)
    query = sa.select(accounts.c.id, accounts.c.reserved, total)
    query = query.outerjoin(reservations, reservations.c.account_id == accounts.c.id)
    query = query.group_by(accounts.c.id, accounts.c.reserved).having(accounts.c.reserved != total)
    for name, reserved, amount in connection.execute(query.limit(DIFFERENCES_MAX)):
        yield Difference("what is reserved is the sum of open reservations", name, int(amount), reserved)


def _charges(connection: sa.Connection) -> Iterator[Difference]:
    """Both ways: a usage row without its charge, and a charge without its usage row."""
    charge = sa.and_(transactions.c.reference == usages.c.id, transactions.c.kind == "charge")
    paid = sa.and_(postings.c.transaction_id == transactions.c.id, postings.c.account_id == REVENUE)
    amount = sa.func.coalesce(postings.c.amount, 0)
    query = sa.select(usages.c.id, usages.c.microcredits, amount).select_from(
        usages.outerjoin(transactions, charge).outerjoin(postings, paid)
    )
    for name, expected, found in connection.execute(
        query.where(usages.c.microcredits != amount).limit(DIFFERENCES_MAX)
    ):
        yield Difference("a usage row has its charge", name, expected, int(found))
    lost = sa.select(transactions.c.reference, postings.c.amount).select_from(
        transactions.join(postings, paid).outerjoin(usages, usages.c.id == transactions.c.reference)
    )
    lost = lost.where(transactions.c.kind == "charge", usages.c.id.is_(None))
    for name, found in connection.execute(lost.limit(DIFFERENCES_MAX)):
        yield Difference("a charge has its usage row", name, 0, int(found))
    payer = sa.and_(postings.c.transaction_id == transactions.c.id, accounts.c.user_id == usages.c.user_id)
    wrong = sa.select(usages.c.id, usages.c.microcredits).where(
        usages.c.microcredits > 0,
        ~sa.exists(
            sa.select(1)
            .select_from(transactions.join(postings, postings.c.transaction_id == transactions.c.id))
            .join(accounts, accounts.c.id == postings.c.account_id)
            .where(charge, payer, postings.c.amount == -usages.c.microcredits)
            .correlate(usages)
        ),
    )
    for name, expected in connection.execute(wrong.limit(DIFFERENCES_MAX)):
        yield Difference("who used it paid it", name, expected, 0)


def _costs(connection: sa.Connection) -> Iterator[Difference]:
    """Both ways: a usage row whose cost is not that of its lines, and lines of no request."""
    lines = (
        sa.select(
            swarm_costs.c.bill,
            _sum(swarm_costs.c.microcredits).label("microcredits"),
            _sum(swarm_costs.c.nano).label("nano"),
        )
        .where(swarm_costs.c.purpose == costs.REQUEST)
        .group_by(swarm_costs.c.bill)
        .subquery()
    )
    whole, part = (sa.func.coalesce(each, 0) for each in (lines.c.microcredits, lines.c.nano))
    off = (usages.c.swarm_microcredits - whole) * NANO + usages.c.swarm_nano - part
    query = sa.select(usages.c.id, whole, part, usages.c.swarm_microcredits, usages.c.swarm_nano)
    query = query.outerjoin(lines, lines.c.bill == usages.c.id).where(off != 0).limit(DIFFERENCES_MAX)
    for name, *amounts in connection.execute(query):
        expected, found = costs.total(*amounts[:2]), costs.total(*amounts[2:])
        yield Difference("a usage row's swarm cost is the sum of its calls (nano)", name, expected, found)
    lost = sa.select(lines.c.bill, lines.c.microcredits, lines.c.nano)
    lost = lost.outerjoin(usages, usages.c.id == lines.c.bill).outerjoin(
        reservations, reservations.c.id == lines.c.bill
    )
    lost = lost.where(usages.c.id.is_(None), reservations.c.id.is_(None))
    for name, *amounts in connection.execute(lost.limit(DIFFERENCES_MAX)):
        yield Difference("a cost has its usage row (nano)", name, 0, costs.total(*amounts))


def _budgets(connection: sa.Connection) -> Iterator[Difference]:
    for row in connection.execute(sa.select(budgets_table)).mappings():
        spent, reserved = budgets.counted(connection, row["user_id"], row["account_id"], row["key_id"], row["month"])
        if row["spent"] != spent:
            yield Difference("a budget counts the charges of its month", row["subject"], spent, row["spent"])
        if row["reserved"] != reserved:
            yield Difference("a budget counts what is reserved", row["subject"], reserved, row["reserved"])


def _invoices(connection: sa.Connection) -> Iterator[Difference]:
    numbers: Sequence[int] = (
        connection.execute(sa.select(invoices_table.c.number).order_by(invoices_table.c.number)).scalars().all()
    )
    head = connection.execute(sa.select(invoice_head)).one()
    if list(numbers) != list(range(1, head.number + 1)):
        yield Difference("invoices are numbered without gaps", "invoices", head.number, len(numbers))
    if head.month:
        charged = sa.select(_sum(usages.c.microcredits))
        charged = charged.where(usages.c.created_at_ms < month_begins_ms(next_month(head.month)))
        due, billed = (
            connection.execute(q).scalar_one() for q in (charged, sa.select(_sum(invoices_table.c.microcredits)))
        )
        if due != billed:
            yield Difference("all charges of closed months are on invoices", head.month, int(due), int(billed))
    for row in connection.execute(sa.select(invoices_table)).mappings():
        due = sum(line["microcredits"] for line in invoices.lines_of(connection, row["user_id"], row["month"]))
        if row["microcredits"] != due:
            yield Difference("an invoice is the charges of its month", str(row["number"]), due, row["microcredits"])
