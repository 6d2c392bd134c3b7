"""The models a node answers with: stored manifests joined to trunk, experts and routes, loaded when first needed.

Owns: which route needs which shards, loading each part once, one run per answer. Does not own: files (``dmoe/store``),
arithmetic (``dmoe/layers``, ``dmoe/runtime``), calls to other peers (``dmoe/caller``).

Invariants:

1. Nothing is loaded before a request needs it, and nothing twice; loading never blocks the event loop.
2. A run owns its key/value cache alone: closing it frees the cache, whatever else runs.
3. ``fault`` looks at what is known now: it neither waits nor reads files' contents. A damaged file shows when it is
   loaded, as the IntegrityError of the answer that needed it.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import trio
from numpy.typing import NDArray

from config.errors import LocalError, RemoteError, RiosError
from config.generation import Route
from config.vocabulary import ModelId, PeerId
from dmoe import layers
from dmoe.caller import Caller, CallerSession
from dmoe.core.manifest import Manifest, Shard
from dmoe.generate import Report, Run
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.store import ModelStore
from dmoe.text import Tokenizer

_Part = TypeVar("_Part")
_NAMED_SHARDS_MAX = 4


class ExpertsSource(Protocol):
    """Where a model's experts are: :class:`SwarmExperts`, or anything else that opens sessions."""

    async def open(self, manifest: Manifest) -> tuple[layers.Experts, Callable[[], Report]]:
        """Experts for one answer, and who computed what so far."""

    def missing(self, manifest: Manifest) -> Sequence[Shard]:
        """Expert shards that nobody offers now."""


class SwarmExperts:
    """Experts wherever their replicas are, through the node's :class:`Caller`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def open(self, manifest: Manifest) -> tuple[layers.Experts, Callable[[], Report]]:
        """See :class:`ExpertsSource`."""
        session = self._caller.session(manifest)
        await session.open()
        return session, lambda: _report_of(session)

    def missing(self, manifest: Manifest) -> Sequence[Shard]:
        """See :class:`ExpertsSource`."""
        _, table = self._caller.table(self._caller.map(manifest))
        return [shard for shard in manifest.expert_shards() if manifest.shard_index(shard.id) not in table.offered]


class StoredModels:
    """Every model of a store that ``chosen`` accepts, in the order of their names. A provider for the engine."""

    def __init__(
        self,
        store: ModelStore,
        experts: ExpertsSource | None,
        options: RuntimeOptions,
        peer_id: PeerId,
        *,
        chosen: Callable[[Manifest], bool] = lambda manifest: True,
    ) -> None:
        self._store = store
        self._experts = experts
        self._options = options
        self._peer_id = peer_id
        self._chosen = chosen
        self._models: dict[ModelId, StoredModel] = {}

    def models(self) -> Sequence["StoredModel"]:
        """The models now; those removed from the store are let go."""
        manifests = {known: manifest for known, manifest in self._store.manifests().items() if self._chosen(manifest)}
        for gone in set(self._models) - set(manifests):
            del self._models[gone]
        for known, manifest in manifests.items():
            if known not in self._models:
                self._models[known] = StoredModel(manifest, self._store, self._experts, self._options, self._peer_id)
        return sorted(self._models.values(), key=lambda model: (model.name, model.id))


class StoredModel:
    """One model (:class:`dmoe.engine.Model`)."""

    def __init__(
        self,
        manifest: Manifest,
        store: ModelStore,
        experts: ExpertsSource | None,
        options: RuntimeOptions,
        peer_id: PeerId,
    ) -> None:
        self.manifest = manifest
        self.id = str(manifest.model_id)
        self.name = manifest.name
        self.context_tokens = manifest.architecture.context
        self.stop_tokens = manifest.stop_tokens
        self.created = int((store.root / manifest.model_id).stat().st_mtime)
        self._store = store
        self._experts = experts
        self._options = options
        self._peer_id = peer_id
        self._tokenizer = _Once(self._load_tokenizer)
        self._trunk = _Once(lambda: layers.Trunk(manifest, store, options))
        self._local = _Once(self._load_local)
        self._fused = _Once(lambda: layers.FusedModel(manifest, store, options))

    def fault(self, route: Route) -> RiosError | None:
        """Why the model cannot answer by this route now, or None."""
        needed = [self.manifest.trunk] if route == "experts" else list(self.manifest.shards)
        absent = [shard for shard in needed if not self._is_here(shard)]
        if absent:
            return LocalError(
                "unavailable",
                f"{self.name}: {_named(absent)} not on this node",
                "wait until fetched (see: rios model list)" if route == "experts" else 'use the route "experts"',
            )
        if route != "experts":
            return None
        if self._experts is None:
            return LocalError("unavailable", "this node calls no experts", 'use the route "local"')
        missing = self._experts.missing(self.manifest)
        if missing:
            return RemoteError(
                "no_replica",
                f"{self.name}: no replica of {_named(missing)}",
                "start a node that serves this model, or raise its replica count",
            )
        return None

    async def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once."""
        return await self._tokenizer.get()

    async def open(self, route: Route, positions: int) -> Run:
        """A new sequence for ``positions`` tokens. Loads what the route needs. Raises RiosError."""
        if route == "fused":
            fused = await self._fused.get()
            return _Run(fused.new_sequence(positions), fused.forward, self._own_report)
        trunk = await self._trunk.get()
        if route == "local":
            return _Run(trunk.new_sequence(positions), _Pieces(trunk, await self._local.get()), self._own_report)
        assert self._experts is not None, "fault() is asked first"
        experts, report = await self._experts.open(self.manifest)
        return _Run(trunk.new_sequence(positions), _Pieces(trunk, experts), lambda sequence: report())

    def _load_tokenizer(self) -> Tokenizer:
        return Tokenizer(self._store.read(self.manifest, self.manifest.tokenizer), self.manifest.chat_template)

    def _load_local(self) -> layers.LocalExperts:
        shards = [
            ExpertShard(self.manifest, shard, self._store, self._options) for shard in self.manifest.expert_shards()
        ]
        return layers.LocalExperts(self.manifest, shards, threads=self._options.thread_count)

    def _is_here(self, shard: Shard) -> bool:
        return all(self._store.path(self.manifest.model_id, file).is_file() for file in shard.files)

    def _own_report(self, sequence: layers.Sequence) -> Report:
        """Everything was computed here, counted as calls to peers are: a row per sum group and layer."""
        arch = self.manifest.architecture
        served = {"layers": list(range(arch.layers)), "experts": list(range(self.manifest.experts_per_layer))}
        rows = sequence.length * arch.layers * len(self.manifest.sum_groups)
        return Report(expert_rows={self._peer_id: rows}, serving={self._peer_id: served})


