"""The billing page: a balance, what moved it, budgets with how full they are, invoices. It reads what ``/v1/billing``
reads; its buttons call that."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request

from gateway.billing import budgets, invoices, statements, usage
from gateway.billing.budget import PERCENTS, month_begins_ms, month_of
from gateway.dashboard import charts
from gateway.dashboard.session import can
from gateway.dashboard.views import names_of, own_only
from gateway.db import stamps
from gateway.db.session import Database
from gateway.endpoint import Caller

TRANSACTIONS, INVOICES, BUDGETS = 25, 24, 50
"""Rows of a page of each."""
_CURSOR = re.compile(r"[0-9A-Za-z_:.-]{1,128}")


@dataclass(frozen=True, slots=True)
class Fill:
    """How much of a budget is used, in percent of its bar; ``state`` as badges have it."""

    spent: float
    held: float
    percent: int
    state: str


@dataclass(frozen=True, slots=True)
class Target:
    """What a budget can be set for: all of a user's requests, or those of one key (``key_id``)."""

    user_id: str
    key_id: str
    label: str


async def billing(request: Request, caller: Caller) -> Mapping[str, Any]:
    """The page's values. ``of`` says whose, for those who may see others'; cursors go on from an earlier page."""
    site, till = request.app.state.site, request.app.state.service.till
    own = own_only(caller, "billing:read")
    whose = "mine" if request.query_params.get("of") == "mine" or own is not None else "all"
    owner = caller.user_id if whose == "mine" else None
    now = stamps.now_ms()
    month = (month_begins_ms(month_of(now)), now + 1)
    cursors = {name: _cursor(request, name) for name in ("after", "invoice", "budget")}
    find = partial(_lists, till.database, owner=owner, cursors=cursors)
    rows, bills, limits = await till.in_thread(find)
    names = await names_of(request, caller)
    return {
        "money": await till.in_thread(site.accounts.balance, caller.user_id),
        "this_month": sum(
            row.microcredits for row in await till.in_thread(usage.by_day, till.database, caller.user_id, *month)
        ),
        "month": month_of(now),
        "rows": rows[:TRANSACTIONS],
        "older": _last(rows, TRANSACTIONS, lambda row: f"{row['transaction_id']}:{row['account_id']}"),
        "invoices": bills[:INVOICES],
        "older_invoice": _last(bills, INVOICES, lambda row: row["number"]),
        "budgets": [(each, fill_of(each)) for each in limits[:BUDGETS]],
        "older_budget": _last(limits, BUDGETS, lambda row: row["id"]),
        "whose": whose,
        "may_see_all": own is None,
        "may_write": can(caller, "billing:write"),
        "may_pay_in": can(caller, "billing:manage"),
        "names": names,
        **await _keys(request, caller, names),
    }


def fill_of(budget: Mapping[str, Any]) -> Fill:
    """How full a budget is: warned of from the second share at which its owner is told, bad from the last."""
    limit, spent, held = budget["microcredits"], budget["spent"], budget["reserved"]
    part = charts.share(spent, limit) if limit else 100.0
    percent = 100 * spent // limit if limit else 100
    state = "failed" if percent >= PERCENTS[2] else "degraded" if percent >= PERCENTS[1] else "ready"
    return Fill(part, min(100.0 - part, charts.share(held, limit)), percent, state)


def _lists(database: Database, *, owner: str | None, cursors: Mapping[str, str]) -> tuple[Sequence[Any], ...]:
    number = cursors["invoice"] if cursors["invoice"].isdecimal() and len(cursors["invoice"]) < 18 else ""
    with database.read() as connection:
        return (
            statements.list_postings(connection, owner=owner, kinds=(), limit=TRANSACTIONS + 1, after=cursors["after"]),
            invoices.list_invoices(connection, owner=owner, limit=INVOICES + 1, after=number),
            budgets.list_budgets(connection, owner=owner, limit=BUDGETS + 1, after=cursors["budget"]),
        )


async def _keys(request: Request, caller: Caller, names: Mapping[str, str]) -> Mapping[str, Any]:
    """The names of keys, and what the caller can set a budget for."""
    accounts, till = request.app.state.site.accounts, request.app.state.service.till
    found = await till.in_thread(accounts.list_keys, own_only(caller, "billing:write"))
    several = len(names) > 1
    people = [
        Target(user, "", f"All requests of {name}" if several else "All requests") for user, name in names.items()
    ]
    keys = [
        Target(key.user_id, key.id, f"Key {key.name or key.id}" + (f" of {names[key.user_id]}" if several else ""))
        for key in found
        if key.revoked_at_ms is None and key.user_id in names
    ]
    return {"key_names": {key.id: key.name or key.id for key in found}, "targets": [*people, *keys]}


def _cursor(request: Request, name: str) -> str:
    text = request.query_params.get(name, "")
    return text if _CURSOR.fullmatch(text) else ""


def _last(rows: Sequence[Any], size: int, name: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - a row's id
    """The cursor behind this page; None at the end."""
    return name(rows[size - 1]) if len(rows) > size else None
