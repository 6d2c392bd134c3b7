"""Files of users: bytes in the accounts database, in pieces, so that every gateway has them and none has all in memory.

Blocking calls. Invariants: what was not uploaded to its end is nobody's file and is swept away; a user's files together
are bounded (a batch that runs writes its answers to the end, but none begins where there is no room); a file does not
change once it is complete.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from gateway.db.jobs import batches, file_chunks, files
from gateway.db.models import users
from gateway.db.session import Database
from gateway.db.stamps import new_id, now_ms
from gateway.errors import ApiError

CHUNK_BYTES = 256 << 10
USER_BYTES_MAX = 4 << 30
USER_FILES_MAX = 10_000
PURPOSES = ("batch", "user_data", "evals", "batch_output")
_ABANDONED_MS = 3600 * 1000
_SWEPT_AT_ONCE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """What is known of a file, without its bytes."""

    id: str
    user_id: str
    purpose: str
    filename: str
    bytes: int
    created_at_ms: int


_COLUMNS = tuple(column for column in files.c if column.name != "complete")


class Upload:
    """A file on its way in: :meth:`write` its bytes, then :meth:`finish`; or :meth:`drop` it."""

    def __init__(self, database: Database, user_id: str, *, bytes_max: int = 0) -> None:
        """``bytes_max`` 0: the gateway writes it for the user, and nothing bounds it."""
        self.id = f"file-{new_id()}"
        self.size = 0
        self._database, self._user_id, self._bytes_max = database, user_id, bytes_max
        self._rest, self._place = bytearray(), 0
        with database.write() as connection:
            if bytes_max:
                require_room(*self._others(connection), param="file")
            row = {"id": self.id, "user_id": user_id, "purpose": "", "filename": "", "bytes": 0, "complete": False}
            connection.execute(sa.insert(files), {**row, "created_at_ms": now_ms()})

    def write(self, data: bytes) -> None:
        """More of it. Raises ApiError ``too_large``, or ``conflict``: the user's files are too many, or it was given
        up."""
        self.size += len(data)
        if self._bytes_max and self.size > self._bytes_max:
            raise ApiError("too_large", f"a file has {self._bytes_max} bytes at most", param="file")
        self._rest += data
        while len(self._rest) >= CHUNK_BYTES:
            self._put(bytes(self._rest[:CHUNK_BYTES]))
            del self._rest[:CHUNK_BYTES]

    def finish(self, filename: str, purpose: str) -> File:
        """That was all of it. Raises ApiError as :meth:`write`."""
        if self._rest:
            self._put(bytes(self._rest))
            self._rest.clear()
        values = {"purpose": purpose, "filename": filename, "bytes": self.size, "complete": True}
        with self._database.write() as connection:
            self._update(connection, values)
            row = connection.execute(sa.select(*_COLUMNS).where(files.c.id == self.id)).mappings().one()
            return File(**row)

    def drop(self) -> None:
        """It does not become a file."""
        with self._database.write() as connection:
            _delete(connection, self.id)

    def _put(self, data: bytes) -> None:
        with self._database.write() as connection:
            if self._bytes_max and self._others(connection)[1] + self.size > USER_BYTES_MAX:
                raise _full("file")
            self._update(connection, {"bytes": self.size, "created_at_ms": now_ms()})
            connection.execute(sa.insert(file_chunks), {"file_id": self.id, "place": self._place, "data": data})
        self._place += 1

    def _others(self, connection: sa.Connection) -> tuple[int, int]:
        """How many files the user has beside this one, and their bytes."""
        return lock_files(connection, self._user_id, without=self.id)

    def _update(self, connection: sa.Connection, values: dict[str, Any]) -> None:
        if not connection.execute(sa.update(files).where(files.c.id == self.id).values(**values)).rowcount:
            minutes = _ABANDONED_MS // 60_000
            why = f"nothing came of this file for {minutes} minutes, and its upload was given up"
            raise ApiError("conflict", why, "send it again", param="file")


def lock_files(connection: sa.Connection, user_id: str, *, without: str = "") -> tuple[int, int]:
    """How many files a user has, and their bytes. The user's other uploads and new batches wait meanwhile."""
    connection.execute(sa.select(users.c.id).where(users.c.id == user_id).with_for_update(key_share=True))
    mine = files.c.user_id == user_id, files.c.id != without
    total = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(files.c.bytes), 0)).where(*mine)
    count, size = connection.execute(total).one()
    return count, int(size)


