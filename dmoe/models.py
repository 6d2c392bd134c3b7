"""The models a node answers with: stored manifests joined to trunk, experts and routes, loaded when first needed.

Owns: which route needs which shards, loading each part once, one runner per route. Does not own: files
(``dmoe/store``), arithmetic (``dmoe/layers``, ``dmoe/runtime``), calls to other peers (``dmoe/caller``).

Invariants:

1. Nothing is loaded before a request needs it, and nothing twice; loading never blocks the event loop.
2. A sequence owns its key/value cache alone: closing it frees the cache, whatever else runs.
3. ``fault`` looks at what is known now: it neither waits nor reads files' contents. A damaged file shows when it is
   loaded, as the IntegrityError of the answer that needed it.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar, get_args

import trio

from config.errors import LocalError, RemoteError, RiosError
from config.generation import Route, RouteWish
from config.vocabulary import ModelId, PeerId
from dmoe import layers
from dmoe import runner as seam
from dmoe.caller import Caller, CallerSession
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.plan import Candidate
from dmoe.core.spans import Ask
from dmoe.planning import Held
from dmoe.runner import Feed, FloatRows, Report, Runner, Want
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.store import ModelStore
from dmoe.text import Tokenizer

_Part = TypeVar("_Part")
_NAMED_SHARDS_MAX = 4
PREFERRED: tuple[Route, ...] = ("fused", "local", "experts")
"""Routes in the order in which a node without a planner tries them."""


class _Forward(Protocol):
    """Appends tokens to a cache: logits f32[V] of the last, or outputs of all positions."""

    async def __call__(
        self, cache: layers.Sequence, ids: Sequence[int], /, *, all_positions: bool = False, want: Want = "logits"
    ) -> FloatRows: ...


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
        return self._caller.missing(manifest)


class Chooser(Protocol):
    """Says what ``auto`` means: :class:`dmoe.planning.Planner`."""

    def route(self, manifest: Manifest, ask: Ask) -> Candidate:
        """How to answer such a request now. Raises RiosError where no route is possible."""


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
        """Set ``planner`` before the first answer by route ``auto``: without one, the first possible of
        :data:`PREFERRED` is taken."""
        self.planner: Chooser | None = None
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
                self._models[known] = StoredModel(
                    manifest, self._store, self._experts, self._options, self._peer_id, planner=lambda: self.planner
                )
        return sorted(self._models.values(), key=lambda model: (model.name, model.id))

    def held(self, manifest: Manifest) -> Held:
        """What of a model is here, for the planner."""
        model = self._models.get(manifest.model_id)
        here = (index for index, shard in enumerate(manifest.shards) if is_here(self._store, manifest, shard))
        return Held(frozenset(here), model.resident() if model else frozenset())


class StoredModel:
    """One model (:class:`dmoe.engine.Model`)."""

    def __init__(
        self,
        manifest: Manifest,
        store: ModelStore,
        experts: ExpertsSource | None,
        options: RuntimeOptions,
        peer_id: PeerId,
        *,
        planner: Callable[[], Chooser | None] = lambda: None,
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
        self._planner = planner
        self._tokenizer = _Once(self._load_tokenizer)
        self._trunk = _Once(lambda: layers.Trunk(manifest, store, options))
        self._local = _Once(self._load_local)
        self._fused = _Once(lambda: layers.FusedModel(manifest, store, options))
        self._runners: dict[Route, Runner] = {}

    def fault(self, route: RouteWish) -> RiosError | None:
        """Why the model cannot answer by this route now, or None. By ``auto``: only if it cannot by any."""
        if route == "auto":
            faults = [self.fault(each) for each in PREFERRED]
            return None if None in faults else faults[-1]
        needed = [self.manifest.trunk] if route == "experts" else list(self.manifest.shards)
        absent = [shard for shard in needed if not is_here(self._store, self.manifest, shard)]
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

    def route_for(self, ask: Ask) -> Route:
        """What ``auto`` means for such a request now. Raises RiosError where no route is possible."""
        planner = self._planner()
        if planner is not None:
            kind = planner.route(self.manifest, ask).kind
            route: Route = next(each for each in get_args(Route) if each == kind)  # it offers only what can run
            return route
        is_dense = self.manifest.architecture.router.kind == "all"
        possible = [each for each in PREFERRED if self.fault(each) is None and (is_dense or each != "fused")]
        if not possible:
            raise self.fault("experts") or LocalError("unavailable", f"{self.name}: no route is possible")
        return possible[0]

    def resident(self) -> frozenset[int]:
        """Shards that are in memory for answers made here."""
        if self._fused.is_loaded or self._local.is_loaded:
            return frozenset(range(len(self.manifest.shards)))
        return frozenset({self.manifest.shard_index(self.manifest.trunk.id)} if self._trunk.is_loaded else ())

    async def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once."""
        return await self._tokenizer.get()

    async def runner(self, route: Route) -> Runner:
        """The model by this route, the same object each time. Loads what the route needs. Raises RiosError."""
        if route not in self._runners:
            self._runners[route] = await self._make_runner(route)
        return self._runners[route]

    async def _make_runner(self, route: Route) -> Runner:
        if route == "fused":
            fused = await self._fused.get()

            async def whole(capacity: int) -> _Sequence:
                return _Sequence(fused.new_sequence(capacity), fused.forward, self._own_report)

            return _Runner(whole)
        trunk = await self._trunk.get()
        if route == "local":
            own = partial(layers.forward, trunk, experts=await self._local.get())

            async def here(capacity: int) -> _Sequence:
                return _Sequence(trunk.new_sequence(capacity), own, self._own_report)

            return _Runner(here)
        source = self._experts
        assert source is not None, "fault() is asked first"

        async def anywhere(capacity: int) -> _Sequence:
            experts, report = await source.open(self.manifest)
            cache = trunk.new_sequence(capacity)
            return _Sequence(cache, partial(layers.forward, trunk, experts=experts), lambda cache: report())

        return _Runner(anywhere)

    def _load_tokenizer(self) -> Tokenizer:
        return Tokenizer(self._store.read(self.manifest, self.manifest.tokenizer), self.manifest.chat_template)

    def _load_local(self) -> layers.LocalExperts:
        shards = [
            ExpertShard(self.manifest, shard, self._store, self._options) for shard in self.manifest.expert_shards()
        ]
        return layers.LocalExperts(self.manifest, shards, threads=self._options.thread_count)

    def _own_report(self, sequence: layers.Sequence) -> Report:
        """Everything was computed here, counted as calls to peers are: a row per sum group and layer."""
        arch = self.manifest.architecture
        served = {"layers": list(range(arch.layers)), "experts": list(range(self.manifest.experts_per_layer))}
        rows = sequence.length * arch.layers * len(self.manifest.sum_groups)
        return Report(expert_rows={self._peer_id: rows}, serving={self._peer_id: served})


