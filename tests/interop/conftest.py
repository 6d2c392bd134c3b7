"""The JavaScript peer and client: their packages and their own Node, from npm, below ``.cache/interop``."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "interop"
INSTALL_SECONDS = 180

sys.path.insert(0, str(HERE.parent / "e2e"))  # for the gateway's rig


class Answer(dict[str, Any]):
    """What a process said. A test that misses a key shows the whole, with the reason for a failure in it."""

    def __missing__(self, key: str) -> Any:
        raise AssertionError(f"no {key!r} in {dict(self)}")


class Process:
    """A process that takes a JSON command a line and answers each with one."""

    def __init__(self, command: list[str], errors: Path) -> None:
        self._errors = errors.open("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.hello = self._answer()

    def _answer(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._errors.seek(0)
            pytest.fail(f"{self.process.args} ended: {self._errors.read()[-3000:]}")
        return Answer(json.loads(line))

    def ask(self, op: str, **more: object) -> Answer:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **more}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def ask_until(self, key: str, seconds: float, op: str, **more: object) -> Answer:
        """Ask again while the answer, a failure, has no ``key``."""
        ends = time.monotonic() + seconds
        while key not in (answer := self.ask(op, **more)) and time.monotonic() < ends:
            print(f"{op}: {dict(answer)}")
            time.sleep(0.5)
        return answer

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self._errors.close()


@pytest.fixture(scope="session")
def javascript() -> Path:
    """The folder with the JavaScript peer, ready to run; skips where Node 22 cannot be had."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", ".npmrc"):
        shutil.copy(HERE / name, CACHE / name)
    lock, installed = HERE / "package-lock.json", CACHE / "installed.json"
    if not installed.exists() or installed.read_bytes() != lock.read_bytes():
        shutil.copy(lock, CACHE / lock.name)
        _install(npm)
        shutil.copy(lock, installed)
    for old in CACHE.glob("*.mjs"):
        old.unlink()
    for source in HERE.glob("*.mjs"):
        shutil.copy(source, CACHE / source.name)
    return CACHE


def _install(npm: str) -> None:
    arguments = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", f"--cache={CACHE / 'npm'}"]
    try:
        done = subprocess.run([npm, *arguments], cwd=CACHE, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not install the JavaScript peer within {INSTALL_SECONDS} s")
    if done.returncode:
        said = " ".join(line.removeprefix("npm error").strip() for line in done.stderr.splitlines()[:4])
        pytest.skip(f"npm could not install the JavaScript peer: {said[:300]}")


@pytest.fixture(scope="session")
def node22(javascript: Path) -> str:
    """The Node binary that the registry has for this machine."""
    for binary in javascript.glob("node_modules/node-*/bin/node"):
        return str(binary)
    pytest.skip("the npm registry has no Node 22 for this kind of machine")


@pytest.fixture
def start_js(javascript: Path, node22: str, tmp_path: Path) -> Iterator[Any]:
    """Starts JavaScript peers."""
    running: list[Process] = []

    def start(name: str) -> Process:
        seed = name.encode().ljust(32).hex()
        running.append(Process([node22, str(javascript / "peer.mjs"), seed], tmp_path / f"{name}.stderr"))
        return running[-1]

    yield start
    for process in running:
        process.end()


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Any]:
    """Starts RiOS nodes."""
    running: list[Process] = []
    program = HERE.parent / "e2e" / "p2p_node.py"

    def start(name: str, seeds: list[str], *swarm_key: str) -> Process:
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, str(program), str(folder), "/ip4/127.0.0.1/tcp/0", ",".join(seeds), *swarm_key]
        running.append(Process(command, tmp_path / f"{name}.stderr"))
        return running[-1]

    yield start
    for process in running:
        process.end()
