"""Money over HTTP, on both databases: budgets, statements, invoices, payments, and that all of it ties."""

import csv
import io
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import pytest
import sqlalchemy as sa
import trio
from fake_engine import FakeEngine
from gateway_rig import Rig, listening, serving
from test_rights import client, key_of, user_id

from config.errors import ConfigError, LocalError
from config.settings import GatewaySettings
from gateway import audit, books
from gateway.accounts import open_accounts
from gateway.audit import Actor
from gateway.billing import budgets, invoices, payment
from gateway.billing.budget import Budget, month_begins_ms, month_of, next_month
from gateway.billing.reconcile import reconcile
from gateway.books import Batch
from gateway.db import stamps
from gateway.db.models import accounts, usages
from gateway.db.session import Database, open_database
from gateway.errors import ApiError
from gateway.money import Prices, Reservation, Settlement

SECRET = "a secret of the payment service"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}


@pytest.fixture
def payments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(payment.ENVIRONMENT, SECRET)


@asynccontextmanager
async def with_root(tmp_path: Path, database: str = "", **more: object):
    async with (
        serving(tmp_path, database=database, requests_per_minute=1 << 20, **more) as rig,
        client(rig, await key_of(rig, "root", "admin")) as root,
        rig.http() as ada,
    ):
        yield rig, root, ada


async def ties(rig: Rig) -> dict:
    found = await trio.to_thread.run_sync(reconcile, rig.accounts.database)
    assert found["ties"], found
    return found


async def spend(http: httpx.AsyncClient, times: int = 1) -> httpx.Response:
    for _ in range(times):
        answer = await http.post("/v1/chat/completions", json=CHAT)
    return answer


async def test_a_budget_stops_a_user_and_tells_at_each_share_once(tmp_path: Path, database: str) -> None:
    async with with_root(tmp_path, database) as (rig, root, ada):
        await spend(ada)
        cost = (await ada.get("/v1/billing/usage")).json()["data"][0]["microcredits"]
        assert cost > 0
        worst = cost  # it took all of its max_tokens, or less
        made = await ada.put("/v1/billing/budgets", json={"microcredits": 20 * cost})
        assert (made.status_code, made.json()["spent"]) == (200, cost)
        while (answer := await spend(ada)).status_code == 200:
            pass
        assert (answer.status_code, answer.json()["error"]["code"]) == (402, "budget_exceeded")
        assert f"user:{await user_id(rig, 'ada')}" in answer.json()["error"]["message"]
        (budget,) = (await ada.get("/v1/billing/budgets")).json()["data"]
        assert budget["spent"] <= 20 * cost
        assert budget["reserved"] == 0
        assert [alert["percent"] for alert in budget["alerts"]] == [50, 75, 90]
        assert (await root.get("/v1/billing/budgets", params={"user_id": "nobody"})).json()["data"] == []
        raised = await ada.put("/v1/billing/budgets", json={"microcredits": 100 * worst})
        assert raised.status_code == 200
        assert (await spend(ada, 60)).status_code == 200  # passes 50 % again: that is no news
        assert len((await ada.get("/v1/billing/budgets")).json()["data"][0]["alerts"]) == 3
        await ties(rig)
        assert (await ada.delete(f"/v1/billing/budgets/{budget['id']}")).status_code == 204
        assert (await ada.get("/v1/billing/budgets")).json()["data"] == []


async def test_a_keys_budget_stops_that_key_and_an_admins_word_stands(tmp_path: Path, database: str) -> None:
    async with with_root(tmp_path, database) as (rig, root, ada):
        me = await user_id(rig, "ada")
        other = await key_of(rig, "ada")
        name = other.split("_")[1]
        wish = {"user_id": me, "key_id": name, "microcredits": 0}
        assert (await root.put("/v1/billing/budgets", json=wish)).status_code == 200
        async with client(rig, other) as narrow:
            refused = await spend(narrow)
            assert (refused.status_code, refused.json()["error"]["code"]) == (402, "budget_exceeded")
        assert (await spend(ada)).status_code == 200
        more = await ada.put("/v1/billing/budgets", json={**wish, "microcredits": 1 << 40})
        assert (more.status_code, more.json()["error"]["code"]) == (403, "forbidden")
        budget = (await ada.get("/v1/billing/budgets")).json()["data"][0]["id"]
        assert (await ada.delete(f"/v1/billing/budgets/{budget}")).status_code == 403
        root_id = await user_id(rig, "root")
        for wrong in ({"user_id": root_id, "microcredits": 1}, {"key_id": "0" * 16, "microcredits": 1}):
            assert (await ada.put("/v1/billing/budgets", json=wrong)).status_code == 404
        await ties(rig)


