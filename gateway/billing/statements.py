"""What happened to an account: its postings, its usage added up. Reads only; blocking calls in an open transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa

from config.vocabulary import KFLOP_PER_TFLOP as NANO
from gateway.billing.costs import of_request, total
from gateway.db.models import accounts, postings, transactions, usages

By = Literal["day", "model", "key", "user"]
BYS: tuple[By, ...] = get_args(By)
ROWS_MAX = 10_000
_MS_PER_DAY = 86_400_000
_GROUPS: Mapping[By, "sa.ColumnElement[Any]"] = {
    # Written out: as parameters, PostgreSQL would not see that both clauses say the same.
    "day": sa.literal_column(f"usages.created_at_ms / {_MS_PER_DAY}", sa.BigInteger),
    "model": usages.c.model,
    "key": usages.c.key_id,
    "user": usages.c.user_id,
}
_COSTS = ("swarm_microcredits", "swarm_nano")
_SUMS = ("prompt_tokens", "completion_tokens", "microcredits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """From when to before when, unix milliseconds; whose, None: everybody's."""

    owner: str | None
    from_ms: int
    to_ms: int


def list_postings(
    connection: sa.Connection, *, owner: str | None, kinds: Sequence[str], limit: int, after: str
) -> Sequence[Mapping[Any, Any]]:
    """Newest first: postings to a user's account, or to all accounts. ``after``: ``TRANSACTION:ACCOUNT``."""
    mine = (postings.c.transaction_id, postings.c.account_id)
    columns = (*mine, postings.c.amount, transactions.c.kind, transactions.c.reference, transactions.c.created_at_ms)
    query = sa.select(*columns, accounts.c.user_id).join(transactions, transactions.c.id == postings.c.transaction_id)
    query = query.join(accounts, accounts.c.id == postings.c.account_id)
    if owner is not None:
        # An account's id is made of its user's, so that this needs no look at another table.
        query = query.where(postings.c.account_id == f"user:{owner}")
    if kinds:
        query = query.where(transactions.c.kind.in_(kinds), accounts.c.user_id.is_not(None))
    if after:
        transaction, _, account = after.partition(":")
        query = query.where(sa.tuple_(*mine) < sa.tuple_(sa.literal(transaction), sa.literal(account)))
    query = query.order_by(postings.c.transaction_id.desc(), postings.c.account_id.desc())
    return connection.execute(query.limit(limit)).mappings().all()


def sum_usage(
    connection: sa.Connection, span: Span, by: Sequence[By], *, with_costs: bool = False
) -> Sequence[dict[str, Any]]:
    """Requests, tokens and charges for each combination of ``by``, at most :data:`ROWS_MAX`; ``with_costs``: also what
    the swarm was paid and the margin, which are the operator's to know."""
    groups = [_GROUPS[each].label(each) for each in by]
    sums = [sa.func.sum(usages.c[name]).label(name) for name in (*_SUMS, *(_COSTS if with_costs else ()))]
    query = sa.select(*groups, sa.func.count().label("requests"), *sums)
    query = query.where(usages.c.created_at_ms >= span.from_ms, usages.c.created_at_ms < span.to_ms)
    if span.owner is not None:
        query = query.where(usages.c.user_id == span.owner)
    query = query.group_by(*groups).order_by(*groups).limit(ROWS_MAX)
    return [_plain(row) for row in connection.execute(query).mappings()]


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Sums are decimals on PostgreSQL."""
    found = dict(row)
    if "day" in found:
        found["day"] = int(found["day"]) * _MS_PER_DAY
    found = {name: int(value) if name in _SUMS else value for name, value in found.items()}
    return with_margin(found) if _COSTS[0] in found else found


def with_margin(found: dict[str, Any]) -> dict[str, Any]:
    """A usage row, or a sum of some, with its two columns of cost as ``swarm_nano`` in one, ``swarm_cost`` in
    microcredits (rounded down) and the ``margin`` left of the charge."""
    nano = total(*(found.pop(name) for name in _COSTS))
    return found | {"swarm_nano": nano, "swarm_cost": nano // NANO, "margin": found["microcredits"] - nano // NANO}


def newest_costs(connection: sa.Connection, span: Span, limit: int) -> Sequence[dict[str, Any]]:
    """The last settled requests, newest first, with what they cost and earned."""
    names = ("id", "request_id", "user_id", "model", "outcome", "created_at_ms", "microcredits", *_COSTS)
    query = sa.select(*(usages.c[name] for name in names))
    query = query.where(usages.c.created_at_ms >= span.from_ms, usages.c.created_at_ms < span.to_ms)
    if span.owner is not None:
        query = query.where(usages.c.user_id == span.owner)
    query = query.order_by(usages.c.created_at_ms.desc(), usages.c.id.desc()).limit(limit)
    return [with_margin(dict(row)) for row in connection.execute(query).mappings()]


def find_cost(connection: sa.Connection, name: str) -> dict[str, Any] | None:
    """A settled request's charge, cost and margin, and the calls behind the cost per channel; None: there is no such
    request."""
    columns = (usages.c.id, usages.c.request_id, usages.c.user_id, usages.c.microcredits)
    query = sa.select(*columns, *(usages.c[each] for each in _COSTS)).where(usages.c.id == name)
    row = connection.execute(query).mappings().first()
    return None if row is None else with_margin(dict(row)) | {"channels": of_request(connection, name)}
