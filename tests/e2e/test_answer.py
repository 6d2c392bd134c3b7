"""The bundled model answers a real question, by the routes of one process; the same answer every time."""

import pytest
import trio

from config.generation import Delta, GenerationRequest, Message, Sampling
from dmoe.importer.bundled import NAME
from dmoe.models import StoredModels
from dmoe.runtime import RuntimeOptions
from tests.unit.dmoe.engine_kit import SelfRunningEngine

QUESTION = "What is the capital of France? Answer, then describe the city in five sentences."


@pytest.fixture(scope="module")
def engine(smollm2_store):
    models = StoredModels(smollm2_store, None, RuntimeOptions(device="cpu"), "me")
    return SelfRunningEngine(models, default_route="local")


async def ask(engine, route, question=QUESTION, **sampling):
    sampling = Sampling(**{"temperature": 0, "max_tokens": 10, **sampling})
    messages = (Message(role="user", content=question),)
    prepared = await engine.prepare(GenerationRequest(model=NAME, messages=messages, sampling=sampling, route=route))
    async with engine.stream(prepared) as stream:
        events = [event async for event in stream]
    deltas = [event for event in events if isinstance(event, Delta)]
    return [token for delta in deltas for token in delta.tokens], "".join(delta.text for delta in deltas), events[-1]


@pytest.mark.parametrize("route", ["local", "fused"])
async def test_the_answer_is_paris_every_time(engine, route):
    tokens, text, finished = await ask(engine, route)
    assert "Paris" in text
    assert finished.route == route
    assert (await ask(engine, route))[0] == tokens
    beside = []

    async def one():
        beside.append((await ask(engine, route))[0])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        nursery.start_soon(one)
    assert beside == [tokens, tokens]


async def test_an_answer_ends_by_itself_and_at_a_stop_string(engine):
    _, whole, finished = await ask(engine, "local", "What is the capital of France? Answer in one sentence.")
    assert finished.reason == "stop"
    assert whole.endswith("Paris.")
    _, cut, finished = await ask(
        engine, "local", "What is the capital of France? Answer in one sentence.", stop=(" Par",)
    )
    assert (cut, finished.reason) == (whole[: -len(" Paris.")], "stop")
