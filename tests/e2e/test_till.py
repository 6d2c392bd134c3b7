"""The till's writer: what is handed to it is written, whoever still waits for it, and nothing stays held back."""

import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import sqlalchemy as sa
import trio
from fake_engine import ANSWER, FakeEngine
from gateway_rig import eventually, read_until, serving

from config.accountbook import PaidChannel, Spent
from config.errors import LocalError
from gateway import books, idempotency
from gateway.accounts import Accounts
from gateway.audit import OPERATOR
from gateway.billing import budgets, invoices
from gateway.billing.budget import month_begins_ms, month_of, next_month
from gateway.billing.costs import CostBook
from gateway.billing.reconcile import reconcile
from gateway.db.migrate import migrate
from gateway.db.models import reservations, users
from gateway.db.session import Database, Kept, open_database
from gateway.db.stamps import new_id
from gateway.errors import ApiError
from gateway.money import Closing, Prices, Progress, Reservation, Settlement
from gateway.till import Till

PRICES = Prices(1_000_000, 1_000_000)


def made(tmp_path: Path, dsn: str) -> Iterator[Database]:
    found = open_database(dsn, tmp_path)
    migrate(found)
    accounts = Accounts(found)
    accounts.create_user("ada")
    accounts.credit("ada", 1000)
    yield found
    found.close()


@pytest.fixture
def opened(tmp_path: Path, database: str) -> Iterator[Database]:
    yield from made(tmp_path, database)


@pytest.fixture
def in_sqlite(tmp_path: Path) -> Iterator[Database]:
    """For what PostgreSQL has nothing like."""
    yield from made(tmp_path, "")


@asynccontextmanager
async def running(database: Database) -> AsyncIterator[Till]:
    till = Till(database, "here")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(till.run)
        try:
            yield till
        finally:
            till.close()
        await till.closed.wait()
    await till.drain()


@asynccontextmanager
async def held_up(database: Database, account: str) -> AsyncIterator[None]:
    """Nobody else can write about the account."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with database.write() as connection:
            books.lock_account(connection, account)
            held.set()
            release.wait(4)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, hold)
        await trio.to_thread.run_sync(held.wait)
        yield
        release.set()


@contextmanager
def settlements_refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The database is away whenever something is to be settled, and back at the end."""
    write = books.write_batch

    def refuse(database: Database, batch: books.Batch, *more: object, **ways: bool) -> dict:
        if batch.settle or batch.close:
            raise LocalError("unavailable", "the database is away")
        return write(database, batch, *more, **ways)

    with monkeypatch.context() as patch:
        patch.setattr(books, "write_batch", refuse)
        yield


def reservation(database: Database, tokens: int = 9) -> Reservation:
    with database.read() as connection:
        user = connection.execute(sa.select(users.c.id).where(users.c.name == "ada")).scalar_one()
    return Reservation(
        id=new_id(),
        instance="here",
        account_id=f"user:{user}",
        user_id=user,
        key_id=None,
        request_id="r",
        endpoint="chat.completions",
        model="tiny",
        prompt_tokens=1,
        max_tokens=tokens,
        prices=PRICES,
    )


def paid(wanted: Reservation) -> Settlement:
    return Settlement(reservation=wanted, prompt_tokens=1, completion_tokens=4, outcome="stop")


async def test_who_leaves_while_a_reservation_is_written_leaves_nothing_held_back(opened: Database) -> None:
    wanted = [reservation(opened) for _ in range(3)]
    async with running(opened) as till, held_up(opened, wanted[0].account_id):
        async with trio.open_nursery() as nursery:
            for one in wanted:
                nursery.start_soon(till.reserve, one)
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        assert till.running() == ()
    balance = Accounts(opened).balance("ada")
    assert (balance.balance, balance.reserved) == (1000, 0)
    assert books.find_abandoned(opened, "here") == []


