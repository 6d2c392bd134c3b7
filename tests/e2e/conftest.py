"""Fixtures of the end-to-end tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside this file


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A running PostgreSQL; its DSN with ``{name}`` for the database."""
    from postgresql import running_cluster

    try:
        cluster = running_cluster()
        dsn = cluster.__enter__()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield dsn
    cluster.__exit__(None, None, None)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    """The ``gateway.database`` setting: SQLite in the data folder, then a fresh PostgreSQL database."""
    if request.param == "sqlite":
        return ""
    from postgresql import new_database

    return new_database(request.getfixturevalue("postgresql"))
