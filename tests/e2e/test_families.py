"""Sparse families over two real processes: the tokens and logits of transformers, and the bits of one process.

The reference stands in ``tests/vectors/hf_reference.npz``; the checkpoints are the tiny ones that it was computed from.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trio

from dmoe.importer.build import import_folder
from dmoe.layers import local_runner
from dmoe.runner import Feed, Runner
from dmoe.store import ModelStore
from tests.bench.parity_swarm import OPTIONS, PUBLISHER, ParitySwarm, with_fp32_wire
from tests.unit.dmoe.folder_kit import write_folder

FAMILIES = ("qwen2_moe", "gpt_oss", "deepseek_v3")
"""Biases, a gated shared expert, a dense layer between; and latent attention with a grouped sigmoid router."""
REFERENCE = Path(__file__).resolve().parents[1] / "vectors" / "hf_reference.npz"
STEPS = 8


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelStore, dict, ParitySwarm]]:
    folder = tmp_path_factory.mktemp("families")
    store, models = ModelStore(folder / "models"), {}
    for family in FAMILIES:
        source = write_folder(folder / family, family)
        models[family] = with_fp32_wire(store, import_folder(source, store, PUBLISHER, name=family))
    swarm = ParitySwarm(folder, store, list(models.values()))
    yield store, models, swarm
    swarm.close()


async def logits_of(runner: Runner, ids: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Logits behind the prompt and behind each further token, and how many rows each peer computed."""
    sequence = await runner.open(60)
    found = [await runner.forward([Feed(sequence=sequence, tokens=tuple(map(int, ids)))])]
    found += [await runner.forward([Feed(sequence=sequence, tokens=(int(token),))]) for token in tokens]
    return np.concatenate([rows for (rows,) in found]), sequence.report().expert_rows


@pytest.mark.parametrize("family", FAMILIES)
async def test_experts_at_two_processes_compute_what_transformers_does(
    rig: tuple[ModelStore, dict, ParitySwarm], family: str
) -> None:
    store, models, swarm = rig
    manifest = models[family]
    with np.load(REFERENCE) as reference:
        ids, tokens = reference[f"{family}.ids"], reference[f"{family}.tokens"]
        wanted = np.concatenate([reference[f"{family}.prefill"][-1:], reference[f"{family}.logits"]])[:STEPS]
    make = partial(local_runner, manifest, store, OPTIONS)
    here, _ = await logits_of(await trio.to_thread.run_sync(make), ids, tokens[: STEPS - 1])
    async with swarm.caller() as models_here:
        runner = await swarm.runner(models_here, manifest, "experts")
        found, rows = await logits_of(runner, ids, tokens[: STEPS - 1])
    assert found.tobytes() == here.tobytes()
    assert np.abs(found - wanted).max() < 1e-4
    assert list(found.argmax(axis=-1)) == list(tokens[:STEPS])
    assert set(rows) <= {worker.peer_id for worker in swarm.workers}
