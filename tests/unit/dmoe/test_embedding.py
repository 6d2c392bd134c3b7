"""Vectors are the mean of the last hidden states that transformers has, with the same bits however they come about."""

import json
from pathlib import Path

import numpy as np
import pytest
import trio

from config.errors import RequestError
from config.generation import EmbeddingRequest
from dmoe.importer.build import import_folder
from dmoe.models import StoredModels
from dmoe.passes import PassOptions
from dmoe.runtime import RuntimeOptions
from dmoe.store import ModelStore
from tests.unit.dmoe.answer_kit import answer, request, tiny_engine
from tests.unit.dmoe.engine_kit import SelfRunningEngine
from tests.unit.dmoe.folder_kit import write_folder
from tests.unit.dmoe.model_kit import PUBLISHER

REFERENCE = json.loads((Path(__file__).resolve().parents[2] / "vectors" / "embeddings.json").read_text())


async def vectors(engine, *inputs, route=None):
    asked = EmbeddingRequest(model="tiny", inputs=inputs, route=route)
    found = await engine.embed(await engine.prepare_embeddings(asked))
    return [np.frombuffer(vector, dtype="<f4") for vector in found.vectors], found


@pytest.mark.parametrize("family", REFERENCE)
def test_vectors_are_those_of_transformers(tmp_path, family):
    store = ModelStore(tmp_path / "store")
    import_folder(write_folder(tmp_path / "hf", family), store, PUBLISHER, name="tiny", quantisation="fp32")

    async def run():
        models = StoredModels(store, None, RuntimeOptions(device="cpu", threads=1), "me")
        engine = SelfRunningEngine(models, default_route="local")
        found, _ = await vectors(engine, *(tuple(each["ids"]) for each in REFERENCE[family]))
        for vector, each in zip(found, REFERENCE[family], strict=True):
            assert np.abs(vector - np.array(each["vector"])).max() < 2e-4, "fp16 on the wire"

    trio.run(run)


async def test_bits_do_not_depend_on_chunks_or_neighbours(tmp_path):
    long, short = "The quick brown fox jumps. " * 12, "ab"
    engine = await tiny_engine(tmp_path)
    (alone, _), (other, _) = await vectors(engine, long), await vectors(engine, short)
    together, found = await vectors(engine, long, short, long)
    assert found.prompt_tokens == sum(len(text.replace("ab", "a").replace(" ", "G")) for text in (long, short, long))
    assert (together[0] == alone[0]).all()
    assert (together[1] == other[0]).all()
    assert np.isclose(np.linalg.norm(alone[0]), 1)
    chunked = await tiny_engine(tmp_path, passes=PassOptions(rows_max=40))
    assert ((await vectors(chunked, long))[0][0] == alone[0]).all()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer, chunked, request("beside it", max_tokens=30))
        beside = (await vectors(chunked, long))[0][0]
    assert (beside == alone[0]).all()
    assert not (alone[0] == other[0]).all()


async def test_the_cut_route_and_who_computed_it(tmp_path):
    engine = await tiny_engine(tmp_path)
    (fused,), _ = await vectors(engine, "hello there")
    (local,), found = await vectors(engine, "hello there", route="local")
    assert 0.999 < float(fused @ local) <= 1.0001
    assert found.route == "local"
    assert found.expert_rows["me"] > 0


@pytest.mark.parametrize(
    ("inputs", "code", "why"),
    [
        ((), "invalid_request", "input has 0"),
        (("a", ""), "invalid_request", "input 1 is empty"),
        (((),), "invalid_request", "input 0 is empty"),
        (((5, 10**6),), "invalid_request", "1000000"),
        (("x" * 600,), "context_length_exceeded", "600 tokens"),
    ],
)
async def test_inputs_that_cannot_be_had_are_named(tmp_path, inputs, code, why):
    engine = await tiny_engine(tmp_path)
    with pytest.raises(RequestError, match=why) as caught:
        await engine.prepare_embeddings(EmbeddingRequest(model="tiny", inputs=inputs))
    assert caught.value.code == code


async def test_a_request_that_is_left_frees_everything(tmp_path):
    engine = await tiny_engine(tmp_path)
    prepared = await engine.prepare_embeddings(EmbeddingRequest(model="tiny", inputs=("hello " * 50,) * 30))
    with trio.move_on_after(0.05):
        await engine.embed(prepared)
    statistics = engine.statistics()
    assert (statistics.active, statistics.waiting, statistics.kv_positions) == (0, 0, 0)