def require_room(count: int, size: int, *, param: str | None = None) -> None:
    """For more beside those; ``param``: of an upload. Raises ApiError ``conflict``."""
    if count >= USER_FILES_MAX or size >= USER_BYTES_MAX:
        raise _full(param)


def list_files(
    database: Database, *, owner: str | None, purpose: str, limit: int, after: str, newest_first: bool = True
) -> Sequence[File]:
    """The owner's, or all."""
    query = sa.select(*_COLUMNS).where(files.c.complete.is_(sa.true())).limit(limit)
    if owner is not None:
        query = query.where(files.c.user_id == owner)
    if purpose:
        query = query.where(files.c.purpose == purpose)
    if after:
        query = query.where(files.c.id < after if newest_first else files.c.id > after)
    query = query.order_by(files.c.id.desc() if newest_first else files.c.id)
    with database.read() as connection:
        return [File(**row) for row in connection.execute(query).mappings()]


def get_file(database: Database, file_id: str, owner: str | None) -> File:
    """Raises ApiError ``not_found``, also for files out of reach."""
    with database.read() as connection:
        return _file(connection, file_id, owner)


def read_chunk(database: Database, file_id: str, place: int) -> bytes | None:
    """A piece of a file, from 0 on; None behind its end."""
    which = file_chunks.c.file_id == file_id, file_chunks.c.place == place
    with database.read() as connection:
        data = connection.execute(sa.select(file_chunks.c.data).where(*which)).scalar()
    return None if data is None else bytes(data)


def lines_of(read: Callable[[int], bytes | None], line_bytes_max: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file with their numbers from 1, without blank ones; None for one that is too long, the last."""
    rest, number, place = b"", 0, 0
    while (chunk := read(place)) is not None:
        place += 1
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():
                yield number, line
        if len(rest) > line_bytes_max:
            yield number + 1, None
            return
    if rest.strip():
        yield number + 1, rest


def delete_file(database: Database, file_id: str, owner: str | None) -> None:
    """Raises ApiError ``not_found``; ``conflict`` while a batch reads it."""
    with database.write() as connection:
        _file(connection, file_id, owner)
        running = batches.c.input_file_id == file_id, batches.c.status == "validating"
        if connection.execute(sa.select(batches.c.id).where(*running).limit(1)).first() is not None:
            raise ApiError("conflict", "a batch is reading this file", "wait for it, or cancel it")
        _delete(connection, file_id)


def sweep(database: Database) -> int:
    """Delete some of what was never uploaded to its end, and of which nothing came for long; how many."""
    old = sa.and_(files.c.complete.is_(sa.false()), files.c.created_at_ms < now_ms() - _ABANDONED_MS)
    query = sa.select(files.c.id).where(old).limit(_SWEPT_AT_ONCE)
    with database.write() as connection:
        names = list(connection.execute(query.with_for_update(skip_locked=True)).scalars())
        for name in names:
            _delete(connection, name)
    return len(names)


def _delete(connection: sa.Connection, file_id: str) -> None:
    # First a piece that is being written meanwhile, by whom nobody waits for any more.
    connection.execute(sa.select(files.c.id).where(files.c.id == file_id).with_for_update())
    connection.execute(sa.delete(file_chunks).where(file_chunks.c.file_id == file_id))
    connection.execute(sa.delete(files).where(files.c.id == file_id))


def _file(connection: sa.Connection, file_id: str, owner: str | None) -> File:
    query = sa.select(*_COLUMNS).where(files.c.id == file_id, files.c.complete.is_(sa.true()))
    row = connection.execute(query).mappings().first()
    if row is None or owner not in (None, row["user_id"]):
        raise ApiError("not_found", f"there is no file {file_id!r:.80}", public_code="not_found")
    return File(**row)


def _full(param: str | None) -> ApiError:
    most = f"{USER_FILES_MAX} files and {USER_BYTES_MAX >> 30} GiB at most"
    if param:
        return ApiError("conflict", f"a user's files are {most}", "delete some first", param=param)
    what = f"a user's files and the inputs of open batches are {most}"
    return ApiError("conflict", what, "delete some files, or wait for a batch to end")
