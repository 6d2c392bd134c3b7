"""Connections to the accounts database: SQLite in the data folder, or PostgreSQL by a DSN.

Owns the pool, the pragmas and the translation of database errors; nothing outside this file sees a driver exception
but :class:`sqlalchemy.exc.IntegrityError`. All calls block: the gateway makes them in threads.

Invariants: SQLite runs with WAL, ``synchronous=FULL`` (an acknowledged commit survives a power loss) and foreign keys;
a write transaction takes SQLite's write lock at its start, so it never fails halfway for want of it. This process's own
writers wait for each other before that: SQLite lets those sleep that find its lock taken, some of them for long.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from config.errors import ConfigError, LocalError, RiosError
from gateway.errors import StoreError

POOL_SIZE = 5
"""One is the till's writer's."""
_OVERFLOW = 2
"""For a pass over a batch's file and a GraphQL query, beside the till's threads."""
_BUSY_MS = 5000
_AGAIN_SECONDS = 0.002
"""Between looks whether another process has ended its transaction."""
_KEPT_SECONDS = 5.0
"""After so long a rest a kept connection may be dead."""
_PAGE_BYTES = 1024
"""Of a new SQLite file. A commit writes every page that it touched whole, and the money of an answer, a few rows of a
hundred bytes, is on a dozen of them: four times as much with SQLite's usual size."""
_LOG_BYTES = 32 << 20
"""When whoever writes brings SQLite's log into the file: the till has done it before, if it is in use."""
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


class Kept:
    """One connection for many transactions, one after the other: to take one out of the pool and put it back costs as
    much as a small transaction, and SQLite reads anew what another connection wrote. After an error, or with PostgreSQL
    a rest, the next transaction has another one.

    SQLite waits for nobody in it (:meth:`Database.write` does) and never brings its log into the file by itself.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._is_file = engine.dialect.name == "sqlite"
        self._connection: sa.Connection | None = None
        self._used_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        """As :meth:`sqlalchemy.Engine.connect`."""
        now = time.monotonic()
        if self._connection is not None and now - self._used_at > _KEPT_SECONDS and not self._is_file:
            self.close()  # the pool looks first whether one still works
        connection = self._connection or self._open()
        self._used_at = now
        try:
            yield connection
        except BaseException as error:
            if not _left_it_sound(error):
                self.close()
            raise

    def _open(self) -> sa.Connection:
        connection = self._engine.connect()
        try:
            if self._is_file:
                connection.detach()  # nobody else wants it as it is set
                for pragma in ("synchronous=FULL", "busy_timeout=0", "wal_autocheckpoint=0"):
                    connection.exec_driver_sql(f"PRAGMA {pragma}").close()
                connection.info[_SYNCHRONOUS] = "FULL"  # who takes its place in the pool may clear what it was told
                connection.rollback()
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def close(self, *, for_good: bool = False) -> None:
        """Give it up; ``for_good``: nobody else shall have it, as its pool may be closed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if for_good and not connection.closed and not self._is_file:
                connection.detach()
            connection.close()


class Database:
    """An open pool. ``place`` names it for people (never with a password)."""

    def __init__(self, engine: sa.Engine, place: str, replica: "Database | None" = None) -> None:
        self.engine = engine
        self.is_postgresql = engine.dialect.name == "postgresql"
        """Which of the two it is."""
        self.place = place
        self._replica = replica
        self._replica_rests_until = 0.0
        self._clock: tuple[int, float] | None = None
        """What PostgreSQL's clock said, and this host's monotonic seconds then."""
        self._clock_is_off = False
        self._turn = threading.Lock()
        if self.is_postgresql:
            sa.event.listen(engine, "connect", self._on_connect)

    @contextmanager
    def write(self, *, synced: bool = True, kept: Kept | None = None, waits: bool = True) -> Iterator[sa.Connection]:
        """A transaction that commits at the end of the block, durably. Not ``synced``: others see it at once and a
        killed process does not undo it, but a power cut may until the next one that is synced. ``kept``: on that
        connection. Not ``waits``: LocalError at once if another writes, or ``kept`` has no connection yet."""
        with self._mapped(), self._turns(waits=waits):
            if not waits and kept is not None and not kept.is_open:
                raise LocalError("unavailable", "there is no connection to the accounts database yet")
            with (kept or self.engine).connect() as connection, connection.begin():
                if not self.is_postgresql:
                    _begin_sqlite(connection, synced=synced, waits=waits)
                elif not synced:
                    connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")
                yield connection

    @contextmanager
    def _turns(self, *, waits: bool = True) -> Iterator[None]:
        """One writer after the other. None waits for longer than SQLite would have it wait."""
        if self.is_postgresql:
            yield
            return
        if not self._turn.acquire(timeout=_BUSY_MS / 1000 if waits else 0):
            raise LocalError("unavailable", f"the accounts database {self.place} is being written", "try again later")
        try:
            yield
        finally:
            self._turn.release()

    def release(self, kept: Kept, *, for_good: bool) -> None:
        """Close a kept connection that another thread may be using."""
        with self._turns():
            kept.close(for_good=for_good)

    def is_written_now(self) -> bool:
        """Whether another thread of this process writes into SQLite."""
        return self._turn.locked()

    def shorten_log(self, kept: Kept) -> bool:
        """Bring what SQLite's log holds into the file, if nobody is in the way. Whether all of it: then the log begins
        anew with the next transaction, which waits for the disk even if it is not synced."""
        with self._mapped(), self._turns(), kept.connect() as connection:
            busy, held, brought = connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)").one()
            connection.rollback()
        return not busy and held == brought

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
    connection.execute(f"PRAGMA page_size={_PAGE_BYTES}").close()  # a file that has pages keeps their size
    _switch_to_wal(connection)
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    for pragma in ("synchronous=FULL", "foreign_keys=ON", f"wal_autocheckpoint={_LOG_BYTES // page_bytes}"):
        connection.execute(f"PRAGMA {pragma}").close()


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """A new file becomes one with WAL by its first connection. SQLite refuses that, without waiting, while another
    connection is at the file; so where two start at once, one of them tries again."""
    _when_free(connection, "PRAGMA journal_mode=WAL")


def _begin_sqlite(connection: sa.Connection, *, reads: bool = False, synced: bool = True, waits: bool = True) -> None:
    raw = connection.connection.dbapi_connection  # SQLAlchemy's way costs more than the statements do
    assert isinstance(raw, sqlite3.Connection)
    try:
        if reads:
            raw.execute("BEGIN")
            return
        synchronous = "FULL" if synced else "NORMAL"
        if connection.info.get(_SYNCHRONOUS, "FULL") != synchronous:
            raw.execute(f"PRAGMA synchronous={synchronous}")
            connection.info[_SYNCHRONOUS] = synchronous
        _when_free(raw, "BEGIN IMMEDIATE", _BUSY_MS / 1000 if waits else 0.0)
    except sqlite3.Error as error:
        raise sa.exc.OperationalError("BEGIN", None, error) from error


def _when_free(connection: sqlite3.Connection, statement: str, seconds: float = _BUSY_MS / 1000) -> None:
    """Run it when no other process is in the way."""
    ends = time.monotonic() + seconds
    while True:
        try:
            connection.execute(statement).close()
            return
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() >= ends:
                raise
            time.sleep(_AGAIN_SECONDS)


def _left_it_sound(error: BaseException) -> bool:
    """Whether a connection is as good as before: we refused something, or another process wrote and nothing began."""
    return isinstance(error, RiosError) or (isinstance(error, sa.exc.OperationalError) and _is_busy(error.orig))


def _is_busy(error: BaseException | None) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


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
