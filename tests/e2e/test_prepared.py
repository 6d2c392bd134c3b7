"""Prepared statements: what they answer, on both kinds of database, and that they fail like any other statement."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from config.errors import LocalError
from gateway.db.migrate import migrate
from gateway.db.models import accounts, postings
from gateway.db.prepared import Among, Prepared
from gateway.db.session import Database, open_database

ADD = Prepared(sa.insert(accounts))
FIND = Among(lambda names: sa.select(accounts.c.id, accounts.c.balance).where(accounts.c.id.in_(names)))
TAKE = Among(lambda names: sa.delete(accounts).where(accounts.c.id.in_(names)).returning(accounts.c.id))


@pytest.fixture
def opened(tmp_path: Path, database: str):
    found = open_database(database, tmp_path)
    migrate(found)
    with found.write() as connection:
        ADD.run(connection, [account(f"n{number}", number) for number in range(9)])
        ADD.run(connection, [account("one", -(2**62))])
    yield found
    found.close()


def account(name: str, balance: int, reserved: int = 0) -> dict[str, object]:
    return {"id": name, "user_id": None, "balance": balance, "reserved": reserved}


def test_lists_of_every_length_find_what_they_name_once(opened: Database) -> None:
    with opened.read() as connection:
        for count in (0, 1, 2, 3, 5, 9):
            names = [f"n{number}" for number in range(count)]
            assert sorted(FIND.rows(connection, names)) == [(name, n) for n, name in enumerate(names)]
        assert FIND.rows(connection, ["nobody", "one"]) == [("one", -(2**62))]


def test_what_is_taken_is_told_and_gone(opened: Database) -> None:
    with opened.write() as connection:
        assert sorted(TAKE.rows(connection, ["n1", "nobody", "n3"])) == [("n1",), ("n3",)]
        assert TAKE.rows(connection, ["n1"]) == []


@pytest.mark.parametrize("rows", [[account("one", 0)], [account("new", 0), account("one", 0)], [account("x", 0, -1)]])
def test_what_the_database_refuses_undoes_the_transaction(opened: Database, rows: list) -> None:
    def add() -> None:
        with opened.write() as connection:
            ADD.run(connection, [account("before", 1)])
            ADD.run(connection, rows)

    with pytest.raises(sa.exc.IntegrityError):
        add()
    with opened.read() as connection:
        assert FIND.rows(connection, ["before", "new", "x"]) == []


def test_other_failures_are_told_as_the_databases(opened: Database) -> None:
    missing = Prepared(sa.insert(sa.Table("nowhere", sa.MetaData(), sa.Column("id", sa.Integer))))
    with pytest.raises(LocalError, match="accounts database"), opened.write() as connection:
        missing.run(connection, [{"id": 1}])


def test_a_number_that_no_column_holds_fails_like_any_other(opened: Database) -> None:
    with pytest.raises(LocalError, match="refused"), opened.write() as connection:
        ADD.run(connection, [account("new", 1 << 70)])


def test_who_listens_for_statements_hears_of_them(opened: Database) -> None:
    heard: list[tuple[str, bool]] = []

    def hear(_c: object, _k: object, statement: str, _p: object, _x: object, many: bool) -> None:
        heard.append((statement.split()[0], many))

    sa.event.listen(opened.engine, "before_cursor_execute", hear)
    with opened.write() as connection:
        FIND.rows(connection, ["one"])
        Prepared(sa.delete(postings)).run(connection, [{}, {}])
    sa.event.remove(opened.engine, "before_cursor_execute", hear)
    assert [each for each in heard if each[0] != "SET"] == [("SELECT", False), ("DELETE", True)]
