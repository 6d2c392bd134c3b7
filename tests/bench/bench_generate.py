"""Tokens per second on this machine: the fused model beside llama.cpp, on the same file, threads and prompt.

Run it as a program; the last line on stdout is one JSON object. The two take turns, so that what else the machine
does hits both; ratios are medians over the rounds. llama.cpp comes from its Python wheel, in an environment of its
own below ``.bench/``.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio
from tokenizers import Tokenizer

from dmoe.core.manifest import Manifest
from dmoe.importer.build import import_gguf
from dmoe.importer.bundled import fetch_bundled
from dmoe.layers import fused_runner, local_runner
from dmoe.pages import use_huge_pages
from dmoe.runner import Feed, Sequence
from dmoe.runtime import RuntimeOptions
from dmoe.store import ModelStore
from p2p.core.identity import Identity
from tests.bench import perplexity
from tests.bench.three_processes import ThreeProcesses

REPOSITORY = Path(__file__).resolve().parents[2]
BENCH = REPOSITORY / ".bench"
PROMPT = "The history of computing begins " * 20
NEW_TOKENS = 64
PEER_PACKAGE = "xllamacpp"

PEER_PROGRAM = f"""
import json, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup = sys.argv[1], 1024, 1, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[2])
server = xllamacpp.Server(p)
for _ in sys.stdin:
    answer = server.handle_completions(dict(
        prompt={PROMPT!r}, n_predict={NEW_TOKENS}, temperature=0, ignore_eos=True, cache_prompt=False))
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    print("TIMINGS " + json.dumps(answer["timings"]), flush=True)
"""

Round = dict[str, float]
"""``decode`` and ``prefill``, tokens per second."""


def peer_python() -> Path:
    """The interpreter of llama.cpp's environment, made if there is none."""
    python = BENCH / PEER_PACKAGE / "bin" / "python"
    if not python.exists():
        venv.create(BENCH / PEER_PACKAGE, with_pip=True)
    if subprocess.run([python, "-c", f"import {PEER_PACKAGE}"], capture_output=True, check=False).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER_PACKAGE], check=True)
    return python


class LlamaCpp:
    """llama.cpp in a process and an environment of its own."""

    def __init__(self, gguf: Path, threads: int) -> None:
        command = [str(peer_python()), "-c", PEER_PROGRAM, str(gguf), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def run(self) -> Round:
        """Answer the prompt once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("TIMINGS "):
                timings = json.loads(line.removeprefix("TIMINGS "))
                return {"decode": timings["predicted_per_second"], "prefill": timings["prompt_per_second"]}
        raise RuntimeError("llama.cpp ended early")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


class Local:
    """This project's model in this process: route ``fused``, or ``local`` (the swarm's pieces, without a swarm)."""

    def __init__(self, store: ModelStore, name: str, threads: int, route: str) -> None:
        manifest = store.find(name)
        options = RuntimeOptions(device="cpu", threads=threads)
        self._ids = Tokenizer.from_str(store.read(manifest, manifest.tokenizer).decode()).encode(PROMPT).ids
        make = fused_runner if route == "fused" else local_runner
        self._runner = make(manifest, store, options)
        use_huge_pages()  # as a node does when it has loaded a model

    def run(self) -> Round:
        """Answer the prompt once, greedily."""
        return trio.run(self._run)

    async def _run(self) -> Round:
        sequence = await self._runner.open(len(self._ids) + NEW_TOKENS)
        start = time.perf_counter()
        token = await self._next(sequence, self._ids)
        prefilled = time.perf_counter()
        for _ in range(NEW_TOKENS):
            token = await self._next(sequence, [token])
        done = time.perf_counter()
        sequence.close()
        return {"decode": NEW_TOKENS / (done - prefilled), "prefill": len(self._ids) / (prefilled - start)}

    async def _next(self, sequence: Sequence, ids: list[int]) -> int:
        (logits,) = await self._runner.forward([Feed(sequence=sequence, tokens=tuple(ids))])
        return int(logits[-1].argmax())


def measure(runners: dict[str, Callable[[], Round]], rounds: int) -> dict[str, list[Round]]:
    """Let all take turns; a first turn of each warms up and is not counted."""
    results: dict[str, list[Round]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name, run in runners.items():
            result = run()
            if turn:
                results[name].append(result)
    return results


def ratio(results: dict[str, list[Round]], ours: str, theirs: str, what: str) -> float:
    """Median over the rounds of ours / theirs; above 1 we are faster."""
    pairs = zip(results[ours], results[theirs], strict=True)
    return round(statistics.median(a[what] / b[what] for a, b in pairs), 3)


def prepare() -> tuple[ModelStore, Path, str]:
    """The bundled model, imported once below ``.bench/``."""
    gguf = fetch_bundled(BENCH / "download")
    store = ModelStore(BENCH / "models")
    name = "bench-source"
    if not any(manifest.name == name for manifest in store.manifests().values()):
        import_gguf(gguf, store, Identity.from_seed(bytes(32)), name=name)
    return store, gguf, name


def staged(store: ModelStore) -> Manifest:
    """The same with stages, which models of older imports lack."""
    name = "bench-stages"
    if not any(manifest.name == name for manifest in store.manifests().values()):
        import_gguf(fetch_bundled(BENCH / "download"), store, Identity.from_seed(bytes(32)), name=name)
    return store.find(name)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {"system": platform.platform(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def local_vs_llamacpp(threads: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Figures and ratios of the local routes beside llama.cpp."""
    store, gguf, name = prepare()
    peer = LlamaCpp(gguf, threads)
    try:
        fused, pieces = Local(store, name, threads, "fused"), Local(store, name, threads, "local")
        results = measure({"llamacpp": peer.run, "fused": fused.run, "pieces": pieces.run}, rounds)
    finally:
        peer.close()
    figures = {
        f"{name}_{what}_tokens_per_second": round(statistics.median(r[what] for r in results[name]), 1)
        for name in results
        for what in ("decode", "prefill")
    }
    ratios = {
        "local_vs_llamacpp_decode": ratio(results, "fused", "llamacpp", "decode"),
        "local_vs_llamacpp_prefill": ratio(results, "fused", "llamacpp", "prefill"),
        "pieces_vs_local_decode": ratio(results, "pieces", "fused", "decode"),
        "pieces_vs_local_prefill": ratio(results, "pieces", "fused", "prefill"),
    }
    return figures, ratios


