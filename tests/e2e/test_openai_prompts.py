"""Vectors, a prompt's own log probabilities, the best of several and what they cost, through the real openai client,
over a real engine and a tiny model of random weights."""

import base64
import math
from functools import partial
from pathlib import Path

import numpy as np
import openai
import pytest
from gateway_rig import INPUT_PRICE, serving

from tests.unit.dmoe.answer_kit import engine_running, token_of

TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
async def rig(tmp_path: Path, folder: Path):
    async with engine_running(folder) as engine, serving(tmp_path, engine=engine) as rig:
        yield rig


def _embed(client: openai.OpenAI, given: object, **changes: object) -> object:
    return client.embeddings.create(**{"model": "tiny", "input": given, **changes})


def _complete(client: openai.OpenAI, prompt: object, **changes: object) -> object:
    options = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, **changes}
    return client.completions.create(**options)


async def test_vectors_in_both_encodings_and_of_every_kind_of_input(rig) -> None:
    whole = await rig.with_openai(lambda client: _embed(client, TEXT))
    (entry,) = whole.data
    assert (entry.object, entry.index, whole.model) == ("embedding", 0, "tiny")
    assert math.isclose(sum(x * x for x in entry.embedding), 1, rel_tol=1e-5)
    assert whole.usage.prompt_tokens == whole.usage.total_tokens == len(TEXT)
    numbers = await rig.with_openai(lambda client: _embed(client, [TEXT, "x"], encoding_format="float"))
    assert [each.index for each in numbers.data] == [0, 1]
    assert np.allclose(numbers.data[0].embedding, entry.embedding, atol=1e-7)
    raw = await rig.with_openai(lambda client: _embed(client, TEXT, encoding_format="base64"))
    assert np.allclose(np.frombuffer(base64.b64decode(raw.data[0].embedding), "<f4"), entry.embedding)
    by_ids = await rig.with_openai(lambda client: _embed(client, [[5, 6, 7], [8]]))
    flat = await rig.with_openai(lambda client: _embed(client, [5, 6, 7]))
    assert by_ids.data[0].embedding == flat.data[0].embedding
    assert by_ids.usage.prompt_tokens == 4


async def test_vectors_are_charged_as_prompts_and_failures_are_not(rig) -> None:
    await rig.with_openai(lambda client: _embed(client, [TEXT, TEXT]))
    spent = 2 * len(TEXT) * INPUT_PRICE // 1_000_000
    balance = await rig.balance()
    assert (balance.balance, balance.reserved) == (1_000_000 - spent, 0)
    with pytest.raises(openai.BadRequestError):
        await rig.with_openai(lambda client: _embed(client, ["y" * 600]))
    async with rig.http() as http:
        rows = (await http.get("/v1/billing/usage")).json()["data"]
    assert [(row["endpoint"], row["outcome"], row["prompt_tokens"]) for row in rows] == [
        ("embeddings", "embedded", 2 * len(TEXT))
    ]


