"""What walls add to an answer of this node: users' grammars, and strangers' models as a whole, here and there in turns.

A model of random weights is answered with in this process and in a cell, one token per pass; the outputs must be equal
bit for bit. A grammar is followed in its own process and by the library in this one. Medians; the last line of stdout
is one JSON object:

- ``grammar_added_us``: per token: accept it, see whether the answer is complete, mask the next
- ``answer_added_us_local``, ``answer_added_us_fused``: per pass of one token, all layers in one call
- ``answer_added_us_per_layer``: the same where experts are elsewhere, by layer: the cell is asked once for each
- ``answer_added_p10_us_*``: between the fastest tenths instead of the medians, for machines that are busy
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import trio

from config.generation import Constraint
from dmoe.cells.cells import Cells
from dmoe.cells.home import Homes
from dmoe.cells.link import Options
from dmoe.constraint import Constraints
from dmoe.core.constraint import masked
from dmoe.grammar import Grammars
from dmoe.models import StoredModels
from dmoe.runner import Feed
from dmoe.runtime import RuntimeOptions
from dmoe.text import Tokenizer
from tests.unit.dmoe.model_kit import tiny
from tests.unit.dmoe.test_cells_home import Lenders

THREADS = RuntimeOptions(device="cpu", threads=1)


def vocabulary(count: int) -> Tokenizer:
    """A tokenizer with so many tokens."""
    letters = [chr(0x100 + number) if number < 33 else chr(number) for number in range(127)]
    pieces = {letter: number for number, letter in enumerate(letters)}
    for number in range(count - len(pieces)):
        pieces[f"t{number}x"] = len(pieces)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": pieces, "merges": []}
    return Tokenizer(json.dumps({"model": model, "pre_tokenizer": byte_level, "decoder": byte_level}).encode())


def grammar(tokenizer: Tokenizer, turns: int) -> tuple[list[float], list[float]]:
    """Seconds per token here and in the grammar's process."""
    text, token = "[a-z]{1,%d}" % (2 * turns), tokenizer.encode("a")[0]  # noqa: UP031 - braces
    logits, here, there = np.zeros(tokenizer.vocabulary, np.float32), [], []
    own = Grammars(tokenizer, [0]).compile("regex", text)
    with closing(Constraints(tokenizer, (0,))) as constraints:
        walled = constraints.compile_here(Constraint(kind="regex", text=text)).begin()
        for _ in range(turns):
            start = perf_counter()
            bits = np.unpackbits(np.frombuffer(own.mask(), np.uint8), bitorder="little")
            expected = masked(logits, bits[: tokenizer.vocabulary].view(np.bool_))
            own.accept(token)
            assert not own.done
            middle = perf_counter()
            assert (walled.mask(logits) == expected).all()
            walled.accept(token)
            assert not walled.done
            here.append(middle - start)
            there.append(perf_counter() - middle)
    return here, there


async def passes(models: Sequence[StoredModels], route: Any, turns: int) -> list[list[float]]:
    """Seconds of each pass by each of them."""
    runners = [await models_here.models()[0].runner(route) for models_here in models]
    sequences = [await runner.open(turns + 9) for runner in runners]
    spent: list[list[float]] = [[] for _ in models]
    for turn in range(turns + 8):
        answers = []
        for index in range(len(models)) if turn % 2 else reversed(range(len(models))):
            start = perf_counter()
            feed = Feed(sequence=sequences[index], tokens=(turn % 50,), outputs=1)
            answers.append(await runners[index].forward([feed]))
            if turn >= 8:
                spent[index].append(perf_counter() - start)
        assert np.array_equal(answers[0][0], answers[1][0])
    return spent


def added(here: list[float], there: list[float]) -> float:
    """Microseconds between the medians."""
    return round((statistics.median(there) - statistics.median(here)) * 1e6, 1)


def added_at_best(here: list[float], there: list[float]) -> float:
    """Microseconds between the fastest tenths: what a machine with other work to do still tells."""
    return round((statistics.quantiles(there, n=10)[0] - statistics.quantiles(here, n=10)[0]) * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=480, help="at most 500: the model's context")
    parser.add_argument("--vocabulary", type=int, default=49152)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    here, there = grammar(vocabulary(arguments.vocabulary), arguments.turns)
    found |= {"grammar_here_us": round(statistics.median(here) * 1e6, 1), "grammar_added_us": added(here, there)}
    with tempfile.TemporaryDirectory() as folder:
        store, manifest = tiny(Path(folder), hidden=512, kind="F32")
        rule = Cells(store, lambda *_: None, lambda *_: None, own="me")  # type: ignore[arg-type,return-value]
        with closing(Homes(rule, store, Options(kv_bytes_max=64 << 20))) as homes:
            both = [StoredModels(store, Lenders(store), THREADS, "me", homes=each) for each in (None, homes)]  # type: ignore[arg-type]
            for route in ("local", "fused", "experts"):
                spent = trio.run(passes, both, route, arguments.turns)
                found[f"answer_here_us_{route}"] = round(statistics.median(spent[0]) * 1e6, 1)
                found[f"answer_added_us_{route}"] = added(*spent)
                found[f"answer_added_p10_us_{route}"] = added_at_best(*spent)
    layers = manifest.architecture.layers
    found["answer_added_us_per_layer"] = round(found["answer_added_us_experts"] / layers, 1)
    print(json.dumps({**found, "layers": layers}))


if __name__ == "__main__":
    main()
