"""Uploads side by side stay within what a user may have; one that is slow comes to its end."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import sqlalchemy as sa

from gateway.accounts import Accounts
from gateway.db.jobs import file_chunks
from gateway.db.jobs import files as table
from gateway.db.migrate import migrate
from gateway.db.session import Database, open_database
from gateway.errors import ApiError
from gateway.jobs import files
from gateway.jobs.files import CHUNK_BYTES, Upload

TWO_HOURS_MS = 2 * 3600 * 1000


@pytest.fixture
def opened(tmp_path: Path, database: str) -> Iterator[Database]:
    found = open_database(database, tmp_path)
    migrate(found)
    Accounts(found).create_user("ada")
    yield found
    found.close()


def begin(database: Database, *, bytes_max: int = 100 << 20) -> Upload:
    return Upload(database, Accounts(database).find_user("ada").id, bytes_max=bytes_max)


def grow_old(database: Database) -> None:
    with database.write() as connection:
        connection.execute(sa.update(table).values(created_at_ms=table.c.created_at_ms - TWO_HOURS_MS))


def test_uploads_side_by_side_have_the_bytes_of_one_user(opened: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 8 * CHUNK_BYTES
    monkeypatch.setattr(files, "USER_BYTES_MAX", most)
    together = Barrier(4)

    def upload(_number: int) -> str:
        made = begin(opened)
        together.wait(10)
        try:
            for _ in range(5):
                made.write(bytes(CHUNK_BYTES))
        except ApiError as error:
            return error.code
        return made.finish("x", "user_data").purpose

    with ThreadPoolExecutor(4) as threads:
        ends = list(threads.map(upload, range(4)))
    assert "conflict" in ends
    with opened.read() as connection:
        kept = connection.execute(sa.select(sa.func.sum(sa.func.length(file_chunks.c.data)))).scalar_one()
    assert kept <= most


def test_a_small_last_piece_counts_too(opened: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "USER_BYTES_MAX", 100)
    uploads = [begin(opened) for _ in range(2)]
    for each in uploads:
        each.write(bytes(60))
    uploads[0].finish("x", "user_data")
    with pytest.raises(ApiError, match="delete some first"):
        uploads[1].finish("x", "user_data")


def test_a_slow_upload_is_not_swept_away_while_pieces_come(opened: Database) -> None:
    made = begin(opened)
    made.write(bytes(CHUNK_BYTES))
    grow_old(opened)
    made.write(bytes(CHUNK_BYTES))
    assert files.sweep(opened) == 0
    assert made.finish("x", "user_data").bytes == 2 * CHUNK_BYTES


def test_an_upload_that_stood_still_is_swept_away_and_says_so(opened: Database) -> None:
    uploads = [begin(opened), begin(opened), begin(opened)]
    uploads[1].write(b"little")
    uploads[2].write(bytes(CHUNK_BYTES))
    grow_old(opened)
    assert files.sweep(opened) == 3
    for each in uploads:
        with pytest.raises(ApiError, match="given up") as caught:
            each.finish("x", "user_data")
        assert caught.value.code == "conflict"
    with pytest.raises(ApiError, match="given up"):
        uploads[0].write(bytes(CHUNK_BYTES))
    with opened.read() as connection:
        assert connection.execute(sa.select(file_chunks.c.place)).all() == []
