"""The answers of OpenAI's endpoints are what the OpenAPI document says, field by field, and what OpenAI's client takes.

Recorded from a gateway over a real engine and a tiny model; from the fake engine where a tiny model does not get: an
answer that thinks aloud, lacks experts, or breaks off.
"""

import copy
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import trio
from fake_engine import FakeEngine, FakePrepared
from gateway_rig import serving
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from test_openai_structure import ASK, MODEL, TOOLS

from config.generation import Delta, Finished, GenerationEvent
from tests.unit.dmoe.answer_kit import engine_running

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
ASKED: tuple[tuple[str, dict[str, Any]], ...] = (
    (CHAT, {"max_tokens": 3, "n": 2}),
    (CHAT, {"max_tokens": 3, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"max_tokens": 200, "tools": TOOLS, "tool_choice": "required", "seed": 5}),
    (CHAT, {"max_tokens": 3, "logprobs": True, **STREAM}),
    (CHAT, {"max_tokens": 3, "stream": True, "n": 2}),
    (CHAT, {"max_tokens": 200, "tools": TOOLS, "tool_choice": "required", "seed": 5, **STREAM}),
    (TEXT, {"prompt": "abc", "max_tokens": 3}),
    (TEXT, {"prompt": "abc", "max_tokens": 3, "logprobs": 2}),
    (TEXT, {"prompt": [5, 6, 7], "max_tokens": 3, "logprobs": 2, "echo": True}),
    (TEXT, {"prompt": "abc", "max_tokens": 3, "logprobs": 2, **STREAM}),
    (TEXT, {"prompt": "abc", "max_tokens": 3, "stream": True}),
    (VECTORS, {"input": ["abc", "d"], "encoding_format": "float"}),
    (VECTORS, {"input": "abc", "encoding_format": "base64"}),
    (CHAT, {"temperature": 9}),
    (TEXT, {"prompt": "abc", "model": "no such model"}),
    (VECTORS, {"input": []}),
)
WHOLE = {CHAT: ChatCompletion, TEXT: Completion, VECTORS: CreateEmbeddingResponse}
Recorded = tuple[str, httpx.Response]


class Thinking(FakeEngine):
    """Thinks aloud, and says in the end that an expert was missing."""

    async def _events(self, prepared: FakePrepared) -> AsyncIterator[GenerationEvent]:
        yield Delta(text="", tokens=(0,), reasoning="Hm.")
        async with aclosing(super()._events(prepared)) as events:
            async for each in events:
                yield replace(each, missing=((1, 2),)) if isinstance(each, Finished) else each


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Recorded]]:
    """The document, and answers."""
    return trio.run(_record, tmp_path_factory.mktemp("answers"))


async def _record(folder: Path) -> tuple[dict[str, Any], list[Recorded]]:
    found: list[Recorded] = []
    async with (
        engine_running(folder / "model", **MODEL) as engine,
        serving(folder / "real", engine=engine) as rig,
        rig.http() as http,
    ):
        document = (await http.get("/openapi.json")).json()
        for path, changes in ASKED:
            found.append((path, await _ask(http, path, changes)))
        found.append((CHAT, await http.post(CHAT, json={}, headers={"authorization": "Bearer wrong"})))
    async with serving(folder / "thinking", engine=Thinking()) as rig, rig.http() as http:
        for changes in ({}, {"stream": True}):
            found.append((CHAT, await _ask(http, CHAT, changes)))
    async with serving(folder / "failing", engine=FakeEngine(fail_at=2)) as rig, rig.http() as http:
        for path, changes in ((CHAT, {"stream": True}), (TEXT, {"prompt": "x", "stream": True}), (CHAT, {})):
            found.append((path, await _ask(http, path, changes)))
    return document, found


async def _ask(http: httpx.AsyncClient, path: str, changes: dict[str, Any]) -> httpx.Response:
    return await http.post(path, json={"model": "tiny", **({"messages": ASK} if path == CHAT else {}), **changes})


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """What its events say, without the last ``[DONE]``."""
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line and not line.startswith(":")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def said(document: dict[str, Any], answers: list[Recorded]) -> list[tuple[dict[str, Any], Any]]:
    """What was answered, each piece with the schema that the document has for it."""
    found = []
    for path, answer in answers:
        media = answer.headers["content-type"].split(";")[0]
        described = document["paths"][path]["post"]["responses"][str(answer.status_code)]["content"][media]["schema"]
        if media == "text/event-stream":
            data = described["properties"]["data"]
            assert data["contentMediaType"] == "application/json"
            found += [(data["contentSchema"], each) for each in events_of(answer)]
        else:
            found.append((described, answer.json()))
    return found


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """The document's schemas, but with no other field allowed than they name."""
    schemas = copy.deepcopy(document["components"]["schemas"])

    def close(value: Any) -> None:
        if isinstance(value, dict):
            if "properties" in value:
                value["additionalProperties"] = False
            value = list(value.values())
        for each in value if isinstance(value, list) else ():
            close(each)

    close(schemas)
    return schemas


def fits(schemas: dict[str, Any], shape: dict[str, Any], value: object) -> bool:
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "components": {"schemas": schemas}, **shape}
    return jsonschema_rs.validator_for(whole).is_valid(value)


def test_every_answer_is_as_documented_and_has_nothing_else(recorded) -> None:
    document, answers = recorded
    schemas = closed(document)
    assert sum(answer.status_code != 200 for _, answer in answers) == 5
    for shape, value in said(document, answers):
        assert fits(schemas, shape, value), (shape, value)


def test_no_documented_field_is_made_up(recorded) -> None:
    """Without any one of them, some answer would have a field too many."""
    schemas, pieces = closed(recorded[0]), said(*recorded)
    for name in _reached(schemas, [shape for shape, _ in pieces]):
        for field in schemas[name].get("properties", {}):
            less = {key: dict(value) for key, value in schemas.items()}
            less[name]["properties"] = {key: each for key, each in schemas[name]["properties"].items() if key != field}
            less[name]["required"] = [each for each in schemas[name].get("required", []) if each != field]
            assert not all(fits(less, shape, value) for shape, value in pieces), f"{name}.{field}"


def _reached(schemas: dict[str, Any], shapes: list[dict[str, Any]]) -> set[str]:
    """The names of the components that shapes lead to."""
    found: set[str] = set()
    text = json.dumps(shapes)
    while new := {name for name in schemas if f'schemas/{name}"' in text} - found:
        found |= new
        text = json.dumps([schemas[name] for name in new])
    return found


def test_openais_own_types_take_them(recorded) -> None:
    """But for what those do not know, though OpenAI sends it too: base64, a prompt's first token, pieces of texts."""
    for path, answer in recorded[1]:
        asked = json.loads(answer.request.content)
        if answer.status_code != 200 or "echo" in asked or asked.get("encoding_format") == "base64":
            continue
        if "stream" not in asked:
            WHOLE[path].model_validate(answer.json())
        elif path == CHAT:
            for piece in events_of(answer):
                if "error" not in piece:
                    ChatCompletionChunk.model_validate(piece)


def test_a_stream_that_breaks_off_ends_with_a_documented_error(recorded) -> None:
    broken = [answer for _, answer in recorded[1] if "event-stream" in answer.headers["content-type"]][-2:]
    for answer in broken:
        assert set(events_of(answer)[-1]) == {"error"}
        assert "[DONE]" not in answer.text
