"""What answers look like, as types: the OpenAPI document is made from them.

``chat.py``, ``completions.py``, ``embeddings.py`` and ``stream.py`` write answers; a test holds what they write against
these. ``UNSET``: a field that may be missing.
"""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from config.generation import FinishReason, Route


class CachedTokens(msgspec.Struct, kw_only=True):
    """What of a prompt had been computed before."""

    cached_tokens: int


class TokenUsage(msgspec.Struct, kw_only=True):
    """The tokens that are charged."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class MissingExpert(msgspec.Struct, kw_only=True):
    """An expert that the router chose and nobody had."""

    layer: int
    expert: int


class Served(msgspec.Struct, kw_only=True):
    """What a peer served of an answer."""

    layers: list[int] | UnsetType = UNSET
    experts: list[int] | UnsetType = UNSET


class Work(msgspec.Struct, kw_only=True):
    """RiOS's extension of an answer: who computed it, and how long that took. Keys are peer ids."""

    route: Route
    expert_rows: dict[str, int]
    serving: dict[str, Served]
    retries: int
    degraded: bool
    missing: list[MissingExpert]
    prefill_seconds: float
    decode_seconds: float


class LikelyToken(msgspec.Struct, kw_only=True):
    """A token and its natural log probability. ``bytes`` may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(LikelyToken, kw_only=True):
    """The token that stands there, and the likeliest ones in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """One entry per token."""

    content: list[ChosenToken]
    refusal: None


class CalledFunction(msgspec.Struct, kw_only=True):
    """``arguments`` is JSON as text, unless the model wrote something else."""

    name: str
    arguments: str


class CallOfTool(msgspec.Struct, kw_only=True):
    """A function that the model wants called."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(msgspec.Struct, kw_only=True):
    """``content`` is null if there is nothing but calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CallOfTool] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One of the answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    rios: Work


class FunctionDelta(msgspec.Struct, kw_only=True):
    """``name`` comes with the call's first piece."""

    name: str | UnsetType = UNSET
    arguments: str


class CallDelta(msgspec.Struct, kw_only=True):
    """A piece of the ``index``-th call; ``id`` and ``type`` come with its first."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class MessageDelta(msgspec.Struct, kw_only=True):
    """What a piece adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    """A piece of one of the answers."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(msgspec.Struct, kw_only=True):
    """A piece of a streamed conversation. ``usage`` is null up to the chunk without choices that has it, and missing
    unless it was asked for; ``rios`` comes with the finish reason."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: TokenUsage | UnsetType | None = UNSET
    rios: Work | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Parallel lists, one entry per token; of a prompt's first token nothing is known."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One of the texts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(msgspec.Struct, kw_only=True):
    """What goes on from a prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage
    rios: Work


class CompletionPiece(msgspec.Struct, kw_only=True):
    """A piece of one of the texts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(msgspec.Struct, kw_only=True):
    """A piece of it. ``usage`` and ``rios`` as in a chat's chunks."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionPiece]
    usage: TokenUsage | UnsetType | None = UNSET
    rios: Work | UnsetType = UNSET


class EmbeddingVector(msgspec.Struct, kw_only=True):
    """A vector of length 1: numbers, or little-endian f32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, kw_only=True):
    """The tokens that are charged."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingWork(msgspec.Struct, kw_only=True):
    """Who computed the vectors."""

    route: Route
    expert_rows: dict[str, int]


class EmbeddingList(msgspec.Struct, kw_only=True):
    """One vector per text, in their order."""

    object: Literal["list"]
    data: list[EmbeddingVector]
    model: str
    usage: EmbeddingUsage
    rios: EmbeddingWork
