"""Budgets and limits of keys, as people set and see them. Blocking calls.

A budget that an admin set for somebody is changed and removed by admins only; one that users set for themselves is
theirs. Setting and removing hold the lock of the account, so the counters start exact: what this month cost so far,
and what runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from gateway import audit, books, events
from gateway.audit import Actor
from gateway.billing.budget import PERCENTS, Budget, month_begins_ms, month_of
from gateway.db import stamps
from gateway.db.billing import budget_alerts, budgets, key_limits
from gateway.db.models import accounts, api_keys, reservations, usages
from gateway.db.session import Database
from gateway.errors import ApiError

_ALERTS_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Alert:
    """A budget reached a share of its limit for the first time in a month."""

    budget_id: str
    user_id: str
    subject: str
    month: str
    percent: int
    spent: int
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Who is to have which budget. ``key_id`` empty: all of the user's requests."""

    user_id: str
    key_id: str = ""
    microcredits: int

    @property
    def subject(self) -> str:
        """What it is called."""
        return f"key:{self.key_id}" if self.key_id else f"user:{self.user_id}"


def list_budgets(
    connection: sa.Connection, *, owner: str | None, limit: int, after: str
) -> Sequence[Mapping[str, Any]]:
    """Newest first, each as it is this month, with the alerts of the month."""
    query = sa.select(budgets).order_by(budgets.c.id.desc()).limit(limit)
    if owner is not None:
        query = query.where(budgets.c.user_id == owner)
    if after:
        query = query.where(budgets.c.id < after)
    return _shown(connection, connection.execute(query).mappings().all())


def set_budget(database: Database, actor: Actor, wish: Wish, owner: str | None) -> Mapping[str, Any]:
    """Make or change the budget of a user or key within reach. Raises ApiError ``not_found``, ``forbidden``."""
    by_admin = owner is None and wish.user_id != actor.user_id
    with database.write() as connection:
        account_id = _account_of(connection, wish, owner)
        books.lock_account(connection, account_id)
        row = _find(connection, budgets.c.subject == wish.subject)
        if row is None:
            row = _begin(connection, wish, account_id, by_admin=by_admin)
        else:
            _check_right(row, owner)
            change = sa.update(budgets).where(budgets.c.id == row["id"])
            now, kept = stamps.now_ms(), by_admin or row["by_admin"]
            connection.execute(change.values(microcredits=wish.microcredits, updated_at_ms=now, by_admin=kept))
        detail = {"subject": wish.subject, "microcredits": wish.microcredits}
        audit.record(connection, actor, "budget.set", row["id"], owner_id=wish.user_id, detail=detail)
        found = _find(connection, budgets.c.id == row["id"])
        assert found is not None
        return _shown(connection, [found])[0]


def remove_budget(database: Database, actor: Actor, budget_id: str, owner: str | None) -> None:
    """Raises ApiError ``not_found``, ``forbidden``."""
    with database.write() as connection:
        books.lock_account(connection, _budget(connection, budget_id, owner)["account_id"])
        row = _budget(connection, budget_id, owner)  # as it is now that nobody else changes it
        _check_right(row, owner)
        connection.execute(sa.delete(budget_alerts).where(budget_alerts.c.budget_id == budget_id))
        connection.execute(sa.delete(budgets).where(budgets.c.id == budget_id))
        detail = {"subject": row["subject"]}
        audit.record(connection, actor, "budget.removed", budget_id, owner_id=row["user_id"], detail=detail)


def set_key_limits(database: Database, actor: Actor, key_id: str, requests: int, tokens: int) -> str:
    """Give a key limits of its own (0: the gateway's); returns whose it is. Raises ApiError ``not_found``."""
    with database.write() as connection:
        query = sa.select(api_keys.c.user_id).where(api_keys.c.id == key_id).with_for_update()
        user_id = connection.execute(query).scalar()
        if user_id is None:
            raise _no_key(key_id)
        connection.execute(sa.delete(key_limits).where(key_limits.c.key_id == key_id))
        values = {"requests_per_minute": requests, "tokens_per_minute": tokens}
        connection.execute(sa.insert(key_limits), {"key_id": key_id, **values})
        audit.record(connection, actor, "key.limited", key_id, owner_id=user_id, detail=values)
        return str(user_id)


def take_alerts(database: Database) -> Sequence[Alert]:
    """Tell, as events, of the alerts that nobody was told of yet; which they were."""
    waiting = sa.select(budget_alerts.c.budget_id).where(budget_alerts.c.told.is_(sa.false())).limit(1)
    with database.read() as connection:
        if connection.execute(waiting).first() is None:
            return []
    key = (budget_alerts.c.budget_id, budget_alerts.c.month, budget_alerts.c.percent)
    some = (
        sa.select(*key, budget_alerts.c.spent, budgets.c.user_id, budgets.c.subject, budgets.c.microcredits)
        .join(budgets, budgets.c.id == budget_alerts.c.budget_id)
        .where(budget_alerts.c.told.is_(sa.false()))
        .order_by(*key)
        .limit(_ALERTS_AT_ONCE)
        .with_for_update(of=budget_alerts, skip_locked=True)
    )
    with database.write() as connection:
        found = connection.execute(some).all()
        for row in found:
            mine = sa.and_(*(column == row[place] for place, column in enumerate(key)))
            connection.execute(sa.update(budget_alerts).where(mine).values(told=True))
        alerts = [Alert(r.budget_id, r.user_id, r.subject, r.month, r.percent, r.spent, r.microcredits) for r in found]
        for alert in alerts:
            events.record(connection, "budget.alert", alert.user_id, asdict(alert))
    return alerts


