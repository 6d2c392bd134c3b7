"""Tools of a request: what the prompt says of them, that a forced call comes and fits, what the client sees of it."""

import json
import re

import pytest

from config.errors import RequestError
from config.generation import (
    Constraint,
    Delta,
    Finished,
    GenerationRequest,
    Message,
    Sampling,
    Tool,
    ToolCall,
    ToolUse,
)
from dmoe.constraint import Constraints
from dmoe.core.toolformats import FORMATS
from dmoe.tools import plan
from tests.unit.dmoe.answer_kit import events_of, tiny_engine, tokenizer

WEATHER = Tool(
    name="get_weather",
    description="The weather <|stop|> now",
    parameters=json.dumps(
        {
            "type": "object",
            "$defs": {"unit": {"enum": ["c", "f"]}},
            "properties": {
                "city": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        }
    ),
)
TIME = Tool(name="get_time", parameters='{"type": "object", "properties": {}, "additionalProperties": false}')
KNOWS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }};{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }}|{{ c.function.arguments | tojson }}|{{ '' + c.function.arguments }}]{% endfor %}/"
    "{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }}/{% endfor %}"
HERMES = KNOWS + "{# <tool_call> #}"
ASK = (Message(role="user", content="Weather?"),)
EVERY = sorted(
    {
        mark
        for kind in FORMATS
        for mark in re.findall(r"<[^<>\s]+>|\[[A-Z_]+\]", "".join(kind.marks) + kind.head + kind.tail)
    }
)
CALL = Message(
    role="assistant", content="", tool_calls=(ToolCall(id="a", name="get_time", arguments='{"zone": "<|stop|>"}'),)
)
RESULT = Message(role="tool", content="noon", tool_call_id="a")


def use(*tools, **options):
    return ToolUse(tools=tools or (WEATHER, TIME), **options)


def asking(tool_use, messages=ASK, **sampling):
    settings = Sampling(**{"max_tokens": 800, "seed": 3, **sampling})
    return GenerationRequest(model="tiny", messages=messages, tool_use=tool_use, sampling=settings)


def with_template(template):
    return {"tokenizer.chat_template": template, "llama.context_length": 2048}


def calls_of(events):
    calls = {}
    for delta in (delta for event in events if isinstance(event, Delta) for delta in event.tool_calls):
        call = calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
        for key in call:
            call[key] += getattr(delta, key)
    return [calls[index] for index in range(len(calls))]


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Delta))


def fits(call):
    arguments = json.loads(call["arguments"])
    if call["name"] == "get_weather":
        return re.fullmatch("[A-Z][a-z]{1,6}", arguments["city"]) and arguments["unit"] in "cf"
    return call["name"] == "get_time" and arguments == {}


@pytest.mark.parametrize("template", [HERMES, PLAIN], ids=["knows tools", "is told of them"])
async def test_a_required_call_comes_and_fits_its_schema(tmp_path, template):
    engine = await tiny_engine(tmp_path, change=with_template(template))
    seen = set()
    for seed in range(3):
        events = await events_of(engine, asking(use(choice="required"), seed=seed))
        calls = calls_of(events)
        assert events[-1].reason in ("tool_calls", "length")
        assert text_of(events) == ""
        whole = calls if events[-1].reason == "tool_calls" else calls[:-1]
        assert calls
        assert all(fits(call) for call in whole)
        assert all(re.fullmatch("call_[0-9a-f]{24}", call["id"]) for call in calls)
        seen.update(call["name"] for call in whole)
    assert seen


async def test_a_named_function_and_one_call_only(tmp_path):
    engine = await tiny_engine(tmp_path, change=with_template(HERMES))
    for seed in range(3):
        asked = asking(use(choice="required", name="get_weather", parallel=False), seed=seed)
        events = await events_of(engine, asked)
        assert events[-1].reason == "tool_calls"
        (call,) = calls_of(events)
        assert call["name"] == "get_weather"
        assert fits(call)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.title)
@pytest.mark.parametrize("control", [False, True], ids=["marks are text", "marks are tokens"])
async def test_every_family_is_held_to_its_form(tmp_path, kind, control):
    marks = [mark for mark in EVERY if mark not in ("<|stop|>",)] if control else []
    template = KNOWS + "{# " + " ".join(kind.signs) + " #}"
    engine = await tiny_engine(tmp_path, change=with_template(template), control=marks)
    events = await events_of(engine, asking(use(WEATHER, choice="required", parallel=False), logit_bias=()))
    if kind.channels and events[-1].reason == "length":
        return  # random weights may think for ever
    assert events[-1].reason == "tool_calls"
    (call,) = calls_of(events)
    assert fits(call)
    assert text_of(events) == ""
    assert len(call["id"]) == (9 if kind.short_ids else 29)


def prompt_of(request, template):
    made = tokenizer(template)
    planned = plan(request, made)
    return made.decode(planned.prompt(made)), planned.prompt(made)


def test_the_prompt_tells_of_tools_calls_and_results():
    text, ids = prompt_of(asking(use(), messages=(*ASK, CALL, RESULT)), HERMES)
    assert '{"type": "function", "function": {"name": "get_weather", "description": "The weather <|stop|> now"' in text
    assert text.endswith('assistant:[get_time|{"zone": "<|stop|>"}|{"zone": "<|stop|>"}]/tool:noon/')
    assert 0 not in ids, "the name of a control token in a tool or a call is text"


