"""The migrations, the tables that queries use, and the revision the code expects are one."""

import warnings
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import gateway.db.audit
import gateway.db.billing
import gateway.db.identity
import gateway.db.jobs
import gateway.db.migrate as migrate_module
import gateway.db.swarm  # noqa: F401 - its tables
from config.errors import ConfigError
from gateway import books
from gateway.books import Batch
from gateway.db.migrate import HEAD, migrate
from gateway.db.models import metadata
from gateway.db.session import open_database


def test_head_is_the_newest_revision() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrate_module.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_migrations_make_the_tables_of_the_models(tmp_path: Path) -> None:
    database = open_database("", tmp_path)
    migrate(database)
    with database.read() as connection, warnings.catch_warnings():
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        for table in metadata.tables.values():
            checks = {check["name"] for check in sa.inspect(connection).get_check_constraints(table.name)}
            expected = {c.name for c in table.constraints if isinstance(c, sa.CheckConstraint)}
            assert checks == expected
    database.close()


def test_an_older_database_is_copied_before_it_is_changed(tmp_path: Path) -> None:
    database = open_database("", tmp_path)
    with database.write() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        connection.execute(sa.text("CREATE TABLE kept (text VARCHAR)"))
        connection.execute(sa.text("INSERT INTO kept VALUES ('precious')"))
        connection.execute(sa.text("INSERT INTO alembic_version VALUES ('0000')"))
    # There never was such a revision, so there is no way up from it.
    with pytest.raises(ConfigError, match="cannot be brought to schema"):
        migrate(database)
    copy = sa.create_engine(f"sqlite:///{tmp_path / 'gateway.db.before-0000'}")
    with copy.connect() as connection:
        assert connection.execute(sa.text("SELECT text FROM kept")).scalar() == "precious"
    copy.dispose()
    database.close()


def test_a_database_of_the_version_before_keeps_what_it_holds(tmp_path: Path) -> None:
    database = open_database("", tmp_path)
    config = Config()
    config.set_main_option("script_location", str(Path(migrate_module.__file__).parent / "migrations"))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(sa.text("INSERT INTO users VALUES ('u', 'ada', FALSE, 1)"))
        connection.execute(sa.text("INSERT INTO accounts VALUES ('user:u', 'u', 500, 7)"))
        columns = "id, instance, account_id, user_id, request_id, endpoint, model, prompt_tokens, completion_tokens, "
        columns += "input_price, output_price, microcredits, created_at_ms, updated_at_ms"
        values = "'r', 'here', 'user:u', 'u', 'x', 'chat.completions', 'tiny', 5, 1, 1000000, 1000000, 7, 1, 1"
        connection.execute(sa.text(f"INSERT INTO reservations ({columns}) VALUES ({values})"))
    migrate(database)
    with database.read() as connection:
        assert migrate_module.current_revision(connection) == HEAD
    (left,) = books.find_abandoned(database, "here")
    assert (left.completion_tokens, left.microcredits) == (1, 6)
    books.write_batch(database, Batch(settle=[left]))
    with database.read() as connection:
        assert connection.execute(sa.text("SELECT balance, reserved FROM accounts WHERE id = 'user:u'")).one() == (
            494,
            0,
        )
    assert (tmp_path / "gateway.db.before-0001").exists()
    database.close()
