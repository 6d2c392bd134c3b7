"""Whose webhooks are delivered to next."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from gateway import events
from gateway.accounts import Accounts
from gateway.audit import OPERATOR
from gateway.db import jobs as tables
from gateway.db.jobs import cursors, deliveries
from gateway.db.migrate import migrate
from gateway.db.session import Database, open_database
from gateway.db.stamps import now_ms
from gateway.identity.vault import Vault
from gateway.jobs import webhooks
from gateway.jobs.webhooks import AT_ONCE_OF_USER, WEBHOOKS_OF_USER_MAX


@pytest.fixture
def opened(tmp_path: Path, database: str) -> Iterator[Database]:
    found = open_database(database, tmp_path)
    migrate(found)
    for name in ("ada", "bob"):
        Accounts(found).create_user(name)
    yield found
    found.close()


def due(database: Database, user: str, count: int, ago_ms: int) -> list[str]:
    """Webhooks of a user that all have something to deliver, the first one for ``ago_ms``, the others a bit less."""
    owner = Accounts(database).find_user(user).id
    make = partial(webhooks.create, database, Vault(bytes(32)), OPERATOR, user_id=owner, kinds=())
    names = [make(url="https://example.com/")[0].id for _ in range(count)]
    for number, name in enumerate(names):
        made = webhooks.ping(database, name, None)
        with database.write() as connection:
            mine = sa.update(deliveries).where(deliveries.c.id == made.id)
            connection.execute(mine.values(due_at_ms=now_ms() - ago_ms + number))
    return names


def claim(database: Database, limit: int, busy: list[str]) -> list[str]:
    return [each.webhook_id for each in webhooks.claim(database, "here", limit=limit, busy=busy)]


def test_many_webhooks_of_one_user_leave_the_others_their_places(opened: Database) -> None:
    many = due(opened, "ada", WEBHOOKS_OF_USER_MAX, ago_ms=60_000)
    few = due(opened, "bob", 2, ago_ms=1_000)
    first = claim(opened, 16, [])
    assert first == [*many[:AT_ONCE_OF_USER], *few]
    assert claim(opened, 16, first) == []
    assert claim(opened, 16, first[1:]) == [many[AT_ONCE_OF_USER]]


def test_who_has_waited_longest_comes_first(opened: Database) -> None:
    late = due(opened, "ada", 2, ago_ms=1_000)
    early = due(opened, "bob", 2, ago_ms=60_000)
    assert claim(opened, 3, []) == [*early, late[0]]


def tell(database: Database, count: int) -> None:
    with database.write() as connection:
        for _ in range(count):
            events.record(connection, "worker.joined", None, {})


def place(database: Database) -> tuple[int, int]:
    """How far the events were read, and the newest one's place."""
    with database.read() as connection:
        read = connection.execute(sa.select(cursors.c.place)).scalar_one()
        return read, events.bounds(database)[1]


def test_events_that_nobody_can_want_are_not_read_and_others_are_not_skipped(opened: Database) -> None:
    webhooks.spread(opened)  # the first time
    tell(opened, 500)
    assert webhooks.spread(opened) == 0
    assert place(opened)[0] == place(opened)[1], "there is no webhook"
    admin = Accounts(opened).create_user("root", role="admin").id
    made, _ = webhooks.create(opened, Vault(bytes(32)), OPERATOR, user_id=admin, url="https://example.com/", kinds=())
    tell(opened, 500)
    for enabled in (False, True):
        with opened.write() as connection:
            connection.execute(sa.update(tables.webhooks).values(enabled=enabled))
        assert webhooks.spread(opened) == 200
    while webhooks.spread(opened):
        pass
    with opened.read() as connection:
        told = connection.execute(sa.select(sa.func.count()).where(deliveries.c.webhook_id == made.id)).scalar_one()
    assert told == 300, "those of the pass without it are lost, and only those"
