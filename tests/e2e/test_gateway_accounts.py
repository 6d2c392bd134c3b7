"""Users, keys and money, on SQLite and on a real PostgreSQL alike, and what a crash leaves of them."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
import trio
from fake_engine import FakeEngine
from gateway_rig import eventually, read_until, request_bytes, serving
from postgresql import new_database

from config.errors import ConfigError, LocalError, RequestError
from config.settings import GatewaySettings
from gateway import books, idempotency
from gateway.accounts import Accounts, open_accounts
from gateway.db import stamps
from gateway.db.session import open_database
from gateway.errors import ApiError
from gateway.money import EMBEDDED, Prices, Progress, Reservation, Settlement

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi there"}]}
STREAM = {**BODY, "stream": True}


@pytest.fixture
def accounts(tmp_path: Path, database: str) -> Iterator[Accounts]:
    with open_accounts(GatewaySettings(database=database, starting_balance=500), tmp_path) as opened:
        yield opened


def reservation(accounts: Accounts, name: str = "r1", *, max_tokens: int = 10, instance: str = "here") -> Reservation:
    user = accounts.find_user("ada")
    return Reservation(
        id=name,
        instance=instance,
        account_id=f"user:{user.id}",
        user_id=user.id,
        key_id=None,
        request_id="x",
        endpoint="chat.completions",
        model="tiny",
        prompt_tokens=5,
        max_tokens=max_tokens,
        prices=Prices(1_000_000, 2_000_000),
    )


def settlement(reserved: Reservation, completion_tokens: int, outcome: str = "stop") -> Settlement:
    return Settlement(
        reservation=reserved,
        prompt_tokens=reserved.prompt_tokens,
        completion_tokens=completion_tokens,
        outcome=outcome,
    )


def books_balance(accounts: Accounts) -> None:
    """The postings of every transaction add up to 0, and every balance is the sum of its postings."""
    with accounts.database.read() as connection:
        uneven = "SELECT transaction_id FROM postings GROUP BY transaction_id HAVING SUM(amount) <> 0"
        assert connection.execute(sa.text(uneven)).all() == []
        wrong = (
            "SELECT a.id FROM accounts a LEFT JOIN (SELECT account_id, SUM(amount) AS total FROM postings "
            "GROUP BY account_id) p ON p.account_id = a.id WHERE a.balance <> COALESCE(p.total, 0)"
        )
        assert connection.execute(sa.text(wrong)).all() == []


def test_users(accounts: Accounts) -> None:
    ada = accounts.create_user("ada")
    accounts.create_user("Zoë; DROP TABLE users")
    assert [user.name for user in accounts.list_users()] == ["local", "ada", "Zoë; DROP TABLE users"]
    assert accounts.find_user("ada") == accounts.find_user(ada.id) == ada
    assert accounts.balance("ada").balance == 500
    with pytest.raises(RequestError, match="already a user"):
        accounts.create_user("ada")
    with pytest.raises(RequestError, match="no user 'eve'"):
        accounts.balance("eve")
    for name in ("", "a\nb", "x" * 300):
        with pytest.raises(RequestError, match="1 to 200 characters"):
            accounts.create_user(name)


def test_keys(accounts: Accounts) -> None:
    accounts.create_user("ada")
    made = accounts.create_key("ada", "laptop")
    assert made.secret.startswith(f"rios_{made.key.id}_")
    assert accounts.list_keys("ada") == [made.key]
    with accounts.database.read() as connection:
        stored = connection.execute(sa.text("SELECT * FROM api_keys")).all()
    assert made.secret.rpartition("_")[2] not in str(stored)
    accounts.revoke_key(made.key.id)
    accounts.revoke_key(made.key.id)
    assert accounts.list_keys()[0].revoked_at_ms is not None
    with pytest.raises(RequestError, match="no key"):
        accounts.revoke_key("0000")


def test_credit_counts_once(accounts: Accounts) -> None:
    accounts.create_user("ada")
    assert accounts.credit("ada", 100, "payment-1").balance == 600
    with pytest.raises(RequestError, match="already booked"):
        accounts.credit("ada", 100, "payment-1")
    for amount in (0, -5):
        with pytest.raises(RequestError, match="more than 0"):
            accounts.credit("ada", amount)
    assert accounts.balance("ada").balance == 600
    books_balance(accounts)


def test_reserve_and_settle(accounts: Accounts) -> None:
    accounts.create_user("ada")
    first = reservation(accounts)
    assert books.write_batch(accounts.database, books.Batch(reserve=[first])) == {}
    assert (accounts.balance("ada").reserved, accounts.balance("ada").available) == (25, 475)
    for _ in range(2):  # The second time there is nothing left to settle.
        books.write_batch(accounts.database, books.Batch(settle=[settlement(first, 4)]))
        assert (accounts.balance("ada").balance, accounts.balance("ada").reserved) == (500 - 5 - 8, 0)
    usage = accounts.usage("ada")
    assert [(row.completion_tokens, row.microcredits, row.outcome) for row in usage] == [(4, 13, "stop")]
    books_balance(accounts)


def test_a_batch_that_is_written_again_counts_once(accounts: Accounts) -> None:
    """A commit may go through although its answer is lost."""
    accounts.create_user("ada")
    first, second = reservation(accounts, "r1"), reservation(accounts, "r2")
    books.write_batch(accounts.database, books.Batch(reserve=[first]))
    with pytest.raises(LocalError, match="refused a booking"):
        books.write_batch(accounts.database, books.Batch(reserve=[first, second]))
    assert books.write_batch(accounts.database, books.Batch(reserve=[first, second], again=True)) == {}
    assert accounts.balance("ada").reserved == 50


def test_a_balance_is_promised_once(accounts: Accounts) -> None:
    """Many gateways' threads reserve at once: together never more than there is."""
    accounts.create_user("ada")
    batches = [
        books.Batch(reserve=[reservation(accounts, f"r{i}-{j}", max_tokens=45) for j in range(3)]) for i in range(8)
    ]
    with ThreadPoolExecutor(4) as pool:
        refused = list(pool.map(lambda batch: books.write_batch(accounts.database, batch), batches))
    assert sum(3 - len(each) for each in refused) == 5  # 95 each of 500
    assert accounts.balance("ada").reserved == 5 * 95
    assert {answer.needed for each in refused for answer in each.values()} == {95}


