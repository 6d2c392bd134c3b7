"""What serving experts costs beyond computing them: hivemind's job on this project's expert server, receipts on.

A server process holds 8 experts (FFN 1024-4096-1024, fp32) and is paid for its answers over a real ledger channel; this
process calls them through :class:`dmoe.caller.Caller`, as an orchestrating node does. The floor is a bare ONNX Runtime
call of the same rows on one thread of the server's process. Floor and calls take turns, ratios are medians over the
turns. The last line of stdout is one JSON object; its ratios:

- ``expert_added_vs_floor_b1``: (p50 of a call - floor) / floor, batch 1, one caller, the experts in turn
- ``expert_total_vs_floor_b256``: p50 of a call / floor, batch 256
- ``rows_32_vs_floor``: rows per second of 32 callers of batch 1, the experts in turn, over 1 / floor
- ``moe_k4_b16_vs_floor``: rows per second of a layer of 16 experts on two servers, 4 per row, batch 16, over those of
  bare calls with the same rows per expert, one after the other, on one core

They are measured on the product's wire (fp16); ``..._f32`` are the same with fp32 on the wire, as hivemind sends it.
``--hivemind-python P --hivemind-script S`` runs hivemind's side of the job, one server, in an environment of its own.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trio

from dmoe.caller import Caller, CallerSession
from dmoe.layers import Routing
from tests.bench.expert_job import EXPERTS, HIDDEN, reference
from tests.bench.expert_nodes import CLIENT, Member, manifests, member, server_identity

NODES = Path(__file__).with_name("expert_nodes.py")
ROOT = Path(__file__).resolve().parents[2]
MOE_ROWS, MOE_K = 16, 4
HIVEMIND = ("--experts", "8", "--servers", "1", "--handlers", "4", "--server-threads", "1", "--client-threads", "1")


@contextlib.contextmanager
def servers(count: int) -> Iterator[list[str]]:
    """Server processes and their addresses; they end with their stdin."""
    with contextlib.ExitStack() as stack:
        addresses: list[str] = []
        for number in range(count):
            command = [sys.executable, str(NODES), "--number", str(number)]
            for address in addresses:
                command += ["--seed", address]
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                )
            )
            assert process.stdin is not None
            assert process.stdout is not None
            stack.callback(process.wait, 20)
            stack.callback(process.stdin.close)
            addresses.append(process.stdout.readline().strip())
        yield addresses


@dataclass
class Bench:
    """The calling process: its caller and what it asks the servers."""

    here: Member
    caller: Caller
    seconds: float
    rounds: int

    def session(self, model: str) -> CallerSession:
        """One caller's session."""
        return self.caller.session(manifests()[model])

    async def ask(self, server: int, method: str, **header) -> dict:
        """One of the benchmark's own methods."""
        peer = server_identity(server).peer_id
        return (await self.here.network.call(peer, method, header, deadline_ms=60_000)).header

    async def floor(self, rows: int, *, calls: int, one: bool = False) -> float:
        """Median seconds of a bare call in the first server's process."""
        return statistics.median((await self.ask(0, "bench.floor", rows=rows, calls=calls, one=one))["seconds"])

    async def cpu(self, servers: int = 1) -> tuple[float, float]:
        """CPU seconds of this process and of the servers so far."""
        there = [(await self.ask(number, "bench.cpu"))["seconds"] for number in range(servers)]
        return time.process_time(), sum(there)


def rows_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, HIDDEN), np.float32)


def choose(expert: int, count: int) -> Routing:
    """Every row to one expert."""
    return Routing(np.full((count, 1), expert, np.int32), np.ones((count, 1), np.float32))


async def check(bench: Bench, model: str, tolerance: float) -> None:
    """The answers are the job's."""
    x = rows_of(3)
    for expert in (0, EXPERTS - 1):
        got = await bench.session(model).run(0, x, choose(expert, 3))
        assert np.abs(got - reference(expert, x)).max() < tolerance