async def test_a_settlement_that_nobody_waits_for_is_written_before_the_end(opened: Database) -> None:
    wanted = reservation(opened)
    async with running(opened) as till:
        await till.reserve(wanted)
        async with held_up(opened, wanted.account_id):
            with trio.move_on_after(0.1) as waited:
                await till.settle(paid(wanted))
            assert waited.cancelled_caught
            assert [ticket.reservation for ticket in till.running()] == [wanted]
    balance = Accounts(opened).balance("ada")
    assert (balance.balance, balance.reserved) == (995, 0)


async def test_who_leaves_while_several_answers_are_settled_pays_for_finished_ones(
    tmp_path: Path, database: str
) -> None:
    asked = {"model": "tiny", "prompt": "hi there", "n": 3, "stream": True}
    async with serving(tmp_path, database=database, engine=FakeEngine(pause_seconds=0.05)) as rig:
        user = (await trio.to_thread.run_sync(rig.accounts.list_users))[-1].id
        async with await rig.raw("/v1/completions", asked) as stream:
            await read_until(stream, b"Paris")
            async with held_up(rig.accounts.database, f"user:{user}"):
                await eventually(lambda: rig.engine.produced == 3 * len(ANSWER))
                await trio.sleep(0.2)
                await stream.aclose()
                await trio.sleep(0.2)
        await eventually(lambda: rig.accounts.balance("ada").reserved == 0)
        assert [row.outcome for row in rig.accounts.usage("ada")] == ["stop"] * 3


async def test_a_settlement_that_was_refused_is_tried_again_before_the_end(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, write = reservation(opened), books.write_batch

    def refuse(database: Database, batch: books.Batch, *more: object, **ways: bool) -> dict:
        raise LocalError("unavailable", "the database is away")

    async with running(opened) as till:
        await till.reserve(wanted)
        monkeypatch.setattr(books, "write_batch", refuse)
        with pytest.raises(LocalError, match="away"):
            await till.settle(paid(wanted))
        monkeypatch.setattr(books, "write_batch", write)
    balance = Accounts(opened).balance("ada")
    assert (balance.balance, balance.reserved) == (995, 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "hi there"}),
        ("/v1/completions", {"model": "tiny", "prompt": "hi there", "n": 3}),
        ("/v1/embeddings", {"model": "tiny", "input": "hi there"}),
    ],
)
async def test_an_answer_that_the_client_did_not_get_for_want_of_a_database_is_not_charged(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, path: str, body: dict
) -> None:
    async with serving(tmp_path, database=database) as rig, rig.http() as http:
        with settlements_refused(monkeypatch):
            assert (await http.post(path, json=body)).status_code == 503
        await eventually(lambda: rig.accounts.balance("ada").reserved == 0)
        assert rig.accounts.balance("ada").balance == 1_000_000
        assert {row.outcome for row in rig.accounts.usage("ada")} == {"failed"}


async def test_a_stream_that_was_told_is_charged_once_the_database_is_back(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "prompt": "hi there", "stream": True}
    async with serving(tmp_path, database=database) as rig, rig.http() as http:
        with settlements_refused(monkeypatch):
            assert "France" in (await http.post("/v1/completions", json=body)).text
        await eventually(lambda: rig.accounts.balance("ada").reserved == 0)
        assert rig.accounts.balance("ada").balance == 1_000_000 - 2 - 2 * len(ANSWER)


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after the late booking"])
@pytest.mark.parametrize("lets_go", [True, False], ids=["let go", "still held"])
async def test_a_retry_under_a_key_pays_once_for_what_the_database_refused(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, lets_go: bool, waits: bool
) -> None:
    body, key = {"model": "tiny", "prompt": "hi there"}, {"idempotency-key": "order-66"}

    def refuse(*given: object) -> None:
        raise LocalError("unavailable", "the database is away")

    async with serving(tmp_path, database=database) as rig, rig.http() as http:
        with settlements_refused(monkeypatch), monkeypatch.context() as patch:
            if not lets_go:
                patch.setattr(idempotency, "release", refuse)
            assert (await http.post("/v1/completions", json=body, headers=key)).status_code == 503
        if waits:
            await eventually(lambda: rig.accounts.balance("ada").reserved == 0)
        assert (await http.post("/v1/completions", json=body, headers=key)).status_code == 200
        await eventually(lambda: rig.accounts.balance("ada").reserved == 0)
        await trio.sleep(1.2)  # another tick: nothing comes late
        assert rig.accounts.balance("ada").balance == 1_000_000 - 2 - 2 * len(ANSWER)


