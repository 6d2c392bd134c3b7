"""Connections to the accounts database: SQLite in the data folder, or PostgreSQL by a DSN.

Owns the pool, the pragmas and the translation of database errors; nothing outside this file sees a driver exception
but :class:`sqlalchemy.exc.IntegrityError`. All calls block: the gateway makes them in threads.

Invariants: SQLite runs with WAL, ``synchronous=FULL`` (an acknowledged commit survives a power loss) and foreign keys;
a write transaction takes SQLite's write lock at its start, so it never fails halfway for want of it.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from config.errors import ConfigError, LocalError
from gateway.errors import StoreError

POOL_SIZE = 5
"""One is the till's writer's."""
_OVERFLOW = 1
"""For a pass over a batch's file, beside the till's threads."""
_BUSY_MS = 5000
_WAL_AGAIN_SECONDS = 0.01
_CONNECT_SECONDS = 5
_STATEMENT_MS = 10_000
_SYNCHRONOUS = "rios_synchronous"
"""How a pooled connection to SQLite is set now."""
_CLOCK_OFF_MS = 5_000
"""A clock that is wrong by more than this is told of."""
_ASK_TIME = "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)"
_REPLICA_REST_SECONDS = 5.0
"""So long nobody asks a replica again that did not answer."""

_logger = logging.getLogger("rios.gateway")

T = TypeVar("T")


class Database:
    """An open pool. ``place`` names it for people (never with a password)."""

    def __init__(self, engine: sa.Engine, place: str, replica: "Database | None" = None) -> None:
        self.engine = engine
        self.place = place
        self._replica = replica
        self._replica_rests_until = 0.0
        self._clock: tuple[int, float] | None = None
        """What PostgreSQL's clock said, and this host's monotonic seconds then."""
        self._clock_is_off = False
        if self.is_postgresql:
            sa.event.listen(engine, "connect", self._on_connect)

    @contextmanager
    def write(self, *, synced: bool = True) -> Iterator[sa.Connection]:
        """A transaction that commits at the end of the block, durably. Not ``synced``: others see it at once and a
        killed process does not undo it, but a power cut may until the next one that is synced."""
        with self._mapped(), self.engine.connect() as connection, connection.begin():
            if not self.is_postgresql:
                _begin_sqlite(connection, synced=synced)
            elif not synced:
                connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads; it never waits for a writer."""
        with self._mapped(), self.engine.connect() as connection, connection.begin():
            if not self.is_postgresql:
                _begin_sqlite(connection, reads=True)
            yield connection

    def look(self, work: Callable[[sa.Connection], T]) -> T:
        """What ``work`` reads, which may be a moment old: from the replica if there is one and it answers."""
        if self._replica is not None and time.monotonic() >= self._replica_rests_until:
            try:
                with self._replica.read() as connection:
                    return work(connection)
            except LocalError as error:
                self._replica_rests_until = time.monotonic() + _REPLICA_REST_SECONDS
                _logger.warning("the replica is left out for a while: %s", error)
        with self.read() as connection:
            return work(connection)

    def ping(self) -> None:
        """See that it answers. Raises LocalError."""
        with self.read() as connection:
            connection.execute(sa.select(1))

    def take_time(self, connection: sa.Connection) -> None:
        """Let the statements of this transaction take as long as they do: they read whole tables."""
        if self.is_postgresql:
            connection.exec_driver_sql("SET LOCAL statement_timeout TO 0")

    def now_ms(self) -> int:
        """Unix time in milliseconds by the clock that all gateways of the database share: PostgreSQL's, as it was asked
        last and as time went on since; with SQLite this host's. Asks nobody but at first."""
        if not self.is_postgresql:
            return time.time_ns() // 1_000_000
        if self._clock is None:
            self.ping()
        assert self._clock is not None  # every new connection sets it
        then_ms, then = self._clock
        return then_ms + int((time.monotonic() - then) * 1000)

    def set_clock(self, connection: sa.Connection) -> None:
        """Ask PostgreSQL for the time again, for what :meth:`now_ms` tells."""
        if self.is_postgresql:
            asked_at = time.monotonic()
            self._set_clock(int(connection.exec_driver_sql(_ASK_TIME).scalar_one()), asked_at)

    def _on_connect(self, raw: Any, record: object) -> None:  # noqa: ANN401 - a driver's connection
        asked_at = time.monotonic()
        with raw.cursor() as cursor:
            cursor.execute(_ASK_TIME)
            self._set_clock(int(cursor.fetchone()[0]), asked_at)
        raw.rollback()

    def _set_clock(self, theirs_ms: int, asked_at: float) -> None:
        self._clock = theirs_ms, (asked_at + time.monotonic()) / 2
        off_ms, was_off = time.time_ns() // 1_000_000 - theirs_ms, self._clock_is_off
        self._clock_is_off = abs(off_ms) > _CLOCK_OFF_MS
        if self._clock_is_off and not was_off:
            _logger.warning("the clocks of this host and of %s are %d ms apart: set them", self.place, abs(off_ms))

    @property
    def is_postgresql(self) -> bool:
        """Which of the two it is."""
        return self.engine.dialect.name == "postgresql"

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()
        if self._replica is not None:
            self._replica.close()

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError:
            raise
        except sa.exc.SQLAlchemyError as error:
            raise _translate(error, self.place) from error


