"""Is it the same model? Every family beside transformers, on tiny checkpoints with random weights.

Run it as a program; the last line on stdout is one JSON object. transformers runs in an environment of its own below
``.bench/``, on the very folders that are imported here. Compared are all logits of a prompt, those behind 20 greedy
tokens with cache, and a ragged batch of three prompts: in this process, with the experts at two node processes, and
with all layers at two. Rows travel as fp32, as the weights are.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from dmoe.core.manifest import Manifest
from dmoe.importer.build import Wishes, import_model
from dmoe.importer.cut import Sizes
from dmoe.layers import local_runner
from dmoe.runner import Feed, FloatRows, Runner
from dmoe.store import ModelStore
from tests.bench.bench_generate import BENCH, machine
from tests.bench.parity_swarm import OPTIONS, PUBLISHER, ParitySwarm, with_fp32_wire
from tests.unit.dmoe.folder_kit import FAMILIES, SPARSE, write_folder

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers")
TOLERANCE = 1e-4
SIZES = Sizes(layers_per_shard=1)
"""A stage per layer: every model passes from process to process."""
Reference = dict[str, NDArray[Any]]


@dataclass(slots=True)
class Outcome:
    """One family by one route: the largest difference of a logit, and greedy tokens that are others."""

    difference: float = 0.0
    mismatches: int = 0
    peers: int = 0
    """How many computed experts or layers."""

    def add(self, found: FloatRows, wanted: FloatRows, token: int | None = None) -> None:
        """Compare rows of logits; ``token``: the reference's choice after the last of them."""
        self.difference = max(self.difference, float(np.abs(found - wanted).max()))
        self.mismatches += token is not None and int(found[-1].argmax()) != token


def references(folder: Path) -> dict[str, Reference]:
    """What transformers says of every folder below ``folder``, by its name."""
    python = BENCH / "transformers" / "bin" / "python"
    if not python.exists():
        venv.create(BENCH / "transformers", with_pip=True)
    if subprocess.run([python, "-c", f"import {', '.join(PACKAGES)}"], capture_output=True, check=False).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    program = REPOSITORY / "tests" / "vectors" / "hf_reference.py"
    command = [str(python), str(program), "--folders", str(folder), "--out", str(folder / "reference.npz")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with np.load(folder / "reference.npz") as found:
        arrays = dict(found)
    return {name: {k.partition(".")[2]: v for k, v in arrays.items() if k.startswith(f"{name}.")} for name in FAMILIES}


async def compare(runner: Runner, wanted: Reference) -> Outcome:
    """One sequence alone, then three of unlike lengths together."""
    outcome = Outcome()
    sequence = await runner.open(64)
    ids = tuple(map(int, wanted["ids"]))
    (found,) = await runner.forward([Feed(sequence=sequence, tokens=ids, outputs=len(ids))])
    outcome.add(found, wanted["prefill"], int(wanted["tokens"][0]))
    following = [*map(int, wanted["tokens"][1:]), None]
    for token, logits, then in zip(wanted["tokens"], wanted["logits"], following, strict=True):
        (found,) = await runner.forward([Feed(sequence=sequence, tokens=(int(token),))])
        outcome.add(found, logits[None], then)
    outcome.peers = len(sequence.report().expert_rows)
    sequence.close()
    await _compare_ragged(runner, wanted, outcome)
    return outcome


async def _compare_ragged(runner: Runner, wanted: Reference, outcome: Outcome) -> None:
    marks = ("", "0", "1")
    sequences = [await runner.open(64) for _ in marks]
    tokens = [tuple(map(int, wanted[f"ids{mark}"])) for mark in marks]
    for step in range(-1, 3):
        feeds = [Feed(sequence=own, tokens=mine) for own, mine in zip(sequences, tokens, strict=True)]
        for mark, found in zip(marks, await runner.forward(feeds), strict=True):
            logits = wanted[f"prefill{mark}"][-1] if step < 0 else wanted[f"logits{mark}"][step]
            outcome.add(found, logits[None])
        tokens = [(int(wanted[f"tokens{mark}"][step + 1]),) for mark in marks] if step < 2 else []
    for own in sequences:
        own.close()


def measure(folder: Path) -> dict[str, dict[str, Outcome]]:
    """Outcomes by route, then by family."""
    store, models = ModelStore(folder / "models"), dict[str, Manifest]()
    for name in FAMILIES:
        source = write_folder(folder / "hf" / name, name)
        models[name] = with_fp32_wire(store, import_model(source, store, PUBLISHER, Wishes(name=name, sizes=SIZES)))
    wanted = references(folder / "hf")
    found = {"local": {n: trio.run(compare, local_runner(models[n], store, OPTIONS), wanted[n]) for n in FAMILIES}}
    return found | _over_processes(folder, store, models, wanted)


def _over_processes(
    folder: Path, store: ModelStore, models: dict[str, Manifest], wanted: dict[str, Reference]
) -> dict[str, dict[str, Outcome]]:
    """All experts, then all layers, at two node processes."""
    swarm = ParitySwarm(folder, store, list(models.values()))

    async def run() -> dict[str, dict[str, Outcome]]:
        found: dict[str, dict[str, Outcome]] = {"experts": {}, "stages": {}}
        async with swarm.caller() as callers:
            for name in FAMILIES:
                for route in ("experts", "stages") if name in SPARSE else ("stages",):
                    runner = await swarm.runner(callers, models[name], route)
                    found[route][name] = await compare(runner, wanted[name])
        return found

    try:
        return trio.run(run)
    finally:
        swarm.close()


def report(outcomes: dict[str, dict[str, Outcome]]) -> dict[str, Any]:
    """Figures per route and family, and whether all is within the tolerance."""
    figures = {
        f"{route}_{name}": asdict(outcome) for route, found in outcomes.items() for name, outcome in found.items()
    }
    every = [outcome for found in outcomes.values() for outcome in found.values()]
    return {
        "figures": figures,
        "difference_max": max(outcome.difference for outcome in every),
        "mismatches": sum(outcome.mismatches for outcome in every),
        "tolerance": TOLERANCE,
    }


def main(make: Callable[[Path], dict[str, dict[str, Outcome]]] = measure) -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="rios-parity-") as folder:
        outcomes = make(Path(folder))
    print(json.dumps({"name": "parity", "machine": machine(), **report(outcomes)}))


if __name__ == "__main__":
    sys.exit(main())
