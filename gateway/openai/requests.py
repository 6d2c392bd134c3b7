"""What clients may ask: the request bodies of OpenAI's API, checked.

Owns parsing and the translation to :class:`config.generation.GenerationRequest`. A parameter of OpenAI's that this
server does not have is accepted at the value that asks for nothing, and refused by name at any other; an unknown
parameter is refused by name.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import msgspec
import trio
from msgspec import Meta
from starlette.requests import Request

from config.generation import GenerationRequest, Message, PrivacyWish, Prompt, RouteWish, Sampling
from gateway.errors import ApiError, invalid, unsupported
from gateway.openai.constraints import StructuredOutputs, constraint_of
from gateway.openai.tools import check_results, message_calls, tool_use

_BODY_SECONDS = 30.0
_STOPS_MAX = 4
_STOP_CHARACTERS_MAX = 256
_INTEGER_MAX = 2**31 - 1
CHOICES_MAX = 8
"""Most answers (``n``) to one request."""
_COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions (chat has none)."""

Count = Annotated[int, Meta(ge=1, le=_INTEGER_MAX)]
CountOrZero = Annotated[int, Meta(ge=0, le=_INTEGER_MAX)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]

B = TypeVar("B", bound=msgspec.Struct)


class RiosOptions(msgspec.Struct, forbid_unknown_fields=True):
    """RiOS's extension of a request."""

    route: RouteWish | None = None


class StreamOptions(msgspec.Struct):
    """What a stream has besides the answer. OpenAI's other options ask for nothing here."""

    include_usage: bool | None = None


class SharedBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints have in common. ``Any`` marks what :data:`_NEUTRAL` checks."""

    model: Annotated[str, Meta(min_length=1, max_length=255)]
    max_tokens: Count | None = None
    min_tokens: CountOrZero | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_INTEGER_MAX)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    rios: RiosOptions | None = None
    n: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    stop_token_ids: Annotated[list[CountOrZero], Meta(max_length=64)] | None = None
    response_format: Any = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class ChatMessage(msgspec.Struct):
    """One message. Fields that answers carry back (``refusal``, ``annotations``) are ignored."""

    role: str
    content: Any = None
    name: str | None = None
    tool_calls: Any = None
    tool_call_id: str | None = None
    function_call: Any = None


class ChatBody(SharedBody, kw_only=True):
    """``POST /v1/chat/completions``"""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    metadata: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    service_tier: Any = None
    store: Any = None
    web_search_options: Any = None


class CompletionBody(SharedBody, kw_only=True):
    """``POST /v1/completions``"""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: bool | Annotated[int, Meta(ge=0, le=5)] | None = None
    suffix: Any = None
    best_of: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] | None = None


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "web_search_options": (),
    "suffix": ("",),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

_PATH = re.compile(r"^(?P<what>.*?) - at `\$\.?(?P<path>[^`]*)`$", re.DOTALL)
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")
_FIELD = re.compile(r"(?:missing required|unknown) field `(?P<field>[^`]*)`")


async def read_body(request: Request, kind: type[B]) -> B:
    """The request's JSON body, checked. Raises ApiError that names the parameter, or for NUL: PostgreSQL takes none."""
    data = await read_bytes(request)
    if b"\\u0000" in data and _NUL.search(data):
        raise invalid(None, "the body must not hold NUL")
    return decode(data, kind)


async def read_prompt(request: Request, kind: type[B]) -> B:
    """The same of a body that is for a model, and may hold what it likes."""
    return decode(await read_bytes(request), kind)


async def read_bytes(request: Request) -> bytes:
    """The request's body as it came. Raises ApiError if it takes too long."""
    with trio.move_on_after(_BODY_SECONDS):
        return await request.body()
    raise ApiError("invalid_request", f"the body did not arrive within {_BODY_SECONDS:.0f} s", status=408)


def decode(data: bytes, kind: type[B]) -> B:
    """A JSON body, checked. Raises ApiError that names the parameter."""
    try:
        body = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(None, f"the body is not valid JSON in UTF-8: {error}") from error
    except RecursionError as error:
        raise invalid(None, "the body is nested too deeply") from error
    _check_neutral(body)
    return body


def _validation_error(text: str) -> ApiError:
    match = _PATH.match(text)
    what, path = (match["what"], match["path"]) if match else (text, "")
    named = _FIELD.search(what)
    if named:
        path = f"{path}.{named['field']}" if path else named["field"]
        what = "is required" if "missing" in what else "is not a parameter of this model server"
        return invalid(path, f"{path} {what}")
    path = path.removesuffix("[...]")  # a value of a mapping
    return invalid(path or None, f"{path or 'the body'}: {what[:1].lower()}{what[1:]}")


def _check_neutral(body: msgspec.Struct) -> None:
    for name in body.__struct_fields__:
        accepted = _NEUTRAL.get(name)
        if accepted is None:
            continue
        value = getattr(body, name)
        # 0 == False, and a client that sends one for the other means the same.
        if value is not None and value not in accepted:
            raise unsupported(name)


def chat_request(body: ChatBody, request_id: str, privacy: PrivacyWish = "") -> GenerationRequest:
    """A chat request for the engine."""
    limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens differ; send one of them")
    messages = tuple(_message(index, message) for index, message in enumerate(body.messages))
    check_results(messages)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs is only allowed with logprobs: true")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = _sampling(body, limits.pop() if limits else None, logprobs)
    return GenerationRequest(
        model=body.model,
        messages=messages,
        sampling=sampling,
        request_id=request_id,
        route=_route(body),
        privacy=privacy,
        tool_use=tool_use(body.tools, body.tool_choice, body.parallel_tool_calls),
    )


