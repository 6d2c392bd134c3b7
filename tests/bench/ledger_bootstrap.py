"""A new node of a large ledger: from a checkpoint, and from the genesis with everything verified.

The ledger is generated with the real core (one witness); two full nodes hold it, one of them proposes the checkpoint
and the other takes it, a third starts empty, over the in-memory network with real databases. ``bootstrap_*_s`` is
elapsed, ``_cpu_s`` CPU time of the process that runs all nodes; the file of the node that started from the checkpoint
is counted after that. The genesis run is a round of anti-entropy from nothing: what it fetched is verified, applied and
durable. ``disk_bytes_per_entry`` is the full node's file; with ``f`` faults tolerated a certificate has 2f more votes.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import trio

from config.settings import LedgerSettings
from ledger.ledger import Ledger, open_ledger
from ledger.store import Store
from p2p.core.identity import Identity
from p2p.memory import MemoryHub
from tests.bench.ledger_made import Made, size_bytes


class Timer:
    """Elapsed and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def figures(self, name: str) -> dict[str, float]:
        """Both."""
        elapsed, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu
        return {f"{name}_s": round(elapsed, 1), f"{name}_cpu_s": round(cpu, 1)}


async def _run(folder: Path, made: Made, say: Callable[[str], None]) -> dict[str, float]:
    hub, figures = MemoryHub(1), dict[str, float]()
    async with trio.open_nursery() as nursery:

        async def node(name: str, me: Identity, *, witness: bool = False, archive: bool = False) -> Ledger:
            settings = LedgerSettings(witness=witness, archive=archive, sync_seconds=3600)
            return await open_ledger(hub.add(me), me, made.genesis, folder / f"{name}.db", settings, nursery=nursery)

        timer = Timer()
        full = await node("full", made.witness_key, witness=True)
        figures |= timer.figures("start_full_node")
        other = await node("other", Identity.from_seed(b"o" * 32))
        timer = Timer()
        proof = await full.checkpoints.propose()
        figures |= timer.figures("checkpoint_made_and_signed")
        timer = Timer()
        await other.checkpoints.obtain()
        figures |= timer.figures("checkpoint_taken_and_checked")
        say(f"bootstrap: checkpoint of {proof.summary.entries} entries: {figures}")
        new = await node("new", Identity.from_seed(b"n" * 32))
        timer = Timer()
        if not new.book.state.applied:
            await new.checkpoints.start()
        figures |= timer.figures("bootstrap_checkpoint")
        assert new.book.state.digest() == full.book.state.digest()
        say(f"bootstrap: {figures['bootstrap_checkpoint_s']} s from the checkpoint")
        from_genesis = await node("genesis", Identity.from_seed(b"g" * 32), archive=True)
        timer = Timer()
        assert await from_genesis.replicator.sync_with(full.checkpoints._network.peer_id)
        figures |= timer.figures("bootstrap_genesis")
        assert from_genesis.book.state.digest() == full.book.state.digest()
        for ledger in (full, other, new, from_genesis):
            await ledger.aclose()
        nursery.cancel_scope.cancel()
    return figures


def run(folder: Path, entries: int, accounts: int, say: Callable[[str], None]) -> dict[str, float]:
    """Figures."""
    made = Made(accounts)
    path = folder / "full.db"
    store = Store(path, made.genesis.net)
    made.stores = [store]
    made.found()
    timer = Timer()
    while made.state.applied < entries:
        made.grow(min(50_000, entries - made.state.applied))
        say(f"bootstrap: {made.state.applied} entries generated")
    store.close()
    figures: dict[str, float] = {"bootstrap_entries": made.state.applied, "bootstrap_accounts": accounts}
    figures |= timer.figures("generate")
    figures["disk_bytes_per_entry"] = round(size_bytes(path) / made.state.applied)
    shutil.copyfile(path, folder / "other.db")
    figures |= trio.run(_run, folder, made, say)
    figures["disk_bytes_after_checkpoint"] = size_bytes(folder / "new.db")
    return figures
