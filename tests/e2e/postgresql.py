"""A real PostgreSQL for tests: Debian's packages as a throw-away cluster under an unprivileged user, or pgserver."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

_START_SECONDS = 30.0


@contextmanager
def running_cluster() -> Iterator[str]:
    """A socket folder and user of a running cluster as the query part of a DSN's beginning: format it with a name.

    Raises RuntimeError with the reason if none can run here.
    """
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if binaries:
        with _debian(binaries[-1].parent) as dsn:
            yield dsn
        return
    with _pgserver() as dsn:
        yield dsn


@contextmanager
def _debian(binaries: Path) -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="rios-pg-"))
    user = _unprivileged()
    if user:
        os.chown(folder, user["user"], user["group"])
    data = folder / "data"
    try:
        initdb = [binaries / "initdb", "-D", data, "-U", "rios", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(initdb, check=True, cwd=folder, capture_output=True, **user)
        command = [binaries / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-F"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **user)
        try:
            dsn = f"postgresql://rios@/{{name}}?host={folder}"
            _wait(dsn, process)
            yield dsn
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait()
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"PostgreSQL does not start here: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _pgserver() -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It complains about a missing XDG_RUNTIME_DIR.
            import pgserver
    except ImportError as error:
        raise RuntimeError("neither Debian's postgresql nor pgserver is installed") from error
    folder = Path(tempfile.mkdtemp(prefix="rios-pg-"))
    server = pgserver.get_server(folder / "data", cleanup_mode="delete")
    try:
        host = server.get_uri().partition("host=")[2]
        yield f"postgresql://postgres@/{{name}}?host={host}"
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def new_database(dsn: str) -> str:
    """A fresh database of a running cluster; its DSN."""
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(dsn.format(name="postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return dsn.format(name=name)


def _unprivileged() -> dict[str, int]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid}
    raise RuntimeError("root needs a user postgres or nobody to run PostgreSQL as")


def _wait(dsn: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            psycopg.connect(dsn.format(name="postgres")).close()
            return
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"PostgreSQL does not start here: {error}") from error
            time.sleep(0.05)
