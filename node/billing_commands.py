"""``rios billing ...``: the money of the HTTP gateway, whether gateways run or not."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from config.accountbook import PaidChannel
from config.errors import EXIT_FAILED, EXIT_OK, RequestError
from config.vocabulary import KFLOP_PER_TFLOP as NANO
from config.vocabulary import format_credits
from node.cli import Context, Output
from node.local import open_books
from node.spending import paid_of
from node.table import table

LOOKS = 4
LOOK_SECONDS = 1.0
"""A running node counts first and books within a second: what differs is looked at again, so often and so late."""
REQUESTS_MAX = 1000
_MS_PER_DAY = 86_400_000
_SUMS = ("paid_in", "charges", "revenue", "owed_to_users", "reserved", "swarm_cost", "margin", "vouchers")


def reconcile(context: Context) -> Output:
    """``rios billing reconcile``"""
    by, name = context.args.by, context.args.request
    with open_books(context) as accounts:
        found = _settled(context, accounts.database)
        if by:
            found["by"] = _margins(accounts.database, by, context.args.days)
        if name:
            found["request"] = _request(accounts.database, name)
    lines = [_line(each, found[each]) for each in _SUMS if each in found]
    lines += [_line(f"  paid: {purpose}", nano / NANO) for purpose, nano in sorted(found["swarm_nano"].items())]
    if found.get("in_flight_nano"):
        lines.append(_line("in flight", found["in_flight_nano"] / NANO))
    lines += _tables(found, by)
    lines += [
        f"{each['rule']}: {each['subject']} has {each['found']}, not {each['expected']}"
        for each in found["differences"]
    ]
    lines.append("all of it ties" if found["ties"] else f"{len(found['differences'])} differences")
    return Output(found, "\n".join(lines), EXIT_OK if found["ties"] else EXIT_FAILED)


def _settled(context: Context, database: Any) -> dict[str, Any]:  # noqa: ANN401 - a Database: loads SQLAlchemy
    """The sums, once what is under way has come to rest or does not."""
    from gateway.billing import reconcile as rules  # noqa: PLC0415

    for look in range(LOOKS):
        found = rules.reconcile(database, _paid(context))
        others = [each for each in found["differences"] if each["rule"] not in rules.IN_FLIGHT]
        if others or (found["ties"] and not found.get("in_flight_nano")):
            break
        if look < LOOKS - 1:
            time.sleep(LOOK_SECONDS)
    return found


def _margins(database: Any, by: str, days: int) -> Sequence[dict[str, Any]]:  # noqa: ANN401
    from gateway.billing import statements  # noqa: PLC0415

    now = time.time_ns() // 1_000_000
    span = statements.Span(owner=None, from_ms=now - days * _MS_PER_DAY, to_ms=now + 1)
    with database.read() as connection:
        if by == "request":
            return statements.newest_costs(connection, span, REQUESTS_MAX)
        return statements.sum_usage(connection, span, (by,), with_costs=True)  # type: ignore[arg-type]


def _request(database: Any, name: str) -> dict[str, Any]:  # noqa: ANN401
    from gateway.billing import statements  # noqa: PLC0415

    with database.read() as connection:
        found = statements.find_cost(connection, name)
    if found is None:
        raise RequestError("not_found", f"there is no usage row {name!r:.80}", "rios billing reconcile --by request")
    return found


def _tables(found: dict[str, Any], by: str | None) -> list[str]:
    made = []
    if by:
        name = "id" if by == "request" else by
        rows = [[by, "charge", "swarm cost", "margin"]]
        rows += [[_named(by, row[name]), *_money(row)] for row in found["by"]]
        made.append(table(rows))
    if "request" in found:
        one = found["request"]
        rows = [["channel", "peer", "calls", "nano"]]
        rows += [[row["channel"], row["peer_id"], str(row["calls"]), str(row["nano"])] for row in one["channels"]]
        made += [table([["charge", "swarm cost", "margin"], _money(one)]), table(rows)]
    return made


def _named(by: str, value: Any) -> str:  # noqa: ANN401 - a text or a time
    return datetime.fromtimestamp(value / 1000, UTC).date().isoformat() if by == "day" else str(value or "-")


def _money(row: dict[str, Any]) -> list[str]:
    return [format_credits(row[name]) for name in ("microcredits", "swarm_cost", "margin")]


def _line(name: str, microcredits: float) -> str:
    return f"{name.replace('_', ' '):16} {format_credits(int(microcredits)):>20}"


def close(context: Context) -> Output:
    """``rios billing close``"""
    from gateway.audit import OPERATOR  # noqa: PLC0415
    from gateway.billing.invoices import close_months  # noqa: PLC0415

    with open_books(context) as accounts:
        made = close_months(accounts.database, OPERATOR)
    return Output({"invoices": made}, f"{made} invoices made")


def _paid(context: Context) -> Sequence[PaidChannel] | None:
    """What this node counts and promised; None where there is no ledger."""
    from ledger.reading import opened  # noqa: PLC0415
    from node import founding  # noqa: PLC0415

    loaded = context.settings()
    paths = context.paths(loaded)
    genesis = founding.in_force(loaded.settings, paths)
    if genesis is None or not paths.ledger.exists():
        return None
    with opened(paths.ledger, genesis) as store:
        return paid_of(store, genesis, loaded.settings.ledger)