@pytest.mark.parametrize(
    ("given", "changes", "param"),
    [
        (TEXT, {"dimensions": 64}, "dimensions"),
        ([], {}, "input"),
        (["a", ""], {}, "input"),
        ([[1, 10**6]], {}, "input"),
        (["y" * 600], {}, "input"),
        (TEXT, {"encoding_format": "int8"}, "encoding_format"),
        (TEXT, {"extra_body": {"pooling": "max"}}, "pooling"),
    ],
)
async def test_bad_requests_for_vectors_are_named(rig, given: object, changes: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await rig.with_openai(lambda client: _embed(client, given, **changes))
    assert caught.value.param == param
    balance = await rig.balance()
    assert (balance.balance, balance.reserved) == (1_000_000, 0)


async def test_money_that_does_not_cover_the_texts(tmp_path: Path, folder: Path) -> None:
    async with engine_running(folder) as engine, serving(tmp_path, engine=engine, credit=5) as rig:
        with pytest.raises(openai.APIStatusError) as caught:
            await rig.with_openai(lambda client: _embed(client, TEXT))
        assert caught.value.status_code == 402


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_tells_what_the_model_thinks_of_the_prompt(rig, stream: bool) -> None:
    """The same tokens as answer and as prompt: their log probabilities are the same."""

    def told(client: openai.OpenAI, prompt: str, **changes: object) -> tuple[str, list[object]]:
        got = _complete(client, prompt, logprobs=2, stream=stream, **changes)
        choices = [chunk.choices[0] for chunk in got] if stream else [got.choices[0]]
        entries: list[object] = []
        for part in (choice.logprobs for choice in choices if choice.logprobs):
            entries += zip(part.tokens, part.token_logprobs, part.top_logprobs, part.text_offset, strict=True)
        return "".join(choice.text for choice in choices), entries

    letters = {"guided_regex": "[c-y]{8}"}
    answer, said = await rig.with_openai(lambda client: told(client, TEXT, extra_body=letters))
    echoed, both = await rig.with_openai(lambda client: told(client, TEXT + answer, echo=True, max_tokens=1))
    assert echoed.startswith(TEXT + answer)
    prompt_tokens = len(both) - 1
    assert both[0][1:3] == (None, None)
    assert all(entry[1] is not None for entry in both[1:])
    assert both[len(both) - 1 - len(said) : -1] == [(*entry[:3], entry[3] + len(TEXT)) for entry in said]
    assert [entry[3] for entry in both[:6]] == [0, 1, 2, 3, 4, 5]
    assert both[-1][3] == len(TEXT + answer)
    assert prompt_tokens >= len(TEXT)


async def test_a_prompt_that_is_scored_has_one_place_behind_it(rig) -> None:
    """Also where the model would stop: who leaves out the last place must not lose the prompt's own."""

    letter = token_of("a")

    def told(client: openai.OpenAI, **changes: object) -> object:
        options = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, "logit_bias": {str(letter): 100}}
        return _complete(client, TEXT, **{**options, **changes}).choices[0]

    stopped = {"stop_token_ids": [letter]}
    first = await rig.with_openai(told)
    scored = await rig.with_openai(lambda client: told(client, extra_body=stopped))
    assert scored.logprobs.token_logprobs[:-1] == first.logprobs.token_logprobs[:-1]
    assert first.logprobs.tokens[-1] == "a" != scored.logprobs.tokens[-1]
    longer = await rig.with_openai(lambda client: told(client, max_tokens=2, extra_body=stopped))
    assert (longer.finish_reason, longer.text) == ("stop", TEXT), "an answer that is wanted still ends where it ends"


async def test_a_prompt_of_token_ids_is_echoed_as_text(rig) -> None:
    def told(client: openai.OpenAI, **changes: object) -> tuple[str, list[object], list[object]]:
        got = _complete(client, [40, 41, 42, 43], echo=True, max_tokens=2, **changes)
        choices = [chunk.choices[0] for chunk in got] if changes.get("stream") else [got.choices[0]]
        places = [choice.logprobs for choice in choices if choice.logprobs]
        offsets = [offset for place in places for offset in place.text_offset]
        return (
            "".join(choice.text for choice in choices),
            offsets,
            [p for place in places for p in place.token_logprobs],
        )

    plain, _, _ = await rig.with_openai(told)
    whole, offsets, probabilities = await rig.with_openai(lambda client: told(client, logprobs=1))
    streamed, *same = await rig.with_openai(lambda client: told(client, logprobs=1, stream=True))
    assert plain == whole == streamed
    assert same == [offsets, probabilities]
    assert (offsets[:5], probabilities[0], len(probabilities)) == ([0, 1, 2, 3, 4], None, 6)
    by_text = await rig.with_openai(lambda client: _complete(client, whole[:4], echo=True, max_tokens=2, logprobs=1))
    assert by_text.choices[0].logprobs.token_logprobs[1:4] == probabilities[1:4]


