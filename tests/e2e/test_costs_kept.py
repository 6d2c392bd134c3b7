"""What the swarm is paid, in the accounts of a running gateway on both databases: the engine only counts (a fake)."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
import trio
from fake_engine import FakeEngine, FakePrepared
from gateway_rig import Rig, eventually, read_until, serving
from postgresql import new_database
from test_rights import client, key_of

from config.accountbook import PaidChannel
from config.errors import LocalError
from config.generation import GenerationEvent
from config.vocabulary import KFLOP_PER_TFLOP as NANO
from config.vocabulary import PeerId
from dmoe.bills import Bills
from gateway.billing.costs import CostBook, by_purpose
from gateway.billing.reconcile import reconcile, tie_channels
from gateway.billing.statements import find_cost
from gateway.db import session
from gateway.db.billing import swarm_costs
from gateway.db.migrate import migrate
from gateway.db.models import usages
from gateway.db.session import open_database
from gateway.db.stamps import new_id
from node.spending import NodeSpending

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}
CHANNELS = (b"a" * 32, b"b" * 32)
STEP = 7 * NANO // 3
"""What an event of an answer costs on each channel, nanocredits."""


def channel(key: bytes, nano: int, *, promised: int | None = None, ahead: int = 5, behind: int = 3) -> PaidChannel:
    promised = nano // NANO if promised is None else promised
    return PaidChannel(
        channel=key.hex(), peer_id="peer", calls=1, nano=nano, promised=promised, ahead=ahead, behind=behind
    )


@dataclass
class PayingEngine(FakeEngine):
    """Every event of an answer costs :data:`STEP` on each channel. ``counted``: as the ledger would."""

    bills: Bills = field(default_factory=Bills)
    counted: dict[bytes, int] = field(default_factory=lambda: dict.fromkeys(CHANNELS, 0))

    def pay(self, name: str) -> None:
        for key in CHANNELS:
            self.bills.of(name).add(PeerId("peer"), key, STEP)
            self.counted[key] += STEP

    async def _events(self, prepared: FakePrepared) -> AsyncIterator[GenerationEvent]:
        held = self.bills.of(prepared.request.bill)
        async with aclosing(super()._events(prepared)) as events:
            async for event in events:
                self.pay(prepared.request.bill)
                yield event
        assert held.costs()

    @property
    def ledger(self) -> Sequence[PaidChannel]:
        return [channel(key, nano) for key, nano in self.counted.items()]

    def spending(self, *opening: PaidChannel) -> NodeSpending:
        return NodeSpending(self.bills, opening)


async def rows_of(rig: Rig) -> dict[str, tuple[str, int]]:
    """Usage rows: outcome and cost, nanocredits."""

    def read() -> dict[str, tuple[str, int]]:
        with rig.accounts.database.read() as connection:
            found = connection.execute(sa.select(usages)).mappings()
            return {r["id"]: (r["outcome"], r["swarm_microcredits"] * NANO + r["swarm_nano"]) for r in found}

    return await trio.to_thread.run_sync(read)


async def reconciled(rig: Rig, ledger: Sequence[PaidChannel] | None = None) -> dict:
    return await trio.to_thread.run_sync(reconcile, rig.accounts.database, ledger)


async def test_finished_cancelled_and_failed_requests_all_have_their_cost(tmp_path: Path, database: str) -> None:
    engine = PayingEngine()
    async with (
        serving(tmp_path, engine=engine, database=database, spending=engine.spending()) as rig,
        rig.http() as ada,
    ):
        assert (await ada.post("/v1/chat/completions", json=CHAT)).status_code == 200
        engine.fail_at = 2
        await ada.post("/v1/chat/completions", json=CHAT)
        engine.fail_at, engine.hang_at = None, 3
        async with await rig.raw("/v1/chat/completions", {**CHAT, "stream": True}) as left:
            await read_until(left, b"content")
        await eventually(lambda: engine.running == 0)
        with trio.fail_after(10):
            while len(await rows_of(rig)) < 3:  # noqa: ASYNC110 - the database tells nobody
                await trio.sleep(0.05)
        found = await rows_of(rig)
        assert sorted(outcome for outcome, _ in found.values()) == ["cancelled", "failed", "length"]
        assert all(nano >= 2 * STEP for _, nano in found.values())
        report = await reconciled(rig, engine.ledger)
        assert report["ties"], report
        assert report["in_flight_nano"] == 0
        assert report["swarm_nano"] == {"request": sum(nano for _, nano in found.values())}
        assert report["swarm_nano"]["request"] == report["counted_nano"] == sum(engine.counted.values())
        assert report["margin"] == report["charges"] - report["counted_nano"] // NANO


async def test_what_comes_after_the_end_is_added_to_the_row(tmp_path: Path, database: str) -> None:
    engine = PayingEngine()
    async with (
        serving(tmp_path, engine=engine, database=database, spending=engine.spending()) as rig,
        rig.http() as ada,
    ):
        bill = engine.bills.of
        assert (await ada.post("/v1/chat/completions", json=CHAT)).status_code == 200
        name, (_, before) = next(iter((await rows_of(rig)).items()))
        late = bill(name)
        late.add(PeerId("peer"), b"c" * 32, 11)
        engine.bills.purpose("audit").add(PeerId("peer"), b"c" * 32, 4)
        with trio.fail_after(10):
            while (await rows_of(rig))[name][1] == before:  # noqa: ASYNC110 - the database tells nobody
                await trio.sleep(0.05)
        assert (await rows_of(rig))[name][1] == before + 11
        report = await reconciled(rig)
        assert report["ties"], report
        assert report["swarm_nano"] == {"request": before + 11, "audit": 4}


async def test_restarts_are_booked_by_name_and_once(tmp_path: Path, database: str) -> None:
    engine = PayingEngine()
    old = channel(b"o" * 32, 500)
    async with serving(tmp_path, engine=engine, database=database, spending=engine.spending(old)) as rig:
        async with rig.http() as ada:
            await ada.post("/v1/chat/completions", json=CHAT)
        assert (await reconciled(rig))["swarm_nano"]["earlier"] == 500
    # of one channel the books lack 40, of the other the node lost 25 of its own count
    lost = [
        old,
        channel(CHANNELS[0], engine.counted[CHANNELS[0]] + 40),
        channel(CHANNELS[1], engine.counted[CHANNELS[1]] - 25),
    ]
    for _ in range(2):
        async with serving(tmp_path, engine=engine, database=database, spending=engine.spending(*lost)) as rig:
            report = await reconciled(rig, lost)
            assert report["ties"], report
            assert report["in_flight_nano"] == 0
            assert (report["swarm_nano"]["earlier"], report["swarm_nano"]["restart"]) == (500, 15)


def test_what_could_not_be_written_is_written_with_what_came_meanwhile() -> None:
    engine, (one, two) = PayingEngine(), CHANNELS
    book, audits = CostBook(engine.spending(), "run"), engine.bills.purpose("audit")
    for key in CHANNELS:
        audits.add(PeerId("peer"), key, 1)
    book.put_back(book.take(None))
    audits.add(PeerId("peer"), two, 4)
    book.put_back(book.take(["another"]))
    assert book.has_changed()
    (spent,) = book.take(None).spent
    assert {cost.channel: (cost.calls, cost.nano) for cost in spent.costs} == {one.hex(): (1, 1), two.hex(): (2, 5)}
    assert not book.has_changed()


def test_books_that_have_grown_keep_no_gateway_from_starting(postgresql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are added up when a gateway starts, however long that takes; what people wait for has its time."""
    dsn = new_database(postgresql)
    full = open_database(dsn, Path())
    migrate(full)
    with full.write() as connection:
        values = "SELECT 'b' || n, 'audit', 'c' || n % 9, 'p', 1, 2, 3, 4 FROM generate_series(1, 300000) n"
        connection.execute(sa.text(f"INSERT INTO swarm_costs {values}"))
    full.close()
    monkeypatch.setattr(session, "_STATEMENT_MS", 20)
    hurried = open_database(dsn, Path())
    with pytest.raises(LocalError, match="timeout"), hurried.read() as connection:
        by_purpose(connection)
    CostBook(NodeSpending(Bills(), [channel(b"a" * 32, 5)]), new_id()).begin(hurried)
    assert reconcile(hurried)["swarm_nano"] == {"audit": 300_000 * (2 * NANO + 3), "earlier": 5}
    hurried.close()