def test_a_template_without_tools_gets_them_as_text():
    system = Message(role="system", content="Be brief.")
    text, _ = prompt_of(asking(use(choice="required"), messages=(system, *ASK)), PLAIN)
    assert text.startswith("system:Be brief.\n\nYou can call functions")
    assert '"name": "get_weather"' in text
    text, _ = prompt_of(asking(None, messages=(*ASK, CALL, RESULT)), PLAIN)
    assert '<tool_call>\n{"name": "get_time", "arguments": {"zone": "<|stop|>"}}\n</tool_call>/user:<tool_resp' in text


@pytest.mark.parametrize(
    ("tool_use", "template", "why"),
    [
        (use(), PLAIN, "knows no tools"),
        (use(), KNOWS, "not known here"),
        (use(choice="required", name="nothing"), HERMES, "none of the tools"),
        (use(WEATHER, WEATHER), HERMES, "two tools"),
        (use(Tool(name="a b")), HERMES, r"tools\[0\]"),
        (use(Tool(name="a", parameters="[]")), HERMES, "no JSON schema"),
        (use(*(Tool(name=f"t{index}") for index in range(129))), HERMES, "129 entries"),
    ],
)
def test_tools_that_cannot_be_had_are_refused(tool_use, template, why):
    with pytest.raises(RequestError, match=why):
        plan(asking(tool_use), tokenizer(template))


def test_a_constraint_and_tools_exclude_each_other():
    for choice in ("auto", "required"):
        with pytest.raises(RequestError, match="exclude each other"):
            plan(asking(use(choice=choice), constraint=Constraint(kind="json", text="{}")), tokenizer(HERMES))


async def test_a_schema_that_is_not_supported_is_refused_before_anything_streams(tmp_path):
    engine = await tiny_engine(tmp_path, change=with_template(HERMES))
    odd = Tool(name="odd", parameters='{"type": "object", "properties": {"a": {"type": "wrong"}}}')
    with pytest.raises(RequestError, match="cannot be used"):
        await engine.prepare(asking(use(odd, choice="required")))


def read(planned, *pieces, reason="stop"):
    finished = Finished(
        reason=reason,
        prompt_tokens=1,
        completion_tokens=1,
        prefill_seconds=0,
        decode_seconds=0,
        route="local",
        expert_rows={},
        serving={},
    )
    reader = planned.reader()
    deltas = [Delta(text=piece, tokens=(index,)) for index, piece in enumerate(pieces)]
    return [each for event in (*deltas, finished) for each in reader.read(event)]


def test_a_free_model_may_call_or_talk():
    planned = plan(asking(use()), tokenizer(HERMES))
    events = read(
        planned, "I ", "look.\n<tool", '_call>{"name": "get_time", "argu', 'ments": {"z": ', "1}}\n</tool_call>"
    )
    assert text_of(events) == "I look."
    (call,) = calls_of(events)
    assert (call["name"], call["arguments"]) == ("get_time", '{"z": 1}')
    assert events[-1].reason == "tool_calls"
    assert [event.tokens for event in events[:-1]] == [(0,), (1,), (2,), (3,), (4,)]
    events = read(planned, "No ", "need <to")
    assert (text_of(events), calls_of(events), events[-1].reason) == ("No need <to", [], "stop")
    cut = read(planned, '<tool_call>{"name": "get_time", "arguments": {"z', reason="length")
    assert cut[-1].reason == "length"


def test_without_parallel_calls_the_first_one_ends_the_answer():
    planned = plan(asking(use(parallel=False), stop=("x",)), tokenizer(HERMES))
    assert planned.request.sampling.stop == ("x", "</tool_call>")
    events = read(planned, '<tool_call>{"name": "get_time", "arguments": {}}\n')
    assert (len(calls_of(events)), events[-1].reason) == (1, "tool_calls")


def test_harmony_thoughts_are_never_the_answer():
    template = PLAIN + "{# <|channel|><|message|> #}"
    control = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
    made = tokenizer(template, control)
    planned = plan(asking(None), made)
    events = read(planned, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi")
    assert text_of(events) == "Hi"
    assert "".join(event.reasoning for event in events[:-1]) == "Hm."
    assert made.showing(planned.shown).decode([made.control_tokens["<|end|>"]]) == "<|end|>"
    assert made.decode([made.control_tokens["<|end|>"]]) == ""
    held = plan(asking(None, constraint=Constraint(kind="json", text="{}")), made)
    assert held.reader() is None
    assert held.prompt(made)[-7:][0] == made.control_tokens["<|channel|>"]


def test_without_tools_calls_are_text():
    assert plan(asking(None), tokenizer(HERMES)).reader() is None


def test_grammars_of_every_family_are_accepted():
    """With and without control tokens of their own, one call or several."""
    for control in ((), EVERY):
        made = tokenizer(PLAIN, control)
        constraints = Constraints(made, (0,))
        for kind in FORMATS:
            made.template.source = " ".join(kind.signs)
            made.template.knows_tools = True
            for parallel in (False, True):
                planned = plan(asking(use(choice="required", parallel=parallel)), made)
                assert planned.kind is kind
                constraints.compile_here(planned.request.sampling.constraint)
