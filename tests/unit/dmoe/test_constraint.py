"""What a constraint allows is what comes out, whatever a model with random weights would say; what cannot be kept is
refused before the answer begins."""

import json
import re

import numpy as np
import pytest

from config.errors import RequestError
from config.generation import Constraint, Delta
from dmoe.constraint import CHARACTERS_MAX, Constraints
from dmoe.passes import PassOptions
from tests.unit.dmoe.answer_kit import answer, events_of, request, tiny_engine, tokenizer, tokens_of

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
STOP, TOKENIZER = 0, tokenizer()
CONSTRAINTS = Constraints(TOKENIZER, (STOP,))


def to(kind, value):
    return Constraint(kind=kind, text=value if isinstance(value, str) else json.dumps(value))


def compiled(kind, value):
    return CONSTRAINTS.compile_here(to(kind, value))


def allowed(state):
    """The tokens that may come next."""
    return np.flatnonzero(np.isfinite(state.mask(np.zeros(TOKENIZER.vocabulary, dtype=np.float32)))).tolist()


def said(state, text):
    """Whether the constraint lets the model say ``text``, token by token."""
    for token in TOKENIZER.encode(text, control=False):
        if token not in allowed(state):
            return False
        state.accept(token)
    return True


@pytest.fixture
async def engine(tmp_path):
    return await tiny_engine(tmp_path)


async def test_random_weights_answer_by_the_schema(engine):
    seen = set()
    for seed in range(4):
        text, last = await answer(engine, request(seed=seed, constraint=to("json", PERSON)))
        value = json.loads(text)
        assert list(value) == ["name", "age", "tags"]
        assert re.fullmatch("[A-Z][a-z]{1,5}", value["name"])
        assert 0 <= value["age"] <= 150
        assert set(value["tags"]) <= {"x", "y"}
        assert last.reason == "stop"
        seen.add(text)
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", r"[0-9]{3}-[a-f]{2}", r"[0-9]{3}-[a-f]{2}"),
        ("choice", ["Paris", 'a "quoted"\nline', "\N{SNOWMAN}\N{GRINNING FACE}"], None),
        ("grammar", 'start: "(" item ("," item)~1..2 ")"\nitem: /[a-z]/', r"\([a-z](,[a-z]){1,2}\)"),
        ("grammar", 'root ::= "yes" | "no"', "yes|no"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1.5])
async def test_other_forms(engine, kind, value, pattern, temperature):
    text, last = await answer(engine, request(temperature=temperature, constraint=to(kind, value)))
    assert text in value if pattern is None else re.fullmatch(pattern, text), text
    assert last.reason == "stop"


async def test_every_other_control_still_works(engine):
    """Penalties and biases move what is left; log probabilities stay the model's own; the answer is reproducible."""
    vowels = to("regex", "[aeiou]{30}")
    asked = request(constraint=vowels, logprobs=2, logit_bias=((ord("a") - 33 + 1, -100),), min_p=0.01, top_k=2)
    first, second = [await events_of(engine, asked) for _ in range(2)]
    text = "".join(event.text for event in first if isinstance(event, Delta))
    assert set(text) == set("eiou") - (set("eiou") - set(text))
    assert "a" not in text
    assert len(text) == 30
    assert tokens_of(first) == tokens_of(second)
    places = [place for event in first if isinstance(event, Delta) for place in event.logprobs]
    assert len(places) == 30
    assert any(place.chosen not in place.top for place in places), "the model itself would rarely say a vowel"


async def test_a_complete_answer_ends_before_min_tokens_and_max_tokens_cuts_it(engine):
    text, last = await answer(engine, request(constraint=to("choice", ["ab", "cd"]), min_tokens=50))
    assert text in ("ab", "cd")
    assert last.reason == "stop"
    text, last = await answer(engine, request(constraint=to("regex", "[cd]{20}"), max_tokens=5))
    assert (len(text), last.reason) == (5, "length")


async def test_min_tokens_keeps_an_answer_that_may_end_going(engine):
    _, last = await answer(engine, request(constraint=to("regex", "[ab]*"), min_tokens=60, max_tokens=60))
    assert (last.reason, last.completion_tokens) == ("length", 60)


async def test_stop_strings_end_a_constrained_answer(engine):
    text, last = await answer(engine, request(constraint=to("regex", "[a-c]{200}"), stop=("b",)))
    assert last.reason == "stop"
    assert "b" not in text


