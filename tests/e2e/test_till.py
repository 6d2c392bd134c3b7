"""The till's writer: what is handed to it is written, whoever still waits for it, and nothing stays held back."""

import threading
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
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
from gateway.billing.costs import CostBook
from gateway.books import new_id
from gateway.db.migrate import migrate
from gateway.db.models import users
from gateway.db.session import Database, open_database
from gateway.errors import ApiError
from gateway.money import Prices, Reservation, Settlement
from gateway.till import Till

PRICES = Prices(1_000_000, 1_000_000)


@pytest.fixture
def opened(tmp_path: Path, database: str):
    found = open_database(database, tmp_path)
    migrate(found)
    accounts = Accounts(found)
    accounts.create_user("ada")
    accounts.credit("ada", 1000)
    yield found
    found.close()


@asynccontextmanager
async def running(database: Database) -> AsyncIterator[Till]:
    till = Till(database, "here")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(till.run)
        yield till
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

    def refuse(database: Database, batch: books.Batch) -> dict:
        if batch.settle or batch.close:
            raise LocalError("unavailable", "the database is away")
        return write(database, batch)

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

    def refuse(database: Database, batch: books.Batch) -> dict:
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

    def lose(database: Database, batch: books.Batch) -> dict:
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


async def test_the_answers_of_a_request_are_charged_together_or_not_at_all(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, write = [reservation(opened) for _ in range(3)], books.write_batch
    written: list[int] = []

    def count(database: Database, batch: books.Batch) -> dict:
        written.append(len(batch.settle))
        return write(database, batch)

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
