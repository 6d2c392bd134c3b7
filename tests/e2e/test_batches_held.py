"""Who holds a batch works on it, and nobody else."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
import trio
from fake_engine import FakeEngine
from gateway_rig import eventually, serving

from gateway.accounts import Accounts
from gateway.db.jobs import batch_lines
from gateway.db.jobs import batches as table
from gateway.db.migrate import migrate
from gateway.db.session import Database, open_database
from gateway.db.stamps import now_ms
from gateway.errors import ApiError
from gateway.jobs import batches, files
from gateway.jobs.batches import Batch
from gateway.jobs.files import Upload
from gateway.jobs.runner import WORKERS

CHAT = "/v1/chat/completions"


@pytest.fixture
def opened(tmp_path: Path, database: str) -> Iterator[Database]:
    found = open_database(database, tmp_path)
    migrate(found)
    Accounts(found).create_user("ada")
    yield found
    found.close()


def begin(
    database: Database,
    data: bytes = b'{"custom_id": "c", "url": "/v1/chat/completions", "body": {}}',
    name: str = "ada",
) -> Batch:
    """A batch of this user's over such a file."""
    user = Accounts(database).find_user(name).id
    upload = Upload(database, user)
    upload.write(data)
    return create(database, user, upload.finish("lines.jsonl", "batch").id)


def create(database: Database, user_id: str, file_id: str) -> Batch:
    return batches.create(
        database, user_id=user_id, key_id=None, file_id=file_id, endpoint=CHAT, window="24h", metadata="null"
    )


def claimed(database: Database, instance: str) -> Batch:
    found = batches.claim(database, instance)
    assert found is not None
    return found


def lose(database: Database) -> None:
    """The time of whoever holds a batch is over, as after a suspend."""
    with database.write() as connection:
        connection.execute(sa.update(table).values(held_until_ms=0))


def statuses(database: Database) -> list[int]:
    with database.read() as connection:
        return list(connection.execute(sa.select(batch_lines.c.status)).scalars())


def test_who_lost_a_batch_while_reading_its_input_leaves_the_answers_of_who_has_it(opened: Database) -> None:
    begin(opened)
    lost = claimed(opened, "here")
    lose(opened)
    held = claimed(opened, "there")
    assert batches.validate(opened, held) is not None
    (line,) = batches.waiting(opened, held, 9)
    assert batches.answered(opened, held, line, 200, b"{}", key="")
    assert batches.validate(opened, lost) is None
    assert statuses(opened) == [200]


def test_a_batch_that_is_in_progress_is_not_read_again(opened: Database) -> None:
    """A pass whose requester gave up goes on beside what the same hold does next."""
    begin(opened)
    held = claimed(opened, "here")
    assert batches.validate(opened, held) is not None
    (line,) = batches.waiting(opened, held, 9)
    assert batches.answered(opened, held, line, 200, b"{}", key="")
    assert batches.validate(opened, held) is None
    assert statuses(opened) == [200]


def test_another_worker_of_the_same_gateway_is_another_holder(opened: Database) -> None:
    begin(opened)
    lost = claimed(opened, "here")
    lose(opened)
    held = claimed(opened, "here")
    assert batches.hold(opened, lost) is None
    batches.let_go(opened, lost)
    assert batches.validate(opened, lost) is None
    assert batches.hold(opened, held) is not None
    assert batches.claim(opened, "here") is None


@pytest.mark.parametrize("instance", ["here", "h_%" + "e" * 61])
def test_a_gateway_that_starts_again_frees_what_it_held_and_nothing_else(opened: Database, instance: str) -> None:
    for _ in range(3):
        begin(opened)
    kept = claimed(opened, "hereabouts")
    mine = [claimed(opened, instance) for _ in range(2)]
    batches.let_all_go(opened, instance)
    assert batches.hold(opened, kept) is not None
    assert [batches.hold(opened, each) for each in mine] == [None, None]
    assert {claimed(opened, instance).id for _ in mine} == {each.id for each in mine}


def test_whose_batches_are_worked_on_least_comes_first(opened: Database) -> None:
    Accounts(opened).create_user("bob")
    of_ada = [begin(opened).id for _ in range(3)]
    first = claimed(opened, "here")
    assert first.id == of_ada[0]
    assert not batches.somebody_waits(opened, first), "ada's own wait their turn"
    of_bob = [begin(opened, name="bob").id for _ in range(2)]
    assert batches.somebody_waits(opened, first)
    second = claimed(opened, "there")
    assert second.id == of_bob[0]
    assert not batches.somebody_waits(opened, first)
    third = claimed(opened, "here")
    assert third.id == of_ada[1], "the oldest of those who have one each"
    assert batches.somebody_waits(opened, first)
    batches.let_go(opened, first)
    assert not batches.somebody_waits(opened, second)
    assert [claimed(opened, "here").id for _ in range(3)] == [of_ada[2], of_bob[1], of_ada[0]]


