"""Catching up: a node that was away while the ledger grew by many objects asks one peer for what it lacks.

Two nodes over the in-memory network with their real databases; time is elapsed time of this busy process that runs
both sides, bytes are those of the answers. ``sync_memory_mb`` is what the process grew by, the new objects included;
``sync_waiting_max`` the most objects that were there before what they build on.
"""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import trio

from ledger.book import Book
from ledger.replicate import Replicator
from ledger.store import Store
from ledger.writer import Writer
from p2p.core.identity import Identity
from p2p.memory import MemoryHub
from tests.bench.ledger_made import Made


async def _run(folder: Path, behind: int, made: Made) -> dict[str, float]:
    hub = MemoryHub(1)
    books, replicators = [], []
    for n, name in enumerate(("full", "away")):
        store = Store(folder / f"{name}.db", made.genesis.net)
        network = hub.add(Identity.from_seed((b"sync %d" % n).ljust(32)))
        start = time.perf_counter()
        books.append(Book(made.genesis, store, Writer(store, in_thread=True), lambda: 1))
        loaded_s = time.perf_counter() - start
        replicators.append(Replicator(network, books[-1], 10))
    lacking = books[0].state.applied - books[1].state.applied
    process, peak, waiting = psutil.Process(), 0, 0
    before = process.memory_info().rss

    async def watch() -> None:
        nonlocal peak, waiting
        while True:
            peak = max(peak, process.memory_info().rss - before)
            waiting = max(waiting, books[1].state.waiting())
            await trio.sleep(0.02)

    start, cpu = time.perf_counter(), time.process_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        same = await replicators[1].sync_with(replicators[0]._network.peer_id)
        nursery.cancel_scope.cancel()
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert same
    assert books[0].state.digest() == books[1].state.digest()
    for book in books:
        book.store.close()
    return {
        "sync_objects": lacking,
        "sync_s": round(elapsed, 1),
        "sync_cpu_s": round(cpu, 1),
        "sync_objects_per_s": round(lacking / elapsed),
        "sync_answers": replicators[1].answers,
        "sync_bytes_per_object": round(replicators[1].fetched_bytes / lacking),
        "sync_memory_mb": round(peak / 1e6, 1),
        "sync_waiting_max": waiting,
        "load_s": round(loaded_s, 1),
    }


def run(folder: Path, behind: int, accounts: int, say: Callable[[str], None]) -> dict[str, float]:
    """Figures. Both have the ledger's beginning; only one has the ``behind`` objects after it."""
    made = Made(accounts)
    both = [Store(folder / f"{name}.db", made.genesis.net) for name in ("full", "away")]
    made.stores = list(both)
    made.found()
    made.grow(behind // 10)
    made.stores = both[:1]
    made.grow(behind)
    for store in both:
        store.close()
    say(f"sync: {accounts} accounts, {behind} objects behind")
    return {"sync_accounts": accounts} | trio.run(_run, folder, behind, made)
