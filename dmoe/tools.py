"""Functions that a model may call: how a request's tools reach its prompt, its answer and the client.

Owns: the way between a request's tools and one model. Does not own: how families write calls (``dmoe/core/
toolformats.py``), finding calls in text (``dmoe/core/toolparser.py``), what a grammar does (``dmoe/constraint.py``).

Invariants:

1. ``required`` and a named function are kept by a grammar: what the model says is a call whose arguments fit the
   function's schema. With ``auto`` the model is free, and its arguments are passed on as they are.
2. Without tools nothing of an answer is read as a call; what a model marks as thought is never shown as its answer.
3. A model whose template knows no tools is told of them in a system message, in Hermes' form, but only where a grammar
   makes it call one: left free, it would guess.

Fails with RequestError naming the tool or the choice.
"""

import json
import re
import secrets
import string
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from config.errors import RequestError
from config.generation import (
    Constraint,
    Delta,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Message,
    Sampling,
    Tool,
    ToolUse,
)
from dmoe.core.toolformats import HARMONY, HARMONY_MARKS, HERMES, NAME, ToolFormat, find_format
from dmoe.core.toolparser import Found, Parser, parser_of
from dmoe.text import Tokenizer

TOOLS_MAX = 128
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SHORT_ID = string.ascii_letters + string.digits
_MANUAL = """You can call functions. Their signatures, one JSON object each:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON within <tool_call></tool_call>:
<tool_call>
{{"name": <function>, "arguments": <object>}}
</tool_call>"""
_ANSWER_AT_ONCE = "<|channel|>final<|message|>"
"""How a constrained harmony answer begins: the constraint holds for the answer, not for the headers around it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a request is put to one model, and how its answer is read."""

    request: GenerationRequest
    tools: tuple[Tool, ...] = ()
    """Those that the template writes."""
    prompt_end: str = ""
    """What the prompt has behind the template's."""
    kind: ToolFormat | None = None
    """The form in which calls are looked for; None: the answer is text."""
    names: frozenset[str] = frozenset()

    @property
    def shown(self) -> tuple[str, ...]:
        """The control tokens that the reader needs to see."""
        if self.kind is None:
            return ()
        kind = self.kind
        text = kind.opening + kind.head + kind.tail + kind.closing + "".join((*kind.begins, *kind.between))
        return HARMONY_MARKS if kind.channels else tuple(_marks(text))

    @property
    def characters(self) -> int:
        """About how much text the prompt is."""
        written = sum(len(tool.parameters) + len(tool.description) for tool in self.tools)
        return written + sum(len(message.content) for message in self.request.messages or ())

    def prompt(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The conversation as token ids."""
        assert self.request.messages is not None
        chat = tokenizer.chat(self.request.messages, self.tools)
        return chat + tokenizer.encode(self.prompt_end, begin=False) if self.prompt_end else chat

    def reader(self) -> "Reader | None":
        """A reader for one answer."""
        if self.kind is None:
            return None
        return Reader(parser_of(self.kind, self.names, _new_id(self.kind)))


class Reader:
    """Turns the events of one answer into those that tell calls and reasoning from text."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser

    def read(self, event: GenerationEvent) -> tuple[GenerationEvent, ...]:
        """What an event becomes."""
        if isinstance(event, Delta):
            found = self._parser.push(event.text)
            return (replace(event, text=found.text, tool_calls=found.calls, reasoning=found.reasoning),)
        return (*_rest(self._parser.finish()), self._end(event))

    def _end(self, finished: Finished) -> Finished:
        called = self._parser.called and finished.reason == "stop"
        return replace(finished, reason="tool_calls") if called else finished


@asynccontextmanager
async def reading(
    stream: AbstractAsyncContextManager[AsyncIterator[GenerationEvent]], reader: Reader | None
) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
    """The events of an answer as a reader sees them."""
    async with stream as events:
        yield events if reader is None else _Read(events, reader)


class _Read(AsyncIterator[GenerationEvent]):
    """Events behind a reader."""

    def __init__(self, events: AsyncIterator[GenerationEvent], reader: Reader) -> None:
        self._events = events
        self._reader = reader
        self._ready: deque[GenerationEvent] = deque()

    async def __anext__(self) -> GenerationEvent:
        while not self._ready:
            self._ready.extend(self._reader.read(await anext(self._events)))
        return self._ready.popleft()


def plan(request: GenerationRequest, tokenizer: Tokenizer) -> Plan:
    """Fit a request's tools to a model. RequestError for tools that it cannot have."""
    if request.messages is None:
        if request.tool_use is not None:
            raise _refused("tools need messages, not a prompt", "use /v1/chat/completions")
        return Plan(request=request)
    template = tokenizer.template
    kind = find_format(template.source) if template else None
    knows = template is not None and template.knows_tools
    if request.tool_use is None:
        if not knows:
            request = replace(request, messages=tuple(_spelled(message) for message in request.messages))
        return _without_tools(request, kind)
    _check(request.tool_use)
    if knows:
        if kind is None:
            raise _refused("this model writes calls in a form that is not known here", "leave tools out")
        return _with_tools(request, request.tool_use, kind, tokenizer, request.tool_use.tools)
    if request.tool_use.choice == "auto":
        raise _refused(
            "this model's chat template knows no tools", 'set tool_choice to "required" or name one, or leave tools out'
        )
    told = replace(request, messages=_told(request.messages or (), request.tool_use.tools))
    return _with_tools(told, request.tool_use, HERMES, tokenizer, ())


def _without_tools(request: GenerationRequest, kind: ToolFormat | None) -> Plan:
    if kind is not HARMONY:
        return Plan(request=request)
    end = _ANSWER_AT_ONCE if request.sampling.constraint is not None else ""
    return Plan(request=request, prompt_end=end, kind=None if end else kind)


def _with_tools(
    request: GenerationRequest, use: ToolUse, kind: ToolFormat, tokenizer: Tokenizer, shown: tuple[Tool, ...]
) -> Plan:
    sampling = request.sampling
    one = not use.parallel or kind.alone
    if use.choice == "required":
        if sampling.constraint is not None:
            raise _refused("a forced call and a constraint exclude each other", "leave one of them out", "tool_choice")
        grammar = _grammar(kind, _callable(use), tokenizer.control_tokens, one=one)
        sampling = replace(sampling, constraint=Constraint(kind="grammar", text=grammar, where="tools"))
    elif sampling.constraint is not None:
        raise _refused("tools that the model may call and a constraint exclude each other", "leave one of them out")
    elif not use.parallel and kind.tail.strip("} \n"):
        sampling = _stopped_at(sampling, kind.tail.strip("} \n"))
    names = frozenset(tool.name for tool in use.tools)
    return Plan(request=replace(request, sampling=sampling), tools=shown, kind=kind, names=names)


def _stopped_at(sampling: Sampling, mark: str) -> Sampling:
    """The end of a call ends the answer."""
    return replace(sampling, stop=(*sampling.stop, mark))


def _callable(use: ToolUse) -> Sequence[Tool]:
    return [tool for tool in use.tools if use.name in ("", tool.name)]


def _check(use: ToolUse) -> None:
    if not 0 < len(use.tools) <= TOOLS_MAX:
        raise _refused(f"tools has {len(use.tools)} entries", f"send 1 to {TOOLS_MAX}")
    for index, tool in enumerate(use.tools):
        if _TOOL_NAME.fullmatch(tool.name) is None:
            raise _refused(f"tools[{index}] is called {tool.name!r:.80}", "use 1 to 64 of a-z, A-Z, 0-9, _, . and -")
        if any(tool.name == other.name for other in use.tools[:index]):
            raise _refused(f"two tools are called {tool.name}", "give each a name of its own")
        if not isinstance(_parsed(tool.parameters), dict):
            raise _refused(f"the parameters of {tool.name} are no JSON schema", "send a JSON object")
    if use.name and not _callable(use):
        raise _refused(
            f"tool_choice names {use.name!r:.80}, which is none of the tools", "name one of them", "tool_choice"
        )


def _grammar(kind: ToolFormat, tools: Sequence[Tool], control: Mapping[str, int], *, one: bool) -> str:
    """A grammar (llguidance's Lark) of one or more calls of these tools, as the family writes them."""
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    more = "" if one else f" ({_literal(kind.separator, control)} ({calls}))*"
    rules = [f"start: {_literal(kind.opening, control)} ({calls}){more} {_literal(kind.closing, control)}"]
    if kind.channels:
        thought = f"{_literal('<|channel|>analysis<|message|>', control)} /(.|\\n)*/"
        rules = [f"start: ({thought} {_literal('<|end|><|start|>assistant', control)})? ({calls})"]
    for index, tool in enumerate(tools):
        head, tail = _literal(kind.head.replace(NAME, tool.name), control), _literal(kind.tail, control)
        rules.append(f"call_{index}: {head} %json {json.dumps(_schema(tool))} {tail}")
    return "\n".join(rules)


def _schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, which are always an object."""
    schema: dict[str, Any] = dict(_parsed(tool.parameters))
    schema.setdefault("type", "object")
    schema.setdefault("x-guidance", {"whitespace_pattern": " ?"})
    return schema


def _literal(text: str, control: Mapping[str, int]) -> str:
    """Text of a format in Lark: control tokens by their numbers, the rest in quotes."""
    parts: list[str] = []
    rest = text
    while rest:
        place, name = min(((rest.find(name), name) for name in control if name in rest), default=(len(rest), ""))
        if place:
            parts.append(json.dumps(rest[:place], ensure_ascii=False))
        if name:
            parts.append(f"<[{control[name]}]>")
        rest = rest[place + len(name) :]
    return " ".join(parts)


def _told(messages: tuple[Message, ...], tools: Sequence[Tool]) -> tuple[Message, ...]:
    """A conversation for a template that knows no tools: a manual at its head, calls and results as text."""
    described = [
        json.dumps({"name": each.name, "description": each.description, "parameters": _parsed(each.parameters)})
        for each in tools
    ]
    manual = _MANUAL.format(tools="\n".join(described))
    spelled = [_spelled(message) for message in messages]
    if spelled and spelled[0].role in ("system", "developer"):
        first = replace(spelled[0], content=f"{spelled[0].content}\n\n{manual}")
        return (first, *spelled[1:])
    return (Message(role="system", content=manual), *spelled)


def _spelled(message: Message) -> Message:
    if message.role == "tool":
        return Message(role="user", content=f"<tool_response>\n{message.content}\n</tool_response>")
    if not message.tool_calls:
        return message
    calls = [
        HERMES.head.replace(NAME, call.name) + (call.arguments or "{}") + HERMES.tail for call in message.tool_calls
    ]
    return Message(role=message.role, content="\n".join(filter(None, [message.content, *calls])))


def _marks(text: str) -> list[str]:
    return re.findall(r"<[^<>\s]+>|\[[A-Z_]+\]", text)


def _new_id(kind: ToolFormat) -> Any:  # noqa: ANN401 - a function
    if kind.short_ids:
        return lambda: "".join(secrets.choice(_SHORT_ID) for _ in range(9))
    return lambda: f"call_{secrets.token_hex(12)}"


def _rest(found: Found) -> tuple[Delta, ...]:
    if not (found.text or found.calls or found.reasoning):
        return ()
    return (Delta(text=found.text, tokens=(), tool_calls=found.calls, reasoning=found.reasoning),)


def _parsed(text: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _refused(message: str, hint: str, param: str = "tools") -> RequestError:
    return RequestError("invalid_request", message, hint, param=param)
