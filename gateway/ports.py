"""What the gateway needs of the rest of the node, as Protocols. ``node`` passes the real things in.

The gateway imports neither the engine nor the ledger; what crosses these lines stands in ``config/generation.py``,
``config/swarm.py`` and ``config/accountbook.py``.
"""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from config.accountbook import (
    LedgerBalance,
    LedgerChannel,
    LedgerCommittee,
    LedgerEntry,
    LedgerSummary,
    PaidChannel,
    Spent,
    StatementLine,
)
from config.generation import Embedded, EmbeddingRequest, GenerationEvent, GenerationRequest, ModelInfo, Route
from config.swarm import Deployment, DeploymentMode, ModelMap, Worker


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


class Swarm(Protocol):
    """The swarm as this node sees it, and what it asks of it."""

    def workers(self) -> Sequence[Worker]:
        """All nodes known, this one first; those that went a while ago last."""

    def deployments(self) -> Sequence[Deployment]:
        """What somebody wants served, and how far that is."""

    def maps(self) -> Sequence[ModelMap]:
        """Who holds what, for every model that is deployed or answered with here."""

    async def deploy(self, model: str, replicas: int | None, mode: DeploymentMode) -> Deployment:
        """Ask the swarm to serve a model (id or name); None: as many replicas as the node's settings say.

        Raises RiosError: ``not_found`` (no such model here), ``invalid_request`` (count, mode, or a mode that the
        model was not cut for), ``local`` (too many deployments).
        """

    async def scale(self, model_id: str, replicas: int) -> Deployment:
        """Change the replicas of this node's deployment. Raises as :meth:`deploy`."""

    async def undeploy(self, model_id: str) -> None:
        """Take this node's deployment back. Raises RiosError ``not_found``."""


class LedgerView(Protocol):
    """Reads the ledger. What is asked of the disk is async; names of accounts are peer ids, empty for the node's own.

    Raises RiosError ``usage`` for what is no account or no name, ``not_found`` for an entry that is not here.
    """

    def account(self) -> str:
        """The node's own account as text (its peer id)."""

    def balance(self, account: str = "") -> LedgerBalance:
        """What an account has."""

    def summary(self) -> LedgerSummary:
        """The whole in numbers."""

    def committee(self) -> LedgerCommittee:
        """The witnesses in office."""

    async def statement(self, account: str = "") -> Sequence[StatementLine]:
        """What moved an account's balance, oldest first."""

    async def entries(self, *, limit: int, before: int | None) -> Sequence[LedgerEntry]:
        """Final entries, newest first; ``before``: only places below it."""

    async def entry(self, name: str) -> Mapping[str, Any]:
        """One object with its certificate, by the id of an entry, claim or channel, or ``ACCOUNT:SEQ``."""

    async def channels(self, account: str = "") -> Sequence[LedgerChannel]:
        """An account's channels."""


class Anchor(Protocol):
    """Keeps a hash where nobody can take it back."""

    async def anchor(self, place: int, digest: bytes) -> dict[str, str]:
        """Keep the 32 bytes that the audit log has at a place; says where they are now. Raises RiosError."""


class Spending(Protocol):
    """What this node pays other nodes for work, as it happens, by what it is for."""

    def opening(self) -> Sequence[PaidChannel]:
        """The channels as they were when this node started, before anything was spent."""

    def has_changed(self) -> bool:
        """Whether there is anything to take."""

    def take(self, names: Collection[str] | None = None) -> Sequence[Spent]:
        """What changed since it was last taken, of everything or of the requests with these bills: of the channels that
        changed the whole sums since the start, not the changes."""