async def test_a_long_batch_lets_another_users_through(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.jobs.runner.WORKERS", 1)
    monkeypatch.setattr("gateway.jobs.runner._TURN_SECONDS", 0.1)
    monkeypatch.setattr("gateway.jobs.runner._FETCH_LINES", 4)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a b c"}]}
    lines = [json.dumps({"custom_id": f"c{n}", "url": CHAT, "body": body}).encode() for n in range(200)]
    async with serving(tmp_path, database=database, engine=FakeEngine(pause_seconds=0.02)) as rig:

        def status(batch: Batch) -> tuple[str, int]:
            found = batches.get(rig.accounts.database, batch.id, None)
            return found.status, found.completed

        def bob() -> Batch:
            rig.accounts.create_user("bob")
            rig.accounts.credit("bob", 1_000_000)
            return begin(rig.accounts.database, lines[0], "bob")

        long = await trio.to_thread.run_sync(begin, rig.accounts.database, b"\n".join(lines))
        await eventually(lambda: status(long)[1] > 0)
        short = await trio.to_thread.run_sync(bob)
        await eventually(lambda: status(short) == ("completed", 1))
        assert status(long)[0] == "in_progress"
        before = status(long)[1]
        await eventually(lambda: status(long)[1] > before)


def test_batches_that_fail_count_for_a_while(opened: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "OPEN_MAX", 2)
    for _ in range(2):
        begin(opened, b"no request")
        failed = batches.validate(opened, claimed(opened, "here"))
        assert failed is not None
        assert failed.status == "failed"
    with pytest.raises(ApiError, match="2 batches at most"):
        begin(opened)
    with opened.write() as connection:
        connection.execute(sa.update(table).values(ended_at_ms=now_ms() - batches.FAILED_MINUTES * 60_000))
    begin(opened)


async def test_passes_over_files_leave_the_database_to_those_who_wait_for_answers(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, begun = threading.Event(), []

    def validate(_database: Database, batch: Batch) -> None:
        begun.append(batch.id)
        ends.wait(10)

    monkeypatch.setattr(batches, "validate", validate)
    async with serving(tmp_path, database=database) as rig, rig.http() as http:
        try:
            for _ in range(WORKERS):
                await trio.to_thread.run_sync(begin, rig.accounts.database)
            await eventually(lambda: bool(begun))
            await trio.sleep(2.5)  # by then each worker has looked for one
            assert len(begun) == 1
            with trio.fail_after(3):
                answers = [await http.get("/v1/files") for _ in range(3)]
            assert {answer.status_code for answer in answers} == {200}
        finally:
            ends.set()


@pytest.mark.parametrize("full", [("USER_FILES_MAX", 1), ("USER_BYTES_MAX", 60)])
def test_no_batch_begins_where_its_user_has_no_room_for_answers(
    full: tuple[str, int], opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, *full)
    with pytest.raises(ApiError, match="at most") as caught:
        begin(opened)
    assert caught.value.code == "conflict"
    assert batches.claim(opened, "gateway") is None
    monkeypatch.undo()
    begin(opened)


def test_the_inputs_of_open_batches_take_room_too(opened: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    first = begin(opened)
    monkeypatch.setattr(files, "USER_BYTES_MAX", 120)  # the input and what its batch reads of it, 61 each
    with pytest.raises(ApiError, match="wait for a batch to end"):
        create(opened, first.user_id, first.input_file_id)
    batches.finish(opened, claimed(opened, "gateway"), "cancelled")
    create(opened, first.user_id, first.input_file_id)


def test_batches_begun_at_once_are_no_more_than_a_user_may_have(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "OPEN_MAX", 2)
    first, together = begin(opened), threading.Barrier(5)

    def begin_another(_number: int) -> str:
        together.wait(10)
        try:
            create(opened, first.user_id, first.input_file_id)
        except ApiError as error:
            return error.code
        return "made"

    with ThreadPoolExecutor(5) as threads:
        assert sorted(threads.map(begin_another, range(5))) == ["conflict"] * 4 + ["made"]


def ask(number: int) -> bytes:
    return json.dumps({"custom_id": f"c{number}", "url": CHAT, "body": {}}).encode()


def lines_in(database: Database, file_id: str | None) -> list[dict[str, object]]:
    data, place = b"", 0
    while file_id is not None and (piece := files.read_chunk(database, file_id, place)) is not None:
        data, place = data + piece, place + 1
    return [json.loads(text) for text in data.splitlines()]


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_lines_without_an_answer_stand_in_the_error_file(opened: Database, status: str) -> None:
    count = 2 * batches._ANSWERS_AT_ONCE + 5
    begin(opened, b"\n".join(ask(number) for number in range(1, count + 1)))
    mine = claimed(opened, "a")
    assert batches.validate(opened, mine) is not None
    good, bad = batches.waiting(opened, mine, count)[1:3]
    batches.answered(opened, mine, good, 200, b'{"good": 1}', key="")
    batches.answered(opened, mine, bad, 400, b'{"bad": 1}', key="")
    done = batches.finish(opened, mine, status)
    assert done is not None
    assert (done.status, done.total, done.completed, done.failed) == (status, count, 1, count - 1)
    assert [row["custom_id"] for row in lines_in(opened, done.output_file_id)] == ["c2"]
    found = lines_in(opened, done.error_file_id)
    assert [row["custom_id"] for row in found] == ["c1", *(f"c{number}" for number in range(3, count + 1))]
    assert (found[1]["response"]["status_code"], found[1]["error"]) == (400, None)  # type: ignore[index]
    for row in (found[0], *found[2:]):
        assert (row["response"], row["error"]["code"]) == (None, f"batch_{status}")  # type: ignore[index]
        assert row["error"]["message"]  # type: ignore[index]


def test_of_a_batch_that_never_began_no_lines_are_told(opened: Database) -> None:
    """Its input was not read to the end, so it counts none."""
    made = begin(opened, b"\n".join(ask(number) for number in range(3)))
    mine = claimed(opened, "a")
    assert batches._write_lines(opened, mine)
    batches.cancel(opened, made.id, None)
    assert batches.validate(opened, mine) is None
    done = batches.finish(opened, mine, "cancelled")
    assert done is not None
    assert (done.total, done.failed, done.output_file_id, done.error_file_id) == (0, 0, None, None)
    assert statuses(opened) == []
