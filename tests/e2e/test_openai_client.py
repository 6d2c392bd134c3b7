"""The real, unmodified openai client against a real gateway."""

import asyncio
from pathlib import Path

import openai
import pytest
import trio
from fake_engine import ANSWER, FakeEngine
from gateway_rig import serving

from config.errors import BusyError

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "".join(ANSWER)


async def test_chat(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        answer = await rig.with_openai(
            lambda client: client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, seed=7)
        )
        assert answer.choices[0].message.content == TEXT
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens == 6
        assert answer.usage.completion_tokens == 7
        assert answer.usage.total_tokens == 13
        assert answer.rios["route"] == "experts"
        assert answer.rios["expert_rows"] == {"12D3KooWfake": 21}
        assert answer._request_id.startswith("req_")
        balance = await rig.balance()
        assert (balance.balance, balance.reserved) == (1_000_000 - 6 - 2 * 7, 0)


async def test_stream_with_usage(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        chunks = await rig.with_openai(
            lambda client: list(
                client.chat.completions.create(
                    model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
                )
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 8 + ["stop"]
        assert chunks[-2].rios["serving"]["12D3KooWfake"]["experts"] == [0, 2]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.total_tokens == 13
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert len({chunk.id for chunk in chunks}) == 1


async def test_stream_without_usage_has_no_usage(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        chunks = await rig.with_openai(
            lambda client: list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        )
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert all(chunk.usage is None for chunk in chunks)


async def test_request_reaches_the_engine(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        await rig.with_openai(
            lambda client: client.chat.completions.create(
                model="tiny",
                messages=[
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
                ],
                temperature=0.5,
                top_p=0.9,
                seed=3,
                stop=["\n", "END"],
                max_completion_tokens=5,
                extra_body={"top_k": 40, "min_tokens": 2, "rios": {"route": "local"}},
                extra_headers={"x-request-id": "my-id"},
            )
        )
        request = rig.engine.requests[0]
        assert [(message.role, message.content) for message in request.messages] == [
            ("system", "Be brief."),
            ("user", "Hello"),
        ]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 40, 3)
        assert (sampling.stop, sampling.max_tokens, sampling.min_tokens) == (("\n", "END"), 5, 2)
        assert (request.route, request.request_id) == ("local", "my-id")


async def test_completions(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:

        def use(client: openai.OpenAI) -> list[str]:
            create = client.completions.create
            texts = [
                create(model="tiny", prompt="one two").choices[0].text,
                create(model="tiny", prompt=["one two "], echo=True).choices[0].text,
                create(model="tiny", prompt=[1, 2, 3]).choices[0].text,
                create(model="tiny", prompt=[[1, 2, 3]], max_tokens=2).choices[0].text,
            ]
            stream = create(model="tiny", prompt="x ", echo=True, stream=True, stream_options={"include_usage": True})
            chunks = list(stream)
            assert chunks[-1].usage.completion_tokens == 7
            assert chunks[-2].choices[0].finish_reason == "stop"
            return [*texts, "".join(chunk.choices[0].text for chunk in chunks[:-1])]

        assert await rig.with_openai(use) == [TEXT, f"one two {TEXT}", TEXT, "Paris is", f"x {TEXT}"]
        assert rig.engine.requests[2].prompt == (1, 2, 3)
        assert rig.engine.requests[0].sampling.max_tokens == 16


async def test_models(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:

        def use(client: openai.OpenAI) -> None:
            models = list(client.models.list())
            assert [model.id for model in models] == ["tiny", "cold"]
            assert models[1].rios["ready"] is False
            assert client.models.retrieve("tiny").created == 1_700_000_000
            assert client.models.retrieve("b" * 64).id == "cold"
            with pytest.raises(openai.NotFoundError) as caught:
                client.models.retrieve("none/such")
            assert caught.value.code == "model_not_found"

        await rig.with_openai(use)


def _chat(client: openai.OpenAI, **changes: object) -> object:
    return client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **changes})


async def test_wrong_keys(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        wrong = rig.key[:-1] + ("A" if rig.key[-1] != "A" else "B")
        for key in ("nonsense", wrong, "rios_0123456789abcdef_" + "A" * 43):
            with pytest.raises(openai.AuthenticationError) as caught:
                await rig.with_openai(_chat, key=key)
            assert caught.value.code == "invalid_api_key"
        await rig.with_openai(_chat)
        with pytest.raises(openai.AuthenticationError):
            await rig.with_openai(_chat, key=wrong)


async def test_disabled_user(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        rig.accounts.set_disabled("ada", True)
        with pytest.raises(openai.PermissionDeniedError):
            await rig.with_openai(_chat)


async def test_unknown_model(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        with pytest.raises(openai.NotFoundError) as caught:
            await rig.with_openai(lambda client: _chat(client, model="gpt-9"))
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_prompt_too_long(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        messages = [{"role": "user", "content": "word " * 5000}]
        with pytest.raises(openai.BadRequestError) as caught:
            await rig.with_openai(lambda client: _chat(client, messages=messages))
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"extra_body": {"min_p": 1.5}}, "min_p"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"extra_body": {"suffix": "x"}}, "suffix"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"extra_body": {"rios": {"route": "moon"}}}, "rios.route"),
        ({"extra_body": {"wishes": 3}}, "wishes"),
    ],
)
async def test_bad_parameter_is_named(tmp_path: Path, changes: dict[str, object], param: str) -> None:
    async with serving(tmp_path) as rig:
        with pytest.raises(openai.BadRequestError) as caught:
            await rig.with_openai(lambda client: _chat(client, **changes))
        assert caught.value.param == param
        assert param in caught.value.message
        assert (await rig.balance()).balance == 1_000_000


async def test_neutral_parameters_are_accepted(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:
        await rig.with_openai(
            lambda client: _chat(
                client,
                n=1,
                frequency_penalty=0,
                presence_penalty=0.0,
                logprobs=False,
                tools=[],
                response_format={"type": "text"},
                user="u",
                metadata={"a": "b"},
                logit_bias={},
                store=False,
            )
        )


async def test_rate_limit(tmp_path: Path) -> None:
    async with serving(tmp_path, requests_per_minute=1) as rig:
        await rig.with_openai(_chat)
        with pytest.raises(openai.RateLimitError) as caught:
            await rig.with_openai(_chat)
        headers = caught.value.response.headers
        assert caught.value.code == "rate_limit_exceeded"
        assert 0 < int(headers["retry-after"]) <= 60
        assert 0 < int(headers["retry-after-ms"]) <= 60_000
        assert headers["x-ratelimit-limit-requests"] == "1"
        assert headers["x-ratelimit-remaining-requests"] == "0"


async def test_client_retries_after_the_time_it_is_told(tmp_path: Path) -> None:
    async with serving(tmp_path, requests_per_minute=20) as rig:
        await rig.with_openai(lambda client: _exhaust(client, 100))
        # its own pause before a first retry is half a second at most
        answer = await rig.with_openai(lambda client: _chat(client.with_options(max_retries=1)))
        assert answer.choices[0].message.content == TEXT


def _exhaust(client: openai.OpenAI, requests_max: int) -> None:
    def ask() -> None:
        for _ in range(requests_max):
            client.models.list()

    with pytest.raises(openai.RateLimitError):
        ask()


async def test_no_money(tmp_path: Path) -> None:
    async with serving(tmp_path, credit=25) as rig:
        with pytest.raises(openai.APIStatusError) as caught:
            await rig.with_openai(lambda client: _chat(client, max_tokens=10))
        assert caught.value.status_code == 402
        assert caught.value.code == "insufficient_quota"
        await rig.with_openai(lambda client: _chat(client, max_tokens=9))
        assert (await rig.balance()).balance == 25 - 6 - 2 * 7


async def test_free_gateway_charges_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, credit=0, free=True) as rig:
        await rig.with_openai(_chat)
        assert (await rig.balance()).balance == 0
        assert rig.accounts.usage("ada")[0].completion_tokens == 7


async def test_busy_engine(tmp_path: Path) -> None:
    engine = FakeEngine(fail_at=0, error=BusyError("all slots are taken", retry_after_ms=2500))
    async with serving(tmp_path, engine=engine) as rig:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                await rig.with_openai(lambda client, stream=stream: _chat(client, stream=stream))
            assert caught.value.status_code == 503
            assert caught.value.code == "busy"
            assert caught.value.response.headers["retry-after-ms"] == "2500"
            assert caught.value.response.headers["retry-after"] == "3"
        balance = await rig.balance()
        assert (balance.balance, balance.reserved) == (1_000_000, 0)


async def test_client_tries_a_busy_server_again(tmp_path: Path) -> None:
    engine = FakeEngine(fail_at=0, error=BusyError("all slots are taken", retry_after_ms=2000))

    async def recovers() -> None:
        await engine.stopped.wait()
        await trio.sleep(1)
        engine.fail_at = None

    async with serving(tmp_path, engine=engine) as rig, trio.open_nursery() as nursery:
        nursery.start_soon(recovers)
        answer = await rig.with_openai(lambda client: _chat(client.with_options(max_retries=1)))
        assert answer.choices[0].message.content == TEXT
        assert (await rig.balance()).balance == 1_000_000 - 6 - 2 * 7, "the first try is not charged"
    assert len(engine.requests) == 2


async def test_the_asynchronous_client(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:

        async def use(count: int) -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{rig.gateway.url}/v1", api_key=rig.key, max_retries=0) as client:
                return await asyncio.gather(*(spelled(client) for _ in range(count)))

        async def spelled(client: openai.AsyncOpenAI) -> str:
            stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await trio.to_thread.run_sync(lambda: asyncio.run(use(5))) == [TEXT] * 5


async def test_failure_midway_is_an_error_event(tmp_path: Path) -> None:
    async with serving(tmp_path, engine=FakeEngine(fail_at=3)) as rig:
        texts: list[str] = []

        def use(client: openai.OpenAI) -> None:
            for chunk in _chat(client, stream=True):
                texts.append(chunk.choices[0].delta.content)

        with pytest.raises(openai.APIError, match="no replica of expert 3"):
            await rig.with_openai(use)
        assert "".join(texts) == "Paris is the"
        balance = await rig.balance()
        assert (balance.balance, balance.reserved) == (1_000_000 - 6 - 2 * 3, 0)
        assert rig.accounts.usage("ada")[0].outcome == "failed"


async def test_bug_in_the_engine_does_not_leak(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path, engine=FakeEngine(fail_at=2, error=ZeroDivisionError("secret detail"))) as rig:
        with pytest.raises(openai.InternalServerError) as caught:
            await rig.with_openai(_chat)
        assert caught.value.code == "internal"
        assert "secret" not in str(caught.value)
        assert caught.value.request_id in str(caught.value)
        with pytest.raises(openai.APIError, match="the server failed"):
            await rig.with_openai(lambda client: list(_chat(client, stream=True)))
        assert "secret detail" in caplog.text
        assert (await rig.balance()).reserved == 0


async def test_keyless(tmp_path: Path) -> None:
    async with serving(tmp_path, require_key=False, credit=0) as rig:
        await rig.with_openai(_chat, key="anything")
        usage = rig.accounts.usage("local")
        assert [(row.key_id, row.microcredits, row.completion_tokens) for row in usage] == [(None, 0, 7)]
        # A key still means its owner, who pays; and a wrong one is still wrong.
        with pytest.raises(openai.APIStatusError) as caught:
            await rig.with_openai(_chat)
        assert caught.value.status_code == 402
        with pytest.raises(openai.AuthenticationError):
            await rig.with_openai(_chat, key="rios_0123456789abcdef_" + "A" * 43)
