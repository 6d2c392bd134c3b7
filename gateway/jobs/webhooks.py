"""Webhooks, and what is to be delivered to them, in the database. Blocking calls.

The table of events is the outbox: an event is written in the transaction of what it tells, and :func:`spread` makes
deliveries of it, each event once, by a cursor that moves on in the same transaction.

Invariants:
1. A delivery is tried by one gateway at a time (a lease), until the other side says 2xx: at least once.
2. Bounded: tries of a delivery, deliveries that wait for a webhook, how long deliveries are kept, webhooks of a user.
3. A webhook's secret is shown once, and sealed here.
4. A webhook is sent no more than its user may hear, nor than the key it was made or last changed with by them, and
   nothing once that key has ended; what was made in a session is the user's.
"""

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import sqlalchemy as sa

from config.errors import RequestError
from gateway import audit, events
from gateway.audit import Actor
from gateway.db.jobs import cursors, deliveries, webhooks
from gateway.db.jobs import events as event_rows
from gateway.db.models import api_keys, users
from gateway.db.session import Database
from gateway.db.stamps import new_id, now_ms
from gateway.errors import ApiError
from gateway.events import Event, matches
from gateway.identity.vault import Vault
from gateway.roles import Permission, Reach, reach_of

WEBHOOKS_OF_USER_MAX = 20
TRIES_MAX = 12
WAITING_MAX = 5_000
"""Deliveries that wait for one webhook; what comes then is dead at once."""
KEPT_MS = 7 * 24 * 3600 * 1000
DISABLED_AFTER_MS = 3 * 24 * 3600 * 1000
LEASE_MS = 60_000
AT_ONCE_OF_USER = 4
"""Webhooks of a user that a gateway delivers to at the same time."""
BACKOFF_MS_MIN, BACKOFF_MS_MAX = 5_000, 6 * 3600 * 1000
_EVENTS_AT_ONCE = 200
_PROBLEM_CHARACTERS_MAX = 255
_CURSOR = "webhooks"
PING = "webhook.ping"
HEARS: Permission = "events:read"
_KEY_GONE = "the API key that it was made or last changed with has ended, or lost events:read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """A webhook without its secret. ``kinds``: patterns between spaces. ``key_id``: what its user made, or last
    changed, it with; None for a session."""

    id: str
    user_id: str
    key_id: str | None
    url: str
    kinds: str
    enabled: bool
    problem: str
    failing_since_ms: int | None
    created_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An event for a webhook."""

    id: str
    webhook_id: str
    kind: str
    status: str
    attempts: int
    due_at_ms: int
    answered: int
    problem: str
    created_at_ms: int


@dataclass(frozen=True, slots=True)
class Due:
    """A delivery to try now."""

    id: str
    webhook_id: str
    url: str
    secret: bytes
    body: str
    attempts: int


_WITH_OWNER = deliveries.join(webhooks, webhooks.c.id == deliveries.c.webhook_id).join(
    users, users.c.id == webhooks.c.user_id
)
_DELIVERY = [deliveries.c[name] for name in Delivery.__dataclass_fields__]


def purpose(webhook_id: str) -> str:
    """For which a webhook's secret is sealed."""
    return f"webhook {webhook_id}"


def _keyed(now: int) -> sa.ColumnElement[bool]:
    """Of webhooks: that the key goes on, and hears of events; or there is none."""
    scopes = sa.literal(" ") + api_keys.c.scopes + " "
    hears = sa.or_(api_keys.c.scopes == "", scopes.contains(f" {HEARS} "))
    lives = sa.or_(api_keys.c.expires_at_ms.is_(None), api_keys.c.expires_at_ms > now)
    key = sa.exists().where(api_keys.c.id == webhooks.c.key_id, api_keys.c.revoked_at_ms.is_(None), lives, hears)
    return sa.or_(webhooks.c.key_id.is_(None), key)


