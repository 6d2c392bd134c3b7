"""Statements of the hot path: SQLAlchemy writes them, once for each kind of database, and the driver runs them.

On the way from a statement to the driver SQLAlchemy spends several times what SQLite takes to run it, and an answer
needs a dozen. Owns that way alone: connection, transaction and what becomes of errors are as for any other statement,
and who listens for ``before_cursor_execute`` hears of these too. All raise :class:`sqlalchemy.exc.DBAPIError`.

Values go to the driver, and come from it, as they are: text, integers, bytes, and nothing that needs a conversion.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

_SQLITE = SQLiteDialect_pysqlite(paramstyle="named")
"""Takes parameters by their names, as psycopg does."""

Row = tuple[Any, ...]


class Prepared:
    """A statement with named parameters. An INSERT without values takes every column of its table."""

    def __init__(self, statement: sa.ClauseElement) -> None:
        self._statement = statement
        self._texts: dict[str, str] = {}

    def run(self, connection: sa.Connection, rows: Sequence[Mapping[str, object]]) -> None:
        """Run it with each row of parameters; at least one."""
        text = self._texts.get(connection.dialect.name)
        if text is None:
            text = self._texts[connection.dialect.name] = _written(self._statement, connection.dialect)
        _execute(connection, text, rows)


class Among:
    """A statement about the rows whose names are in a list: made from that parameter, which is its only one."""

    def __init__(self, statement_of: Callable[[sa.BindParameter[Any]], sa.ClauseElement]) -> None:
        self._statement_of = statement_of
        self._texts: dict[tuple[str, int], str] = {}

    def rows(self, connection: sa.Connection, names: Sequence[str]) -> list[Row]:
        """What it answers."""
        if not names:
            return []
        count = 1 << (len(names) - 1).bit_length()  # so that there are few texts: other lists repeat their last
        kind = (connection.dialect.name, count)
        text = self._texts.get(kind)
        if text is None:
            listed: sa.BindParameter[Any] = sa.bindparam("names", [""] * count, expanding=True)
            text = self._texts[kind] = _written(self._statement_of(listed), connection.dialect)
        given = [*names, *[names[-1]] * (count - len(names))]
        return _execute(connection, text, [{f"names_{n}": name for n, name in enumerate(given, 1)}])


def _written(statement: sa.ClauseElement, dialect: sa.Dialect) -> str:
    dialect = _SQLITE if dialect.name == _SQLITE.name else dialect
    return str(statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True}))


def _execute(connection: sa.Connection, text: str, given: Sequence[Mapping[str, object]]) -> list[Row]:
    many = len(given) > 1
    raw: Any = connection.connection.dbapi_connection
    cursor = raw.cursor()
    try:
        for hear in connection.dispatch.before_cursor_execute:
            hear(connection, cursor, text, given if many else given[0], None, many)
        if many:
            cursor.executemany(text, given)
            return []
        cursor.execute(text, given[0])
        return list(cursor.fetchall()) if cursor.description else []
    except connection.dialect.loaded_dbapi.Error as error:
        raise sa.exc.DBAPIError.instance(text, None, error, connection.dialect.loaded_dbapi.Error) from error
    except OverflowError as error:  # SQLite's driver says it so
        raise sa.exc.DataError(text, None, error) from error
    finally:
        cursor.close()
