"""The money under kill -9: clients that retry, a gateway and a PostgreSQL that die again and again, then the reckoning.

    python -m tests.soak.money [--requests 10000] [--kills 20] [--sqlite] [--seed 0]

Prints JSON; exit 1 if anything does not tie. Every request has an idempotency key and is repeated until it is answered.
Afterwards each was charged exactly once and for what it got, nothing is held back, and every balance is what
``rios billing reconcile`` computes.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import sqlalchemy as sa
import trio

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from postgresql import new_database, running_cluster

from config.settings import GatewaySettings
from gateway.accounts import open_accounts
from gateway.billing.reconcile import reconcile
from gateway.db.models import usages

CLIENTS = 16
CREDIT = 10_000_000
PROMPT = "what is the capital"
COST = 4 + 2 * 7
"""Microcredits of an answer: four words asked, seven said."""
_START_SECONDS = 30.0
_ANSWER_SECONDS = 120.0


class Postgres:
    """A running cluster that can be killed: it is started again as it was found running."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn.format(name="postgres")
        with psycopg.connect(self._dsn) as connection:
            row = connection.execute("SHOW data_directory").fetchone()
        assert row is not None
        self._data = Path(row[0])
        process = Path("/proc", str(self._pid()))
        self._command = [part.decode() for part in (process / "cmdline").read_bytes().split(b"\0") if part]
        self._owner = process.stat().st_uid, process.stat().st_gid
        self._child: subprocess.Popen[bytes] | None = None

    def _pid(self) -> int:
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def kill(self) -> None:
        """kill -9, and start it again; its children see that it is gone and leave."""
        pid = self._pid()
        os.kill(pid, signal.SIGKILL)
        with suppress(
            ChildProcessError
        ):  # dead, but not gone until its parent asks, which the first one's is this test
            os.waitpid(pid, 0)
        ends = time.monotonic() + _START_SECONDS
        while not self._starts():
            assert time.monotonic() < ends, "PostgreSQL does not come back"

    def _starts(self) -> bool:
        user, group = self._owner
        who: dict[str, Any] = {} if user == os.geteuid() else {"user": user, "group": group, "extra_groups": []}
        self._child = subprocess.Popen(
            self._command, cwd=self._data, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **who
        )
        while self._child.poll() is None:
            try:
                psycopg.connect(self._dsn).close()
                return True
            except psycopg.OperationalError:
                time.sleep(0.1)
        time.sleep(0.2)  # the old one's children hold its memory a little longer
        return False

    def stop(self) -> None:
        """End what was started here."""
        if self._child is not None:
            self._child.send_signal(signal.SIGQUIT)
            self._child.wait()


@dataclass
class Gateway:
    """A gateway's process on a port that stays its own."""

    folder: Path
    database: str
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it may take a while until it answers."""
        script = Path(__file__).with_name("money_gateway.py")
        command = [sys.executable, str(script), str(self.folder), self.database, str(self.port)]
        errors = (self.folder / "stderr").open("ab")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors)
        errors.close()

    def see(self) -> None:
        """One that could not start, as its database was just away, is started again, as a service manager does."""
        if self.process is not None and self.process.poll() is not None:
            self.start()

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def stop(self) -> None:
        """In peace."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


@dataclass
class Run:
    """The load and what came of it."""

    url: str
    headers: dict[str, str]
    requests: int
    next: int = 0
    done: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def client(self) -> None:
        """Ask until all are asked."""
        async with httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=20) as http:
            while self.next < self.requests:
                number, self.next = self.next, self.next + 1
                await self.ask(http, number)
                self.done += 1

    async def ask(self, http: httpx.AsyncClient, number: int) -> None:
        """One request, again and again until it is answered."""
        name = f"money-{number}"
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 50, "stream": number % 2 == 0}
        headers = {"idempotency-key": name, "x-request-id": name}
        with trio.move_on_after(_ANSWER_SECONDS) as scope:
            while True:
                try:
                    answer = await http.post("/v1/completions", json=body, headers=headers)
                except httpx.HTTPError as error:
                    self.statuses[type(error).__name__] += 1
                else:
                    self.statuses[str(answer.status_code)] += 1
                    if self.is_whole(answer):
                        return
                await trio.sleep(0.1)
        assert scope.cancelled_caught
        self.wrong.append(f"{name} was never answered")

    def is_whole(self, answer: httpx.Response) -> bool:
        """Whether it is the answer; one that is neither that nor a documented error is noted."""
        if answer.status_code == 200:
            return "France" in answer.text and ("[DONE]" in answer.text or "usage" in answer.text)
        if answer.status_code not in (409, 503) or "error" not in answer.json():
            self.wrong.append(f"{answer.status_code} {answer.text[:200]}")
        return False