def _sent(now: int) -> tuple[sa.ColumnElement[bool], ...]:
    """What is sent: of a user who is shut out it waits, and goes on when they are let in again."""
    return webhooks.c.enabled.is_(True), users.c.disabled.is_(False), _keyed(now)


def _columns(now: int) -> list[sa.ColumnElement[Any]]:
    """Those of :class:`Webhook`."""
    columns: dict[str, sa.ColumnElement[Any]] = {name: webhooks.c[name] for name in Webhook.__dataclass_fields__}
    columns["problem"] = sa.case((_keyed(now), webhooks.c.problem), else_=_KEY_GONE).label("problem")
    return list(columns.values())


def create(
    database: Database,
    vault: Vault,
    actor: Actor,
    *,
    user_id: str,
    url: str,
    kinds: Collection[str],
    key_id: str | None = None,
) -> tuple[Webhook, str]:
    """Make one; it and its secret. Raises RequestError ``conflict`` for too many."""
    name, secret = f"wh_{new_id()}", secrets.token_bytes(32)
    row = {"id": name, "user_id": user_id, "url": url, "kinds": " ".join(kinds), "enabled": True, "problem": ""}
    row |= {"created_at_ms": now_ms(), "secret": vault.seal(secret, purpose(name)), "key_id": key_id}
    with database.write() as connection:
        connection.execute(sa.select(users.c.id).where(users.c.id == user_id).with_for_update(key_share=True))
        count = sa.select(sa.func.count()).where(webhooks.c.user_id == user_id)
        if connection.execute(count).scalar_one() >= WEBHOOKS_OF_USER_MAX:
            raise RequestError("conflict", f"a user has {WEBHOOKS_OF_USER_MAX} webhooks at most", "delete some first")
        connection.execute(sa.insert(webhooks).values(**row))
        audit.record(connection, actor, "webhook.created", name, owner_id=user_id)
        return find(connection, name, None), f"whsec_{base64.b64encode(secret).decode()}"


def find(connection: sa.Connection, name: str, owner: str | None) -> Webhook:
    """A webhook within reach. Raises ApiError ``not_found``."""
    row = connection.execute(sa.select(*_columns(now_ms())).where(webhooks.c.id == name)).mappings().first()
    if row is None or owner not in (None, row["user_id"]):
        raise ApiError("not_found", f"there is no webhook {name!r:.80}", public_code="not_found")
    return Webhook(**row)


def get(database: Database, name: str, owner: str | None) -> Webhook:
    """:func:`find` in a transaction of its own."""
    with database.read() as connection:
        return find(connection, name, owner)


def listed(database: Database, owner: str | None, *, limit: int, after: str) -> Sequence[Webhook]:
    """Those within reach, newest first."""
    query = sa.select(*_columns(now_ms())).order_by(webhooks.c.id.desc()).limit(limit)
    if owner is not None:
        query = query.where(webhooks.c.user_id == owner)
    if after:
        query = query.where(webhooks.c.id < after)
    with database.read() as connection:
        return [Webhook(**row) for row in connection.execute(query).mappings()]


def change(
    database: Database, actor: Actor, name: str, owner: str | None, values: dict[str, object], *, key_id: str | None
) -> Webhook:
    """Other values. One that is enabled again starts anew; from now on it goes on with the key that changed it, if that
    is its user's own: another's says nothing of what the user may hear.

    Raises ApiError ``not_found``.
    """
    if values.get("enabled"):
        values |= {"problem": "", "failing_since_ms": None}
    with database.write() as connection:
        webhook = find(connection, name, owner)
        key = {"key_id": key_id} if actor.user_id == webhook.user_id else {}
        connection.execute(sa.update(webhooks).where(webhooks.c.id == name).values(**values, **key))
        audit.record(
            connection, actor, "webhook.changed", name, owner_id=webhook.user_id, detail={"changed": sorted(values)}
        )
        return find(connection, name, owner)