async def test_the_best_of_several(rig) -> None:
    def means(choices: list[object]) -> list[float]:
        return [sum(each.logprobs.token_logprobs) / len(each.logprobs.tokens) for each in choices]

    options = {"temperature": 1.5, "seed": 11, "logprobs": 1, "max_tokens": 6}
    all_of_them = await rig.with_openai(lambda client: _complete(client, TEXT, n=4, **options))
    chosen = await rig.with_openai(lambda client: _complete(client, TEXT, n=2, best_of=4, **options))
    assert means(chosen.choices) == sorted(means(all_of_them.choices), reverse=True)[:2]
    assert [choice.index for choice in chosen.choices] == [0, 1]
    assert chosen.usage.completion_tokens == all_of_them.usage.completion_tokens
    bare = await rig.with_openai(lambda client: _complete(client, TEXT, best_of=2))
    assert (len(bare.choices), bare.choices[0].logprobs) == (1, None)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_is_computed_once_is_charged_once(rig, stream: bool) -> None:
    prompt = TEXT * 4
    options = {"n": 4, "stream": stream, "temperature": 1, "seed": 3}
    if stream:
        options["stream_options"] = {"include_usage": True}

    def use(client: openai.OpenAI) -> object:
        got = _complete(client, prompt, **options)
        return list(got)[-1].usage if stream else got.usage

    usage = await rig.with_openai(use)
    assert usage.prompt_tokens == len(prompt)
    assert (await rig.balance()).balance == 1_000_000 - len(prompt) - 2 * usage.completion_tokens


async def test_a_seed_gives_the_same_answer_again(rig) -> None:
    one, two, other = [
        await rig.with_openai(
            lambda client, seed=seed: _complete(client, TEXT, temperature=1, seed=seed).choices[0].text
        )
        for seed in (5, 5, 6)
    ]
    assert one == two != other


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_are_answered_as_each_would_be_alone(rig, stream: bool) -> None:
    prompts: list[object] = [TEXT, [5, 6, 7], "Once upon a time"]
    options = {"n": 2, "echo": True, "logprobs": 1, "temperature": 1, "seed": 3}

    def told(client: openai.OpenAI, prompt: object) -> tuple[dict[int, str], dict[int, list[int]], object]:
        got = _complete(client, prompt, stream=stream, **options, **asked)
        texts: dict[int, str] = {}
        offsets: dict[int, list[int]] = {}
        usage = None
        for chunk in got if stream else [got]:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset if choice.logprobs else ())
        return texts, offsets, usage

    asked = {"stream_options": {"include_usage": True}} if stream else {}
    alone = [await rig.with_openai(partial(told, prompt=prompt)) for prompt in prompts]
    spent = 1_000_000 - (await rig.balance()).balance
    texts, offsets, usage = await rig.with_openai(partial(told, prompt=prompts))
    assert texts == {2 * place + n: one[0][n] for place, one in enumerate(alone) for n in range(2)}
    assert offsets == {2 * place + n: one[1][n] for place, one in enumerate(alone) for n in range(2)}
    assert len(set(texts.values())) == 6
    assert usage.completion_tokens == sum(one[2].completion_tokens for one in alone) == 48
    assert usage.prompt_tokens == sum(one[2].prompt_tokens for one in alone)
    assert 1_000_000 - (await rig.balance()).balance - spent <= spent  # prompts that were read before may be cheaper


async def test_the_best_answers_to_each_of_several_prompts(rig) -> None:
    def told(client: openai.OpenAI, prompt: object, **changes: object) -> list[str]:
        got = _complete(client, prompt, best_of=4, temperature=1, seed=7, **changes)
        assert [choice.index for choice in got.choices] == [*range(len(got.choices))]
        return [choice.text for choice in got.choices]

    first, second = [await rig.with_openai(partial(told, prompt=prompt)) for prompt in (TEXT, "Once upon a time")]
    keyed = {"extra_headers": {"idempotency-key": "k"}}
    assert await rig.with_openai(lambda client: told(client, [TEXT, "Once upon a time"], **keyed)) == first + second
    paid = (await rig.balance()).balance
    assert await rig.with_openai(lambda client: told(client, [TEXT, "Once upon a time"], **keyed)) == first + second
    assert (await rig.balance()).balance == paid


@pytest.mark.parametrize("prompt", [["a"] * 33, ["a", [1, 10**6]], ["a", 5], [[1], []], []])
async def test_prompts_that_are_refused_cost_nothing(rig, prompt: list[object]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await rig.with_openai(lambda client: _complete(client, prompt))
    assert str(caught.value.body["param"]).startswith("prompt")
    balance = await rig.balance()
    assert (balance.balance, balance.reserved) == (1_000_000, 0)