async def latency(bench: Bench, model: str, rows: int, *, one: bool) -> dict[str, float]:
    """One caller, batch after batch, in turns with the floor."""
    session, x = bench.session(model), rows_of(rows)
    routes = [choose(0 if one else n, rows) for n in range(EXPERTS)]
    times: list[float] = []
    floors: list[float] = []
    cpu = [0.0, 0.0]
    for turn in range(bench.rounds + 1):
        floors.append(await bench.floor(rows, calls=max(3, 40 // rows), one=one))
        before, end, n = await bench.cpu(), time.perf_counter() + bench.seconds, 0
        turn_times: list[float] = []
        while (start := time.perf_counter()) < end or n < EXPERTS:
            await session.run(0, x, routes[n % EXPERTS])
            turn_times.append(time.perf_counter() - start)
            n += 1
        after = await bench.cpu()
        if turn:  # the first turn warms up
            times += turn_times
            cpu = [total + b - a for total, a, b in zip(cpu, before, after, strict=True)]
    floor, p50 = statistics.median(floors[1:]), statistics.median(times)
    return {
        "floor_ms": round(floor * 1e3, 3),
        "p50_ms": round(p50 * 1e3, 3),
        "p99_ms": round(float(np.percentile(times, 99)) * 1e3, 3),
        "added_vs_floor": round((p50 - floor) / floor, 3),
        "total_vs_floor": round(p50 / floor, 3),
        "client_cpu_ms_per_call": round(cpu[0] / len(times) * 1e3, 3),
        "server_cpu_ms_per_call": round(cpu[1] / len(times) * 1e3, 3),
        "calls": len(times),
    }


async def crowd(bench: Bench, model: str, callers: int, *, one: bool) -> dict[str, float]:
    """So many callers of batch 1 at the same time, each with a session of its own."""
    ratios: list[float] = []
    rates: list[float] = []
    times: list[float] = []
    cpu = [0.0, 0.0]
    x = rows_of(1)
    batches = 0

    async def work(first: int, end: float) -> None:
        session = bench.session(model)
        n = first
        while (start := time.perf_counter()) < end:
            await session.run(0, x, choose(0 if one else n % EXPERTS, 1))
            times.append(time.perf_counter() - start)
            n += 1

    for turn in range(bench.rounds + 1):
        floor = await bench.floor(1, calls=40)
        before, known = await bench.cpu(), len(times)
        batches_before = await _batches(bench)
        start = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(callers):
                nursery.start_soon(work, number, start + bench.seconds)
        spent = time.perf_counter() - start
        after = await bench.cpu()
        if not turn:
            times.clear()
            continue
        batches += await _batches(bench) - batches_before
        rates.append((len(times) - known) / spent)
        ratios.append(rates[-1] * floor)
        cpu = [total + b - a for total, a, b in zip(cpu, before, after, strict=True)]
    return {
        "rows_per_s": round(statistics.median(rates), 1),
        "vs_floor": round(statistics.median(ratios), 3),
        "p50_ms": round(statistics.median(times) * 1e3, 3),
        "p99_ms": round(float(np.percentile(times, 99)) * 1e3, 3),
        "rows_per_batch": round(len(times) / max(1, batches), 2),
        "client_cpu_ms_per_call": round(cpu[0] / len(times) * 1e3, 3),
        "server_cpu_ms_per_call": round(cpu[1] / len(times) * 1e3, 3),
    }


async def _batches(bench: Bench) -> int:
    shards = (await bench.ask(0, "bench.cpu"))["worker"]["shards"]
    return sum(shard["batches"] for model in shards.values() for shard in model.values())


async def mixture(bench: Bench, model: str) -> dict[str, float]:
    """Layers of 16 experts on two servers, 4 per row, one caller, in turns with the bare calls."""
    session, x = bench.session(model), rows_of(MOE_ROWS)
    dice = np.random.default_rng(4)
    routes = []
    for _ in range(8):
        chosen = np.stack([dice.permutation(2 * EXPERTS)[:MOE_K] for _ in range(MOE_ROWS)]).astype(np.int32)
        routes.append(Routing(chosen, np.full(chosen.shape, 1 / MOE_K, np.float32)))
    times: list[float] = []
    ratios: list[float] = []
    cpu = [0.0, 0.0]
    for turn in range(bench.rounds + 1):
        floors = []
        for route in routes[:3]:
            counts = np.bincount(route.experts.ravel(), minlength=2 * EXPERTS)
            floors.append(sum((await bench.ask(0, "bench.work", rows=counts.tolist()))["seconds"]))
        before, end, n = await bench.cpu(2), time.perf_counter() + bench.seconds, 0
        turn_times: list[float] = []
        while (start := time.perf_counter()) < end or n < 3:
            await session.run(0, x, routes[n % len(routes)])
            turn_times.append(time.perf_counter() - start)
            n += 1
        after = await bench.cpu(2)
        if turn:
            times += turn_times
            ratios.append(statistics.median(floors) / statistics.median(turn_times))
            cpu = [total + b - a for total, a, b in zip(cpu, before, after, strict=True)]
    p50 = statistics.median(times)
    return {
        "p50_ms": round(p50 * 1e3, 3),
        "rows_per_s": round(MOE_ROWS / p50, 1),
        "vs_floor": round(statistics.median(ratios), 3),
        "client_cpu_ms_per_layer": round(cpu[0] / len(times) * 1e3, 3),
        "server_cpu_ms_per_layer": round(cpu[1] / len(times) * 1e3, 3),
    }


async def measure(addresses: list[str], seconds: float, rounds: int, wires: list[str]) -> dict[str, object]:
    """Every phase; the figures by name."""
    figures: dict[str, object] = {}
    async with member(CLIENT, tuple(addresses)) as here:
        caller = Caller(here.network, buyer=here.ledger.buyer)
        await here.nursery.start(caller.run)
        with trio.fail_after(60):
            while len(here.network.directory.adverts()) < 3 or not here.ledger.balance():  # noqa: ASYNC110
                await trio.sleep(0.1)
        bench = Bench(here, caller, seconds, rounds)
        for wire in wires:
            moe = "moe" if wire == "f16" else "moe_f32"
            await check(bench, wire, 0.02 if wire == "f16" else 1e-3)
            for rows in (1, 16, 256):
                figures[f"{wire}_b{rows}"] = await latency(bench, wire, rows, one=False)
                _show(figures)
            figures[f"{wire}_b1_one_expert"] = await latency(bench, wire, 1, one=True)
            _show(figures)
            for callers in (8, 32):
                figures[f"{wire}_callers{callers}"] = await crowd(bench, wire, callers, one=False)
                _show(figures)
                figures[f"{wire}_callers{callers}_one_expert"] = await crowd(bench, wire, callers, one=True)
                _show(figures)
            figures[f"{wire}_moe_k4_b16"] = await mixture(bench, moe)
            _show(figures)
        figures["ledger"] = await receipts(here)
    return figures


async def receipts(here: Member) -> list[dict[str, object]]:
    """The channels after all of it: every answer counted, vouchers given for receipts, nothing in dispute."""
    await trio.sleep(0.5)
    channels = here.ledger.channels()
    assert channels
    assert all(c["calls"] and c["promised"] >= c["spent"] and not c["stopped"] for c in channels), channels
    kept = ("calls", "kflop", "spent", "promised")
    return [{"vouchers": here.ledger.buyer.vouchers} | {name: channel[name] for name in kept} for channel in channels]


def _show(figures: dict[str, object]) -> None:
    name, last = list(figures.items())[-1]
    print(f"{name:>24}: {last}", flush=True)


def ratios_of(figures: dict, wires: list[str]) -> dict[str, float]:
    """The figures that a machine's speed does not change."""
    ratios = {}
    for wire in wires:
        suffix = "" if wire == "f16" else f"_{wire}"
        ratios |= {
            f"expert_added_vs_floor_b1{suffix}": figures[f"{wire}_b1"]["added_vs_floor"],
            f"expert_total_vs_floor_b256{suffix}": figures[f"{wire}_b256"]["total_vs_floor"],
            f"rows_32_vs_floor{suffix}": figures[f"{wire}_callers32"]["vs_floor"],
            f"moe_k4_b16_vs_floor{suffix}": figures[f"{wire}_moe_k4_b16"]["vs_floor"],
        }
    return ratios


def hivemind(python: str, script: str) -> dict[str, object]:
    """hivemind's figures of the same job: its one line of JSON, the part that compares."""
    command = [python, script, *HIVEMIND, "--seconds", "1.5", "--skip-floor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return {"failed": done.stderr[-500:]}
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[name] for name in ("hivemind", "latency", "throughput", "moe")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.7, help="of calls per phase and turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wire", choices=("f16", "f32"), action="append", help="only these")
    parser.add_argument("--hivemind-python", help="the interpreter of an environment that holds hivemind")
    parser.add_argument("--hivemind-script", help="the script that does hivemind's side of the job")
    arguments = parser.parse_args()
    wires = arguments.wire or ["f16", "f32"]
    with servers(2) as addresses:
        figures = trio.run(measure, addresses, arguments.seconds, arguments.rounds, wires)
    if arguments.hivemind_python and arguments.hivemind_script:
        figures["hivemind"] = hivemind(arguments.hivemind_python, arguments.hivemind_script)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    ratios = ratios_of(figures, wires)
    print(json.dumps({"name": "expert", "machine": machine, "figures": figures, "ratios": ratios}))


if __name__ == "__main__":
    main()