def delete(database: Database, actor: Actor, name: str, owner: str | None) -> None:
    """Forget one and its deliveries. Raises ApiError ``not_found``."""
    with database.write() as connection:
        webhook = find(connection, name, owner)
        connection.execute(sa.delete(deliveries).where(deliveries.c.webhook_id == name))
        connection.execute(sa.delete(webhooks).where(webhooks.c.id == name))
        audit.record(connection, actor, "webhook.deleted", name, owner_id=webhook.user_id)


def ping(database: Database, name: str, owner: str | None) -> Delivery:
    """Deliver a test. Raises ApiError ``not_found``, ``conflict`` for one that is sent nothing, or for which a test
    waits: a second one would tell no more."""
    with database.write() as connection:
        # Locked, so that of two at the same time one is first.
        connection.execute(sa.select(webhooks.c.id).where(webhooks.c.id == name).with_for_update(key_share=True))
        webhook = find(connection, name, owner)
        if not webhook.enabled:
            raise ApiError("conflict", "this webhook is disabled", "enable it first")
        if webhook.problem == _KEY_GONE:
            raise ApiError(
                "conflict", f"nothing is sent: {_KEY_GONE}", "its user can change it with another key, or signed in"
            )
        waits = deliveries.c.webhook_id == name, deliveries.c.kind == PING, deliveries.c.status == "pending"
        if connection.execute(sa.select(deliveries.c.id).where(*waits).limit(1)).first() is not None:
            raise ApiError("conflict", "a test of this webhook is on its way already", "see its deliveries")
        row = _row(webhook, PING, {"webhook_id": name}, now_ms(), dead=False)
        connection.execute(sa.insert(deliveries).values(**row))
        return _delivery(connection, str(row["id"]))


def list_deliveries(database: Database, name: str, owner: str | None, *, limit: int, after: str) -> Sequence[Delivery]:
    """Newest first. Raises ApiError ``not_found``."""
    query = sa.select(*_DELIVERY).where(deliveries.c.webhook_id == name).order_by(deliveries.c.id.desc()).limit(limit)
    if after:
        query = query.where(deliveries.c.id < after)
    with database.read() as connection:
        find(connection, name, owner)
        return [Delivery(**row) for row in connection.execute(query).mappings()]


def _delivery(connection: sa.Connection, name: str) -> Delivery:
    return Delivery(**connection.execute(sa.select(*_DELIVERY).where(deliveries.c.id == name)).mappings().one())


# --- the outbox


def spread(database: Database) -> int:
    """Make deliveries of the next events; how many events were looked at."""
    with database.read() as connection:
        place = connection.execute(sa.select(cursors.c.place).where(cursors.c.name == _CURSOR)).scalar()
    if place is None:
        return _begin(database)
    if not events.since(database, place, None, limit=1):
        return 0
    with database.write() as connection:
        query = sa.select(cursors.c.place).where(cursors.c.name == _CURSOR)
        place = connection.execute(query.with_for_update()).scalar_one()
        newest = connection.execute(sa.select(sa.func.max(event_rows.c.place))).scalar() or place
        # read before what webhooks there are: nobody misses what comes between
        if connection.execute(sa.select(webhooks.c.id).limit(1)).first() is None:
            _move(connection, newest)
            return 0
        found = events.after(connection, place, limit=_EVENTS_AT_ONCE)
        if found:
            _spread(connection, found)
            _move(connection, found[-1].place)
        return len(found)


def _move(connection: sa.Connection, place: int) -> None:
    connection.execute(sa.update(cursors).where(cursors.c.name == _CURSOR).values(place=place))


def _begin(database: Database) -> int:
    """The first gateway of a database starts behind what happened before there were webhooks."""
    try:
        with database.write() as connection:
            connection.execute(sa.insert(cursors).values(name=_CURSOR, place=0))
    except sa.exc.IntegrityError:
        pass  # another gateway was faster
    return 1


