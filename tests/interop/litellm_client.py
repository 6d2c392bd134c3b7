"""LiteLLM's SDK at a gateway: ``litellm_client.py BASE_URL KEY`` prints what it saw as JSON. Runs in LiteLLM's own
environment (``make clients``)."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its price list is not fetched

import litellm

litellm.telemetry = False
ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "seed": 5, "temperature": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {"type": "object", "properties": {"name": {"enum": ["Ada", "Bob"]}}, "required": ["name"]}
FORM = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
MISTAKES = {
    "model": {"model": "openai/nothing"},
    "key": {"api_key": "sk-nobody"},
    "long": {"messages": [{"role": "user", "content": "x" * 9000}]},
    "value": {"temperature": 7},
}


def main(base: str, key: str) -> None:
    shared = {"model": "openai/tiny", "api_base": base, "api_key": key, "max_retries": 0, "timeout": 60}
    seen = {**plain(shared), "tools": tools(shared), "embedding": embedding(shared)}
    formed = litellm.completion(**shared, **{**ASK, "max_tokens": 100}, response_format=FORM)
    seen["formed"] = json.loads(formed.choices[0].message.content)
    seen["continued"] = litellm.text_completion(
        **{**shared, "model": "text-completion-openai/tiny"}, prompt="hello", max_tokens=4, temperature=0
    ).usage.completion_tokens
    seen["refused"] = {name: refusal({**shared, **ASK, **changes}) for name, changes in MISTAKES.items()}
    print(json.dumps(seen))


def plain(shared: dict) -> dict:
    whole = litellm.completion(**shared, **ASK)
    chunks = list(litellm.completion(**shared, **ASK, stream=True, stream_options={"include_usage": True}))
    usages = [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None) is not None]
    return {
        "text": whole.choices[0].message.content,
        "usage": whole.usage.completion_tokens,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "streamed_usage": usages[-1:],
    }


def tools(shared: dict) -> dict:
    """A call, the same streamed, and an answer to its result."""
    forced = {**shared, **ASK, "max_tokens": 200, "tools": [TOOL], "tool_choice": "required"}
    message = litellm.completion(**forced).choices[0].message
    chunks = list(litellm.completion(**forced, stream=True))
    streamed = litellm.stream_chunk_builder(chunks, messages=ASK["messages"]).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    turn = [*ASK["messages"], message.model_dump(), *results]
    after = litellm.completion(**{**shared, **ASK, "messages": turn, "tools": [TOOL]})
    return {"called": calls(message), "streamed": calls(streamed), "after": after.usage.completion_tokens}


def calls(message: object) -> list:
    return [[call.function.name, json.loads(call.function.arguments)] for call in message.tool_calls]


def embedding(shared: dict) -> dict:
    """Its own default asks for no form, ``float`` for numbers; both are the same vectors."""
    asked = {name: shared[name] for name in ("model", "api_base", "api_key")}
    one = litellm.embedding(**asked, input=["a", "b"])
    other = litellm.embedding(**asked, input=["a", "b"], encoding_format="float")
    pairs = zip(one.data, other.data, strict=True)
    near = all(abs(x - y) < 1e-6 for a, b in pairs for x, y in zip(a["embedding"], b["embedding"], strict=True))
    return {"count": len(one.data), "near": near, "tokens": one.usage.prompt_tokens}


def refusal(asked: dict) -> list:
    try:
        litellm.completion(**asked)
    except Exception as error:  # noqa: BLE001 - its kind is what is told
        return [type(error).__name__, getattr(error, "status_code", 0)]
    return []


main(*sys.argv[1:])
