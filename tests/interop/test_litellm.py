"""LiteLLM as a client of a real gateway: the real engine, a tiny model of random weights."""

import json
from pathlib import Path

import trio
from gateway_rig import serving

from tests.interop.environments import program_of, run
from tests.unit.dmoe.answer_kit import engine_running

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{# <tool_call> #}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ c.function.arguments | tojson }})]{% endfor %}/"
    "{% endfor %}"
)
MODEL = {"change": {"tokenizer.chat_template": TEMPLATE, "llama.context_length": 2048}}
PROGRAM = Path(__file__).with_name("litellm_client.py")


async def test_litellm(tmp_path: Path) -> None:
    python = program_of("litellm", "python")
    async with engine_running(tmp_path, **MODEL) as engine, serving(tmp_path / "data", engine=engine) as rig:
        said = await run([python, str(PROGRAM), f"{rig.gateway.url}/v1", rig.key])
        charged = await trio.to_thread.run_sync(rig.accounts.usage, "ada")
    seen = json.loads(said.splitlines()[-1])
    assert seen["text"] == seen["streamed"]
    assert (seen["usage"], seen["streamed_usage"]) == (8, [8])
    for called in (seen["tools"]["called"], seen["tools"]["streamed"]):
        assert called
        assert all(name == "get_weather" and given["city"] in ("Oslo", "Rome") for name, given in called)
    assert 1 <= seen["tools"]["after"] <= 8
    assert seen["formed"]["name"] in ("Ada", "Bob")
    assert 1 <= seen["continued"] <= 4
    assert seen["embedding"] == {"count": 2, "near": True, "tokens": 2}
    assert seen["refused"] == {
        "model": ["NotFoundError", 404],
        "key": ["AuthenticationError", 401],
        "long": ["ContextWindowExceededError", 400],
        "value": ["BadRequestError", 400],
    }
    assert len(charged) == 9, "two plain, three with tools, a form, a completion, two embeddings; mistakes are free"