def _spread(connection: sa.Connection, found: Sequence[Event]) -> None:
    now = now_ms()
    query = sa.select(*_columns(now), users.c.role).join(users, users.c.id == webhooks.c.user_id)
    live = connection.execute(query.where(*_sent(now))).mappings().all()
    if not live:
        return
    waits = sa.select(deliveries.c.webhook_id, sa.func.count()).where(deliveries.c.status == "pending")
    waiting: dict[str, int] = {name: n for name, n in connection.execute(waits.group_by(deliveries.c.webhook_id))}
    rows = []
    for row in live:
        webhook = Webhook(**{name: row[name] for name in Webhook.__dataclass_fields__})
        reach = reach_of(row["role"], HEARS)
        if reach is Reach.NONE:
            continue
        owner = None if reach is Reach.ALL else webhook.user_id
        for event in found:
            if event.created_at_ms < webhook.created_at_ms or not event.for_whom(owner):
                continue
            if not matches(event.kind, webhook.kinds.split()):
                continue
            dead = waiting.get(webhook.id, 0) >= WAITING_MAX
            waiting[webhook.id] = waiting.get(webhook.id, 0) + (not dead)
            rows.append(_row(webhook, event.kind, json.loads(event.data), event.created_at_ms, dead=dead))
    if rows:
        connection.execute(sa.insert(deliveries), rows)


def _row(webhook: Webhook, kind: str, data: object, when: int, *, dead: bool) -> dict[str, object]:
    name = f"evt_{new_id()}"
    body = {"id": name, "object": "event", "type": kind, "created_at_ms": when, "data": data}
    return {
        "id": name,
        "webhook_id": webhook.id,
        "kind": kind,
        "body": json.dumps(body),
        "status": "dead" if dead else "pending",
        "attempts": 0,
        "due_at_ms": now_ms(),
        "answered": 0,
        "problem": "too many deliveries wait for this webhook" if dead else "",
        "created_at_ms": now_ms(),
        "holder": "",
    }


def claim(database: Database, holder: str, *, limit: int, busy: Collection[str]) -> Sequence[Due]:
    """Deliveries to try now, leased, the longest due first: one for each webhook, and none for those that are
    ``busy``; of a user at most :data:`AT_ONCE_OF_USER`, with the busy ones."""
    with database.read() as connection:
        names = list(connection.execute(_due(now_ms(), list(busy)).limit(limit)).scalars())
    return [due for name in names if (due := _claim_one(database, holder, name)) is not None]


def _due(now: int, busy: Sequence[str]) -> sa.Select[str]:
    """The webhooks that have something to deliver, in the order of :func:`claim`."""
    owner, earliest = webhooks.c.user_id, sa.func.min(deliveries.c.due_at_ms)
    place = sa.func.row_number().over(partition_by=owner, order_by=earliest)
    waiting = (
        sa.select(deliveries.c.webhook_id, owner, earliest.label("due"), place.label("place"))
        .select_from(_WITH_OWNER)
        .where(deliveries.c.status == "pending", deliveries.c.due_at_ms <= now, *_sent(now))
        .where(deliveries.c.webhook_id.not_in(busy))
        .group_by(deliveries.c.webhook_id, owner)
        .subquery()
    )
    taken = sa.select(sa.func.count()).where(webhooks.c.id.in_(busy), owner == waiting.c.user_id).scalar_subquery()
    return sa.select(waiting.c.webhook_id).where(waiting.c.place + taken <= AT_ONCE_OF_USER).order_by(waiting.c.due)


def _claim_one(database: Database, holder: str, webhook_id: str) -> Due | None:
    now = now_ms()
    columns = (deliveries.c.id, deliveries.c.webhook_id, webhooks.c.url, webhooks.c.secret, deliveries.c.body)
    due = sa.and_(deliveries.c.status == "pending", deliveries.c.due_at_ms <= now)
    query = (
        sa.select(*columns, deliveries.c.attempts)
        .select_from(_WITH_OWNER)
        .where(due, deliveries.c.webhook_id == webhook_id, *_sent(now))
        .order_by(deliveries.c.due_at_ms)
        .limit(1)
    )
    with database.write() as connection:
        row = connection.execute(query.with_for_update(skip_locked=True, of=deliveries)).first()
        if row is None:
            return None
        lease = sa.update(deliveries).where(deliveries.c.id == row.id)
        connection.execute(lease.values(holder=holder, due_at_ms=now + LEASE_MS, attempts=row.attempts + 1))
        return Due(row.id, row.webhook_id, row.url, bytes(row.secret), row.body, row.attempts + 1)


