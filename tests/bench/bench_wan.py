"""Tokens per second over far-away stages: forwarding against hub-and-spoke, speculation on against off.

Run it as a program; the last line on stdout is one JSON object. Three hosts run a stage each of the bundled model;
every connection between two nodes has ``--round-trip`` ms of emulated round trip. The orchestrators take turns, so that
what else the machine does hits all; ratios are medians over the rounds.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dmoe.store import ModelStore
from tests.bench.bench_generate import BENCH, machine, staged
from tests.bench.stage_swarm import StageSwarm

ORCHESTRATORS = {
    "forward": {"dmoe.drafts_max": 0},
    "hub": {"dmoe.drafts_max": 0, "dmoe.stage_forwarding": False},
    "drafts": {},
}
CODE = """def area_of_square(side):
    if side < 0:
        raise ValueError("side is negative")
    return side * side

def area_of_rectangle(width, height):
    if width < 0:
        raise ValueError("width is negative")
    if height < 0:
        raise ValueError("height is negative")
    return width * height

def area_of_triangle(base, height):
    if base < 0:
        raise ValueError("base is negative")
    if height < 0:
        raise ValueError("height is negative")
    return base * height / 2
"""
QUESTIONS = {
    "repetitive": "Repeat the following Python code exactly, without any change:\n\n" + CODE,
    "plain": "Tell me a story about a lighthouse keeper who finds a letter in a bottle.",
}


def measure(swarm: StageSwarm, tokens: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Question -> orchestrator -> tokens per second, a value per round; a first round warms up. All must agree."""
    found = {question: {name: [] for name in ORCHESTRATORS} for question in QUESTIONS}
    for turn in range(rounds + 1):
        for question, text in QUESTIONS.items():
            answers = {name: swarm.ask(name, text, tokens) for name in ORCHESTRATORS}
            if len({answer["text"] for answer in answers.values()}) > 1:
                raise SystemExit(f"the orchestrators differ in their answers to {question!r}")
            for name, answer in answers.items():
                if turn:
                    found[question][name].append(answer["tokens_per_s"])
    return found


def ratio(one: list[float], other: list[float]) -> float:
    """Median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round-trip", type=float, default=100.0, help="ms")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    store = ModelStore(BENCH / "models")
    manifest = staged(store)
    swarm = StageSwarm(manifest, store.root / manifest.model_id, ORCHESTRATORS, delay_ms=arguments.round_trip / 2)
    try:
        found = measure(swarm, arguments.tokens, arguments.rounds)
    finally:
        swarm.close()
    figures = {
        f"{question}_{name}_tokens_per_second": round(statistics.median(values), 2)
        for question, names in found.items()
        for name, values in names.items()
    }
    plain, repetitive = found["plain"], found["repetitive"]
    ratios = {
        "forwarding_gain": ratio(plain["forward"], plain["hub"]),
        "speculation_gain_repetitive": ratio(repetitive["drafts"], repetitive["forward"]),
        "speculation_gain_plain": ratio(plain["drafts"], plain["forward"]),
    }
    more = {"round_trip_ms": arguments.round_trip, "tokens": arguments.tokens}
    print(json.dumps({"name": "wan", "machine": machine(), "figures": {**more, **figures}, "ratios": ratios}))


if __name__ == "__main__":
    main()
