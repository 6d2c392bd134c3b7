"""Fuzzing without a framework: seeded episodes of hostile input, checked for crashes, hangs and growth.

    python -m tests.fuzz.fuzz frames --count 1000000
    python -m tests.fuzz.fuzz frames --seed 7 --episode 1234     # the one that failed, again

Each episode has its own generator, made from the seed and its number; a failure prints both. Memory is looked at twice:
the process's resident set after the first tenth and at the end, and what Python itself allocated over a last stretch
under tracemalloc. The result is one JSON line.
"""

import argparse
import gc
import json
import logging
import signal
import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib import import_module
from random import Random
from types import FrameType

import psutil

TARGETS = ("frames", "lane", "adverts", "records")
HANG_SECONDS = 30
RESIDENT_GROWTH_BYTES_MAX = 16 << 20
TRACED_GROWTH_BYTES_MAX = 512 << 10
TRACED_SHARE = 50

Run = Callable[[Random], int]


class Hang(BaseException):
    """An episode took too long. Not an Exception, so that nothing under test swallows it."""


def _ring(_number: int, _frame: FrameType | None) -> None:
    raise Hang(f"an episode took more than {HANG_SECONDS} s")


def run_episode(target: str, run: Run, seed: int, episode: int) -> int:
    """The number of inputs in it. Whatever goes wrong is raised after its seed was printed."""
    try:
        return run(Random(f"{target}/{seed}/{episode}"))
    except BaseException:
        print(f"failed: python -m tests.fuzz.fuzz {target} --seed {seed} --episode {episode}", file=sys.stderr)
        raise


def _stretch(target: str, run: Run, seed: int, episode: int, count: int) -> tuple[int, int]:
    """At least ``count`` inputs: the number of them and of the next episode."""
    done = 0
    while done < count:
        signal.alarm(HANG_SECONDS)
        done += run_episode(target, run, seed, episode)
        episode += 1
    signal.alarm(0)
    return done, episode


def fuzz(target: str, *, count: int, seed: int) -> dict[str, int | float | str]:
    """Run ``count`` inputs; raises for a crash, a hang or growth."""
    run: Run = import_module(f"tests.fuzz.fuzz_{target}").run
    before = signal.signal(signal.SIGALRM, _ring)
    process, started = psutil.Process(), time.monotonic()
    try:
        done, episode = _stretch(target, run, seed, 0, max(1, count // 10))
        gc.collect()
        resident = process.memory_info().rss
        more, episode = _stretch(target, run, seed, episode, count - done)
        done += more
        gc.collect()
        grown = process.memory_info().rss - resident
        seconds = time.monotonic() - started
        traced = _traced_growth(target, run, seed, episode, max(100, count // TRACED_SHARE))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    result: dict[str, int | float | str] = {
        "target": target,
        "seed": seed,
        "inputs": done,
        "seconds": round(seconds, 1),
        "resident_growth_bytes": grown,
        "traced_growth_bytes": traced,
    }
    assert grown < RESIDENT_GROWTH_BYTES_MAX, f"the process grew: {result}"
    assert traced < TRACED_GROWTH_BYTES_MAX, f"Python's memory grew: {result}"
    return result


def _traced_growth(target: str, run: Run, seed: int, episode: int, count: int) -> int:
    """What Python allocated and kept over ``count`` inputs, after as many to warm up."""
    tracemalloc.start()
    try:
        _, episode = _stretch(target, run, seed, episode, count)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        _stretch(target, run, seed, episode, count)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: all")
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs per target (default: a million)")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--episode", type=int, default=None, help="only this one")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)  # every refusal says something
    seed = args.seed if args.seed is not None else time.time_ns() % (1 << 32)
    for target in args.targets or TARGETS:
        if args.episode is not None:
            run_episode(target, import_module(f"tests.fuzz.fuzz_{target}").run, seed, args.episode)
            continue
        print(f"{target}: {args.count} inputs, seed {seed}", file=sys.stderr, flush=True)
        print(json.dumps(fuzz(target, count=args.count, seed=seed)), flush=True)


if __name__ == "__main__":
    main()
