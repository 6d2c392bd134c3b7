"""What the gateway needs of the rest of the node, as Protocols. ``node`` passes the real things in.

The gateway imports neither the engine nor the ledger; what crosses these lines stands in ``config/generation.py``.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from config.generation import Embedded, EmbeddingRequest, GenerationEvent, GenerationRequest, ModelInfo, Route


class PreparedGeneration(Protocol):
    """A request that was checked and tokenized: its worst case is known before anything runs."""

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """The prompt's token ids, chat template applied."""

    @property
    def max_tokens(self) -> int:
        """Most tokens the answer can have; reserved for before it starts."""

    @property
    def route(self) -> Route:
        """How it is computed; asked for again, with the same seed, it gives the same text."""


class Engine(Protocol):
    """Generates answers."""

    def models(self) -> Sequence[ModelInfo]:
        """The models this node can answer with, at once."""

    async def prepare(self, request: GenerationRequest) -> PreparedGeneration:
        """Check and tokenize.

        Raises RiosError: ``not_found`` (no such model), ``context_length_exceeded``, ``invalid_request``,
        ``unavailable`` or ``no_replica`` (known, but cannot be served now).
        """

    def stream(self, prepared: Any) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:  # noqa: ANN401
        """Run what :meth:`prepare` of the same engine returned. The iterator gives Deltas, then one Finished.

        Leaving the context stops the generation at once and closes the iterator, wherever it stands. Raises RiosError
        (BusyError when all slots and the queue are full) on entry or while iterating.
        """

    async def prepare_embeddings(self, request: EmbeddingRequest) -> Any:  # noqa: ANN401
        """Check a request for vectors and tokenize its texts: what comes back has ``prompt_tokens``, of all together.
        Raises as :meth:`prepare`."""

    async def embed(self, prepared: Any) -> Embedded:  # noqa: ANN401
        """The vectors that :meth:`prepare_embeddings` of the same engine prepared. Cancelling it stops the work."""


class Health(Protocol):
    """Whether this node can do its work."""

    def ready(self) -> tuple[bool, Sequence[str]]:
        """Ready or not, and the reasons why not, for people."""


class LedgerView(Protocol):
    """Reads the node's own ledger account."""

    def account(self) -> str:
        """The account as text (its peer id)."""

    def balance(self) -> int:
        """Final balance of the node's own account, microcredits."""
