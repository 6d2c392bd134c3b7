"""What a generation request and its answer look like, shared by the engine and the gateway.

Both sides import these types so that neither has to import the other.
"""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
Route = Literal["experts", "local", "fused", "stages"]
"""``experts``: experts wherever their replicas are. ``local``: the same graph and roundings, all in this process.
``fused``: one local graph without wire roundings (fastest; its own reference class). ``stages``: whole layers wherever
their replicas are, rounded where stages meet (a third class)."""
RouteWish = Route | Literal["auto"]
"""What may be asked for; ``auto``: the planner chooses when the answer begins, and the answer keeps that route."""
PrivacyWish = Literal["", "trusted", "local"]
"""Who may see a request's hidden states, beyond what the operator laid down: ``trusted``: only this node and
``dmoe.trusted_peers``. ``local``: only this node. Empty: as the operator says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that the model wants called. ``arguments`` is what it wrote: meant as JSON, not always valid."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message. ``tool_calls``: of an assistant's; ``tool_call_id``: which of them a tool's message answers."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call. ``parameters`` is the JSON schema of its arguments, as JSON."""

    name: str
    description: str = ""
    parameters: str = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The functions of a request. ``choice``: ``auto`` leaves it to the model whether to call one, ``required`` makes
    it call one or more, or the one called ``name``. ``parallel``: several calls in one answer are welcome."""

    tools: tuple[Tool, ...]
    choice: Literal["auto", "required"] = "auto"
    name: str = ""
    parallel: bool = True


ConstraintKind = Literal["json", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What an answer must look like, whatever the model would rather say."""

    kind: ConstraintKind
    text: str
    """A JSON schema; a regular expression; a JSON list of texts, one of which is the answer; a grammar (Lark)."""
    where: str = ""
    """What the request calls it, for errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. ``temperature == 0`` is greedy; ``top_k == 0``, ``top_p == 1``, ``min_p == 0``,
    penalties of 0 and a ``repetition_penalty`` of 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    min_p: float = 0.0
    """Drops tokens less than ``min_p`` times as likely as the likeliest."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)"""
    logprobs: int | None = None
    """Tell the log probability of each token, and of this many likeliest ones in its place; None: of none."""
    prompt_logprobs: bool = False
    """Tell those of the prompt's tokens too (``logprobs`` says how many)."""
    constraint: Constraint | None = None
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end the answer, besides the model's own."""


Prompt = str | tuple[int, ...]
"""Text as it is, or token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Exactly one of ``messages`` (chat template applied) and ``prompt`` is set."""

    model: str
    messages: tuple[Message, ...] | None = None
    prompt: Prompt | None = None
    sampling: Sampling = field(default_factory=Sampling)
    request_id: str = ""
    route: RouteWish | None = None
    tool_use: ToolUse | None = None
    choice: int = 0
    """Which of several answers to the same request this is: each has a seed of its own, made from the request's."""
    user: str = ""
    """Whose request it is: users take turns, and what one asked speeds up only their own later prompts."""
    privacy: PrivacyWish = ""
    bill: str = ""
    """What its costs are booked under, unlike any other's; empty: among the questions of this node's operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """Texts, or their token ids, to be turned into vectors."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    request_id: str = ""
    route: RouteWish | None = None
    user: str = ""
    privacy: PrivacyWish = ""
    bill: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the calls to one peer cost on one payment channel, by the payer's own count. ``channel`` in hex; ``calls``
    that were made for it (one may be made for several requests); ``nano``: 1e-9 microcredits."""

    channel: str
    peer_id: str
    calls: int
    nano: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """A vector of length 1 per input, as little-endian f32. ``expert_rows`` as in :class:`Finished`."""

    vectors: tuple[bytes, ...]
    prompt_tokens: int
    route: Route
    expert_rows: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that this node can answer with. ``created`` is a unix time in seconds."""

    id: str
    name: str
    context_tokens: int
    created: int
    ready: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token and its natural log probability in the model's own distribution: before temperature, filters, penalties
    and bias. ``data`` is its bytes, which may be part of a character; of a control token, its name's."""

    token: int
    data: bytes
    logprob: float | None
    """None: of a prompt's first token, which nothing foretells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceLogprobs:
    """The token that stands at a place of the answer, and the likeliest ones there, likeliest first. ``offset``: how
    many characters of the answer were complete before it."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDelta:
    """A piece of the answer's ``index``-th call: first its ``id`` and ``name``, then its arguments bit by bit."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of the answer. ``text`` may be empty while a character or a possible stop string is incomplete;
    ``tokens`` are the ids behind this step (they may lead their text)."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[PlaceLogprobs, ...] = ()
    """One per token of ``tokens`` if they were asked for."""
    prompt_logprobs: tuple[PlaceLogprobs, ...] = ()
    """Those of the next tokens of the prompt, their offsets counted in its text."""
    tool_calls: tuple[ToolDelta, ...] = ()
    reasoning: str = ""
    """What the model thinks aloud before its answer, where it marks that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of every generation that did not fail."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    route: Route
    expert_rows: dict[str, int]
    """Rows that each peer id computed for this answer."""
    serving: dict[str, dict[str, list[int]]]
    """peer id -> {"layers": [...], "experts": [...]} that served this answer."""
    retries: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that an earlier or a neighbouring answer had computed."""
    missing: tuple[tuple[int, int], ...] = ()
    """(layer, expert) that the router chose and nobody had; the weights of the others were rescaled. Not empty: the
    answer is degraded."""


GenerationEvent = Delta | Finished