async def test_a_tampered_row_and_a_lost_one_are_named(tmp_path: Path, database: str) -> None:
    engine = PayingEngine()
    async with (
        serving(tmp_path, engine=engine, database=database, spending=engine.spending()) as rig,
        rig.http() as ada,
    ):
        for _ in range(2):
            await ada.post("/v1/chat/completions", json=CHAT)
        first, second = sorted(await rows_of(rig))

        def tamper(statement: sa.Executable) -> list[dict]:
            with rig.accounts.database.write() as connection:
                connection.execute(statement)
            return reconcile(rig.accounts.database, engine.ledger)["differences"]

        more = sa.update(usages).where(usages.c.id == first).values(swarm_nano=usages.c.swarm_nano + 1)
        (named,) = await trio.to_thread.run_sync(tamper, more)
        assert (named["rule"], named["subject"]) == ("a usage row's swarm cost is the sum of its calls (nano)", first)
        assert named["found"] == named["expected"] + 1
        await trio.to_thread.run_sync(tamper, more.values(swarm_nano=usages.c.swarm_nano - 1))
        less = sa.update(swarm_costs).where(swarm_costs.c.bill == second).values(nano=swarm_costs.c.nano - 1)
        found = await trio.to_thread.run_sync(tamper, less)
        assert {each["subject"] for each in found} == {second, *(key.hex() for key in CHANNELS)}
        gone = sa.update(swarm_costs).where(swarm_costs.c.bill == second).values(bill="nobody's")
        assert {"nobody's", second} <= {each["subject"] for each in await trio.to_thread.run_sync(tamper, gone)}


