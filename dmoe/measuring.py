"""Measures this machine with a model: tokens per second by every route possible here, rows per second of experts.

Owns: what is run and timed. Does not own: which model (``node/bench``), how figures are shown, the routes themselves.

Invariants:
1. Bounded: a measurement stops within its seconds plus one pass; warm-up is not counted.
2. What is timed is what answers run: the same runner, the same sessions, the same threads.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter

import numpy as np
import psutil

from config.generation import Route
from dmoe.core.manifest import Manifest, Shard
from dmoe.models import StoredModel
from dmoe.runner import Feed, Runner
from dmoe.runner import Sequence as Cache
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.store import ModelStore

PROMPT_TOKENS = 128
CHUNK_TOKENS = 128
DECODED_MAX = 256
PASSES_MIN = 3
EXPERTS_MAX = 16
"""So many experts take turns: more than a core's cache holds, few enough to load quickly."""
_HASHES = 2654435761


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A route at a batch size. ``decode_tokens_per_s``: all sequences together; times per pass in milliseconds."""

    route: Route
    batch: int
    threads: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_ms_p50: float
    decode_ms_p99: float
    passes: int
    load_seconds: float
    memory_bytes: int
    kv_bytes_per_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRate:
    """Experts called with ``rows`` rows by so many threads at a time. ``rows_per_s``: all threads together;
    ``weight_bytes_per_s``: weights passed through, whether from memory or from a cache."""

    device: str
    rows: int
    threads: int
    calls: int
    rows_per_s: float
    us_p50: float
    us_p99: float
    gflop_per_s: float
    weight_bytes_per_s: float


Told = Callable[[str], None]
"""Is told what begins."""


def routes_here(manifest: Manifest, store: ModelStore) -> list[Route]:
    """The routes that need nobody else and whose files are here, fastest first."""
    model = _model(manifest, store, RuntimeOptions(device="cpu"))
    is_dense = manifest.architecture.router.kind == "all"
    possible: list[Route] = ["fused", "local", "stages"] if is_dense else ["local", "stages"]
    return [route for route in possible if model.fault(route) is None]


async def generation(
    manifest: Manifest,
    store: ModelStore,
    options: RuntimeOptions,
    routes: Sequence[Route],
    batches: Sequence[int],
    *,
    seconds: float,
    told: Told,
) -> list[Generated]:
    """Every route at every batch size, within ``seconds`` altogether (loading comes on top). Raises RiosError."""
    found = []
    for route in routes:
        told(f"{route}: loading")
        gc.collect()
        before, started = psutil.Process().memory_info().rss, perf_counter()
        runner = await _model(manifest, store, options).runner(route)
        load_seconds = perf_counter() - started
        for batch in batches:
            told(f"{route}, batch {batch}")
            timed = await _timed(runner, manifest, batch, seconds / (len(routes) * len(batches)))
            memory_bytes = max(0, psutil.Process().memory_info().rss - before)
            found.append(_generated(manifest, route, batch, options, timed, load_seconds, memory_bytes))
        del runner
    return found


@dataclass(frozen=True, slots=True)
class _Timed:
    prefill_tokens_per_s: float
    passes: Sequence[float]
    """Seconds of each decoding pass."""
    capacity: int


async def _timed(runner: Runner, manifest: Manifest, batch: int, seconds: float) -> _Timed:
    arch = manifest.architecture
    prompt_tokens = min(PROMPT_TOKENS, arch.context // 2)
    capacity = min(arch.context, prompt_tokens + DECODED_MAX)
    prompts = [
        tuple((place * _HASHES + number) % arch.vocab for place in range(prompt_tokens)) for number in range(batch)
    ]
    sequences = [await runner.open(capacity) for _ in range(batch)]
    try:
        for sequence, prompt in zip(sequences, prompts, strict=True):  # warm up: memory is bound, pages are touched
            await _prefill(runner, sequence, prompt)
            sequence.truncate(0)
        end = perf_counter() + seconds / 2
        tokens, started, last = 0, perf_counter(), [0] * batch
        while not tokens or perf_counter() < end:
            for number, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
                sequence.truncate(0)
                last[number] = await _prefill(runner, sequence, prompt)
            tokens += batch * prompt_tokens
        prefill = tokens / (perf_counter() - started)
        await _decode(runner, sequences, last)
        passes: list[float] = []
        end = perf_counter() + seconds / 2
        while len(passes) < PASSES_MIN or perf_counter() < end:
            if sequences[0].length + 1 > capacity:
                for sequence in sequences:
                    sequence.truncate(prompt_tokens)
            before = perf_counter()
            last = await _decode(runner, sequences, last)
            passes.append(perf_counter() - before)
    finally:
        for sequence in sequences:
            sequence.close()
    return _Timed(prefill, passes, capacity)


async def _prefill(runner: Runner, sequence: Cache, prompt: tuple[int, ...]) -> int:
    for start in range(0, len(prompt), CHUNK_TOKENS):
        (logits,) = await runner.forward([Feed(sequence=sequence, tokens=prompt[start : start + CHUNK_TOKENS])])
    return int(logits[-1].argmax())


async def _decode(runner: Runner, sequences: Sequence[Cache], last: Sequence[int]) -> list[int]:
    feeds = [Feed(sequence=sequence, tokens=(token,)) for sequence, token in zip(sequences, last, strict=True)]
    return [int(logits[-1].argmax()) for logits in await runner.forward(feeds)]


def _generated(
    manifest: Manifest,
    route: Route,
    batch: int,
    options: RuntimeOptions,
    timed: _Timed,
    load_seconds: float,
    memory_bytes: int,
) -> Generated:
    arch = manifest.architecture
    return Generated(
        route=route,
        batch=batch,
        threads=options.thread_count,
        prefill_tokens_per_s=round(timed.prefill_tokens_per_s, 1),
        decode_tokens_per_s=round(batch * len(timed.passes) / sum(timed.passes), 1),
        decode_ms_p50=round(1000 * float(np.percentile(timed.passes, 50)), 3),
        decode_ms_p99=round(1000 * float(np.percentile(timed.passes, 99)), 3),
        passes=len(timed.passes),
        load_seconds=round(load_seconds, 2),
        memory_bytes=memory_bytes,
        kv_bytes_per_sequence=4 * arch.layers * arch.cache_numbers * timed.capacity,
    )


def _model(manifest: Manifest, store: ModelStore, options: RuntimeOptions) -> StoredModel:
    return StoredModel(manifest, store, None, options, manifest.publisher)


# --- experts


def experts(
    manifest: Manifest,
    store: ModelStore,
    options: RuntimeOptions,
    rows: Sequence[int],
    *,
    seconds: float,
    told: Told,
) -> list[ExpertRate]:
    """Experts of the model with every number of rows, by one thread and by all, within ``seconds`` altogether."""
    told("loading experts")
    shards = _some(manifest)
    loaded = [ExpertShard(manifest, shard, store, options) for shard in shards]
    device = options.providers()[0].removesuffix("ExecutionProvider").lower()
    counts = sorted({1, options.thread_count})
    found = []
    for threads in counts:
        for count in rows:
            told(f"{device}, {count} rows, {threads} threads")
            found.append(_rate(manifest, loaded, device, count, threads, seconds / (len(counts) * len(rows))))
    for shard in loaded:
        shard.close()
    return found


def _some(manifest: Manifest) -> list[Shard]:
    """Few shards that together have enough experts to take turns."""
    chosen: list[Shard] = []
    have = 0
    for shard in manifest.expert_shards():
        if have < EXPERTS_MAX:
            chosen.append(shard)
            have += len(shard.experts) * (shard.layers[1] - shard.layers[0] + 1)
    return chosen


def _rate(
    manifest: Manifest, loaded: Sequence[ExpertShard], device: str, rows: int, threads: int, seconds: float
) -> ExpertRate:
    places = list(_places(loaded))
    h = np.random.default_rng(rows).standard_normal((rows, manifest.architecture.hidden), np.float32)
    weights = np.ones((rows, 1), np.float32)
    is_dense = manifest.architecture.router.kind == "all"

    def call(place: "_Place") -> None:
        chosen = None if is_dense else np.full((rows, 1), place.expert, np.int32)
        place.shard.partial(place.layer, h, chosen, None if is_dense else weights)

    for place in places:
        call(place)  # memory of this many rows

    def work(first: int) -> list[float]:
        own = cycle(places[first % len(places) :] + places[: first % len(places)])
        times: list[float] = []
        end = perf_counter() + seconds
        while len(times) < PASSES_MIN or perf_counter() < end:
            before = perf_counter()
            call(next(own))
            times.append(perf_counter() - before)
        return times

    started = perf_counter()
    if threads == 1:
        times = work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            step = max(1, len(places) // threads)
            times = [each for part in pool.map(work, range(0, threads * step, step)) for each in part]
    spent = perf_counter() - started
    flops, weight_bytes = places[0].flops, places[0].weight_bytes
    return ExpertRate(
        device=device,
        rows=rows,
        threads=threads,
        calls=len(times),
        rows_per_s=round(rows * len(times) / spent, 1),
        us_p50=round(1e6 * float(np.percentile(times, 50)), 1),
        us_p99=round(1e6 * float(np.percentile(times, 99)), 1),
        gflop_per_s=round(flops * rows * len(times) / spent / 1e9, 2),
        weight_bytes_per_s=round(weight_bytes * len(times) / spent),
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """What one call runs: one expert; of a dense model all blocks of a sum group."""

    shard: ExpertShard
    layer: int
    expert: int
    flops: float
    weight_bytes: float


def _places(loaded: Sequence[ExpertShard]) -> Iterator[_Place]:
    for shard in loaded:
        first, last = shard.shard.layers
        is_dense = shard.manifest.architecture.router.kind == "all"
        calls = (shard.shard.experts[0],) if is_dense else shard.shard.experts
        flops = shard.shard.flops_per_row / len(calls)
        weight_bytes = shard.shard.size_bytes / ((last - first + 1) * len(calls))
        for layer in range(first, last + 1):
            for expert in calls:
                yield _Place(shard, layer, expert, flops, weight_bytes)