def succeeded(database: Database, holder: str, due: Due, answered: int) -> None:
    """The other side has it."""
    with database.write() as connection:
        if _close(connection, holder, due, status="delivered", answered=answered, problem=""):
            mine = sa.and_(webhooks.c.id == due.webhook_id, webhooks.c.failing_since_ms.is_not(None))
            connection.execute(sa.update(webhooks).where(mine).values(failing_since_ms=None, problem=""))


def failed(database: Database, holder: str, due: Due, answered: int, problem: str, random: Random) -> None:
    """Try it again later, or give it up; a webhook that has failed for long is disabled."""
    problem, now = problem[:_PROBLEM_CHARACTERS_MAX], now_ms()
    dead = due.attempts >= TRIES_MAX
    values = {"status": "dead"} if dead else {"due_at_ms": now + backoff_ms(due.attempts, random)}
    with database.write() as connection:
        if not _close(connection, holder, due, answered=answered, problem=problem, **values):
            return
        query = sa.update(webhooks).where(webhooks.c.id == due.webhook_id)
        since = sa.func.coalesce(webhooks.c.failing_since_ms, now)
        row = connection.execute(
            query.values(failing_since_ms=since, problem=problem).returning(
                webhooks.c.failing_since_ms, webhooks.c.enabled, webhooks.c.user_id
            )
        ).first()
        if row is not None and row.enabled and row.failing_since_ms <= now - DISABLED_AFTER_MS:
            _disable(connection, due.webhook_id, row.user_id)


def _disable(connection: sa.Connection, name: str, user_id: str) -> None:
    connection.execute(sa.update(webhooks).where(webhooks.c.id == name).values(enabled=False))
    waits = sa.and_(deliveries.c.webhook_id == name, deliveries.c.status == "pending")
    connection.execute(sa.update(deliveries).where(waits).values(status="dead", problem="the webhook was disabled"))
    events.record(connection, "webhook.disabled", user_id, {"id": name})


def _close(connection: sa.Connection, holder: str, due: Due, **values: object) -> bool:
    """Whether it was still this gateway's try."""
    mine = sa.and_(deliveries.c.id == due.id, deliveries.c.holder == holder, deliveries.c.attempts == due.attempts)
    changed = connection.execute(sa.update(deliveries).where(mine).values(holder="", **values))
    return bool(changed.rowcount)


def sweep(database: Database) -> None:
    """Forget old deliveries."""
    some = sa.select(deliveries.c.id).where(deliveries.c.created_at_ms < now_ms() - KEPT_MS).limit(1000)
    with database.write() as connection:
        connection.execute(sa.delete(deliveries).where(deliveries.c.id.in_(some)))


def backoff_ms(attempts: int, random: Random) -> int:
    """How long to wait after so many tries: doubled each time up to a cap, and somewhere in its upper half."""
    full = min(BACKOFF_MS_MAX, BACKOFF_MS_MIN << min(attempts - 1, 20))
    return full // 2 + random.randrange(full // 2 + 1)


def signed(name: str, body: bytes, secret: bytes, seconds: int) -> dict[str, str]:
    """The headers of Standard Webhooks: id, timestamp and signature."""
    text = f"{name}.{seconds}.".encode() + body
    signature = base64.b64encode(hmac.new(secret, text, hashlib.sha256).digest()).decode()
    return {"webhook-id": name, "webhook-timestamp": str(seconds), "webhook-signature": f"v1,{signature}"}