async def test_the_admin_api_tells_costs_and_nobody_else_is_told(tmp_path: Path) -> None:
    engine = PayingEngine()
    async with (
        serving(tmp_path, engine=engine, spending=engine.spending()) as rig,
        client(rig, await key_of(rig, "root", "admin")) as root,
        rig.http() as ada,
    ):
        await ada.post("/v1/chat/completions", json=CHAT)
        name, (_, nano) = next(iter((await rows_of(rig)).items()))
        found = (await root.get(f"/v1/billing/usage/{name}/cost")).json()
        assert (found["swarm_nano"], found["margin"]) == (nano, found["microcredits"] - nano // NANO)
        assert [(line["channel"], line["nano"]) for line in found["channels"]] == [
            (key.hex(), nano // 2) for key in CHANNELS
        ]
        assert (await ada.get(f"/v1/billing/usage/{name}/cost")).status_code == 403
        assert (await root.get("/v1/billing/usage/x/cost")).status_code == 404
        (summed,) = (await root.get("/v1/billing/usage/summary", params={"by": "user"})).json()["data"]
        assert (summed["swarm_nano"], summed["swarm_cost"]) == (nano, nano // NANO)
        text = (await root.get("/v1/billing/usage/summary", params={"by": "user", "format": "csv"})).text
        assert text.splitlines()[0].endswith("swarm_nano,swarm_cost,margin")
        for path in ("usage", "usage/summary", "usage/summary?format=csv"):
            answer: httpx.Response = await ada.get(f"/v1/billing/{path}")
            assert "swarm" not in answer.text
            assert "margin" not in answer.text
        database = rig.accounts.database
        assert await trio.to_thread.run_sync(database.look, lambda connection: find_cost(connection, "x")) is None


@pytest.mark.parametrize(
    ("nano", "booked", "running", "wrong", "in_flight"),
    [
        (9 * NANO, 9 * NANO, False, 0, 0),
        (9 * NANO, 9 * NANO - 1, False, 1, 0),  # counted, and never booked
        (9 * NANO, 9 * NANO - 1, True, 0, 1),  # will be booked
        (9 * NANO, 14 * NANO, False, 0, -5 * NANO),  # booked, and no receipt yet
        (9 * NANO, 14 * NANO + 1, True, 1, 0),
    ],
)
def test_what_is_counted_is_booked_but_for_what_is_in_flight(
    nano: int, booked: int, running: bool, wrong: int, in_flight: int
) -> None:
    key = b"a" * 32
    found, sums = tie_channels([channel(key, nano)], {key.hex(): booked, "other": 5}, running=running)
    assert ([each.subject for each in found], sums["in_flight_nano"]) == ([key.hex()] * wrong, in_flight)
    assert (sums["counted_nano"], sums["elsewhere_nano"]) == (nano, 5)


@pytest.mark.parametrize(("promised", "ties"), [(9, True), (14, True), (15, False), (6, True), (5, False)])
def test_vouchers_are_for_what_was_counted_within_their_bounds(promised: int, ties: bool) -> None:
    key = b"a" * 32
    found, sums = tie_channels([channel(key, 9 * NANO, promised=promised)], {key.hex(): 9 * NANO}, running=False)
    assert (not found, sums["vouchers"]) == (ties, promised)