def completion_request(
    body: CompletionBody, prompts: Sequence[Prompt], request_id: str, privacy: PrivacyWish = ""
) -> GenerationRequest:
    """A completion request for the engine, with the first of the prompts."""
    logprobs = _completion_logprobs(body)
    best_of, n = body.best_of or body.n or 1, body.n or 1
    if not n <= best_of <= CHOICES_MAX:
        raise invalid("best_of", f"best_of is at least n ({n}) and at most {CHOICES_MAX}")
    if best_of > n and body.stream:
        raise invalid("best_of", "best_of above n cannot be streamed: the best is known at the end")
    if best_of > n and logprobs is None:
        logprobs = 0  # the answers are compared by them
    sampling = _sampling(body, body.max_tokens or _COMPLETION_MAX_TOKENS, logprobs)
    told = body.logprobs is not None and body.logprobs is not False
    if body.echo and (
        told or not all(isinstance(prompt, str) for prompt in prompts)
    ):  # one of token ids is spelled by those who tell of it
        sampling = replace(sampling, prompt_logprobs=True)
    if body.echo and told and body.max_tokens == 1:
        # harnesses score a prompt so and leave out the last place: a model that would stop there says something
        sampling = replace(sampling, min_tokens=1)
    return GenerationRequest(
        model=body.model,
        prompt=prompts[0],
        sampling=sampling,
        request_id=request_id,
        route=_route(body),
        privacy=privacy,
    )


def _message(index: int, message: ChatMessage) -> Message:
    where = f"messages[{index}]"
    role = _ROLES.get(message.role)
    if role is None:
        known = ", ".join(_ROLES)
        raise invalid(f"{where}.role", f"{where}.role {message.role!r:.60} is not one of {known}")
    if message.function_call:
        raise unsupported(f"{where}.function_call", "send tool_calls")
    calls = message_calls(f"{where}.tool_calls", message.tool_calls)
    if calls and role != "assistant":
        raise invalid(f"{where}.tool_calls", f"{where}.tool_calls: only an assistant's message has calls")
    if role == "tool" and not message.tool_call_id:
        raise invalid(f"{where}.tool_call_id", f"{where}.tool_call_id is required")
    silent = calls and message.content is None
    return Message(
        role=role,
        content="" if silent else _content(f"{where}.content", message.content),
        tool_calls=calls,
        tool_call_id=(message.tool_call_id or "") if role == "tool" else "",
        name=message.name or "",
    )


def _content(where: str, content: object) -> str:
    if isinstance(content, str):
        return check_text(where, content)
    if not isinstance(content, list):
        raise invalid(where, f"{where} must be text or a list of text parts")
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise invalid(where, f"{where} must be text or a list of text parts")
        if part["type"] != "text":
            raise unsupported(where, f"it reads text parts only, not {part['type']!r:.60}")
        if not isinstance(part.get("text"), str):
            raise invalid(where, f"{where}: a text part needs its text")
        texts.append(check_text(where, part["text"]))
    return "".join(texts)


def prompts_of(body: CompletionBody) -> list[Prompt]:
    """One or more: texts, or lists of token ids. Raises ApiError."""
    given = body.prompt
    if isinstance(given, str):
        return [check_text("prompt", given)]
    if not given or [] in given:
        raise invalid("prompt", "a prompt is empty")
    if all(isinstance(token, int) for token in given):
        return [token_ids("prompt", given)]
    return [
        check_text("prompt", one) if isinstance(one, str) else token_ids(f"prompt[{place}]", one)
        for place, one in enumerate(given)
    ]


def token_ids(where: str, given: object) -> tuple[int, ...]:
    """A list of token ids. Raises ApiError."""
    if not isinstance(given, list) or not all(isinstance(token, int) for token in given):
        raise invalid(where, f"{where} must be text or a list of token ids")
    if not all(0 <= token <= _INTEGER_MAX for token in given):
        raise invalid(where, f"{where}: token ids are not negative and fit into 31 bits")
    return tuple(given)


def _completion_logprobs(body: CompletionBody) -> int | None:
    if body.logprobs is None or body.logprobs is False:
        return None
    if body.logprobs is True:
        raise invalid("logprobs", "logprobs is a number from 0 to 5 here (true is chat's form)")
    return body.logprobs


def _sampling(body: SharedBody, max_tokens: int | None, logprobs: int | None) -> Sampling:
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise invalid("min_tokens", f"min_tokens {min_tokens} is more than max_tokens {max_tokens}")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options is only allowed with stream: true")
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=_stops(body.stop),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        min_p=body.min_p or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_biases(body.logit_bias or {}),
        logprobs=logprobs,
        constraint=constraint_of(body),
        stop_tokens=tuple(body.stop_token_ids or ()),
    )


def _biases(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """JSON spells token ids as text; two spellings of one id are refused with the rest that is no id."""
    for token in biases:
        if _TOKEN_ID.fullmatch(token) is None:
            raise invalid("logit_bias", f"logit_bias: {token!r:.60} is not a token id")
    return tuple((int(token), bias) for token, bias in biases.items())


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _STOPS_MAX:
        raise invalid("stop", f"stop has {len(stops)} entries, and {_STOPS_MAX} are allowed")
    for text in stops:
        if not 0 < len(check_text("stop", text)) <= _STOP_CHARACTERS_MAX:
            raise invalid("stop", f"a stop string has 1 to {_STOP_CHARACTERS_MAX} characters")
    return stops


def _route(body: SharedBody) -> RouteWish | None:
    return body.rios.route if body.rios is not None else None


def check_text(where: str, text: str) -> str:
    """JSON can spell half a character; no tokenizer can read one."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise invalid(where, f"{where} holds half of a surrogate pair, which is not a character")
    return text
