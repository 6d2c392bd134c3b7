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


@pytest.fixture(scope="module", autouse=True)
def _end_chromium() -> Iterator[None]:
    """A module's tests share a browser; where none was used, none was started."""
    yield
    rig = sys.modules.get("browser_rig")
    if rig is not None and rig.chromium.cache_info().currsize:
        rig.chromium().close()
        rig.chromium.cache_clear()


@pytest.fixture
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passwords are hashed the same way with the least of memory and passes, for tests that hash many."""
    from argon2 import PasswordHasher

    from gateway.identity import passwords

    cheap = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    monkeypatch.setattr(passwords, "_hasher", lambda: cheap)
    monkeypatch.setattr(passwords, "_NOBODYS_HASH", cheap.hash("nobody's"))


@pytest.fixture(scope="session")
def running() -> Iterator[object]:
    from oidc_rig import running_provider

    with running_provider() as found:
        yield found


@pytest.fixture
def provider(running: object) -> object:
    """Another provider to sign in with (``oidc_rig.Provider``), honest until it is told to lie."""
    running.lie()  # type: ignore[attr-defined]
    return running


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    """The ``gateway.database`` setting: SQLite in the data folder, then a fresh PostgreSQL database."""
    if request.param == "sqlite":
        return ""
    from postgresql import new_database

    return new_database(request.getfixturevalue("postgresql"))
