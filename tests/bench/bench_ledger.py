"""How much of the signature-verification limit the ledger's pipeline keeps.

A run of the pipeline decodes certificates, checks canonical form, payer signature and certificate, applies the entry
and persists it at ``synchronous=FULL`` in batches of 100 or 1000. The limit is bare PyNaCl verification with the
valid-point check of the same signatures on the same core; point check and key object are made once per account there,
as in the pipeline (``verify_fresh`` makes them anew each time: a lower limit). They take turns every 1000 entries, all
pinned to one core. The last line of stdout is one JSON object.

    python tests/bench/bench_ledger.py [--entries N] [--rounds N]
"""

import argparse
import gc
import json
import os
import platform
import tempfile
import time
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
from ledger.store import Final, Store
from p2p.core.identity import Identity

ACCOUNTS = 500


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


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(genesis: Genesis, encoded: list[bytes], folder: Path) -> dict[str, float]:
    """Seconds for all entries, by kind; the kinds take turns every 1000 entries, so that all see the same machine."""
    pipelines = {f"commit{n}": Pipeline(genesis, n, folder) for n in (100, 1000)}
    keys: dict[bytes, VerifyKey] = {}
    seconds = dict.fromkeys(("verify", "verify_fresh", *pipelines), 0.0)
    for position in range(0, len(encoded), 1000):
        part = encoded[position : position + 1000]
        checks = []
        for data in part:
            item = parse(certificates.decode(data).object)
            assert isinstance(item.object, Entry)
            checks.append((item.object.account, item.id, item.signed.signature))
        for name, pipeline in pipelines.items():
            seconds["verify"] += timed(partial(verify, checks, keys)) / len(pipelines)
            seconds[name] += timed(partial(pipeline.feed, part))
        seconds["verify_fresh"] += timed(partial(verify_fresh, checks))
    for pipeline in pipelines.values():
        assert pipeline.state.applied == len(encoded)
        pipeline.close()
    return seconds


def main() -> None:
    """Run and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--entries", type=int, default=6000)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--folder", type=Path, default=None, help="where the database is written")
    options = arguments.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    genesis, encoded = make(options.entries)
    rounds = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for _ in range(options.rounds):
            gc.collect()
            rounds.append(measure(genesis, encoded, Path(folder)))
    figures = {f"{name}_per_s": round(len(encoded) / median(r[name] for r in rounds)) for name in rounds[0]}
    for name, value in figures.items():
        print(f"{name:22} {value:8} {'  '.join(f'{len(encoded) / r[name[:-6]]:.0f}' for r in rounds)}")

    def ratio(name: str, limit: str) -> float:
        return round(median(r[limit] / r[name] for r in rounds), 3)

    report = {
        "name": "ledger",
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "pinned_cores": 1},
        "figures": figures | {"entries": len(encoded), "rounds": options.rounds},
        "ratios": {
            "pipeline_vs_verify_commit100": ratio("commit100", "verify"),
            "pipeline_vs_verify_commit1000": ratio("commit1000", "verify"),
            "pipeline_vs_verify_fresh_commit100": ratio("commit100", "verify_fresh"),
            "pipeline_vs_verify_fresh_commit1000": ratio("commit1000", "verify_fresh"),
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