class _Step(Protocol):
    """Appends tokens to a sequence; logits f32[V] of the last."""

    async def __call__(self, sequence: layers.Sequence, token_ids: Sequence[int], /) -> NDArray[np.float32]: ...


class _Pieces:
    """The layer loop over a trunk and somebody's experts, as one step."""

    def __init__(self, trunk: layers.Trunk, experts: layers.Experts) -> None:
        self._trunk = trunk
        self._experts = experts

    async def __call__(self, sequence: layers.Sequence, token_ids: Sequence[int], /) -> NDArray[np.float32]:
        return await layers.forward(self._trunk, sequence, token_ids, self._experts)


class _Run:
    """One sequence by one route (:class:`dmoe.generate.Run`)."""

    def __init__(self, sequence: layers.Sequence, step: _Step, report: Callable[[layers.Sequence], Report]) -> None:
        self._sequence: layers.Sequence | None = sequence
        self._step = step
        self._report = report

    async def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        assert self._sequence is not None, "the run is closed"
        return await self._step(self._sequence, tokens)

    def report(self) -> Report:
        assert self._sequence is not None, "the run is closed"
        return self._report(self._sequence)

    def close(self) -> None:
        """Nothing else refers to the cache, so it is freed here."""
        self._sequence = None


class _Once(Generic[_Part]):
    """A part that is loaded in a thread by whoever needs it first; a failed load is tried again by the next."""

    def __init__(self, load: Callable[[], _Part]) -> None:
        self._load = load
        self._lock = trio.Lock()
        self._part: _Part | None = None

    async def get(self) -> _Part:
        if self._part is not None:
            return self._part
        async with self._lock:
            if self._part is None:
                try:
                    self._part = await trio.to_thread.run_sync(self._load)
                except MemoryError as error:
                    message = "not enough memory to load the model"
                    raise LocalError("local", message, "free memory, or use another route") from error
            return self._part


def _report_of(session: CallerSession) -> Report:
    report = session.report()
    return Report(expert_rows=report.rows, serving=report.serving, retries=report.retries)


def _named(shards: Collection[Shard]) -> str:
    """``shard a (layers 0 to 9, experts 1), ...``"""
    names = [
        f"shard {shard.id} (layers {shard.layers[0]} to {shard.layers[1]}"
        + (f", experts {', '.join(map(str, shard.experts[:8]))})" if shard.kind == "expert" else ")")
        for shard in list(shards)[:_NAMED_SHARDS_MAX]
    ]
    more = len(shards) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