@pytest.mark.flaky(reruns=2)  # guesses are made while measured pass times say that they pay
@pytest.mark.parametrize("temperature", [0, 1])
async def test_drafts_never_change_a_constrained_answer(tmp_path, temperature):
    """The text repeats itself, so it is guessed; the guesses that the constraint forbids are dropped."""
    asked = request("xyx, xyx, xyx, ", temperature=temperature, constraint=to("regex", "(x[yz]x, ){30}"))
    plain = await tiny_engine(tmp_path, passes=PassOptions(drafts_max=0))
    drafting = await tiny_engine(tmp_path)
    wanted, got = await answer(plain, asked), await answer(drafting, asked)
    assert got[0] == wanted[0]
    assert re.fullmatch("(x[yz]x, ){30}", got[0])
    assert drafting.statistics().drafts_accepted > 0
    assert plain.statistics().drafts_proposed == 0


def test_states_of_one_constraint_are_apart():
    """Two answers to one prepared request: what one says does not move the other."""
    shared = compiled("choice", ["abc", "xyz"])
    first, second = shared.begin(), shared.begin()
    assert said(first, "abc")
    assert first.done
    assert not second.done
    assert said(second, "xyz")


def test_white_space_in_json_is_bounded_and_both_usual_forms_are_allowed():
    value = {"name": "Ada", "age": 36, "tags": ["x", "y"]}
    for indent, separators in ((None, None), (None, (",", ":")), (2, None)):
        assert said(compiled("json", PERSON).begin(), json.dumps(value, indent=indent, separators=separators))
    assert not said(compiled("json", PERSON).begin(), '{\n\n"name"')


def test_control_tokens_are_no_text_and_the_end_waits_for_the_whole():
    state = compiled("regex", "(a|<|s|t|o|p|>|[|])*b").begin()
    assert STOP not in allowed(state)
    assert said(state, "<|stop|>b")
    assert allowed(state) == [STOP]


def test_a_model_without_stop_tokens_ends_when_it_is_complete():
    state = Constraints(TOKENIZER, ()).compile_here(to("choice", ["hi"])).begin()
    assert said(state, "hi")
    assert state.done


def test_the_mask_beyond_the_tokenizer_is_shut():
    """Models pad their vocabulary: logits without a token are never chosen."""
    logits = np.arange(TOKENIZER.vocabulary + 10, dtype=np.float32)
    masked = compiled("regex", "a").begin().mask(logits)
    assert np.flatnonzero(np.isfinite(masked)).tolist() == list(TOKENIZER.encode("a"))
    assert np.isfinite(logits).all(), "the caller's logits stay as they were"


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("json", {"type": "strin"}, "strin"),
        ("json", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ("json", {"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a'"),
        ("json", {"$ref": "http://example.org/x"}, "http://example.org/x"),
        ("json", "false", "nsatisf"),
        ("json", "{", "Expecting"),
        ("json", '"text"', "JSON object"),
        ("json", '{"type":"array","items":' * 2000 + "{}" + "}" * 2000, "recursion"),
        ("regex", "a(b", "unclosed group"),
        ("regex", "(?=a)b", "look"),
        ("regex", r"[^\x00-\U0010ffff]", "satisfies"),
        ("grammar", "start: foo", "foo"),
        ("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        ("choice", [], "1 to"),
        ("choice", ["a", ""], "not empty"),
        ("choice", [1], "text"),
        ("regex", "a" * (CHARACTERS_MAX + 1), "characters"),
    ],
)
def test_what_cannot_be_kept_is_refused(kind, value, why):
    with pytest.raises(RequestError, match=re.escape(why)) as caught:
        compiled(kind, value)
    assert caught.value.code == "invalid_request"
    assert len(str(caught.value)) < 500


async def test_it_is_refused_before_anything_streams(engine):
    with pytest.raises(RequestError, match="JSON schema cannot be used"):
        await engine.prepare(request(constraint=to("json", {"type": "nothing"})))


def test_a_grammar_that_outgrows_its_limits_fails_with_a_reason():
    state = compiled("grammar", "start: (" + " | ".join(f'"a"{{{i},}}' for i in range(1, 60)) + ")*").begin()
    with pytest.raises(RequestError, match="grammar cannot be used"):
        said(state, "a" * 500)
