"""Calls are found in every family's way of writing them, however the text is cut; what is no call stays text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.core.toolformats import (
    DEEPSEEK,
    DEEPSEEK_31,
    FORMATS,
    HARMONY,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    NAME,
    find_format,
)
from dmoe.core.toolparser import parser_of

ARGUMENTS = {"city": 'São "Paulo" {[}]', "days": [1, {"deep": None}], "note": "a\\b\n</tool_call>"}
WEATHER, TIME = ("weather", ARGUMENTS), ("time", {})


def written(kind, *calls):
    """Calls as the family writes them."""
    each = [kind.head.replace(NAME, name) + json.dumps(arguments) + kind.tail for name, arguments in calls]
    return kind.opening + kind.separator.join(each) + kind.closing


def read(kind, *pieces):
    """(text, reasoning, calls) of an answer."""
    ids = iter(range(99))
    parser = parser_of(kind, frozenset({"weather", "time"}), lambda: f"id{next(ids)}")
    found = [*map(parser.push, pieces), parser.finish()]
    calls: list[list[str]] = []
    for delta in (delta for each in found for delta in each.calls):
        if delta.name:
            assert delta.index == len(calls)
            calls.append([delta.id, delta.name, ""])
        calls[delta.index][2] += delta.arguments
    assert parser.called == bool(calls)
    return "".join(each.text for each in found), "".join(each.reasoning for each in found), calls


def names_and_arguments(calls):
    return [(name, json.loads(arguments)) for _, name, arguments in calls]


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.title)
def test_every_family_however_the_text_is_cut(kind):
    calls = [WEATHER] if kind.alone else [WEATHER, TIME]
    text = written(kind, *calls)
    for size in (1, 2, 3, 7, len(text)):
        said, _, got = read(kind, *(text[start : start + size] for start in range(0, len(text), size)))
        assert names_and_arguments(got) == calls
        assert said == ""
        assert [each[0] for each in got] == [f"id{index}" for index in range(len(calls))]


@pytest.mark.parametrize("kind", [HERMES, MISTRAL, MISTRAL_ARGS, DEEPSEEK, DEEPSEEK_31], ids=lambda kind: kind.title)
def test_text_before_a_call_is_text(kind):
    said, _, got = read(kind, *("Let me look.\n\n" + written(kind, WEATHER)))
    assert said == "Let me look."
    assert names_and_arguments(got) == [WEATHER]


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.title)
@pytest.mark.parametrize("text", ["Plain text.", "1 < 2 and a [list] <tool", '{"a": 1}', "", "  \n", "```json\n{}"])
def test_what_is_no_call_stays_as_it_is(kind, text):
    assert read(kind, *text) == (text, "", [])
    assert read(kind, text) == (text, "", [])


def test_an_answer_that_breaks_off_keeps_what_there_was():
    text = written(HERMES, WEATHER)
    whole = json.dumps(ARGUMENTS)
    for end in range(len(text)):
        said, _, got = read(HERMES, *text[:end])
        if got:
            assert said == ""
            assert whole.startswith(got[0][2])
        else:
            assert text.startswith(said)
            assert '"name": "weather"' not in text[:end]


def test_names_and_arguments_in_any_order_and_arguments_as_text():
    turned = '<tool_call>{"arguments": {"a": [1]}, "x": {"name": "no"}, "name": "weather"}</tool_call>'
    assert names_and_arguments(read(HERMES, *turned)[2]) == [("weather", {"a": [1]})]
    nested = '<tool_call>{"name": "weather", "arguments": ' + json.dumps('{"a": "b"}') + "}</tool_call>"
    assert names_and_arguments(read(HERMES, *nested)[2]) == [("weather", {"a": "b"})]


def test_a_broken_envelope_is_text():
    text = "<tool_call>[1, 2]</tool_call>"
    assert read(HERMES, *text)[::2] == (text, [])


def test_llama_answers_that_are_json_are_not_calls_of_unknown_functions():
    text = '{"name": "Ada", "parameters": {"x": 1}}'
    assert read(LLAMA, *text) == (text, "", [])
    tagged = '<|python_tag|>{"name": "weather", "parameters": {}}'
    assert names_and_arguments(read(LLAMA, *tagged)[2]) == [("weather", {})]


def test_mistral_call_ids_are_not_part_of_the_name():
    assert names_and_arguments(read(MISTRAL_ARGS, *'[TOOL_CALLS]time[CALL_ID]abc123[ARGS]{"z": 1}')[2]) == [
        ("time", {"z": 1})
    ]


def test_harmony_channels():
    text = (
        "<|channel|>analysis<|message|>They want weather.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "One moment.<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    ) + json.dumps(ARGUMENTS)
    for size in (1, 5, len(text)):
        said, thought, got = read(HARMONY, *(text[start : start + size] for start in range(0, len(text), size)))
        assert (said, thought) == ("One moment.", "They want weather.")
        assert names_and_arguments(got) == [WEATHER]
    assert read(HARMONY, "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>Hi") == (
        "Hi",
        "x",
        [],
    )


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(
        st.sampled_from(["<tool_call>", "{", "}", '"name"', ":", '"weather"', '"arguments"', "[TOOL_CALLS]", "x"])
    ),
    st.data(),
)
def test_cuts_never_change_what_is_found(kind, parts, data):
    """Text of marks and brackets in any order, cut anywhere."""
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(kind, *pieces) == read(kind, text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (MISTRAL, "<tool_call>" * 5 + "[TOOL_CALLS]{<tool_call>[TOOL_CALLS]"),
        (LLAMA, '{"name": "Ada", "a": "<|python_tag|>{"name": "weather", "parameters": {}}'),
        (HERMES, '<tool_call>x<tool_call>{"name": "weather", "arguments": {}}</tool_call>'),
        (MISTRAL_ARGS, "[TOOL_CALLS]" + 300 * "x" + "[ARGS]{}"),
        (MISTRAL_ARGS, "[TOOL_CALLS]" + 300 * "x" + '[TOOL_CALLS]time[ARGS]{"z": 1}'),
    ],
)
def test_what_follows_no_call_is_read_alike_however_it_is_cut(kind, text):
    whole = read(kind, text)
    for cut in range(len(text)):
        assert read(kind, text[:cut], text[cut:]) == whole
    assert read(kind, *text) == whole


def test_formats_are_found_by_their_templates():
    qwen = "{% for t in tools %}...{% endfor %}<tool_call>\n{...}\n</tool_call>"
    assert find_format(qwen) is HERMES
    assert find_format('<|python_tag|> {"name": function name, "parameters": ...}') is LLAMA
    assert find_format("[AVAILABLE_TOOLS]...[TOOL_CALLS] [") is MISTRAL
    assert find_format("[TOOL_CALLS]...[ARGS]") is MISTRAL_ARGS
    assert find_format("<｜tool▁call▁begin｜>...```json") is DEEPSEEK  # noqa: RUF001
    assert find_format("<｜tool▁call▁begin｜>...<｜tool▁sep｜>") is DEEPSEEK_31  # noqa: RUF001
    assert find_format("<|channel|>analysis<|message|>") is HARMONY
    assert find_format("<tool_call>...<arg_key>") is None
    assert find_format("plain") is None