@pytest.mark.parametrize("synced", [True, False])
async def test_a_charge_that_went_through_unnoticed_is_not_booked_again(
    opened: Database, monkeypatch: pytest.MonkeyPatch, synced: bool
) -> None:
    wanted, write = replace(reservation(opened), synced=synced), books.write_batch

    def lose(database: Database, batch: books.Batch, *more: object, **ways: bool) -> dict:
        write(database, batch)
        raise LocalError("unavailable", "the connection was lost")

    async with running(opened) as till:
        await till.reserve(wanted)
        monkeypatch.setattr(books, "write_batch", lose)
        with pytest.raises(LocalError, match="lost"):
            await till.settle(paid(wanted))
        monkeypatch.setattr(books, "write_batch", write)
    balance = Accounts(opened).balance("ada")
    assert (balance.balance, balance.reserved) == (995, 0)
    assert [row.outcome for row in Accounts(opened).usage("ada")] == ["stop"]


def taken_for_lost(database: Database, wanted: Reservation, delivered: int = 0) -> None:
    """Another gateway settles it: its own was not seen for long."""
    books.write_batch(database, books.Batch(progress=[Progress(wanted.id, delivered)]))
    with database.write() as connection:
        connection.execute(sa.update(reservations).values(updated_at_ms=0))
    books.write_batch(database, books.Batch(settle=books.find_abandoned(database, "there")))


def charges(database: Database) -> list[tuple[str, int, int, int]]:
    """In the order of what they say: some are of the same millisecond."""
    rows = Accounts(database).usage("ada")
    return sorted((row.outcome, row.prompt_tokens, row.completion_tokens, row.microcredits) for row in rows)


@pytest.mark.parametrize(
    ("delivered", "expected"),
    [
        (0, [("recovered", 1, 0, 0), ("stop", 1, 4, 5)]),
        (3, [("recovered", 1, 3, 4), ("stop", 0, 1, 1)]),
        (4, [("recovered", 1, 4, 5)]),
    ],
)
async def test_what_another_gateway_took_for_lost_is_charged_in_full_once(
    opened: Database, delivered: int, expected: list
) -> None:
    wanted = reservation(opened)
    wish = budgets.Wish(user_id=wanted.user_id, microcredits=1000)
    budgets.set_budget(opened, OPERATOR, wish, None)
    async with running(opened) as till:
        await till.reserve(wanted)
        taken_for_lost(opened, wanted, delivered)
        await till.settle(paid(wanted))
        await till.settle(paid(wanted))  # its commit went through unnoticed
    balance = Accounts(opened).balance("ada")
    assert (balance.balance, balance.reserved) == (995, 0)
    assert charges(opened) == expected
    with opened.read() as connection:
        (budget,) = budgets.list_budgets(connection, owner=None, limit=2, after="")
    assert (budget["spent"], budget["reserved"]) == (5, 0)
    assert reconcile(opened)["ties"]


async def test_what_was_taken_for_lost_takes_no_more_than_there_is(opened: Database) -> None:
    """What it held back was given to others meanwhile."""
    wanted, other = reservation(opened), reservation(opened, 996)
    async with running(opened) as till:
        await till.reserve(wanted)
        taken_for_lost(opened, wanted)
        await till.reserve(other)
        await till.settle(paid(wanted))
        assert Accounts(opened).balance("ada").available == 0
        await till.settle(replace(paid(other), completion_tokens=996))
    assert Accounts(opened).balance("ada").balance == 0
    assert charges(opened) == [("recovered", 1, 0, 0), ("stop", 1, 4, 3), ("stop", 1, 996, 997)]
    assert reconcile(opened)["ties"]


