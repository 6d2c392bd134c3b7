"""Bring the accounts database to the schema of this version, or refuse.

Invariants:
1. A database of a newer RiOS is refused before anything is written.
2. All steps of a migration happen in one transaction; two gateways that start together take turns.
3. An existing SQLite file is copied beside itself before it is changed.

Alembic is only imported when there is something to do, so a running gateway does not carry it in memory.
"""

import sqlite3
from pathlib import Path

import sqlalchemy as sa

from config.errors import ConfigError
from gateway.db.session import Database

HEAD = "0012"
"""The newest revision in ``migrations/versions``."""

_LOCK = 0x52694F53
"""Key of the PostgreSQL advisory lock under which a migration runs."""


def migrate(database: Database) -> None:
    """Create or upgrade the schema.

    Raises ConfigError if the database was written by a newer RiOS, LocalError if it cannot be reached.
    """
    with database.read() as connection:
        current = current_revision(connection)
    if current == HEAD:
        return
    _refuse_newer(current, database.place)
    if current and not database.is_postgresql:
        _back_up(Path(database.place), current)
    with database.write() as connection:
        if database.is_postgresql:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        _upgrade(connection, database.place)


def current_revision(connection: sa.Connection) -> str:
    """The schema a database has now; empty for a new one."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return ""
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() or ""


def _refuse_newer(current: str, place: str) -> None:
    if current > HEAD:
        raise ConfigError(
            "config",
            f"the accounts database {place} has schema {current}, and this RiOS only knows up to {HEAD}",
            "install the newer RiOS again, or restore the backup made before the upgrade",
        )


def _back_up(path: Path, revision: str) -> None:
    source, target = sqlite3.connect(path), sqlite3.connect(path.with_name(f"{path.name}.before-{revision}"))
    try:
        source.backup(target)
    finally:
        source.close()
        target.close()


def _upgrade(connection: sa.Connection, place: str) -> None:
    from alembic import command  # noqa: PLC0415 - see the file docstring
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        text = f"the accounts database {place} cannot be brought to schema {HEAD}: {error}"
        raise ConfigError("config", text, "see that gateway.database names a database of RiOS") from error