def _account_of(connection: sa.Connection, wish: Wish, owner: str | None) -> str:
    if owner not in (None, wish.user_id):
        raise ApiError("not_found", f"there is no user {wish.user_id!r:.80}", public_code="not_found")
    if wish.key_id:
        query = sa.select(api_keys.c.user_id).where(api_keys.c.id == wish.key_id)
        if connection.execute(query).scalar() != wish.user_id:
            raise _no_key(wish.key_id)
    account = connection.execute(sa.select(accounts.c.id).where(accounts.c.user_id == wish.user_id)).scalar()
    if account is None:
        raise ApiError("not_found", f"there is no user {wish.user_id!r:.80}", public_code="not_found")
    return str(account)


def _budget(connection: sa.Connection, budget_id: str, owner: str | None) -> Mapping[Any, Any]:
    row = _find(connection, budgets.c.id == budget_id)
    if row is None or owner not in (None, row["user_id"]):
        raise ApiError("not_found", f"there is no budget {budget_id!r:.80}", public_code="not_found")
    return row


def _no_key(key_id: str) -> ApiError:
    return ApiError("not_found", f"there is no key {key_id!r:.80}", public_code="not_found")


def _check_right(row: Mapping[Any, Any], owner: str | None) -> None:
    if owner is not None and row["by_admin"]:
        raise ApiError("forbidden", f"an admin set the budget of {row['subject']}", "ask an admin")


def _find(connection: sa.Connection, condition: "sa.ColumnElement[bool]") -> Mapping[Any, Any] | None:
    return connection.execute(sa.select(budgets).where(condition)).mappings().first()


def _begin(connection: sa.Connection, wish: Wish, account_id: str, *, by_admin: bool) -> dict[str, Any]:
    now = stamps.now_ms()
    month = month_of(now)
    used = counted(connection, wish.user_id, account_id, wish.key_id or None, month)
    row = {
        "id": stamps.new_id(),
        "subject": wish.subject,
        "account_id": account_id,
        "user_id": wish.user_id,
        "key_id": wish.key_id or None,
        "microcredits": wish.microcredits,
        "month": month,
        "spent": used[0],
        "reserved": used[1],
        # What was passed before there was a budget is no news.
        "alerted": max((p for p in PERCENTS if used[0] * 100 >= wish.microcredits * p), default=0),
        "by_admin": by_admin,
        "created_at_ms": now,
        "updated_at_ms": now,
    }
    connection.execute(sa.insert(budgets), row)
    return row


def counted(
    connection: sa.Connection, user_id: str, account_id: str, key_id: str | None, month: str
) -> tuple[int, int]:
    """What a budget's counters must be: the charges of a month from its rows, and what open reservations hold."""
    spent = sa.select(sa.func.coalesce(sa.func.sum(usages.c.microcredits), 0))
    spent = spent.where(usages.c.user_id == user_id, usages.c.created_at_ms >= month_begins_ms(month))
    held = sa.select(sa.func.coalesce(sa.func.sum(reservations.c.microcredits), 0))
    held = held.where(reservations.c.account_id == account_id)
    if key_id is not None:
        spent, held = spent.where(usages.c.key_id == key_id), held.where(reservations.c.key_id == key_id)
    return int(connection.execute(spent).scalar_one()), int(connection.execute(held).scalar_one())


def _shown(connection: sa.Connection, rows: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
    month = month_of(stamps.now_ms())
    names = [row["id"] for row in rows]
    query = sa.select(budget_alerts).where(budget_alerts.c.budget_id.in_(names), budget_alerts.c.month == month)
    told: dict[str, list[dict[str, int]]] = {}
    for alert in connection.execute(query.order_by(budget_alerts.c.percent)).mappings():
        told.setdefault(alert["budget_id"], []).append({n: alert[n] for n in ("percent", "spent", "created_at_ms")})
    return [_one(row, Budget.of(row, month), told.get(row["id"], [])) for row in rows]


def _one(row: Mapping[Any, Any], budget: Budget, alerts: list[dict[str, int]]) -> dict[str, Any]:
    return {
        "id": budget.id,
        "user_id": row["user_id"],
        "key_id": row["key_id"],
        "microcredits": budget.limit,
        "month": budget.month,
        "spent": budget.spent,
        "reserved": budget.reserved,
        "available": max(budget.room, 0),
        "alerts": alerts,
        "by_admin": bool(row["by_admin"]),
        "created_at_ms": row["created_at_ms"],
    }
