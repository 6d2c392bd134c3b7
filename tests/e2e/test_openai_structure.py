"""Schemas, choices and tools through the real openai client, over a real engine and a tiny model of random weights."""

import json
from pathlib import Path
from typing import Literal

import openai
import pytest
from gateway_rig import serving
from pydantic import BaseModel

from tests.unit.dmoe.answer_kit import engine_running, token_of

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{# <tool_call> #}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ c.function.arguments | tojson }})]{% endfor %}/"
    "{% endfor %}"
)
MODEL = {"change": {"tokenizer.chat_template": TEMPLATE, "llama.context_length": 2048}}
ASK = [{"role": "user", "content": "Weather?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather now",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
]


class Person(BaseModel):
    name: Literal["Ada", "Bob"]
    ages: tuple[Literal[1, 2], Literal[3]] | None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
async def rig(tmp_path: Path, folder: Path):
    async with engine_running(folder, **MODEL) as engine, serving(tmp_path, engine=engine) as rig:
        yield rig


def _chat(client: openai.OpenAI, **changes: object) -> object:
    return client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 200, "seed": 5, **changes})


async def test_a_pydantic_model_is_what_comes_back(rig) -> None:
    parsed = await rig.with_openai(
        lambda client: client.chat.completions.parse(
            model="tiny", messages=ASK, response_format=Person, max_tokens=200, seed=1
        )
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)


@pytest.mark.parametrize("stream", [False, True])
async def test_json_of_any_kind_and_the_names_of_vllm(rig, stream: bool) -> None:
    def use(client: openai.OpenAI, **options: object) -> str:
        got = _chat(client, stream=stream, **options)
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in got)
        return got.choices[0].message.content

    for form in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]}):
        assert await rig.with_openai(lambda client, form=form: use(client, extra_body=form)) in ("yes", "no")
    got = await rig.with_openai(lambda client: use(client, extra_body={"guided_regex": "[0-9]{4}"}))
    assert len(got) == 4
    assert got.isdecimal()
    got = await rig.with_openai(
        lambda client: use(client, extra_body={"structured_outputs": {"grammar": 'start: "ok"'}})
    )
    assert got == "ok"
    got = await rig.with_openai(lambda client: use(client, extra_body={"guided_json": {"const": {"a": 1}}}))
    assert json.loads(got) == {"a": 1}
    got = await rig.with_openai(
        lambda client: use(client, response_format={"type": "json_object"}, temperature=0, max_tokens=20)
    )
    assert got.startswith("{")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        ({"extra_body": {"guided_regex": "a(b"}}, "guided_regex"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs.choice"),
        ({"extra_body": {"structured_outputs": {"regexp": "a"}}}, "structured_outputs.regexp"),
        ({"tools": [{"type": "web"}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"messages": [*ASK, {"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages[1].tool_call_id"),
        ({"extra_body": {"stop_token_ids": [99999]}}, "stop_token_ids"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_kept_is_named_before_anything_streams(rig, changes, param: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await rig.with_openai(lambda client: _chat(client, stream=stream, **changes))
    assert caught.value.param == param
    assert (await rig.balance()).reserved == 0


async def test_a_forced_call(rig) -> None:
    answer = await rig.with_openai(lambda client: _chat(client, tools=TOOLS, tool_choice="required", n=2))
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        for call in choice.message.tool_calls:
            assert call.function.name == "get_weather"
            assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
            assert call.id.startswith("call_")


async def test_a_streamed_call_and_its_result_in_the_next_turn(rig) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}

    def use(client: openai.OpenAI) -> tuple[object, list[object]]:
        with client.chat.completions.stream(
            model="tiny",
            messages=ASK,
            tools=TOOLS,
            tool_choice=named,
            parallel_tool_calls=False,
            max_tokens=200,
            seed=2,
        ) as stream:
            events = list(stream)
            return stream.get_final_completion(), events

    final, events = await rig.with_openai(use)
    (choice,) = final.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    arguments = json.loads(call.function.arguments)
    pieces = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(pieces) == call.function.arguments
    assert len([piece for piece in pieces if piece]) > 3
    assert arguments["city"] in ("Oslo", "Rome")
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "Rain"},
    ]
    answer = await rig.with_openai(lambda client: _chat(client, messages=messages, tools=TOOLS, max_tokens=4))
    prompt = f"get_weather user:Weather?/assistant:[get_weather({json.dumps(arguments)})]/tool:Rain/"
    assert answer.usage.prompt_tokens >= len(prompt) - 3, "calls and results are in the prompt (ab is one token)"


async def test_tool_choice_none_leaves_the_tools_out(rig) -> None:
    with_tools = await rig.with_openai(lambda client: _chat(client, tools=TOOLS, max_tokens=3))
    without = await rig.with_openai(lambda client: _chat(client, tools=TOOLS, tool_choice="none", max_tokens=3))
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens
    assert without.choices[0].finish_reason == "length"


async def test_stop_token_ids_end_an_answer(rig) -> None:
    first = await rig.with_openai(
        lambda client: client.completions.create(model="tiny", prompt="abc", max_tokens=4, temperature=0, logprobs=0)
    )
    second = first.choices[0].logprobs.tokens[1]
    listed = await rig.with_openai(
        lambda client: client.completions.create(
            model="tiny", prompt="abc", max_tokens=4, temperature=0, extra_body={"stop_token_ids": [token_of(second)]}
        )
    )
    assert listed.choices[0].finish_reason == "stop"
    assert listed.usage.completion_tokens <= 1
