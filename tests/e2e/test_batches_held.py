"""Who holds a batch works on it, and nobody else."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import trio
from gateway_rig import eventually, serving

from gateway.accounts import Accounts
from gateway.books import now_ms
from gateway.db.jobs import batch_lines
from gateway.db.jobs import batches as table
from gateway.db.migrate import migrate
from gateway.db.session import Database, open_database
from gateway.errors import ApiError
from gateway.jobs import batches
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


def begin(database: Database, data: bytes = b'{"custom_id": "c", "url": "/v1/chat/completions", "body": {}}') -> Batch:
    """A batch of ada's over such a file."""
    user = Accounts(database).find_user("ada").id
    upload = Upload(database, user)
    upload.write(data)
    file = upload.finish("lines.jsonl", "batch").id
    return batches.create(
        database, user_id=user, key_id=None, file_id=file, endpoint=CHAT, window="24h", metadata="null"
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
