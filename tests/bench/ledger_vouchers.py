"""What metering costs: 10,000 calls a second are admitted, counted on both sides, receipted and paid with vouchers.

A payer and its workers in one process over the in-memory network, with the real database (every voucher is durable on
both sides before it counts). The same loop without the ledger runs in turns and is taken off, so what is left is the
CPU time of the payer and of all its workers: counting, receipts and their Merkle roots, vouchers, signatures, storage.
The in-memory network's own work stays in; the real one sends a frame each way instead.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import trio

from config.settings import LedgerSettings
from ledger.core.genesis import Genesis
from ledger.ledger import Ledger, open_ledger
from p2p.core.identity import Identity
from p2p.memory import MemoryHub

CALLS_PER_S = 10_000
WORKERS = 4
TICK_S = 0.005
GRANT = 10**12
KFLOP = 2_000


@dataclass(frozen=True)
class Price:
    """A worker's quote: 2 microcredits a call."""

    number: int = 1
    microcredits_per_tflop: int = 1_000_000
    microcredits_per_kv_unit: int = 0


QUOTE = Price()


def _identity(n: int) -> Identity:
    return Identity.from_seed((b"meter %d" % n).ljust(32))


async def _loop(seconds: float, call: Callable[[int, bytes], None]) -> tuple[float, int]:
    """Calls at their rate; CPU seconds and how many calls."""
    start, cpu, done = time.perf_counter(), time.process_time(), 0
    while (now := time.perf_counter() - start) < seconds:
        while done < now * CALLS_PER_S:
            call(done % WORKERS, done.to_bytes(32, "big"))
            done += 1
        await trio.sleep(TICK_S)
    return time.process_time() - cpu, done


async def _run(folder: Path, seconds: float, rounds: int) -> dict[str, float]:
    ids = [_identity(n) for n in range(WORKERS + 1)]
    genesis = Genesis(issuer=ids[0].public_key, root=ids[0].public_key, witnesses=(ids[0].public_key,))
    hub = MemoryHub(1)
    shares, exchanged, paid_calls = [], 0, 0
    async with trio.open_nursery() as nursery:
        ledgers: list[Ledger] = []
        for n, me in enumerate(ids):
            settings = LedgerSettings(
                witness=n == 0, channel_lock=10**9, credit=10**6, prepay=10**6, lag_calls=0, sync_seconds=3600
            )
            ledgers.append(await open_ledger(hub.add(me), me, genesis, folder / f"{n}.db", settings, nursery=nursery))
        payer, workers = ledgers[0], ledgers[1:]
        await payer.grant(payer.account, GRANT)
        channels = [await payer.buyer.open_channel(me.peer_id) for me in ids[1:]]
        peer = ids[0].peer_id

        def metered(n: int, leaf: bytes) -> None:
            workers[n].seller.admit(peer, channels[n], QUOTE)
            workers[n].seller.served(peer, channels[n], QUOTE, KFLOP, leaf)
            payer.buyer.used(ids[n + 1].peer_id, channels[n], QUOTE, KFLOP, leaf)

        for _ in range(rounds):
            idle_s, idle_calls = await _loop(seconds / 2, lambda _n, _leaf: None)
            before = payer.buyer.vouchers
            busy_s, calls = await _loop(seconds, metered)
            shares.append((busy_s / calls - idle_s / idle_calls) * CALLS_PER_S)
            exchanged += payer.buyer.vouchers - before
            paid_calls += calls
        for ledger in ledgers:
            await ledger.aclose()
        nursery.cancel_scope.cancel()
    return {
        "voucher_core_share_both_sides": round(median(shares), 4),
        "voucher_core_share": round(median(shares) / 2, 4),
        "vouchers_per_s_of_metered": round(exchanged / (seconds * rounds), 1),
        "calls_per_voucher": round(paid_calls / max(1, exchanged), 1),
    }


def run(folder: Path, seconds: float, rounds: int = 3) -> dict[str, float]:
    """Figures: shares of one core at 10,000 calls a second."""
    return trio.run(_run, folder, seconds, rounds)