def test_a_user_does_not_remove_the_budget_that_an_admin_sets_meanwhile(
    tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL; SQLite has one writer at a time."""
    from postgresql import new_database

    with open_accounts(GatewaySettings(database=new_database(postgresql)), tmp_path) as opened:
        database, lock = opened.database, books.lock_account
        user, root = opened.create_user("ada").id, opened.create_user("root", role="admin").id
        own = budgets.set_budget(database, Actor(user, "test"), budgets.Wish(user_id=user, microcredits=100), user)

        def lock_late(connection: sa.Connection, account_id: str) -> None:
            monkeypatch.setattr(books, "lock_account", lock)
            budgets.set_budget(database, Actor(root, "test"), budgets.Wish(user_id=user, microcredits=5), None)
            lock(connection, account_id)

        monkeypatch.setattr(books, "lock_account", lock_late)
        with pytest.raises(ApiError, match="an admin set the budget"):
            budgets.remove_budget(database, Actor(user, "test"), own["id"], user)
        with database.read() as connection:
            (left,) = budgets.list_budgets(connection, owner=user, limit=2, after="")
        assert (left["microcredits"], left["by_admin"]) == (5, True)


async def test_a_key_has_limits_of_its_own(tmp_path: Path, database: str) -> None:
    async with with_root(tmp_path, database) as (rig, root, _):
        key = await key_of(rig, "ada")
        limits = {"requests_per_minute": 2}
        path = f"/v1/billing/limits/{key.split('_')[1]}"
        async with client(rig, key) as http:
            assert (await http.put(path, json=limits)).status_code == 403
            assert (await root.put(path, json=limits)).json()["requests_per_minute"] == 2
            found = [await http.get("/v1/models") for _ in range(3)]
            assert found[0].headers["x-ratelimit-limit-requests"] == "2"
            assert found[2].status_code == 429
        assert (await root.put("/v1/billing/limits/0", json=limits)).status_code == 404


async def test_transactions_and_usage_are_the_callers_own_and_an_admins_all(tmp_path: Path, database: str) -> None:
    async with with_root(tmp_path, database) as (rig, root, ada):
        me = await user_id(rig, "ada")
        await spend(ada, 3)
        rows = (await ada.get("/v1/billing/transactions", params={"limit": 2})).json()
        rest = (await ada.get("/v1/billing/transactions", params={"after": rows["last_id"]})).json()
        own = rows["data"] + rest["data"]
        assert [row["kind"] for row in own] == ["charge"] * 3 + ["credit"]
        assert sum(row["amount"] for row in own) == (await ada.get("/v1/billing/balance")).json()["balance"]
        assert len((await root.get("/v1/billing/transactions")).json()["data"]) == 8
        assert len((await root.get("/v1/billing/transactions", params={"user_id": me})).json()["data"]) == 4
        root_id = await user_id(rig, "root")
        assert (await ada.get("/v1/billing/transactions", params={"user_id": root_id})).status_code == 404
        summed = (await ada.get("/v1/billing/usage/summary", params={"by": "day,model,key"})).json()["data"]
        assert (summed[0]["requests"], summed[0]["model"]) == (3, "tiny")
        assert summed[0]["microcredits"] == -sum(row["amount"] for row in own if row["kind"] == "charge")
        for wrong in ({"by": "secret"}, {"from_ms": "x"}, {"format": "xls"}):
            assert (await ada.get("/v1/billing/usage/summary", params=wrong)).status_code == 400


async def test_usage_as_csv_runs_nothing_in_a_spreadsheet(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with with_root(tmp_path, engine=engine) as (rig, _, ada):
        await spend(ada)
        evil = '=HYPERLINK("http://evil","x")'

        def rename() -> None:
            with rig.accounts.database.write() as connection:
                connection.execute(sa.update(usages).values(model=evil))

        await trio.to_thread.run_sync(rename)
        answer = await ada.get("/v1/billing/usage/summary", params={"by": "model", "format": "csv"})
        assert answer.headers["content-type"].startswith("text/csv")
        header, row = csv.reader(io.StringIO(answer.text))
        assert header == ["model", "requests", "prompt_tokens", "completion_tokens", "microcredits"]
        assert (row[0], row[1]) == (f"'{evil}", "1")


async def test_invoices_are_numbered_add_up_and_stay(tmp_path: Path, database: str) -> None:
    async with with_root(tmp_path, database) as (rig, root, ada):
        accounts_of = rig.accounts
        await trio.to_thread.run_sync(lambda: accounts_of.credit("root", 1000))
        await spend(ada, 3)
        await spend(root)
        later = int(time.time() * 1000) + 32 * 86_400_000

        def close() -> list[int]:
            return [invoices.close_months(accounts_of.database, audit.OPERATOR, later) for _ in range(2)]

        assert await trio.to_thread.run_sync(close) == [2, 0]
        (row,) = (await root.get("/v1/audit")).json()["data"]
        assert (row["action"], row["by"], row["detail"]) == ("invoices.made", "command line", '{"count":2}')
        listed = (await root.get("/v1/billing/invoices")).json()["data"]
        assert [each["number"] for each in listed] == [2, 1]
        (mine,) = (await ada.get("/v1/billing/invoices")).json()["data"]
        charged = sum(row["microcredits"] for row in (await ada.get("/v1/billing/usage")).json()["data"])
        assert mine["microcredits"] == charged == sum(line["microcredits"] for line in mine["lines"])
        (line,) = mine["lines"]
        assert (line["requests"], line["input_price"], line["output_price"]) == (3, 1_000_000, 2_000_000)
        assert line["prompt_tokens"] + 2 * line["completion_tokens"] == line["microcredits"]
        sheet = await ada.get(f"/v1/billing/invoices/{mine['number']}", params={"format": "csv"})
        assert list(csv.reader(io.StringIO(sheet.text)))[-1][-1] == str(charged)
        other = next(each for each in listed if each["number"] != mine["number"])
        assert (await ada.get(f"/v1/billing/invoices/{other['number']}")).status_code == 404

        def forge() -> None:
            with accounts_of.database.write() as connection:
                connection.execute(sa.text("UPDATE invoices SET microcredits = 0"))

        with pytest.raises(Exception, match="append-only"):
            await trio.to_thread.run_sync(forge)
        await ties(rig)


def test_who_sums_up_a_month_holds_up_nobody(tmp_path: Path, database: str) -> None:
    """A charge is booked while a month's usage is read, for however long that takes."""
    settings = GatewaySettings(database=database)
    with open_accounts(settings, tmp_path) as opened, open_accounts(settings, tmp_path) as other:
        user = opened.create_user("ada").id
        opened.credit("ada", 1000)
        key = opened.create_key("ada", "k").key.id
        charge(opened.database, a_reservation(user, key))
        timeouts: list[str] = []

        def meanwhile(connection: sa.Connection, _k: object, statement: str, *_: object) -> None:
            if connection.engine is opened.database.engine and "sum(usages.microcredits)" in statement:
                charge(other.database, a_reservation(user, key))
                if opened.database.is_postgresql:
                    timeouts.append(connection.connection.cursor().execute("SHOW statement_timeout").fetchone()[0])

        with listening("before_cursor_execute", meanwhile):
            later = month_begins_ms(next_month(month_of(stamps.now_ms()))) + invoices.GRACE_MS
            assert invoices.close_months(opened.database, audit.OPERATOR, later) == 1
        assert opened.balance("ada").balance == 980
        assert timeouts == (["0"] if opened.database.is_postgresql else [])


def test_months_are_closed_one_by_one_and_by_one_of_several_gateways(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, now = GatewaySettings(database=database), Database.now_ms
    with open_accounts(settings, tmp_path) as one, open_accounts(settings, tmp_path) as two:
        users = [one.create_user(name).id for name in ("ada", "eve")]
        for user in users:
            one.credit(user, 1000)
        key = one.create_key("ada", "k").key.id
        for days_ago in (100, 30):  # and nothing in the month between
            with monkeypatch.context() as patch:
                patch.setattr(Database, "now_ms", lambda self, ago=days_ago: now(self) - ago * 86_400_000)
                for user in users:
                    charge(one.database, a_reservation(user, key))
        later = int(time.time() * 1000) + 32 * 86_400_000
        with ThreadPoolExecutor(4) as pool:
            made = list(
                pool.map(lambda each: invoices.close_months(each.database, audit.OPERATOR, later), [one, two, one, two])
            )
        assert sum(made) == 4
        with one.database.read() as connection:
            found = invoices.list_invoices(connection, owner=None, limit=9, after="")
        assert [each["number"] for each in found] == [4, 3, 2, 1]
        assert len({each["month"] for each in found}) == 2
        assert {each["microcredits"] for each in found} == {10}
        assert reconcile(two.database)["ties"]


async def test_a_payment_counts_once_and_only_if_it_is_signed(tmp_path: Path, database: str, payments: None) -> None:
    async with with_root(tmp_path, database) as (rig, _, ada):
        me, now = await user_id(rig, "ada"), int(time.time())
        before = (await rig.balance()).balance

        async def send(event: dict, *, secret: str = SECRET, at: int = now, change: bytes = b"") -> httpx.Response:
            body = msgspec.json.encode(event)
            header = {payment.HEADER: payment.sign(secret.encode(), at, body), "content-type": "application/json"}
            return await ada.post("/v1/billing/payments", content=body + change, headers=header)

        event = {"id": "pay_1", "user_id": me, "microcredits": 500}
        first, again = await send(event), await send(event)
        assert (first.status_code, first.json()["booked"]) == (200, True)
        assert (again.status_code, again.json()["booked"]) == (200, False)
        assert first.json()["transaction_id"] == again.json()["transaction_id"]
        assert (await rig.balance()).balance == before + 500
        assert (await send({**event, "microcredits": 501})).status_code == 409
        assert (await send({**event, "id": "pay_2", "user_id": "nobody"})).status_code == 404
        fresh = {**event, "id": "pay_3"}
        assert (await send(fresh, secret="another secret of somebody")).status_code == 401
        assert (await send(fresh, at=now - 301)).status_code == 401
        assert (await send(fresh, at=now + 400)).status_code == 401
        assert (await send(fresh, change=b" ")).status_code == 401
        for header in ("", "t=1", "v1=00", f"t={now},t={now},v1=00", "t=x,v1=y", "é"):
            bad = await ada.post("/v1/billing/payments", json=fresh, headers={payment.HEADER: header.encode()})
            assert bad.status_code == 401, header
        for wrong in ({"microcredits": 0}, {"microcredits": -5}, {"microcredits": 1.5}, {"microcredits": 1 << 60}):
            assert (await send({**fresh, **wrong})).status_code == 400
        assert (await rig.balance()).balance == before + 500
        top_ups = (await ada.get("/v1/billing/topups")).json()["data"]
        assert [row["kind"] for row in top_ups] == ["payment", "credit"]
        await ties(rig)


def test_a_payment_and_a_change_of_the_same_account_do_not_deadlock(tmp_path: Path, database: str) -> None:
    with open_accounts(GatewaySettings(database=database), tmp_path) as opened, ThreadPoolExecutor(1) as pool:
        user = opened.create_user("ada").id
        with opened.database.write() as connection:
            books.lock_account(connection, f"user:{user}")
            booked = pool.submit(payment.book, opened.database, "pay_1", user, 500)
            time.sleep(0.5)  # by now it waits for the account
            audit.record(connection, audit.OPERATOR, "budget.set", "b", owner_id=user)
        assert booked.result(10)[1]
        assert opened.balance("ada").balance == 500
        assert audit.verify(opened.database)[0] == 2


async def test_an_admin_pays_in_once_per_reference(tmp_path: Path, database: str) -> None:
    async with with_root(tmp_path, database) as (rig, root, ada):
        body = {"user_id": await user_id(rig, "ada"), "microcredits": 70, "reference": "invoice 12"}
        assert (await ada.post("/v1/billing/topups", json=body)).status_code == 403
        found = [await root.post("/v1/billing/topups", json=body) for _ in range(2)]
        assert [each.status_code for each in found] == [201, 409]
        assert (await rig.balance()).balance == 1_000_070
        assert (await root.post("/v1/billing/topups", json={**body, "user_id": "x"})).status_code == 404
        assert (await root.post("/v1/billing/payments", json=body)).status_code == 404  # none are taken here
        await ties(rig)


async def test_what_does_not_tie_is_named(tmp_path: Path, database: str) -> None:
    async with with_root(tmp_path, database) as (rig, _, ada):
        await spend(ada)
        await ties(rig)
        me = f"user:{await user_id(rig, 'ada')}"

        def cheat() -> dict:
            with rig.accounts.database.write() as connection:
                connection.execute(sa.update(accounts).where(accounts.c.id == me).values(balance=5_000_000))
                connection.execute(sa.update(usages).values(microcredits=1))
            return reconcile(rig.accounts.database)

        found = await trio.to_thread.run_sync(cheat)
        assert not found["ties"]
        rules = {each["rule"]: each for each in found["differences"]}
        assert rules["a balance is the sum of its postings"]["subject"] == me
        assert rules["a balance is the sum of its postings"]["found"] == 5_000_000
        assert {"all balances add up to 0", "a usage row has its charge"} <= set(rules)


def test_gateways_that_reserve_at_the_same_time_do_not_pass_a_budget(tmp_path: Path, database: str) -> None:
    settings = GatewaySettings(database=database)
    with open_accounts(settings, tmp_path) as one, open_accounts(settings, tmp_path) as two:
        user = one.create_user("ada").id
        one.credit("ada", 1_000_000)
        keys = [one.create_key("ada", "k").key.id for _ in range(2)]
        for key, limit in (("", 100), (keys[0], 60)):
            wish = budgets.Wish(user_id=user, key_id=key, microcredits=limit)
            budgets.set_budget(one.database, audit.OPERATOR, wish, None)

        def reserve(number: int) -> bool:
            wanted = replace(a_reservation(user, keys[number % 2]), instance=str(number % 3))
            return not books.write_batch((one, two)[number % 2].database, Batch(reserve=[wanted]))

        with ThreadPoolExecutor(8) as pool:
            granted = sum(pool.map(reserve, range(40)))
        assert granted == 10  # of 10 microcredits each
        assert one.balance("ada").reserved == 100
        assert reconcile(two.database)["ties"]


def charge(database: Database, wanted: Reservation) -> None:
    """All that it reserves."""
    books.write_batch(database, Batch(reserve=[wanted]))
    done = Settlement(reservation=wanted, prompt_tokens=2, completion_tokens=8, outcome="stop")
    books.write_batch(database, Batch(settle=[done]))


def a_reservation(user: str, key: str) -> Reservation:
    """Of 10 microcredits."""
    return Reservation(
        id=stamps.new_id(),
        instance="here",
        account_id=f"user:{user}",
        user_id=user,
        key_id=key,
        request_id="r",
        endpoint="chat.completions",
        model="tiny",
        prompt_tokens=2,
        max_tokens=8,
        prices=Prices(1_000_000, 1_000_000),
    )


def test_a_budget_begins_anew_with_the_month(tmp_path: Path) -> None:
    row = {"id": "b", "subject": "user:u", "key_id": None, "microcredits": 100, "month": "2026-11"}
    row |= {"spent": 95, "reserved": 5, "alerted": 90}
    assert not Budget.of(row, "2026-11").allows(1)
    fresh = Budget.of(row, month_of(month_begins_ms("2026-12")))
    assert (fresh.spent, fresh.reserved, fresh.room) == (0, 5, 95)
    assert fresh.settle(5, 95) == [50, 75, 90]
    late = Budget.of({**row, "spent": 0}, "2026-10")
    assert (late.settle(5, 60), late.month, late.spent, late.reserved) == ((), "2026-11", 0, 0)
    assert (next_month("2026-12"), month_of(month_begins_ms("2027-01") - 1)) == ("2027-01", "2026-12")


def test_statements_are_prepared_once_on_postgresql(tmp_path: Path, postgresql: str) -> None:
    from postgresql import new_database

    with open_accounts(GatewaySettings(database=new_database(postgresql)), tmp_path) as accounts:
        user = accounts.create_user("ada").id
        accounts.credit("ada", 1000)
        key = accounts.create_key("ada", "k").key.id
        for _ in range(10):
            books.write_batch(accounts.database, Batch(reserve=[a_reservation(user, key)]))
        with accounts.database.read() as connection:
            prepared = connection.execute(sa.text("SELECT statement FROM pg_prepared_statements")).scalars().all()
    for part in ("FOR UPDATE", "INSERT INTO reservations", "UPDATE accounts", "FROM budgets"):
        assert any(part in statement for statement in prepared), (part, prepared)


def test_reports_come_from_the_replica_and_from_the_primary_while_it_is_away(tmp_path: Path, postgresql: str) -> None:
    from postgresql import new_database

    primary, replica = new_database(postgresql), new_database(postgresql)
    where = sa.text("SELECT current_database()")

    def asked(database: Database) -> str:
        return database.look(lambda connection: str(connection.execute(where).scalar()))

    database = open_database(primary, tmp_path, replica)
    assert asked(database) in replica
    database.close()
    away = open_database(primary, tmp_path, "postgresql://rios@/x?host=/nowhere")
    started = time.monotonic()
    assert all(asked(away) in primary for _ in range(20))
    assert time.monotonic() - started < 5
    away.close()
    with pytest.raises(ConfigError, match="database_replica"):
        open_database("", tmp_path, replica)
    away = open_database("postgresql://rios@/x?host=/nowhere", tmp_path)
    with pytest.raises(LocalError):
        asked(away)
