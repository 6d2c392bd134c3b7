"""A throw-away swarm of real node processes on loopback, for the demo, the end-to-end tests and the benchmarks.

Owns the folders, the generated config files and the processes. Nodes end when the pipe to their standard input
closes, so nothing outlives this process even if it is killed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.errors import LocalError, RiosError
from config.load import render_file
from node import control

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 6.0
POLL_SECONDS = 0.1


@dataclass(slots=True)
class NodeProcess:
    """One node: its folder and its process."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    status: Mapping[str, Any] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    """What starts the command, e.g. ``ip netns exec NAME``."""

    @property
    def config_file(self) -> Path:
        """The generated config."""
        return self.folder / "rios.toml"

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.folder / "data"

    @property
    def control(self) -> Path:
        """Its control socket."""
        return self.data / "control.sock"

    @property
    def log_file(self) -> Path:
        """Where the process's stderr goes."""
        return self.folder / "node.log"

    @property
    def peer_id(self) -> str:
        """Known once the node has started."""
        return str(self.status["node"]["peer_id"])

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def ask(self, command: str, **args: Any) -> Any:  # noqa: ANN401 - JSON
        """A control command's result."""
        return control.ask(self.control, command, args)

    def request(self, command: str, **args: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - JSON
        """A control command with events."""
        return control.request(self.control, command, args)

    def start(self, environ: Mapping[str, str] | None = None) -> None:
        """Start the daemon; :meth:`wait_started` tells when it answers."""
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *rios_command(), "--config", str(self.config_file), "run", "--until-stdin-closes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**_environ(), **(environ or {})},
                start_new_session=True,  # Ctrl-C in the terminal reaches the parent only, which stops its nodes
            )

    def wait_started(self) -> None:
        """Block until the node answers status. Raises :class:`LocalError` with its last log lines if it does not."""

        def started() -> bool:
            if not self.alive:
                raise LocalError("local", f"{self.name} did not start:\n{self.log_tail()}", f"see {self.log_file}")
            with contextlib.suppress(RiosError):
                self.status = self.ask("status")
                return True
            return False

        wait_for(started, f"{self.name} to start", START_SECONDS_MAX)

    def kill(self) -> None:
        """SIGKILL: the machine lost power, as far as others can see."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._close_pipe()

    def _close_pipe(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def stop(self) -> int:
        """Ask it to end; returns its exit code."""
        if self.process is None:
            return 0
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
            code = -signal.SIGKILL
        self._close_pipe()
        return code

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log."""
        if not self.log_file.exists():
            return ""
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])


def rios_command() -> list[str]:
    """How to start `rios` with this very interpreter and these very sources."""
    return [sys.executable, "-P", "-m", "node"]


def wait_for(ready: Callable[[], bool], what: str, seconds: float) -> None:
    """Poll until ``ready``. Raises :class:`LocalError` naming ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise LocalError("local", f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(POLL_SECONDS)


def _environ() -> dict[str, str]:
    """The environment without settings of RiOS: those of the machine's own node must not reach a throw-away one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RIOS_")}


def rios(folder: NodeProcess, *args: str) -> str:
    """Run a one-shot `rios` command against a node's config; returns its stdout.

    Raises :class:`LocalError` with its stderr if it fails. Where this process is interrupted, the command and what it
    started get the same chance to clean up before they are killed.
    """
    command = [*rios_command(), "--config", str(folder.config_file), *args]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environ(),
        start_new_session=True,  # Ctrl-C reaches this process only, which passes it on
    ) as process:
        try:
            stdout, stderr = process.communicate()
        except BaseException:
            _end_group(process)
            raise
    if process.returncode:
        raise LocalError("local", f"rios {' '.join(args)} failed:\n{stderr.strip()}")
    return stdout


def _end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS_MAX)
        os.killpg(process.pid, signal.SIGKILL)


class Swarm:
    """Nodes in one temporary folder; use as a context manager."""

    def __init__(self, folder: Path | None = None) -> None:
        self.keep = folder is not None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="rios-"))
        self.nodes: list[NodeProcess] = []

    def __enter__(self) -> "Swarm":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, name: str, settings: Mapping[str, Any], init_args: tuple[str, ...] = ()) -> NodeProcess:
        """Make a node's folder, config and key (``rios init``); does not start it."""
        node = NodeProcess(name, self.folder / name)
        node.folder.mkdir(parents=True)
        changes = {
            "node.name": name,
            "node.data_dir": "data",
            "p2p.listen": ("/ip4/127.0.0.1/tcp/0",),
            "dmoe.route": "experts",  # what such a swarm is for, whatever would be faster
            **settings,
        }
        node.config_file.write_text(render_file(changes))
        rios(node, "init", "--keep-config", *init_args)
        self.nodes.append(node)
        return node

    def start(self, *nodes: NodeProcess) -> None:
        """Start nodes side by side and wait until all answer."""
        for node in nodes:
            node.start()
        for node in nodes:
            node.wait_started()

    def close(self) -> None:
        """Stop every node and remove the folder; impatient signals wait until that is done."""
        with _deaf():
            for node in self.nodes:
                if node.alive and node.process is not None:
                    node.process.send_signal(signal.SIGTERM)
            for node in self.nodes:
                node.stop()
                control.socket_path(node.control).unlink(missing_ok=True)  # a killed node leaves it
            if not self.keep:
                shutil.rmtree(self.folder, ignore_errors=True)


ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