async def test_an_answer_under_a_key_that_was_taken_for_lost_is_charged_by_its_holder(opened: Database) -> None:
    wanted = reservation(opened)
    asked = idempotency.wanted(wanted.account_id, "k", "chat.completions", b"{}", "")
    begun = idempotency.begin(opened, asked, "here", 7)
    wanted = replace(wanted, idempotency_id=asked.id, holder=begun.holder, route="local")
    closing = Closing(
        settlements=(paid(wanted),),
        idempotency_id=asked.id,
        holder=begun.holder,
        status=200,
        content_type="application/json",
        answer=b"all of it",
    )
    async with running(opened) as till:
        await till.reserve(wanted)
        taken_for_lost(opened, wanted)
        await till.finish(closing)
        await till.finish(closing)
    assert charges(opened) == [("recovered", 1, 0, 0), ("stop", 1, 4, 5)]
    assert reconcile(opened)["ties"]


def test_what_was_taken_for_lost_in_a_closed_month_is_charged_in_this_one(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, now = reservation(opened), opened.now_ms()
    before = month_begins_ms(month_of(now)) - 1
    with monkeypatch.context() as patch:
        patch.setattr(Database, "now_ms", lambda _: before)
        books.write_batch(opened, books.Batch(reserve=[wanted]))
        taken_for_lost(opened, wanted, 3)
    assert invoices.close_months(opened, OPERATOR, now + invoices.GRACE_MS) == 1
    books.write_batch(opened, books.Batch(settle=[paid(wanted)]))
    after = month_begins_ms(next_month(month_of(now))) + invoices.GRACE_MS
    assert invoices.close_months(opened, OPERATOR, after) == 1
    with opened.read() as connection:
        found = invoices.list_invoices(connection, owner=None, limit=9, after="")
    assert [(row["month"], row["microcredits"]) for row in found] == [(month_of(now), 1), (month_of(before), 4)]
    assert reconcile(opened)["ties"]


async def test_after_an_outage_what_runs_is_touched_at_once_and_nobody_is_taken_for_lost(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.till._TICK_SECONDS", 0.01)
    monkeypatch.setattr("gateway.till._TRIES", 1)
    monkeypatch.setattr("gateway.till._TOUCH_TICKS", 1 << 20)
    monkeypatch.setattr("gateway.till._REST_TICKS", 1 << 20)
    mine, write, read = reservation(opened), Database.write, Database.read
    theirs = replace(reservation(opened), instance="there")
    away = threading.Event()

    def unless_away(use: Callable) -> Callable:
        def used(self: Database, **how: object) -> object:
            if away.is_set():
                raise LocalError("unavailable", "the database is away")
            return use(self, **how)

        return used

    def touched() -> set[str]:
        with opened.read() as connection:
            query = sa.select(reservations.c.id).where(reservations.c.updated_at_ms > 0)
            return set(connection.execute(query).scalars())

    monkeypatch.setattr(Database, "write", unless_away(write))
    monkeypatch.setattr(Database, "read", unless_away(read))
    books.write_batch(opened, books.Batch(reserve=[theirs]))
    async with running(opened) as till, trio.open_nursery() as nursery:
        ticket = await till.reserve(mine)
        with opened.write() as connection:  # as if the outage had been long
            connection.execute(sa.update(reservations).values(updated_at_ms=0))
        away.set()
        ticket.delivered_tokens = 3
        nursery.start_soon(till.tick)
        await eventually(lambda: till.problem != "")
        away.clear()
        await eventually(lambda: touched() == {mine.id})
        await trio.sleep(0.5)  # many sweeps
        nursery.cancel_scope.cancel()
        with opened.read() as connection:
            found = dict(connection.execute(sa.select(reservations.c.id, reservations.c.completion_tokens)).all())
        assert found == {mine.id: 3, theirs.id: 0}
        await till.settle(paid(mine))


async def test_the_answers_of_a_request_are_charged_together_or_not_at_all(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, write = [reservation(opened) for _ in range(3)], books.write_batch
    written: list[int] = []

    def count(database: Database, batch: books.Batch, *more: object, **ways: bool) -> dict:
        written.append(len(batch.settle))
        return write(database, batch, *more, **ways)

    async with running(opened) as till:
        for one in wanted:
            await till.reserve(one)
        monkeypatch.setattr(books, "write_batch", count)
        monkeypatch.setattr("gateway.till._BATCH_MAX", 1)
        await till.settle(*map(paid, wanted))
    assert written == [3]


async def test_an_overloaded_till_reserves_nothing_but_settles(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = reservation(opened)
    async with running(opened) as till:
        await till.reserve(wanted)
        monkeypatch.setattr("gateway.till._QUEUE_MAX", 0)
        with pytest.raises(LocalError, match="overloaded"):
            await till.reserve(reservation(opened))
        await till.settle(paid(wanted))
        assert till.running() == ()
    assert Accounts(opened).balance("ada").reserved == 0


async def test_those_who_come_together_are_written_together_and_refused_alone(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.till._RETRY_SECONDS", 3600)  # what will not pass holds nobody up
    fits, too_much = reservation(opened), reservation(opened, 10_000)
    wrong = replace(reservation(opened), key_id="nobody's")
    ends: dict[str, object] = {}

    async def reserve(till: Till, one: Reservation) -> None:
        try:
            await till.reserve(one)
            ends[one.id] = "held"
        except (ApiError, LocalError) as error:
            ends[one.id] = error.code

    async with running(opened) as till, trio.open_nursery() as nursery, held_up(opened, fits.account_id):
        for one in (fits, too_much, wrong):
            nursery.start_soon(reserve, till, one)
        await trio.sleep(0.1)
    assert ends == {fits.id: "held", too_much.id: "payment_required", wrong.id: "local"}


async def test_after_the_end_nothing_more_is_taken(opened: Database) -> None:
    async with running(opened) as till:
        pass
    with pytest.raises(LocalError, match="stopping"):
        await till.reserve(reservation(opened))
    assert till.running() == ()


@dataclass
class AskedSpending:
    """Nothing is ever spent. ``asked``: for what."""

    asked: list[Collection[str] | None] = field(default_factory=list)

    def opening(self) -> Sequence[PaidChannel]:
        return ()

    def has_changed(self) -> bool:
        return False

    def take(self, names: Collection[str] | None = None) -> Sequence[Spent]:
        self.asked.append(names)
        return ()


async def test_the_loop_is_asked_for_costs_only_where_there_may_be_some(opened: Database) -> None:
    """A reservation has cost nothing yet: it is not kept waiting for a turn of the loop."""
    spending, wanted = AskedSpending(), reservation(opened)
    async with running(opened) as till:
        till.spending = CostBook(spending, new_id())
        await till.reserve(wanted)
        await till.settle(paid(wanted))
    assert spending.asked == [[wanted.id]]


@dataclass
class Written:
    """In which thread how many reservations were written together."""

    rows: list[tuple[bool, int]] = field(default_factory=list)

    def note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here, write = threading.get_ident(), books.write_batch

        def noted(database: Database, batch: books.Batch, *more: object, **ways: bool) -> dict:
            if batch.reserve:
                self.rows.append((threading.get_ident() == here, len(batch.reserve)))
            return write(database, batch, *more, **ways)

        monkeypatch.setattr(books, "write_batch", noted)


@asynccontextmanager
async def ready(database: Database) -> AsyncIterator[Till]:
    """A till whose writer has written something."""
    async with running(database) as till:
        await till.reserve(reservation(database))
        yield till


async def test_what_comes_alone_is_written_at_once_and_what_comes_together_is_written_together(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, at_once = Written(), not opened.is_postgresql
    async with ready(opened) as till:
        seen.note(monkeypatch)
        for _ in range(3):
            await trio.sleep(0.05)
            ticket = await till.reserve(replace(reservation(opened), synced=False))
            await till.settle(paid(ticket.reservation))
        assert seen.rows == [(at_once, 1)] * 3
        seen.rows.clear()
        await trio.sleep(0.05)
        await till.reserve(reservation(opened))
        assert seen.rows == [(False, 1)], "it waits for the disk"
        seen.rows.clear()
        wanted = [replace(reservation(opened, tokens=1), synced=False) for _ in range(40)]
        await trio.sleep(0.05)
        async with trio.open_nursery() as nursery:
            for one in wanted:
                nursery.start_soon(till.reserve, one)
        assert sum(count for _, count in seen.rows) == 40
        assert sum(here for here, _ in seen.rows) <= 2, "each of them holds up all others"
        assert len(seen.rows) <= 10


async def test_a_reservation_that_would_have_to_wait_holds_nobody_up(in_sqlite: Database) -> None:
    async with ready(in_sqlite) as till:
        other = sqlite3.connect(in_sqlite.place, isolation_level=None)  # as another process
        other.execute("BEGIN IMMEDIATE")
        done = trio.Event()

        async def reserve() -> None:
            await till.reserve(replace(reservation(in_sqlite), synced=False))
            done.set()

        async with trio.open_nursery() as nursery:
            with trio.fail_after(2):
                nursery.start_soon(reserve)
                await trio.sleep(0.3)
            assert not done.is_set()
            other.execute("ROLLBACK")
            other.close()
            with trio.fail_after(3):
                await done.wait()
    assert len(list(rows_of(in_sqlite, "reservations"))) == 2


def test_a_kept_connection_outlives_a_moment_in_which_another_process_writes(in_sqlite: Database) -> None:
    kept = Kept(in_sqlite.engine)
    with in_sqlite.write(kept=kept) as connection:
        first = connection.connection.dbapi_connection
    other = sqlite3.connect(in_sqlite.place, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LocalError, match="locked"), in_sqlite.write(kept=kept, waits=False):
        pytest.fail("it began")
    other.execute("ROLLBACK")
    other.close()
    with in_sqlite.write(kept=kept, waits=False) as connection:
        assert connection.connection.dbapi_connection is first
    in_sqlite.release(kept, for_good=True)


async def test_a_reservation_that_was_written_though_it_failed_is_written_once_or_given_back(
    in_sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, write = threading.get_ident(), books.write_batch

    def fails_after(database: Database, batch: books.Batch, *more: object, **ways: bool) -> dict:
        refused = write(database, batch, *more, **ways)
        if threading.get_ident() == here:
            raise LocalError("unavailable", "the commit was not heard of")
        return refused

    monkeypatch.setattr(books, "write_batch", fails_after)
    async with ready(in_sqlite) as till:
        await trio.sleep(0.05)
        wanted = replace(reservation(in_sqlite), synced=False)
        await till.reserve(wanted)
        assert [row.id for row in rows_of(in_sqlite, "reservations")].count(wanted.id) == 1
        await till.settle(paid(wanted))
        for _ in range(20):  # now and then it is done in the moment that it is cancelled
            await trio.sleep(0.02)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(till.reserve, replace(reservation(in_sqlite), synced=False))
                nursery.cancel_scope.cancel()
        async with held_up(in_sqlite, wanted.account_id), trio.open_nursery() as nursery:
            nursery.start_soon(till.reserve, replace(reservation(in_sqlite), synced=False))
            await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        await eventually(lambda: len(list(rows_of(in_sqlite, "reservations"))) == 1)


async def test_the_log_is_brought_into_the_file_now_and_then(
    in_sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.till._BATCHES_LOGGED", 5)
    log = Path(f"{in_sqlite.place}-wal")
    async with running(in_sqlite) as till:
        for _ in range(30):
            ticket = await till.reserve(reservation(in_sqlite, tokens=1))
            await till.settle(replace(paid(ticket.reservation), completion_tokens=0))
        size = size_of(log)
        for _ in range(60):
            ticket = await till.reserve(reservation(in_sqlite, tokens=1))
            await till.settle(replace(paid(ticket.reservation), completion_tokens=0))
        assert size_of(log) == size, "it begins anew each time"


def size_of(file: Path) -> int:
    return file.stat().st_size


def rows_of(database: Database, table: str) -> Sequence[sa.Row]:
    with database.read() as connection:
        return connection.execute(sa.text(f"SELECT * FROM {table}")).all()