def test_books_are_append_only(accounts: Accounts) -> None:
    accounts.create_user("ada")
    for statement in ("UPDATE postings SET amount = 1", "DELETE FROM postings", "DELETE FROM transactions"):
        with pytest.raises((LocalError, sa.exc.IntegrityError), match="append-only"), accounts.database.write() as c:
            c.execute(sa.text(statement))
    books_balance(accounts)


def test_recovery_bills_recorded_progress(accounts: Accounts) -> None:
    accounts.create_user("ada")
    reserved = [reservation(accounts, f"r{i}", instance=name) for i, name in enumerate(("here", "here", "there"))]
    books.write_batch(accounts.database, books.Batch(reserve=reserved))
    books.write_batch(accounts.database, books.Batch(progress=[Progress("r0", 3)]))
    found = books.find_abandoned(accounts.database, "here")
    assert [(each.reservation.id, each.completion_tokens) for each in found] == [("r0", 3), ("r1", 0)]
    books.write_batch(accounts.database, books.Batch(settle=found))
    balance = accounts.balance("ada")
    assert (balance.balance, balance.reserved) == (500 - 5 - 6, 25)
    with accounts.database.write() as connection:
        connection.execute(sa.text("UPDATE reservations SET updated_at_ms = updated_at_ms - 60000"))
    found = books.find_abandoned(accounts.database, "here")
    assert [each.reservation.id for each in found] == ["r2"]
    books_balance(accounts)


