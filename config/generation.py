"""What a generation request and its answer look like, shared by the engine and the gateway.

Both sides import these types so that neither has to import the other.
"""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]
Route = Literal["experts", "local", "fused"]
"""``experts``: experts wherever their replicas are. ``local``: the same graph and roundings, all in this process.
``fused``: one local graph without wire roundings (fastest; its own reference class)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. ``temperature == 0`` is greedy; ``top_k == 0`` and ``top_p == 1`` are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Exactly one of ``messages`` (chat template applied) and ``prompt`` (text as it is, or token ids) is set."""

    model: str
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    request_id: str = ""
    route: Route | None = None


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
class Delta:
    """A piece of the answer. ``text`` may be empty while a character or a possible stop string is incomplete;
    ``tokens`` are the ids behind this step (they may lead their text)."""

    text: str
    tokens: tuple[int, ...]


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


GenerationEvent = Delta | Finished
