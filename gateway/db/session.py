"""Connections to the accounts database: SQLite in the data folder, or PostgreSQL by a DSN.

Owns the pool, the pragmas and the translation of database errors; nothing outside this file sees a driver exception
but :class:`sqlalchemy.exc.IntegrityError`. All calls block: the gateway makes them in threads.

Invariants: SQLite runs with WAL, ``synchronous=FULL`` (an acknowledged commit survives a power loss) and foreign keys;
a write transaction takes SQLite's write lock at its start, so it never fails halfway for want of it.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from config.errors import ConfigError, LocalError, RiosError

POOL_SIZE = 4
_BUSY_MS = 5000
_CONNECT_SECONDS = 5
_STATEMENT_MS = 10_000
_READ_ONLY = "rios_read_only"


class Database:
    """An open pool. ``place`` names it for people (never with a password)."""

    def __init__(self, engine: sa.Engine, place: str) -> None:
        self.engine = engine
        self.place = place

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that commits at the end of the block, durably."""
        with self._mapped(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads; it never waits for a writer."""
        with self._mapped(), self.engine.connect() as connection:
            yield connection.execution_options(**{_READ_ONLY: True})

    def ping(self) -> None:
        """See that it answers. Raises LocalError."""
        with self.read() as connection:
            connection.execute(sa.select(1))

    @property
    def is_postgresql(self) -> bool:
        """Which of the two it is."""
        return self.engine.dialect.name == "postgresql"

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError:
            raise
        except sa.exc.SQLAlchemyError as error:
            raise _translate(error, self.place) from error


def open_database(dsn: str, data_dir: Path) -> Database:
    """Open the pool; the first connection is made by the first transaction.

    Raises ConfigError for a DSN that is wrong or holds a password, LocalError if the data folder cannot be used.
    """
    return _open_postgresql(dsn) if dsn else _open_sqlite(data_dir / "gateway.db")


def _open_sqlite(path: Path) -> Database:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise LocalError("local", f"cannot open the accounts database {path}: {error.strerror}") from error
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        pool_size=POOL_SIZE,
        max_overflow=0,
        connect_args={"timeout": _BUSY_MS / 1000, "check_same_thread": False},
    )
    sa.event.listen(engine, "connect", _on_sqlite_connect)
    sa.event.listen(engine, "begin", _on_sqlite_begin)
    return Database(engine, str(path))


def _on_sqlite_connect(connection: sqlite3.Connection, record: object) -> None:
    # The driver's own implicit BEGIN would leave DDL outside transactions; _on_sqlite_begin writes them itself.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _on_sqlite_begin(connection: sa.Connection) -> None:
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _open_postgresql(dsn: str) -> Database:
    url = _parse_dsn(dsn)
    arguments: dict[str, Any] = {
        "connect_timeout": _CONNECT_SECONDS,
        "application_name": "rios-gateway",
        "options": f"-c statement_timeout={_STATEMENT_MS} -c lock_timeout={_BUSY_MS}",
    }
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_pre_ping=True,
        connect_args=arguments,
    )
    return Database(engine, url.render_as_string(hide_password=True))


def _parse_dsn(dsn: str) -> sa.URL:
    hint = "write postgresql://user@host:port/name and put the password into PGPASSWORD or a passfile"
    try:
        url = sa.make_url(dsn)
    except sa.exc.ArgumentError as error:
        raise ConfigError("config", "gateway.database is not a database address", hint) from error
    if url.drivername not in ("postgresql", "postgres"):
        raise ConfigError("config", f"gateway.database names {url.drivername!r}, which is not PostgreSQL", hint)
    if url.password is not None or "password" in url.query:
        raise ConfigError("config", "gateway.database holds a password, and settings must not hold secrets", hint)
    return url


def _translate(error: sa.exc.SQLAlchemyError, place: str) -> RiosError:
    """A driver's error as one of RiOS's: full disk, unreachable, or broken."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    text = " ".join(str(cause).split())
    lowered = text.lower()
    if "disk is full" in lowered or "no space left" in lowered:
        return LocalError("disk_full", f"the disk of the accounts database {place} is full", "free some space")
    if "malformed" in lowered or "not a database" in lowered:
        return LocalError("local", f"the accounts database {place} is damaged: {text}", "restore it from a backup")
    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError):
        return LocalError("unavailable", f"the accounts database {place} cannot be used: {text}", "see that it runs")
    return LocalError("local", f"the accounts database {place} refused a statement: {text}")
