"""Four witness processes on loopback: how many entries they finalise in a second, and how long one takes.

One client process stands for many accounts that each send one transfer after another: entries go out by the wallet's
own way (``Quorum.certify``), which verifies, applies and persists each certificate before it counts. Everything shares
the machine's cores, so the CPU time of one entry is told as well, at the client and at a witness. At 50 % load entries
arrive at random times (Poisson), half as many a second as were reached.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import quantiles

import psutil
import trio

from config.settings import P2pSettings
from ledger.book import Book
from ledger.core.genesis import Genesis
from ledger.core.objects import Certificate, Entry, Grant, Op, Transfer, sign
from ledger.notes import Notes
from ledger.quorum import Quorum
from ledger.replicate import Replicator
from ledger.store import Store
from ledger.writer import Writer
from p2p.core.identity import Identity
from p2p.network import open_network
from tests.bench.ledger_witness import identity

WITNESSES = 4
PAYERS = 48
GRANT = 10**9
LIMIT_S = 60.0


class Client:
    """Many accounts in one process."""

    def __init__(self, book: Book, quorum: Quorum) -> None:
        self.book, self.quorum = book, quorum
        self._last: dict[bytes, Certificate] = {}
        self.payers = [Identity.from_seed((b"payer %d" % n).ljust(32)) for n in range(PAYERS)]

    async def send(self, who: Identity, ops: tuple[Op, ...]) -> float:
        """One entry; seconds until its certificate is durable here."""
        start = time.perf_counter()
        known = self.book.state.account(who.public_key)
        entry = Entry(self.book.genesis.net, who.public_key, known.seq + 1, known.head, ops)
        last = self._last.get(who.public_key)
        before = (last,) if last else ()
        certificate = await self.quorum.certify(sign(who, entry), before=before, timeout_s=LIMIT_S)
        self._last[who.public_key] = certificate
        return time.perf_counter() - start

    async def pay(self, number: int) -> float:
        """A transfer to the next account."""
        to = self.payers[(number + 1) % PAYERS].public_key
        return await self.send(self.payers[number], (Transfer(to, 1),))

    async def saturate(self, seconds: float) -> float:
        """Entries a second with every account sending without a pause."""
        done = 0

        async def loop(number: int) -> None:
            nonlocal done
            while time.perf_counter() < until:
                await self.pay(number)
                done += 1

        start = time.perf_counter()
        until = start + seconds
        async with trio.open_nursery() as nursery:
            for number in range(PAYERS):
                nursery.start_soon(loop, number)
        return done / (time.perf_counter() - start)

    async def at_rate(self, rate: float, seconds: float) -> list[float]:
        """Seconds from an entry's arrival to its finality; an entry whose account is busy waits for it."""
        took: list[float] = []
        locks = [trio.Lock() for _ in range(PAYERS)]

        async def one(number: int) -> None:
            start = time.perf_counter()
            async with locks[number]:
                await self.pay(number)
            took.append(time.perf_counter() - start)

        rng, end = random.Random(7), time.perf_counter() + seconds
        async with trio.open_nursery() as nursery:
            while time.perf_counter() < end:
                await trio.sleep(rng.expovariate(rate))
                nursery.start_soon(one, rng.randrange(PAYERS))
        return took


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _start(folder: Path, number: int, seeds: list[str]) -> subprocess.Popen[str]:
    program = Path(__file__).with_name("ledger_witness.py")
    return subprocess.Popen(
        [
            sys.executable,
            str(program),
            str(folder / f"w{number}"),
            str(number),
            str(folder / "g.json"),
            ",".join(seeds),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a witness ended with {process.wait(10)}")
    return str(json.loads(line)["address"])


@asynccontextmanager
async def _client(folder: Path, genesis: Genesis, issuer: Identity, seeds: list[str]) -> AsyncIterator[Client]:
    settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), seeds=tuple(seeds))
    async with open_network(issuer, settings, data_dir=folder / "client", version="bench") as network:
        store = Store(folder / "client" / "ledger.db", genesis.net)
        book = Book(genesis, store, Writer(store, in_thread=True), lambda: time.time_ns() // 1_000_000)
        replicator = Replicator(network, book, 5.0)
        with trio.fail_after(LIMIT_S):
            while len(network.peers()) < WITNESSES:  # noqa: ASYNC110 - polled as by a user
                await trio.sleep(0.05)
        yield Client(book, Quorum(network, book, Notes(network, book, 5.0), replicator.sync_with))
        store.close()


async def _run(folder: Path, seconds: float, say: Callable[[str], None]) -> dict[str, float]:
    issuer = Identity.from_seed(b"issuer".ljust(32))
    keys = tuple(identity(n).public_key for n in range(WITNESSES))
    genesis = Genesis(issuer=issuer.public_key, root=issuer.public_key, witnesses=keys, f=1)
    await trio.Path(folder / "g.json").write_text(genesis.to_json())
    processes, seeds = [], []
    try:
        for number in range(WITNESSES):
            processes.append(_start(folder, number, seeds[:1]))
            seeds.append(await trio.to_thread.run_sync(_address, processes[-1]))
        async with _client(folder, genesis, issuer, seeds) as client:
            await client.send(issuer, tuple(Grant(p.public_key, GRANT) for p in client.payers))
            await client.saturate(1.0)
            everybody = [psutil.Process(), *(psutil.Process(process.pid) for process in processes)]
            before = [_cpu_s(process) for process in everybody]
            per_s = await client.saturate(seconds)
            cpu_s = [_cpu_s(process) - then for process, then in zip(everybody, before, strict=True)]
            say(f"finality: {per_s:.0f} entries finalised a second")
            took = await client.at_rate(per_s / 2, seconds)
            percentiles = quantiles(took, n=100)
            client.book.state.check_invariants()
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            process.wait(20)
    return {
        "finalised_per_s": round(per_s, 1),
        "finality_client_cpu_ms": round(1000 * cpu_s[0] / (per_s * seconds), 2),
        "finality_witness_cpu_ms": round(1000 * sum(cpu_s[1:]) / WITNESSES / (per_s * seconds), 2),
        "finality_p50_ms": round(percentiles[49] * 1000, 1),
        "finality_p99_ms": round(percentiles[98] * 1000, 1),
        "finality_entries": len(took),
    }


def run(folder: Path, seconds: float, say: Callable[[str], None]) -> dict[str, float]:
    """Figures."""
    return trio.run(_run, folder, seconds, say)