class _Sequence:
    """One sequence by one route (:class:`dmoe.runner.Sequence`)."""

    def __init__(self, cache: layers.Sequence, forward: _Forward, report: Callable[[layers.Sequence], Report]) -> None:
        self._cache: layers.Sequence | None = cache
        self.forward = forward
        self.capacity = cache.capacity
        self._report = report

    @property
    def cache(self) -> layers.Sequence:
        """The key/value cache."""
        assert self._cache is not None, "the sequence is closed"
        return self._cache

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self.cache.length

    def truncate(self, length: int) -> None:
        """See :class:`dmoe.runner.Sequence`."""
        self.cache.truncate(length)

    def report(self) -> Report:
        """See :class:`dmoe.runner.Sequence`."""
        return self._report(self.cache)

    def close(self) -> None:
        """Nothing else refers to the cache, so it is freed here."""
        self._cache = None


class _Runner:
    """A route (:class:`dmoe.runner.Runner`): ``make`` gives an empty sequence."""

    def __init__(self, make: Callable[[int], Awaitable[_Sequence]]) -> None:
        self._make = make

    async def open(self, capacity: int, *, like: seam.Sequence | None = None, length: int = 0) -> _Sequence:
        """See :class:`dmoe.runner.Runner`."""
        sequence = await self._make(capacity)
        if like is not None:
            assert isinstance(like, _Sequence)
            sequence.cache.copy_from(like.cache, length)
        return sequence

    async def forward(self, feeds: Sequence[Feed]) -> list[FloatRows]:
        """See :class:`dmoe.runner.Runner`."""
        caches = []
        for feed in feeds:
            assert isinstance(feed.sequence, _Sequence)
            caches.append((feed.sequence.cache, feed.sequence.length))
        try:
            return [await self._run(feed) for feed in feeds]
        except BaseException:
            for cache, length in caches:
                cache.truncate(length)
            raise

    async def _run(self, feed: Feed) -> FloatRows:
        sequence = feed.sequence
        assert isinstance(sequence, _Sequence)
        if feed.outputs <= 1 and feed.want == "logits":
            return (await sequence.forward(sequence.cache, feed.tokens))[None][: feed.outputs]
        rows = await sequence.forward(sequence.cache, feed.tokens, all_positions=True, want=feed.want)
        return rows[len(rows) - feed.outputs :]


class _Once(Generic[_Part]):
    """A part that is loaded in a thread by whoever needs it first; a failed load is tried again by the next."""

    def __init__(self, load: Callable[[], _Part]) -> None:
        self._load = load
        self._lock = trio.Lock()
        self._part: _Part | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether it is in memory."""
        return self._part is not None

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


def is_here(store: ModelStore, manifest: Manifest, shard: Shard) -> bool:
    """Whether all files of a shard exist; what is in them shows when they are loaded."""
    return all(store.path(manifest.model_id, file).is_file() for file in shard.files)


def _report_of(session: CallerSession) -> Report:
    report = session.report()
    return Report(expert_rows=report.rows, serving=report.serving, retries=report.retries, missing=report.missing)


def _named(shards: Collection[Shard]) -> str:
    """``shard a (layers 0 to 9, experts 1), ...``"""
    names = [
        f"shard {shard.id} (layers {shard.layers[0]} to {shard.layers[1]}"
        + (f", experts {', '.join(map(str, shard.experts[:8]))})" if shard.kind == "expert" else ")")
        for shard in list(shards)[:_NAMED_SHARDS_MAX]
    ]
    more = len(shards) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
