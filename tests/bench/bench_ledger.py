"""How fast the ledger is: its pipeline, finality with four witnesses, vouchers, catching up, a new node's start.

**pipeline**: what share of the signature-verification limit it keeps. A run decodes certificates, checks canonical
form, payer signature and certificate, applies the entry and persists it at ``synchronous=FULL`` in batches of 100 or
1000. The limit is bare PyNaCl verification with the valid-point check of the same signatures on the same core; point
check and key object are made once per account there, as in the pipeline (``verify_fresh`` makes them anew each time: a
lower limit). They take turns every 5000 entries, all pinned to one core. Ratios are of elapsed time; ``_cpu`` of CPU
time, which other work on the machine and the disk's waits do not reach.

**finality**, **vouchers**, **sync**: see ``ledger_finality``, ``ledger_vouchers``, ``ledger_sync``. **bootstrap** (a
ledger of ``--bootstrap N`` entries, e.g. 1000000; not run unless asked for): see ``ledger_bootstrap``.

The last line of stdout is one JSON object.

    python tests/bench/bench_ledger.py [--parts pipeline,finality,vouchers,sync] [--bootstrap N] [--entries N]
"""

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.signing import VerifyKey

from ledger.core import certificate as certificates
from ledger.core.certificate import Verifier
from ledger.core.genesis import Genesis
from ledger.core.objects import NO_HEAD, Entry, Grant, Op, Transfer, parse, sign
from ledger.core.state import State
from ledger.core.witness import Witness
from ledger.records import Final
from ledger.store import Store
from p2p.core.identity import Identity
from tests.bench import ledger_bootstrap, ledger_finality, ledger_sync, ledger_vouchers

ACCOUNTS = 500
TURN = 5000


def make(entries: int) -> tuple[Genesis, list[bytes]]:
    """Certificates of an issuer's grants and then of transfers between many accounts, in an order that applies."""
    issuer = Identity.from_seed(b"i" * 32)
    witness_key = Identity.from_seed(b"w" * 32)
    people = [Identity.from_seed(n.to_bytes(32, "big")) for n in range(1, ACCOUNTS + 1)]
    genesis = Genesis(issuer=issuer.public_key, root=issuer.public_key, witnesses=(witness_key.public_key,))
    state = State(genesis)
    witness = Witness(witness_key, state)
    out: list[bytes] = []

    def final(who: Identity, ops: tuple[Op, ...]) -> None:
        account = state.account(who.public_key)
        item = parse(sign(who, Entry(genesis.net, who.public_key, account.seq + 1, account.head, ops)))
        witness.consider_entry(item)
        state.add(item)

    def flush() -> None:
        batch = witness.seal()
        assert batch is not None
        for item, vote in zip(batch.items, batch.votes, strict=True):
            out.append(certificates.encode(certificates.Certificate(item.signed, 0, (vote,))))

    for start in range(0, ACCOUNTS, 50):
        final(issuer, tuple(Grant(p.public_key, 10**6) for p in people[start : start + 50]))
    flush()
    for n in range(entries):
        final(people[n % ACCOUNTS], (Transfer(people[(n * 7 + 1) % ACCOUNTS].public_key, 1 + n % 5),))
        if witness.pending == 256:
            flush()
    if witness.pending:
        flush()
    assert state.account(issuer.public_key).head != NO_HEAD
    return genesis, out