class ThreeOnLoopback:
    """Three node processes (:mod:`tests.bench.three_processes`), asked by one route."""

    def __init__(self, processes: ThreeProcesses, route: str) -> None:
        self._processes = processes
        self._route = route
        self._rows: dict[str, int] = {}

    def run(self) -> Round:
        """Answer the prompt once, greedily."""
        answer = self._processes.ask(PROMPT, NEW_TOKENS, self._route)
        self._rows = answer["expert_rows"]
        prefill = answer["prompt_tokens"] / answer["prefill_seconds"]
        return {"decode": answer["tokens_per_s"], "prefill": prefill}

    def remote_share(self) -> float:
        """Share of the rows that other processes than the orchestrator computed."""
        own = self._rows.get(self._processes.orchestrator.peer_id, 0)
        return round(1 - own / sum(self._rows.values()), 3)


def processes_vs_local(threads: int, rounds: int, node_threads: int = 1) -> tuple[dict[str, float], dict[str, float]]:
    """Three processes of ``node_threads`` each, by stages and by experts, beside the fused model in this process: on
    one thread, and on as many as are best."""
    store, _, _ = prepare()
    manifest = staged(store)
    processes = ThreeProcesses(manifest, store.root / manifest.model_id, node_threads)
    try:
        routes = {route: ThreeOnLoopback(processes, route) for route in ("stages", "experts")}
        fused = {f"fused_{n}_threads": Local(store, manifest.name, n, "fused") for n in sorted({1, threads})}
        results = measure({name: each.run for name, each in (routes | fused).items()}, rounds)
        shares = {f"{name}_remote_row_share": each.remote_share() for name, each in routes.items()}
    finally:
        processes.close()
    best = max(fused, key=lambda name: statistics.median(r["decode"] for r in results[name]))
    figures = {
        f"three_processes_{name}_{what}_tokens_per_second": round(statistics.median(r[what] for r in results[name]), 1)
        for name in results
        for what in ("decode", "prefill")
    }
    ratios = {}
    for name in routes:
        ratios[f"{name}_vs_local_decode"] = ratio(results, name, "fused_1_threads", "decode")
        ratios[f"{name}_vs_best_local"] = ratio(results, name, best, "decode")
        ratios[f"{name}_vs_local_prefill"] = ratio(results, name, "fused_1_threads", "prefill")
    return figures | shares, ratios


def perplexity_vs_llamacpp(threads: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """The perplexity of a fixed text by route ``fused`` over llama.cpp's; one round is enough."""
    store, gguf, name = prepare()
    manifest = store.find(name)
    tokenizer = Tokenizer.from_str(store.read(manifest, manifest.tokenizer).decode())
    ids = tokenizer.encode(perplexity.TEXT).ids[: perplexity.TOKENS_MAX]
    runner = fused_runner(manifest, store, RuntimeOptions(device="cpu", threads=threads))
    own = trio.run(perplexity.ours, runner, ids)
    peers = perplexity.theirs(peer_python(), gguf, threads, ids)
    figures = {"fused_perplexity": round(own, 3), "llamacpp_perplexity": round(peers, 3)}
    return figures, {"perplexity_vs_llamacpp": round(own / peers, 4)}


Section = Callable[[int, int], tuple[dict[str, float], dict[str, float]]]
"""``(threads, rounds) -> (figures, ratios)``."""

SECTIONS: tuple[Section, ...] = (local_vs_llamacpp, processes_vs_local, perplexity_vs_llamacpp)
"""What is measured, one after the other; each adds its figures and ratios to the answer."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument("--only", choices=names, action="append", help="measure only this part (may be repeated)")
    parser.add_argument("--node-threads", type=int, default=1, help="threads of each of the three processes")
    arguments = parser.parse_args()
    figures: dict[str, float] = {"threads": arguments.threads, "node_threads": arguments.node_threads}
    ratios: dict[str, float] = {}
    for section in SECTIONS:
        if arguments.only and section.__name__ not in arguments.only:
            continue
        if section is processes_vs_local:
            section = partial(processes_vs_local, node_threads=arguments.node_threads)
        more_figures, more_ratios = section(arguments.threads, arguments.rounds)
        figures |= more_figures
        ratios |= more_ratios
    print(json.dumps({"name": "generate", "machine": machine(), "figures": figures, "ratios": ratios}))


if __name__ == "__main__":
    sys.exit(main())