async def nemesis(run: Run, gateway: Gateway, postgres: Postgres | None, kills: int, chance: random.Random) -> int:
    """Kill as many times, spread over the load."""
    killed = 0
    for number in range(kills):
        while run.done < run.requests * (number + 1) / (kills + 1):
            gateway.see()
            await trio.sleep(0.01)
        await trio.sleep(chance.random() * 0.1)
        if postgres is not None and number % 2:
            await trio.to_thread.run_sync(postgres.kill)
        else:
            gateway.kill()
            gateway.start()
        killed += 1
    return killed


async def watch(gateway: Gateway, until: trio.Event) -> None:
    """The service manager, after the last kill."""
    while not until.is_set():
        gateway.see()
        await trio.sleep(0.1)


async def load(run: Run, gateway: Gateway, postgres: Postgres | None, kills: int, seed: int) -> int:
    """All clients and the nemesis; how many kills there were."""
    killed, ended = 0, trio.Event()

    async def kill() -> None:
        nonlocal killed
        killed = await nemesis(run, gateway, postgres, kills, random.Random(seed))
        await watch(gateway, ended)

    async with trio.open_nursery() as outer:
        outer.start_soon(kill)
        async with trio.open_nursery() as clients:
            for _ in range(CLIENTS):
                clients.start_soon(run.client)
        ended.set()
    return killed


def judge(folder: Path, database: str, requests: int) -> tuple[dict[str, Any], list[str]]:
    """What the books say afterwards, and what is wrong with it."""
    with open_accounts(GatewaySettings(database=database), folder) as accounts:
        found = reconcile(accounts.database)
        query = sa.select(usages.c.request_id, usages.c.microcredits).where(usages.c.microcredits > 0)
        with accounts.database.read() as connection:
            rows = connection.execute(query).all()
        balance = accounts.balance("ada")
    bills = Counter(name for name, _ in rows)
    wrong = [f"{name} was charged {count} times" for name, count in bills.items() if count != 1]
    wrong += [f"{name} cost {amount}, not {COST}" for name, amount in rows if amount != COST]
    if len(bills) != requests:
        wrong.append(f"{requests} were answered and {len(bills)} charged")
    if (balance.balance, balance.reserved) != (CREDIT - COST * requests, 0):
        wrong.append(f"the balance is {balance}")
    wrong += [str(each) for each in found["differences"]]
    return found, wrong


def money(folder: Path, dsn: str, *, requests: int, kills: int, seed: int) -> dict[str, Any]:
    """One run: ``dsn`` of a cluster, or empty for SQLite."""
    postgres = Postgres(dsn) if dsn else None
    database = new_database(dsn) if dsn else ""
    with open_accounts(GatewaySettings(database=database), folder) as accounts:
        accounts.create_user("ada")
        accounts.credit("ada", CREDIT)
        key = accounts.create_key("ada", "money").secret
    started = time.monotonic()
    with gateway_of(folder, database) as gateway:
        run = Run(f"http://127.0.0.1:{gateway.port}", {"authorization": f"Bearer {key}"}, requests)
        killed = trio.run(load, run, gateway, postgres, kills, seed)
        seconds = time.monotonic() - started
        # Whatever a killed one left behind, the next one settles when it starts.
        gateway.kill()
        gateway.start()
        wait_for(run.url)
        gateway.stop()
    found, wrong = judge(folder, database, requests)
    if postgres is not None:
        postgres.stop()
    report = {"requests": requests, "kills": killed, "seconds": round(seconds, 1), "answers": dict(run.statuses)}
    return {**report, "wrong": run.wrong + wrong, "reconcile": {k: v for k, v in found.items() if k != "differences"}}


@contextmanager
def gateway_of(folder: Path, database: str) -> Iterator[Gateway]:
    """A gateway on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gateway = Gateway(folder, database, probe.getsockname()[1])
    gateway.start()
    try:
        wait_for(f"http://127.0.0.1:{gateway.port}")
        yield gateway
    finally:
        if gateway.process is not None and gateway.process.poll() is None:
            gateway.kill()


def wait_for(url: str) -> None:
    """Until it answers."""
    ends = time.monotonic() + _START_SECONDS
    while True:
        try:
            httpx.get(f"{url}/healthz", timeout=2)
            return
        except httpx.HTTPError:
            assert time.monotonic() < ends, "the gateway does not start"
            time.sleep(0.1)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sqlite", action="store_true")
    asked = parser.parse_args()
    sizes = {"requests": asked.requests, "kills": asked.kills, "seed": asked.seed}
    with tempfile.TemporaryDirectory(prefix="rios-money-") as folder:
        if asked.sqlite:
            report = money(Path(folder), "", **sizes)
        else:
            with running_cluster() as dsn:
                report = money(Path(folder), dsn, **sizes)
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
