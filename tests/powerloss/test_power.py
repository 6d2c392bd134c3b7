"""Power loss: what was acknowledged is on the disk when the power goes.

The database stands on an ext4 of its own, in a file behind a loop device. What the writer has not synced is in the
kernel's memory only, not in that file; so a copy of the file, taken while the writer is stopped, is the disk as a power
cut would leave it. The copy is mounted, which replays its journal as a boot does, and the ledger on it is opened: every
acknowledged entry and vote must be there, and all of it must verify. A run with ``synchronous=NORMAL`` shows that the
rig sees losses. Needs root and loop devices; ``POWER_ROUNDS`` (1; ``make powerloss``: 50).
"""

import os
import random
import selectors
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from config.errors import RiosError
from ledger.core.objects import Entry
from ledger.store import Store
from ledger.verify import verify_file
from tests.unit.ledger.ledger_kit import Maker

ROUNDS = int(os.environ.get("POWER_ROUNDS", "1"))
IMAGE_MB = 48
ROUND_SECONDS = 1.5
FOLDER = Path(__file__).resolve().parents[2]


def _run(*words) -> bool:
    return subprocess.run([str(word) for word in words], capture_output=True, check=False).returncode == 0


@contextmanager
def mounted(image: Path, at: Path):
    at.mkdir(exist_ok=True)
    if not _run("mount", "-o", "loop,data=ordered", image, at):
        pytest.skip("loop devices cannot be mounted here")
    try:
        yield at
    finally:
        for _ in range(100):
            if _run("umount", at):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"cannot unmount {at}")


@pytest.fixture
def image(tmp_path):
    if os.geteuid() or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(IMAGE_MB << 20)
    assert _run("mkfs.ext4", "-q", "-F", path)
    return path


@contextmanager
def writing(database: Path, synchronous: str):
    """A writer, and a function that returns the newest number it acknowledged so far."""
    words = [sys.executable, "-m", "tests.powerloss.writer", str(database), synchronous]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, cwd=FOLDER) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        newest, rest, selector = 0, b"", selectors.DefaultSelector()
        selector.register(process.stdout, selectors.EVENT_READ)

        def acknowledged(wait_s: float) -> int:
            nonlocal newest, rest
            until = time.monotonic() + wait_s
            while selector.select(max(0.0, until - time.monotonic())):
                data = os.read(process.stdout.fileno(), 65536)
                assert data, "the writer ended"
                *lines, rest = (rest + data).split(b"\n")
                newest = int(lines[-1]) if lines else newest
            return newest

        try:
            yield process, acknowledged
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def cut(image: Path, tmp_path: Path, synchronous: str, seed: int) -> tuple[int, int, int]:
    """One power cut: acknowledged, then found entries and votes."""
    rng = random.Random(seed)
    # files of their own each time: a loop device that the kernel has not let go of yet would show an old one's blocks
    before, after = (tmp_path / f"{name}-{seed}.img" for name in ("before", "after"))
    shutil.copyfile(image, before)
    database = tmp_path / "disk" / "ledger.db"
    with mounted(before, database.parent), writing(database, synchronous) as (process, acknowledged):
        while not acknowledged(0.2):
            pass
        acknowledged(rng.uniform(0.0, ROUND_SECONDS))
        process.send_signal(signal.SIGSTOP)
        known = acknowledged(0.0)
        shutil.copyfile(before, after)
    before.unlink()
    with mounted(after, tmp_path / "booted") as disk:
        maker = Maker(2)
        store = Store(disk / "ledger.db", maker.genesis.net)
        entries = sum(isinstance(item.object, Entry) for item in store.items())
        votes = len(store.voted())
        store.close()
        report = verify_file(disk / "ledger.db", maker.genesis)
        assert report.verified, report.problems
        assert report.entries == entries
    after.unlink()
    return known, entries, votes


@pytest.mark.timeout(1800)
def test_no_acknowledged_entry_or_vote_is_lost(image, tmp_path):
    total = 0
    for seed in range(ROUNDS):
        known, entries, votes = cut(image, tmp_path, "FULL", seed)
        total += known
        print(f"round {seed}: {known} acknowledged, {entries} entries and {votes} votes found")
        assert entries >= known
        assert votes >= known
    assert total


@pytest.mark.timeout(1800)
@pytest.mark.skipif(ROUNDS < 10, reason="only in make powerloss")
def test_the_rig_sees_what_is_lost_without_syncing(image, tmp_path):
    lost = 0
    for seed in range(5):
        try:
            known, entries, _ = cut(image, tmp_path, "OFF", seed)
        except (RiosError, AssertionError, sqlite3.Error) as error:  # the file may be broken, which is a loss as well
            print(error)
            lost += 1
            continue
        lost += entries < known
    assert lost
