"""Penalties, biases, log probabilities and several answers, through the real, unmodified openai client."""

from pathlib import Path

import openai
import pytest
from fake_engine import ANSWER, FakeEngine
from gateway_rig import eventually, read_until, serving

from gateway.money import Settlement
from gateway.till import Till

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "".join(ANSWER)


def _chat(client: openai.OpenAI, **changes: object) -> object:
    return client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **changes})


async def test_controls_reach_the_engine(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        await rig.with_openai(
            lambda client: _chat(
                client,
                frequency_penalty=0.5,
                presence_penalty=-1,
                logit_bias={"5": -100, "7": 1.5},
                extra_body={"min_p": 0.05, "repetition_penalty": 1.2},
            )
        )
        await rig.with_openai(_chat)
        sampling, plain = (request.sampling for request in rig.engine.requests)
        assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -1)
        assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.2)
        assert sampling.logit_bias == ((5, -100), (7, 1.5))
        assert sampling.logprobs is None
        assert (plain.min_p, plain.repetition_penalty, plain.logit_bias) == (0, 1, ())


async def test_chat_logprobs(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        answer = await rig.with_openai(lambda client: _chat(client, logprobs=True, top_logprobs=2))
        content = answer.choices[0].logprobs.content
        assert [entry.token for entry in content] == list(ANSWER)
        assert [entry.logprob for entry in content] == [-0.5 - index for index in range(7)]
        assert bytes(content[1].bytes) == b" is"
        assert [(top.token, bytes(top.bytes), top.logprob) for top in content[0].top_logprobs] == [
            ("\ufffd", b"\xe2\x82", -0.25),
            ("Paris", b"Paris", -0.5),
        ]
        bare = await rig.with_openai(lambda client: _chat(client, logprobs=True))
        assert [entry.top_logprobs for entry in bare.choices[0].logprobs.content] == [[]] * 7
        without = await rig.with_openai(lambda client: _chat(client, logprobs=False))
        assert without.choices[0].logprobs is None


async def test_streamed_chat_logprobs(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        chunks = await rig.with_openai(lambda client: list(_chat(client, logprobs=True, top_logprobs=1, stream=True)))
        shown = [chunk.choices[0] for chunk in chunks if chunk.choices[0].logprobs]
        assert "".join(choice.delta.content for choice in shown) == TEXT
        entries = [entry for choice in shown for entry in choice.logprobs.content]
        assert [entry.token for entry in entries] == list(ANSWER)
        assert {len(entry.top_logprobs) for entry in entries} == {1}
        assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(tmp_path: Path, stream: bool) -> None:
    async with serving(tmp_path) as rig:

        def use(client: openai.OpenAI) -> list[openai.types.CompletionChoice]:
            got = client.completions.create(model="tiny", prompt="x", logprobs=1, max_tokens=3, stream=stream)
            return [chunk.choices[0] for chunk in got] if stream else [got.choices[0]]

        parts = [choice.logprobs for choice in await rig.with_openai(use) if choice.logprobs]
        assert [token for part in parts for token in part.tokens] == ["Paris", " is", " the"]
        assert [value for part in parts for value in part.token_logprobs] == [-0.5, -1.5, -2.5]
        assert [offset for part in parts for offset in part.text_offset] == [0, 5, 8]
        tops = [top for part in parts for top in part.top_logprobs]
        assert tops[1] == {"bytes:\\xe2\\x82": -0.25, " is": -1.5}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logprobs": 6}, "logprobs"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 9}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
    ],
)
async def test_bad_completion_parameter_is_named(tmp_path: Path, changes: dict[str, object], param: str) -> None:
    async with serving(tmp_path) as rig:
        with pytest.raises(openai.BadRequestError) as caught:
            await rig.with_openai(lambda client: client.completions.create(model="tiny", prompt="x", **changes))
        assert caught.value.param == param


async def test_several_answers_are_numbered_and_all_charged(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        answer = await rig.with_openai(lambda client: _chat(client, n=3, seed=5))
        assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, TEXT) for i in range(3)]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (18, 21)
        assert answer.rios["expert_rows"] == {"12D3KooWfake": 63}
        assert [(each.choice, each.sampling.seed) for each in rig.engine.requests] == [(0, 5), (1, 5), (2, 5)]
        balance = await rig.balance()
        assert (balance.balance, balance.reserved) == (1_000_000 - 3 * (6 + 2 * 7), 0)


async def test_several_streamed_answers(tmp_path: Path) -> None:
    async with serving(tmp_path, engine=FakeEngine(pause_seconds=0.005)) as rig:
        options = {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
        chunks = await rig.with_openai(lambda client: list(_chat(client, **options)))
        texts, roles, ends = {0: "", 1: ""}, [], []
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
            ends += [choice.index] if choice.finish_reason == "stop" else []
        assert texts == {0: TEXT, 1: TEXT}
        assert (sorted(roles), sorted(ends)) == ([0, 1], [0, 1])
        assert chunks[-1].usage.completion_tokens == 14
        assert (await rig.balance()).balance == 1_000_000 - 2 * (6 + 2 * 7)


async def test_several_completions_echo_each(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        answer = await rig.with_openai(
            lambda client: client.completions.create(model="tiny", prompt="a ", n=2, best_of=2, echo=True)
        )
        assert [(choice.index, choice.text) for choice in answer.choices] == [(0, f"a {TEXT}"), (1, f"a {TEXT}")]


async def test_one_answer_that_fails_fails_them_all_and_what_was_not_sent_costs_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, engine=FakeEngine(fail_at=6, fail_choice=1)) as rig:
        with pytest.raises(openai.APIError, match="no replica of expert 3"):
            await rig.with_openai(lambda client: _chat(client, n=3))
        balance = await rig.balance()
        assert (balance.balance, balance.reserved) == (1_000_000, 0)
        assert rig.engine.running == 0


@pytest.mark.parametrize("limit", ["concurrent_per_key", "user_concurrent"])
async def test_more_answers_than_may_ever_run_are_refused_by_name(tmp_path: Path, limit: str) -> None:
    async with serving(tmp_path, **{limit: 2}) as rig:
        with pytest.raises(openai.BadRequestError, match="at the same time") as caught:
            await rig.with_openai(lambda client: _chat(client, n=3))
        assert caught.value.param == "n"


async def test_answers_that_are_cut_off_wait_for_the_till_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, settle = [], Till.settle_after_cancel

    async def told(till: Till, *settlements: Settlement) -> None:
        together.append(len(settlements))
        await settle(till, *settlements)

    monkeypatch.setattr(Till, "settle_after_cancel", told)
    async with serving(tmp_path, engine=FakeEngine(hang_at=2)) as rig:
        asked = {"model": "tiny", "prompt": ["one", "two"], "n": 4, "stream": True}
        async with await rig.raw("/v1/completions", asked) as stream:
            await read_until(stream, b" is")
        await eventually(lambda: rig.engine.running == 0)
        assert together == [8]
        assert rig.accounts.balance("ada").reserved == 0


async def test_money_for_one_answer_is_not_enough_for_two(tmp_path: Path) -> None:
    async with serving(tmp_path, credit=30) as rig:
        with pytest.raises(openai.APIStatusError) as caught:
            await rig.with_openai(lambda client: _chat(client, n=2, max_tokens=7))
        assert caught.value.status_code == 402
        balance = await rig.balance()
        assert (balance.balance, balance.reserved) == (30, 0)
