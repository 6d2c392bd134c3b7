"""What was used, added up for people: by day, by model. Blocking; reads the usage rows that settlements wrote.

Days are those of UTC. Invariant: every figure is a sum over settled requests of one user (or of all), so the days of a
period add up to its models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from gateway.accounts import Usage
from gateway.billing.sheet import to_csv
from gateway.billing.statements import By, Span, sum_usage
from gateway.db.models import usages, users
from gateway.db.session import Database

DAY_MS = 24 * 3600 * 1000
EXPORT_ROWS_MAX = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Of some requests. ``name``: the model, or the number of the day since 1970."""

    name: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    microcredits: int


def by_day(database: Database, user_id: str | None, since_ms: int, until_ms: int) -> Sequence[Sums]:
    """One row for each day in which something was used, oldest first; ``user_id`` None: everybody's."""
    return _sums(database, Span(owner=user_id, from_ms=since_ms, to_ms=until_ms), "day")


def by_model(database: Database, user_id: str | None, since_ms: int, until_ms: int) -> Sequence[Sums]:
    """One row for each model, the most expensive first."""
    found = _sums(database, Span(owner=user_id, from_ms=since_ms, to_ms=until_ms), "model")
    return sorted(found, key=lambda row: (-row.microcredits, -row.requests, row.name))


def _sums(database: Database, span: Span, by: By) -> Sequence[Sums]:
    with database.read() as connection:
        rows = sum_usage(connection, span, (by,))
    return [Sums(name=str(row.pop(by) // DAY_MS if by == "day" else row.pop(by)), **row) for row in rows]


def newest(database: Database, user_id: str | None, count: int) -> Sequence[tuple[Usage, str]]:
    """The requests settled last, newest first, each with its user's name."""
    names = list(Usage.__dataclass_fields__)
    query = sa.select(*(usages.c[name] for name in names), users.c.name.label("user_name"))
    query = query.join(users, users.c.id == usages.c.user_id).order_by(usages.c.id.desc()).limit(count)
    if user_id is not None:
        query = query.where(usages.c.user_id == user_id)
    with database.read() as connection:
        rows = connection.execute(query).mappings().all()
    return [(Usage(**{name: row[name] for name in names}), str(row["user_name"])) for row in rows]


def as_csv(rows: Sequence[tuple[Usage, str]]) -> str:
    """The rows for a spreadsheet."""
    names = list(Usage.__dataclass_fields__)
    return to_csv((*names, "user"), ([*(getattr(usage, name) for name in names), user] for usage, user in rows))
