"""A node goes on answering honest calls while hostile models are asked, loaded and refused beside it."""

import shutil

import pytest
import trio
import trio.testing

from config.errors import IntegrityError, LocalError, RequestError
from config.generation import Delta, GenerationRequest, Message, Sampling
from dmoe import runtime, textaside
from dmoe.importer.build import Wishes, import_model
from dmoe.models import StoredModels
from dmoe.runtime import RuntimeOptions
from dmoe.store import ModelStore
from tests.hostile.corpus import ENDLESS
from tests.unit.dmoe.engine_kit import SelfRunningEngine
from tests.unit.dmoe.model_kit import PUBLISHER, write_gguf

BOMBS = {
    "endless": ENDLESS,
    "memory": "{{ ('x' * 10**10) | length }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    store = ModelStore(folder / "store")
    templates = {"honest": "{{ messages[0]['content'] }}", "altered": "x", **BOMBS}
    for seed, (name, template) in enumerate(templates.items()):
        path = folder / f"{name}.gguf"
        write_gguf(path, seed=seed, change={"tokenizer.chat_template": template})
        import_model(path, store, PUBLISHER, Wishes(name=name))
    altered = store.find("altered")
    path = store.path(altered.model_id, altered.trunk.files[0])
    moved = folder / "moved"
    shutil.move(path, moved)
    path.symlink_to(moved)
    return store


def asked(model):
    messages = (Message(role="user", content="hello there"),)
    return GenerationRequest(
        model=model, messages=messages, sampling=Sampling(temperature=0, max_tokens=12, min_tokens=12)
    )


async def tokens_of(engine, model):
    async with engine.stream(await engine.prepare(asked(model))) as stream:
        return [token async for event in stream if isinstance(event, Delta) for token in event.tokens]


async def test_honest_answers_go_on_beside_hostile_models(store, monkeypatch, caplog):
    monkeypatch.setattr(textaside, "CHAT_SECONDS", 2.0)
    models = StoredModels(store, None, RuntimeOptions(device="cpu", threads=1), "me")
    engine = SelfRunningEngine(models, default_route="local")
    expected = await tokens_of(engine, "honest")
    refused, answers = {}, []

    async def hostile(name):
        with pytest.raises((IntegrityError, RequestError, LocalError)) as error:
            await tokens_of(engine, name)
        refused[name] = error.value

    async def honest():
        while len(refused) < len(BOMBS) + 1:
            answers.append(await tokens_of(engine, "honest"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(honest)
        for name in (*BOMBS, "altered"):
            nursery.start_soon(hostile, name)
    assert answers == [expected] * len(answers)
    assert len(answers) > 1
    assert "took longer than" in refused["endless"].message
    assert "too much memory" in refused["memory"].message
    assert "unsafe" in refused["escape"].message
    assert "symbolic link" in refused["altered"].message
    assert await tokens_of(engine, "honest") == expected
    assert store.refused.by_kind["text"] == 2  # the escape harmed nobody: its process goes on
    assert store.refused.by_kind["file"] > 0
    told = [record.getMessage() for record in caplog.records if record.name == "rios.security.models"]
    assert any("text refused: the model's tokenizer or chat template" in line for line in told)
    assert any("file refused" in line and "symbolic link" in line for line in told)


async def test_a_crowd_at_a_hostile_model_takes_no_threads_from_honest_answers(store, monkeypatch):
    monkeypatch.setattr(textaside, "CHAT_SECONDS", 60.0)
    models = StoredModels(store, None, RuntimeOptions(device="cpu", threads=1), "me")
    engine = SelfRunningEngine(models, default_route="local", waiting_max=1000)
    expected = await tokens_of(engine, "honest")
    (bomb,) = [model for model in models.models() if model.name == "endless"]
    tokenizer = await bomb.tokenizer()
    async with trio.open_nursery() as nursery:
        for _ in range(3 * trio.to_thread.current_default_thread_limiter().total_tokens):
            nursery.start_soon(tokens_of, engine, "endless")
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert await tokens_of(engine, "honest") == expected
        nursery.cancel_scope.cancel()
    tokenizer._aside._process._popen.kill()  # the thread that asked ends with it


async def test_a_template_that_was_stopped_is_tried_again_by_the_next_request(store, monkeypatch):
    """A model whose process was killed is not lost: only the request that did it is."""
    engine = SelfRunningEngine(
        StoredModels(store, None, RuntimeOptions(device="cpu", threads=1), "me"), default_route="local"
    )
    expected = await tokens_of(engine, "honest")
    (model,) = [model for model in engine._models.models() if model.name == "honest"]
    tokenizer = await model.tokenizer()
    tokenizer._aside._process._popen.kill()
    with pytest.raises(IntegrityError, match="ended its process"):
        await tokens_of(engine, "honest")
    assert await tokens_of(engine, "honest") == expected


def test_an_old_onnxruntime_is_refused_with_what_to_do(monkeypatch):
    for found in ("1.31.2", "1.9.0", "0.9"):
        monkeypatch.setattr(runtime.ort, "__version__", found)
        with pytest.raises(LocalError, match=f"ONNX Runtime {found} is too old: 1.32 or later"):
            RuntimeOptions()
    for found in ("1.32.0", "1.33.0.dev20260101", "2.0.0"):
        monkeypatch.setattr(runtime.ort, "__version__", found)
        RuntimeOptions()
