"""The processes of the bank test and the lines between them.

Not a test. Four witnesses and three clients, each on a host of its own in network namespaces
(:mod:`tests.netns.rig`), or all on loopback, where lines cannot be cut.

Invariants: every process that was started is ended by its pid at the latest by :meth:`Bank.close`, also one that
stands still (SIGSTOP); a command whose process ends is answered with ``None``: nobody knows what became of it.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ledger.core.genesis import Genesis
from p2p import keyfile
from p2p.core.identity import Identity
from tests.netns.rig import REPOSITORY, Host, Rig, missing

F = 1
WITNESSES = [f"w{number}" for number in range(3 * F + 1)]
CLIENTS = ["c0", "c1", "c2"]
START_SECONDS_MAX = 120
PORT = 4701
Answer = dict[str, Any] | None
"""``{"ok": ...}``, ``{"error": [code, message]}``, or None: no answer came."""


class _Waiting:
    """A command under way."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.answer: Answer = None


class Member:
    """One node: folder, key, place and, most of the time, a process."""

    def __init__(self, name: str, folder: Path, identity: Identity, command: Sequence[str], host: Host | None) -> None:
        self.name = name
        self.folder = folder
        self.identity = identity
        self.host = host
        self.starts = 0
        self.stopped = False
        self.key = identity.public_key.hex()
        self._command = tuple(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._number = 0
        self._up = threading.Event()

    @property
    def ledger_file(self) -> Path:
        """Its database."""
        return self.folder / "ledger.db"

    @property
    def running(self) -> bool:
        """Whether it answers commands."""
        return self._up.is_set()

    @property
    def died(self) -> bool:
        """Whether the process ended without being killed from here."""
        return self._process is not None and self._process.poll() is not None

    def tail(self) -> str:
        """The end of its log."""
        return self.log()[-3000:]

    def log(self) -> str:
        """All it wrote to standard error."""
        return (self.folder / "stderr").read_text(errors="replace")

    def start(self) -> None:
        """Start the process; :meth:`wait_up` waits until it serves."""
        self.starts += 1
        self._up.clear()
        prefix = ["ip", "netns", "exec", self.host.namespace] if self.host else []
        with (self.folder / "stderr").open("ab") as log:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.soak.bank_node", *self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            )
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._listener.start()

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._heard(json.loads(line))
        self._up.clear()
        with self._lock:
            lost, self._waiting = list(self._waiting.values()), {}
        for waiting in lost:
            waiting.event.set()

    def _heard(self, told: dict[str, Any]) -> None:
        if "up" in told:
            self._up.set()
            return
        with self._lock:
            waiting = self._waiting.pop(told["id"], None)
        if waiting is not None:
            waiting.answer = told
            waiting.event.set()

    def wait_up(self, seconds: float = START_SECONDS_MAX) -> None:
        """Until it serves commands. Raises RuntimeError if it ended or does not come."""
        ends = time.monotonic() + seconds
        while not self._up.wait(0.2):
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{self.name} did not start ({self._process.poll()}): {self.tail()}")

    def ask(self, op: str, *, seconds: float = 30.0, **fields: Any) -> Answer:
        """One command and its answer."""
        waiting = _Waiting()
        with self._lock:
            self._number += 1
            number = self._number
            process = self._process
            if process is None or process.stdin is None or not self._up.is_set():
                return None
            self._waiting[number] = waiting
            try:
                process.stdin.write(json.dumps({"id": number, "op": op, **fields}).encode() + b"\n")
                process.stdin.flush()
            except OSError:
                self._waiting.pop(number, None)
                return None
        waiting.event.wait(seconds)
        return waiting.answer

    def send_signal(self, number: int) -> None:
        """Send its process a signal."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """``kill -9``, also for one that stands still."""
        process, self._process = self._process, None
        self._up.clear()
        self.stopped = False
        if process is not None:
            process.kill()
            process.wait()
            self._listener.join()  # what it still had to say belongs to this process, not to the next one
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()

    def stop(self) -> None:
        """End it in order: its standard input closes."""
        process = self._process
        if process is None or process.stdin is None:
            return
        with self._lock, contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        self.kill()


class Bank:
    """Everybody."""

    def __init__(
        self, folder: Path, seed: int, *, speed: int, broken: str = "", loopback: bool = False, f: int = F
    ) -> None:
        self.folder = folder
        self.start_s = time.time()
        self.why_loopback = "asked for" if loopback else missing()
        self.rig: Rig | None = None if self.why_loopback else Rig()
        self.speed = speed
        self._broken = broken
        self._kept = contextlib.ExitStack()
        self.members: dict[str, Member] = {}
        names = [*WITNESSES, *CLIENTS]
        identities = {name: Identity.from_seed(f"bank {seed} {name}".encode().ljust(32, b".")) for name in names}
        issuer = identities[CLIENTS[0]].public_key
        self.genesis = Genesis(
            issuer=issuer,
            root=issuer,
            witnesses=tuple(identities[name].public_key for name in WITNESSES),
            f=f,
            min_lock=10_000,
            min_claim_step=1,
        )
        (folder / "genesis.json").write_text(self.genesis.to_json())
        try:
            if self.rig is not None:
                self._kept.enter_context(self.rig)
            self._place(identities, seed)
        except BaseException:
            self.close()
            raise

    def _place(self, identities: dict[str, Identity], seed: int) -> None:
        hosts = {name: self.rig.host(name) if self.rig else None for name in identities}
        ports = dict.fromkeys(identities, PORT) if self.rig else dict(zip(identities, _free_ports(), strict=False))
        listen = {
            name: f"/ip4/{host.address if host else '127.0.0.1'}/tcp/{ports[name]}" for name, host in hosts.items()
        }
        seeds = [f"{listen[name]}/p2p/{identities[name].peer_id}" for name in WITNESSES]
        for number, (name, identity) in enumerate(identities.items()):
            folder = self.folder / name
            folder.mkdir()
            keyfile.save(folder / "key", identity)
            given = {
                "folder": str(folder),
                "p2p": {"listen": [listen[name]], "seeds": seeds, "mdns": "off", "upnp": False, "advert_seconds": 5},
                "ledger": {
                    "witness": name in WITNESSES,
                    "sync_seconds": 1,
                    "channel_lock": 300_000,
                    "channel_hours": 2,
                    "claim_seconds": 1200,
                    "lag_calls": 0,
                },
                "clock": {"start_s": self.start_s, "speed": self.speed, "skew_ms": (number * 7 + seed) % 5 * 60_000},
                "broken": self._broken,
            }
            self.members[name] = Member(name, folder, identity, [json.dumps(given)], hosts[name])

    def start(self) -> None:
        """Start everybody and wait until all serve."""
        for member in self.members.values():
            member.start()
        for member in self.members.values():
            member.wait_up()

    @property
    def witnesses(self) -> list[Member]:
        """Those that vote."""
        return [self.members[name] for name in WITNESSES]

    @property
    def clients(self) -> list[Member]:
        """Those with a wallet that is used."""
        return [self.members[name] for name in CLIENTS]

    def close(self) -> None:
        """End every process, remove the namespaces."""
        for member in self.members.values():
            member.send_signal(signal.SIGCONT)
            member.kill()
        self._kept.close()


def _free_ports() -> Iterator[int]:
    """Free now, and distinct: each socket is held until the last is chosen."""
    held = []
    try:
        for _ in range(len(WITNESSES) + len(CLIENTS)):
            held.append(socket.create_server(("127.0.0.1", 0)))
        ports = [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()
    yield from ports
