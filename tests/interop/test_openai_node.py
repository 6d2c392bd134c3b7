"""The unmodified openai client for Node against a real gateway: the real engine, a tiny model of random weights."""

import json
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_engine import ANSWER, FakeEngine
from gateway_rig import Rig, serving

from config.errors import BusyError
from tests.unit.dmoe.answer_kit import engine_running

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{# <tool_call> #}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ c.function.arguments | tojson }})]{% endfor %}/"
    "{% endfor %}"
)
MODEL = {"change": {"tokenizer.chat_template": TEMPLATE, "llama.context_length": 2048}}

See = Callable[[Rig, str], Awaitable[Any]]
Run = Callable[[str], Awaitable[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
async def rig(tmp_path: Path, folder: Path):
    async with engine_running(folder, **MODEL) as engine, serving(tmp_path, engine=engine) as rig:
        yield rig


@pytest.fixture
def see(javascript: Path, node22: str) -> See:
    """What the client saw in a scenario of ``openai.mjs``."""

    async def seen(rig: Rig, scenario: str) -> Any:
        command = [node22, str(javascript / "openai.mjs"), f"{rig.gateway.url}/v1", rig.key, scenario]
        with trio.fail_after(60):
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return json.loads(done.stdout)

    return seen


@pytest.fixture
def run(rig: Rig, see: See) -> Run:
    """The same at the gateway before the real engine."""
    return partial(see, rig)


async def test_models(run: Run) -> None:
    assert await run("models") == {"listed": ["tiny"], "one": "tiny"}


async def test_chat(run: Run) -> None:
    seen = await run("chat")
    assert (seen["role"], seen["reason"], seen["same"]) == ("assistant", "length", True)
    assert seen["usage"]["completion_tokens"] == 8
    assert seen["usage"]["total_tokens"] == seen["usage"]["prompt_tokens"] + 8


async def test_streaming_and_usage(run: Run, rig: Rig) -> None:
    seen = await run("stream")
    assert (seen["first"], seen["reason"], seen["usage"]["completion_tokens"]) == ("assistant", "length", 8)
    assert seen["text"] == seen["helped"], "the same seed, and the client's own helper puts the same text together"
    rows = await trio.to_thread.run_sync(rig.accounts.usage, "ada")
    assert [row.completion_tokens for row in rows] == [8, 8]


async def test_a_client_that_leaves_pays_for_what_was_produced(run: Run, rig: Rig) -> None:
    assert await run("leaves") == {"aborted": True}
    with trio.fail_after(10):
        while not (rows := await trio.to_thread.run_sync(rig.accounts.usage, "ada")):  # noqa: ASYNC110
            await trio.sleep(0.05)
    assert rows[0].outcome in ("cancelled", "stop", "length")
    assert (await rig.balance()).reserved == 0


async def test_tools(run: Run) -> None:
    seen = await run("tools")
    assert (seen["reason"], seen["next"]) == ("tool_calls", "assistant")
    for calls in (seen["calls"], seen["streamed"]):
        assert calls
        assert all(name == "get_weather" and given["city"] in ("Oslo", "Rome") for name, given in calls)


async def test_a_json_schema(run: Run) -> None:
    assert (await run("schema"))["parsed"]["name"] in ("Ada", "Bob")


async def test_embeddings(run: Run) -> None:
    seen = await run("embeddings")
    assert (seen["count"], seen["near"]) == (2, True)
    assert seen["usage"]["prompt_tokens"] > 0


async def test_echo_with_logprobs(run: Run) -> None:
    seen = await run("completions")
    assert seen["text"] == seen["streamed"]
    assert seen["text"].startswith("hello")
    assert (seen["tokens"][:5], seen["offsets"][:6]) == (list("hello"), [0, 1, 2, 3, 4, 5])
    assert (len(seen["tokens"]), seen["first"], seen["rest"], seen["tops"]) == (7, None, True, True)


async def test_files(tmp_path: Path, see: See) -> None:
    async with serving(tmp_path) as rig:
        seen = await see(rig, "files")
    assert seen["file"] == ["über.bin", 300_000, "user_data"]
    assert [seen[name] for name in ("again", "listed", "same", "removed")] == [True] * 4
    assert (seen["gone"]["kind"], seen["gone"]["status"]) == ("NotFoundError", 404)


async def test_files_and_batches(run: Run) -> None:
    seen = await run("batches")
    assert (seen["status"], seen["counts"]) == ("completed", {"total": 2, "completed": 2, "failed": 0})
    assert [row[:2] for row in seen["answered"]] == [["a", 200], ["b", 200]]
    assert all(1 <= row[2] <= 4 for row in seen["answered"])
    assert seen["listed"] == ["batch", "batch_output"]


async def test_errors_are_the_clients_own_kinds(run: Run) -> None:
    seen = await run("errors")
    kinds = {name: (each["kind"], each["status"], each["code"]) for name, each in seen.items()}
    assert kinds == {
        "model": ("NotFoundError", 404, "model_not_found"),
        "key": ("AuthenticationError", 401, "invalid_api_key"),
        "value": ("BadRequestError", 400, "invalid_value"),
        "long": ("BadRequestError", 400, "context_length_exceeded"),
    }
    assert (seen["model"]["param"], seen["value"]["param"]) == ("model", "temperature")
    assert all(each["request"] for each in seen.values())


async def test_an_empty_purse(tmp_path: Path, see: See) -> None:
    async with serving(tmp_path, credit=25) as rig:
        seen = await see(rig, "broke")
    assert (seen["kind"], seen["status"], seen["code"]) == ("APIError", 402, "insufficient_quota")


async def test_it_comes_again_when_it_is_told_to(tmp_path: Path, see: See) -> None:
    async with serving(tmp_path, requests_per_minute=20) as rig:
        seen = await see(rig, "limited")
    assert (seen["limited"]["kind"], seen["limited"]["status"]) == ("RateLimitError", 429)
    assert (seen["limited"]["code"], seen["after"]) == ("rate_limit_exceeded", 2)


async def test_it_tries_a_busy_server_again(tmp_path: Path, see: See) -> None:
    engine = FakeEngine(fail_at=0, error=BusyError("all slots are taken", retry_after_ms=2000))
    async with serving(tmp_path, engine=engine) as rig, trio.open_nursery() as nursery:
        nursery.start_soon(recovers, engine)
        seen = await see(rig, "busy")
    assert seen == {"busy": "".join(ANSWER)}
    assert len(engine.requests) == 2


async def recovers(engine: FakeEngine) -> None:
    """After its first answer has failed, by half of the time that was told."""
    await engine.stopped.wait()
    await trio.sleep(1)
    engine.fail_at = None
