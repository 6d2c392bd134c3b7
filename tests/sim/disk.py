"""One node's disk: the real ``ledger.store`` over SQLite in memory (a file in some seeds), with crashes inside commits.

What a commit wrote stays when the node crashes; what it had not committed is gone. A crash in the middle of a commit is
an exception out of SQLite's n-th statement, as the process that dies there never gets to the next one.
"""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from config.errors import LocalError
from ledger.mark import Mark
from ledger.records import Record
from ledger.schema import migrate
from ledger.store import Store


def _memory(image: bytes = b"") -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    if image:
        connection.deserialize(image)
    return connection


@cache
def _image() -> bytes:
    """A fresh database of no network yet, made once by the real migrations."""
    with closing(_memory()) as connection:
        migrate(connection, ":memory:")
        return connection.serialize()


class Crash(BaseException):
    """The process dies here."""


Fault = Callable[[Sequence[Record]], "tuple[str, int] | None"]
"""Says whether a commit finds the disk ``full``, or is the last one: ``before``, in the ``middle``, ``after``."""


class SimStore(Store):
    """The real store on a disk that outlives it."""

    def __init__(self, disk: "Disk", net: bytes) -> None:
        self._disk = disk
        self._fuse = -1
        super().__init__(disk.path or ":memory:", net)

    def _connect(self, *, read_only: bool = False) -> sqlite3.Connection:
        return super()._connect(read_only=read_only) if self._disk.path else self._disk.memory

    def close(self) -> None:
        """In memory the database stays: it is the disk."""
        if self._disk.path:
            super().close()

    def commit(self, records: Sequence[Record]) -> None:
        """Commit, or die before, in the middle of or right after it."""
        if self is not self._disk.current:
            raise Crash("a process that is dead already wrote")
        place, number = self._disk.fault(records) or ("", 0)
        if place == "full":
            raise LocalError("disk_full", "no room on the simulated disk")
        if place:
            self._disk.current = None  # whatever else this process had begun never gets to its next commit
        if place == "before":
            raise Crash(place)
        self._fuse = number if place == "middle" else -1
        super().commit(records)
        self._disk.wrote(records)
        if place:
            raise Crash(place)

    def _execute(self, writer: Any, rows: dict[str, list[tuple[Any, ...]]]) -> None:
        super()._execute(_Fused(writer, self._fuse) if self._fuse >= 0 else writer, rows)


class _Fused:
    """A connection that dies at a statement."""

    def __init__(self, connection: sqlite3.Connection, fuse: int) -> None:
        self._connection = connection
        self._left = fuse

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def execute(self, sql: str) -> None:
        if sql == "COMMIT":
            raise Crash("middle")
        self._connection.execute(sql)

    def executemany(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        if self._left <= 0:
            raise Crash("middle")
        self._left -= 1
        self._connection.executemany(sql, rows)


class SimMark(Mark):
    """The counter outside the database, in memory: a database put back to an older state does not take it along."""

    def __init__(self, disk: "Disk") -> None:
        super().__init__("unused")
        self._disk = disk

    def _read(self) -> tuple[bytes, int, int] | None:
        return self._disk.marks[-1]

    def _write(self) -> None:
        self._disk.marks.append((self.lineage, self.promises, self.entries))

    def _sync(self) -> None:
        del self._disk.marks[:-1]


class Disk:
    """Holds what a node wrote."""

    def __init__(self, net: bytes, folder: Path | None, name: str) -> None:
        self.net = net
        self.path = str(folder / f"{name}.db") if folder else ""
        self.fault: Fault = lambda records: None
        self.wrote: Callable[[Sequence[Record]], None] = lambda records: None
        self.current: SimStore | None = None
        self.marks: list[tuple[bytes, int, int] | None] = [None]
        """What was written to the mark, from what is synced on."""
        if not folder:
            self.memory = _memory(_image())

    def open(self) -> Store:
        """What a starting process sees."""
        if not self.path and self.memory.in_transaction:
            self.memory.execute("ROLLBACK")
        self.current = None
        store = SimStore(self, self.net)
        self.current = store
        return store

    def cut_power(self, random: Random) -> None:
        """Of what is not synced, the mark's last writes, the latest are lost; commits are synced."""
        del self.marks[random.randint(1, len(self.marks)) :]

    def backup(self) -> bytes:
        """A copy of everything."""
        if not self.path:
            return self.memory.serialize()
        with closing(sqlite3.connect(self.path)) as source, closing(sqlite3.connect(":memory:")) as copy:
            source.backup(copy)
            return copy.serialize()

    def restore(self, image: bytes) -> None:
        """Overwrite everything with an older copy."""
        if not self.path:
            self.memory.close()  # a connection keeps what it has prepared for the old content
            self.memory = _memory(image)
            return
        for tail in ("-wal", "-shm"):
            Path(self.path + tail).unlink(missing_ok=True)
        Path(self.path).write_bytes(image)

    def destroy(self) -> None:
        """Forget everything."""
        self.current = None
        if not self.path:
            self.memory.close()