class Pipeline:
    """One database with its state, fed slice by slice."""

    def __init__(self, genesis: Genesis, commit: int, folder: Path) -> None:
        self.store = Store(folder / f"{commit}-{time.perf_counter_ns()}.db", genesis.net)
        self.state, self.verifier, self.commit = State(genesis), Verifier(genesis), commit
        self.writer = ThreadPoolExecutor(1)

    def feed(self, encoded: list[bytes]) -> None:
        """Verify, apply, persist. A thread commits while the next batch is verified, as in the daemon; one may wait."""
        pending: Future[None] | None = None
        for position in range(0, len(encoded), self.commit):
            finals = []
            for data in encoded[position : position + self.commit]:
                certificate = certificates.decode(data)
                item = self.verifier.open(certificate)
                self.state.add(item)
                finals.append(Final(item, certificate, 0))
            if pending is not None:
                pending.result()
            pending = self.writer.submit(self.store.commit, finals)
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Check and close."""
        self.writer.shutdown()
        self.store.close()


def verify_fresh(checks: list[tuple[bytes, bytes, bytes]]) -> None:
    """Bare verification, key object and point check made anew for every signature."""
    for key, message, signature in checks:
        if not crypto_core_ed25519_is_valid_point(key):
            raise AssertionError
        VerifyKey(key).verify(message, signature)


def verify(checks: list[tuple[bytes, bytes, bytes]], keys: dict[bytes, VerifyKey]) -> None:
    """Bare verification, key object and point check made once for every account, as the pipeline may: the limit."""
    for key, message, signature in checks:
        known = keys.get(key)
        if known is None:
            if not crypto_core_ed25519_is_valid_point(key):
                raise AssertionError
            known = keys[key] = VerifyKey(key)
        known.verify(message, signature)


class Clock:
    """Adds up elapsed and CPU seconds by name."""

    def __init__(self) -> None:
        self.elapsed: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    def timed(self, name: str, work: Callable[[], None]) -> None:
        """Run it."""
        start, cpu = time.perf_counter(), time.process_time()
        work()
        self.elapsed[name] += time.perf_counter() - start
        self.cpu[name] += time.process_time() - cpu


def measure(genesis: Genesis, encoded: list[bytes], folder: Path) -> Clock:
    """Seconds for all entries, by kind; the kinds take turns, so that all see the same machine."""
    pipelines = {f"commit{n}": Pipeline(genesis, n, folder) for n in (100, 1000)}
    keys: dict[bytes, VerifyKey] = {}
    clock = Clock()
    for position in range(0, len(encoded), TURN):
        part = encoded[position : position + TURN]
        checks = []
        for data in part:
            item = parse(certificates.decode(data).object)
            assert isinstance(item.object, Entry)
            checks.append((item.object.account, item.id, item.signed.signature))
        for name, pipeline in pipelines.items():
            clock.timed("verify", partial(verify, checks, keys))
            clock.timed(name, partial(pipeline.feed, part))
        clock.timed("verify_fresh", partial(verify_fresh, checks))
    for seconds in (clock.elapsed, clock.cpu):
        seconds["verify"] /= len(pipelines)
    for pipeline in pipelines.values():
        assert pipeline.state.applied == len(encoded)
        pipeline.close()
    return clock


def pipeline_part(folder: Path, entries: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Figures and ratios of the pipeline."""
    free = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if free:
        os.sched_setaffinity(0, {max(free)})
    genesis, encoded = make(entries)
    clocks = []
    for _ in range(rounds):
        gc.collect()
        clocks.append(measure(genesis, encoded, folder))
    if free:
        os.sched_setaffinity(0, free)
    figures: dict[str, float] = {"entries": len(encoded), "rounds": rounds}
    for name in clocks[0].elapsed:
        figures[f"{name}_per_s"] = round(len(encoded) / median(c.elapsed[name] for c in clocks))
        rates = "  ".join(f"{len(encoded) / c.elapsed[name]:.0f}" for c in clocks)
        say(f"{name:14} {figures[f'{name}_per_s']:8}  {rates}")
    ratios = {}
    for name in ("commit100", "commit1000"):
        ratios[f"pipeline_vs_verify_{name}"] = round(median(c.elapsed["verify"] / c.elapsed[name] for c in clocks), 3)
        ratios[f"pipeline_vs_verify_{name}_cpu"] = round(median(c.cpu["verify"] / c.cpu[name] for c in clocks), 3)
        fresh = median(c.elapsed["verify_fresh"] / c.elapsed[name] for c in clocks)
        ratios[f"pipeline_vs_verify_fresh_{name}"] = round(fresh, 3)
    return figures, ratios


def say(line: str) -> None:
    """For people, as it goes."""
    print(line, flush=True)


def main() -> None:
    """Run and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--parts", default="pipeline,finality,vouchers,sync", help="which, comma-separated")
    arguments.add_argument("--entries", type=int, default=10_000, help="of the pipeline part")
    arguments.add_argument("--rounds", type=int, default=5, help="of the pipeline part")
    arguments.add_argument("--seconds", type=float, default=8.0, help="for each measurement of finality and vouchers")
    arguments.add_argument("--behind", type=int, default=100_000, help="objects the sync part's node was away for")
    arguments.add_argument("--accounts", type=int, default=20_000, help="accounts of the sync and bootstrap parts")
    arguments.add_argument("--bootstrap", type=int, default=0, metavar="N", help="entries of the bootstrap part")
    arguments.add_argument("--folder", type=Path, default=None, help="where the databases are written")
    options = arguments.parse_args()
    parts = [part for part in options.parts.split(",") if part]
    figures: dict[str, float] = {}
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        if "pipeline" in parts:
            figures, ratios = pipeline_part(folder, options.entries, options.rounds)
        if "finality" in parts:
            figures |= ledger_finality.run(folder, options.seconds, say)
        if "vouchers" in parts:
            ratios |= ledger_vouchers.run(folder, options.seconds)
        if "sync" in parts:
            figures |= ledger_sync.run(folder, options.behind, options.accounts, say)
        if options.bootstrap:
            figures |= ledger_bootstrap.run(folder, options.bootstrap, options.accounts, say)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({"name": "ledger", "machine": machine, "figures": figures, "ratios": ratios}))


if __name__ == "__main__":
    main()