def open_database(dsn: str, data_dir: Path, replica: str = "") -> Database:
    """Open the pool, and that of a read replica; the first connection is made by the first transaction.

    Raises ConfigError for a DSN that is wrong or holds a password, LocalError if the data folder cannot be used.
    """
    if not dsn:
        if replica:
            raise ConfigError("config", "gateway.database_replica is set without gateway.database", "set both, or none")
        return _open_sqlite(data_dir / "gateway.db")
    other = _open_postgresql(replica, "gateway.database_replica") if replica else None
    return _open_postgresql(dsn, "gateway.database", other)


def _open_sqlite(path: Path) -> Database:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise LocalError("local", f"cannot open the accounts database {path}: {error.strerror}") from error
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        pool_size=POOL_SIZE,
        pool_use_lifo=True,  # the one used last still has its pages in memory
        max_overflow=_OVERFLOW,
        connect_args={"timeout": _BUSY_MS / 1000, "check_same_thread": False},
    )
    sa.event.listen(engine, "connect", _on_sqlite_connect)
    return Database(engine, str(path))


def _on_sqlite_connect(connection: sqlite3.Connection, record: object) -> None:
    # The driver's own implicit BEGIN would leave DDL outside transactions; _begin_sqlite writes them itself.
    connection.isolation_level = None
    _switch_to_wal(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """A new file becomes one with WAL by its first connection. SQLite refuses that, without waiting, while another
    connection is at the file; so where two start at once, one of them tries again."""
    deadline = time.monotonic() + _BUSY_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_WAL_AGAIN_SECONDS)


def _begin_sqlite(connection: sa.Connection, *, reads: bool = False, synced: bool = True) -> None:
    raw = connection.connection.driver_connection  # SQLAlchemy's way costs more than the statements do
    assert isinstance(raw, sqlite3.Connection)
    try:
        if reads:
            raw.execute("BEGIN")
            return
        synchronous = "FULL" if synced else "NORMAL"
        if connection.info.get(_SYNCHRONOUS, "FULL") != synchronous:
            raw.execute(f"PRAGMA synchronous={synchronous}")
            connection.info[_SYNCHRONOUS] = synchronous
        raw.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        raise sa.exc.OperationalError("BEGIN", None, error) from error


def _open_postgresql(dsn: str, setting: str, replica: Database | None = None) -> Database:
    url = _parse_dsn(dsn, setting)
    arguments: dict[str, Any] = {
        "connect_timeout": _CONNECT_SECONDS,
        "application_name": "rios-gateway",
        "options": f"-c statement_timeout={_STATEMENT_MS} -c lock_timeout={_BUSY_MS}",
    }
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=POOL_SIZE,
        max_overflow=_OVERFLOW,
        pool_pre_ping=True,
        connect_args=arguments,
    )
    return Database(engine, url.render_as_string(hide_password=True), replica)


def _parse_dsn(dsn: str, setting: str) -> sa.URL:
    hint = "write postgresql://user@host:port/name and put the password into PGPASSWORD or a passfile"
    try:
        url = sa.make_url(dsn)
    except sa.exc.ArgumentError as error:
        raise ConfigError("config", f"{setting} is not a database address", hint) from error
    if url.drivername not in ("postgresql", "postgres"):
        raise ConfigError("config", f"{setting} names {url.drivername!r}, which is not PostgreSQL", hint)
    if url.password is not None or "password" in url.query:
        raise ConfigError("config", f"{setting} holds a password, and settings must not hold secrets", hint)
    return url


def _translate(error: sa.exc.SQLAlchemyError, place: str) -> StoreError:
    """A driver's error as one of RiOS's: full disk, unreachable, or broken."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    text = " ".join(str(cause).split())
    lowered = text.lower()
    code, what, hint, public = "local", f"refused a statement: {text}", "", "cannot do this"
    if "disk is full" in lowered or "no space left" in lowered:
        code, what, hint, public = "disk_full", "has no space left on its disk", "free some space", "has no space left"
    elif "malformed" in lowered or "not a database" in lowered:
        what, hint, public = f"is damaged: {text}", "restore it from a backup", "is damaged"
    elif isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError):
        code, what, hint, public = "unavailable", f"cannot be used: {text}", "see that it runs", "does not answer"
    return StoreError(code, f"the accounts database {place} {what}", hint, public=f"the accounts database {public}")