@pytest.mark.parametrize("off_s", [-60, 60])
def test_a_gateway_whose_clock_is_wrong_is_no_dead_one(
    tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, off_s: int
) -> None:
    """On PostgreSQL; SQLite has one host."""
    settings, real = GatewaySettings(database=new_database(postgresql), starting_balance=500), time.time_ns

    @contextmanager
    def wrong_clock() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(time, "time_ns", lambda: real() + off_s * 1_000_000_000)
            yield

    with open_accounts(settings, tmp_path) as right, open_accounts(settings, tmp_path) as wrong:
        right.create_user("ada")
        asked = idempotency.wanted(f"user:{right.find_user('ada').id}", "k", "chat.completions", b"{}", "")
        mine, theirs = (reservation(right, name, instance=name) for name in ("here", "there"))
        with wrong_clock():
            books.write_batch(wrong.database, books.Batch(reserve=[theirs]))
            books.write_batch(wrong.database, books.Batch(progress=[Progress(theirs.id, 3)]))
            idempotency.begin(wrong.database, asked, "there", 7)
        assert books.find_abandoned(right.database, "here") == []
        with pytest.raises(ApiError, match="being answered by another gateway"):
            idempotency.begin(right.database, asked, "here", 8)
        books.write_batch(right.database, books.Batch(reserve=[mine]))
        with wrong_clock():
            found = books.find_abandoned(wrong.database, "there")
        assert [each.reservation.id for each in found] == [theirs.id]
    assert sum("apart: set them" in record.message for record in caplog.records) == 1


def test_vectors_are_known_to_be_paid_where_a_hosts_clock_is_fast(accounts: Accounts) -> None:
    user, now = accounts.create_user("ada").id, stamps.now_ms()
    for name, outcome in (("unpaid", "failed"), ("paid", EMBEDDED)):
        assert not accounts.has_usage(user, "x", now)
        reserved = reservation(accounts, name)
        books.write_batch(accounts.database, books.Batch(reserve=[reserved]))
        books.write_batch(accounts.database, books.Batch(settle=[settlement(reserved, 0, outcome)]))
    assert accounts.has_usage(user, "x", now + 60_000)
    assert not accounts.has_usage(user, "another", now)


def test_newer_schema_is_refused(tmp_path: Path, database: str) -> None:
    settings = GatewaySettings(database=database)
    with open_accounts(settings, tmp_path) as opened, opened.database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with (
        pytest.raises(ConfigError, match="has schema 9999, and this RiOS only knows up to"),
        open_accounts(settings, tmp_path),
    ):
        pass


def test_two_first_starts_at_once(tmp_path: Path, database: str) -> None:
    def start(_: int) -> int:
        with open_accounts(GatewaySettings(database=database), tmp_path) as opened:
            return len(opened.list_users())

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(start, range(3))) == [1, 1, 1]


def test_a_first_start_waits_for_another_that_is_at_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("CREATE TABLE something (x)")
        other.execute("BEGIN IMMEDIATE")  # SQLite does not make it a file with WAL meanwhile, nor does it wait
        with pytest.raises(sqlite3.OperationalError, match="locked"), closing(sqlite3.connect(path)) as third:
            third.execute("PRAGMA journal_mode=WAL")
        threading.Timer(0.3, other.execute, ("COMMIT",)).start()
        with open_accounts(GatewaySettings(), tmp_path) as opened:
            assert len(opened.list_users()) == 1


def test_damaged_sqlite_file(tmp_path: Path) -> None:
    (tmp_path / "gateway.db").write_bytes(b"this is not a database, and it is long enough to be looked at" * 50)
    with pytest.raises(LocalError, match="is damaged"), open_accounts(GatewaySettings(), tmp_path):
        pass


def test_sqlite_file_is_private(tmp_path: Path) -> None:
    with open_accounts(GatewaySettings(), tmp_path):
        assert (tmp_path / "gateway.db").stat().st_mode & 0o077 == 0
    database = open_database("", tmp_path)
    with database.read() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar() == 2
        assert connection.execute(sa.text("PRAGMA foreign_keys")).scalar() == 1
    database.close()


