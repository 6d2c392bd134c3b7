"""Tools as OpenAI's API writes them (API reference: ``tools``, ``tool_choice``, tool calls in messages and answers).

A function's ``strict`` asks for nothing: a call that is forced always fits its schema, a free one is the model's own.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from config.generation import Message, Tool, ToolCall, ToolDelta, ToolUse
from gateway.errors import invalid, unsupported

_NO_PARAMETERS = {"type": "object", "properties": {}}


def tool_use(tools: object, choice: object, parallel: bool | None) -> ToolUse | None:
    """The functions of a request; None where there are none or ``choice`` is ``none``. Raises ApiError."""
    kind, name = _choice(choice)
    if tools is None or tools == []:
        if kind == "required":
            raise invalid("tool_choice", "tool_choice forces a call, and there are no tools")
        return None
    if not isinstance(tools, list):
        raise invalid("tools", "tools must be a list")
    described = tuple(_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools))
    if kind == "none":
        return None
    return ToolUse(
        tools=described,
        choice="required" if kind == "required" else "auto",
        name=name,
        parallel=parallel is not False,
    )


def _choice(choice: object) -> tuple[str, str]:
    """(none, auto or required; the function's name)"""
    if choice is None:
        return "auto", ""
    if choice in ("none", "auto", "required"):
        return str(choice), ""
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]:
            return "required", function["name"]
        raise invalid("tool_choice", "tool_choice.function needs a name")
    if isinstance(choice, dict) and isinstance(choice.get("type"), str):
        raise unsupported("tool_choice", f"it takes none, auto, required or a function, not {choice['type']!r:.60}")
    raise invalid("tool_choice", 'tool_choice must be "none", "auto", "required" or name a function')


def _tool(where: str, tool: object) -> Tool:
    if not isinstance(tool, dict):
        raise invalid(where, f"{where} must be an object")
    if tool.get("type") != "function":
        raise unsupported(f"{where}.type", f"it takes functions, not {tool.get('type')!r:.60}")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(f"{where}.function", f"{where}.function needs a name")
    description, parameters = function.get("description"), function.get("parameters")
    if not isinstance(description, str | None):
        raise invalid(f"{where}.function.description", f"{where}.function.description must be text")
    if not isinstance(parameters, dict | None):
        raise invalid(f"{where}.function.parameters", f"{where}.function.parameters must be a JSON schema")
    schema = msgspec.json.encode(_NO_PARAMETERS if parameters is None else parameters).decode()
    return Tool(name=function["name"], description=description or "", parameters=schema)


def message_calls(where: str, calls: object) -> tuple[ToolCall, ...]:
    """The calls that an assistant's message carries back. Raises ApiError."""
    if not calls:
        return ()
    if not isinstance(calls, list):
        raise invalid(where, f"{where} must be a list")
    return tuple(_call(f"{where}[{index}]", call) for index, call in enumerate(calls))


def _call(where: str, call: object) -> ToolCall:
    if not isinstance(call, dict) or call.get("type", "function") != "function":
        raise unsupported(where, "it reads calls of functions")
    function = call.get("function")
    named = function if isinstance(function, dict) else {}
    fields = (call.get("id"), named.get("name"), named.get("arguments"))
    if not all(isinstance(field, str) for field in fields):
        raise invalid(where, f"{where} needs an id and a function with name and arguments, all text")
    return ToolCall(id=str(fields[0]), name=str(fields[1]), arguments=str(fields[2]))


def check_results(messages: Sequence[Message]) -> None:
    """Every tool's message answers a call that was made before it. Raises ApiError."""
    made: set[str] = set()
    for index, message in enumerate(messages):
        if message.role == "tool" and message.tool_call_id not in made:
            where = f"messages[{index}].tool_call_id"
            raise invalid(where, f"{where} {message.tool_call_id!r:.60} is no call of a message before it")
        made.update(call.id for call in message.tool_calls)


def call_deltas(deltas: Sequence[ToolDelta]) -> list[dict[str, Any]]:
    """``delta.tool_calls`` of a chunk."""
    return [_delta(delta) for delta in deltas]


def _delta(delta: ToolDelta) -> dict[str, Any]:
    if not delta.name:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


def whole_calls(deltas: Sequence[ToolDelta]) -> list[dict[str, Any]]:
    """``message.tool_calls`` of an answer."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta.index not in calls:
            calls[delta.index] = {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
        calls[delta.index]["function"]["arguments"] += delta.arguments
    return [calls[index] for index in sorted(calls)]