async def test_requests_are_settled(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, rig.http() as http:
        async with trio.open_nursery() as nursery:
            for index in range(20):
                nursery.start_soon(lambda i=index: http.post(CHAT, json=STREAM if i % 2 else BODY))
        balance = (await http.get("/v1/billing/balance")).json()
        assert balance == {"balance": 1_000_000 - 20 * 16, "reserved": 0, "available": 1_000_000 - 20 * 16}
        page = (await http.get("/v1/billing/usage?limit=15")).json()
        rest = (await http.get(f"/v1/billing/usage?limit=15&before={page['data'][-1]['id']}")).json()
        assert (len(page["data"]), page["has_more"], len(rest["data"]), rest["has_more"]) == (15, True, 5, False)
        assert len({row["id"] for row in page["data"] + rest["data"]}) == 20
        for limit in ("0", "-1", "x", "9" * 40, "²"):
            assert (await http.get(f"/v1/billing/usage?limit={limit}")).status_code == 400
        await trio.to_thread.run_sync(books_balance, rig.accounts)


async def test_a_revoked_key_is_shut_out(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.guard.CACHE_SECONDS", 0.2)
    async with serving(tmp_path, database=database) as rig, rig.http() as http:
        assert (await http.get("/v1/models")).status_code == 200
        await trio.to_thread.run_sync(rig.accounts.revoke_key, rig.key.split("_")[1])
        for _ in range(100):
            if (await http.get("/v1/models")).status_code == 401:
                return
            await trio.sleep(0.05)
        pytest.fail("the key still works")


@pytest.mark.parametrize("answers", [1, 3])
async def test_kill_in_the_middle_of_a_stream(tmp_path: Path, database: str, answers: int) -> None:
    """The killed gateway's reservations are settled by the next start, on the progress that was recorded; several
    answers pay for their prompt once."""
    command = [sys.executable, str(Path(__file__).with_name("gateway_process.py")), str(tmp_path), database]
    process = await trio.to_thread.run_sync(
        lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    try:
        port, key = (await trio.to_thread.run_sync(process.stdout.readline)).split()
        async with await trio.open_tcp_stream("127.0.0.1", int(port)) as connection:
            await connection.send_all(request_bytes(CHAT, json.dumps({**STREAM, "n": answers}).encode(), key))
            await read_until(connection, b" the")
            with open_accounts(GatewaySettings(database=database), tmp_path) as accounts:
                await eventually(lambda: _recorded(accounts) == [3] * answers)
                assert accounts.balance("ada").reserved > 0
            process.kill()
            process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    async with serving(tmp_path, database=database) as rig:
        balance = await rig.balance()
        assert (balance.balance, balance.reserved) == (1_000_000 - 2 - 2 * 3 * answers, 0)
        usage = rig.accounts.usage("ada")
        assert [(row.outcome, row.completion_tokens) for row in usage] == [("recovered", 3)] * answers
        await trio.to_thread.run_sync(books_balance, rig.accounts)


def _recorded(accounts: Accounts) -> list[int]:
    with accounts.database.read() as connection:
        return list(connection.execute(sa.text("SELECT completion_tokens FROM reservations")).scalars())


async def test_database_that_fails_while_serving(tmp_path: Path) -> None:
    """Without accounts there is no answer, a clear error, and readiness says why; with them back it goes on."""
    async with serving(tmp_path) as rig, rig.http() as http:
        assert (await http.post(CHAT, json=BODY)).status_code == 200
        with rig.accounts.database.write() as connection:
            connection.execute(sa.text("ALTER TABLE reservations RENAME TO elsewhere"))
        answer = await http.post(CHAT, json=BODY)
        assert answer.status_code in (500, 503)
        assert "accounts database" in answer.json()["error"]["message"]
        with rig.accounts.database.write() as connection:
            connection.execute(sa.text("ALTER TABLE elsewhere RENAME TO reservations"))
        assert (await http.post(CHAT, json=BODY)).status_code == 200


async def test_settlement_outlasts_a_failing_database(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(hang_at=2)
    async with serving(tmp_path, engine=engine) as rig:
        async with await rig.raw(CHAT, STREAM) as connection:
            await read_until(connection, b" is")
            with rig.accounts.database.write() as database:
                database.execute(sa.text("ALTER TABLE usages RENAME TO elsewhere"))
        await eventually(lambda: engine.running == 0)
        await eventually(lambda: "is not settled yet" in caplog.text)
        with rig.accounts.database.write() as database:
            database.execute(sa.text("ALTER TABLE elsewhere RENAME TO usages"))
        await eventually(lambda: rig.accounts.balance("ada").reserved == 0)
        assert rig.accounts.usage("ada")[0].outcome == "cancelled"
        assert (await rig.balance()).balance == 1_000_000 - 2 - 2 * 2
