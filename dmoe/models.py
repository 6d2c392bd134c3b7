"""The models a node answers with: stored manifests joined to trunk, experts and routes, loaded when first needed.

Owns: which route needs which shards, loading each part once, one runner per route. Does not own: files
(``dmoe/store``), arithmetic (``dmoe/layers``, ``dmoe/runtime``), calls to other peers (``dmoe/caller``).

Invariants:

1. Nothing is loaded before a request needs it, and nothing twice; loading never blocks the event loop.
2. A sequence owns its key/value cache alone: closing it frees the cache, whatever else runs.
3. ``fault`` looks at what is known now: it neither waits nor reads files' contents. A damaged file shows when it is
   loaded, as the IntegrityError of the answer that needed it.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

import trio

from config.errors import LocalError, RemoteError, RiosError
from config.generation import PrivacyWish, Route, RouteWish
from config.vocabulary import ModelId, PeerId
from dmoe import layers
from dmoe.caller import Caller, CallerSession
from dmoe.cells.home import Home, Homes
from dmoe.cells.sandbox import Wall
from dmoe.core.manifest import Manifest, Shard
from dmoe.core.plan import Candidate, Kind
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.spans import Ask
from dmoe.kept import kept_experts, kept_layers
from dmoe.pages import use_huge_pages
from dmoe.planning import Held
from dmoe.runner import Runner
from dmoe.runtime import RuntimeOptions, open_files
from dmoe.segment import FusedSegment, Pieces, PieceSegment, Segment
from dmoe.stages.caller import StageCaller
from dmoe.stages.directions import without_stages
from dmoe.stages.loaded import LoadedStage, stage_plan_of
from dmoe.stages.loading import MeteredExperts, SpreadLayers, load_spread, load_stage
from dmoe.store import ModelStore
from dmoe.tally import OwnMeter
from dmoe.text import Tokenizer
from dmoe.textaside import AsideTokenizer
from dmoe.timing import TimedRunner

_Part = TypeVar("_Part")
_NAMED_SHARDS_MAX = 4
PREFERRED: tuple[Route, ...] = ("fused", "local", "experts", "stages")
"""Routes in the order in which a node without a planner tries them."""


class ExpertsSource(Protocol):
    """Where a model's experts are: :class:`SwarmExperts`, or anything else that opens sessions."""

    def experts(self, manifest: Manifest, privacy: Privacy) -> MeteredExperts:
        """A model's experts, for any number of answers under this rule."""

    def missing(self, manifest: Manifest, privacy: Privacy) -> Sequence[Shard]:
        """Expert shards that nobody offers now who may compute them."""

    def where_gone(self, manifest: Manifest, missing: Sequence[Shard]) -> str:
        """What is said of shards that nobody offers: when one of their replicas was last seen, and which."""


class SwarmExperts:
    """Experts wherever their replicas are, through the node's :class:`Caller`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def experts(self, manifest: Manifest, privacy: Privacy = OPEN) -> CallerSession:
        """See :class:`ExpertsSource`."""
        return self._caller.session(manifest, privacy)

    def missing(self, manifest: Manifest, privacy: Privacy = OPEN) -> Sequence[Shard]:
        """See :class:`ExpertsSource`."""
        return self._caller.missing(manifest, privacy)

    def where_gone(self, manifest: Manifest, missing: Sequence[Shard]) -> str:
        """See :class:`ExpertsSource`."""
        return self._caller.where_gone(manifest, missing)


class Chooser(Protocol):
    """Says what ``auto`` means: :class:`dmoe.planning.Planner`."""

    def route(self, manifest: Manifest, ask: Ask, privacy: Privacy) -> Candidate:
        """How to answer such a request now. Raises RiosError where no route is possible."""

    def measured(self, manifest: Manifest, kind: Kind, rows: int, pass_us: float) -> None:
        """A pass of few rows took so long here."""

    def spreads(self, manifest: Manifest, first: int, last: int) -> bool:
        """Whether these layers, where they run here, have their experts elsewhere."""


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
        privacy: Privacy = OPEN,
        homes: Homes | None = None,
        text_walls_demanded: bool = False,
    ) -> None:
        """``homes``: cells for models of others; None: they run in this process. ``text_walls_demanded``: no tokenizer
        is read where there are no walls for that. Set ``planner`` before the first answer by route ``auto``: without
        one, the first possible of :data:`PREFERRED` is taken. Set ``stages`` before the first one by route ``stages``:
        without, they all run here. ``privacy``: the operator's rule."""
        self.planner: Chooser | None = None
        self.stages: StageCaller | None = None
        self._store = store
        self._experts = experts
        self._options = options
        self._peer_id = peer_id
        self._chosen = chosen
        self._privacy = privacy
        self._homes = homes
        self._walls_demanded = text_walls_demanded
        self._models: dict[ModelId, StoredModel] = {}

    def models(self) -> Sequence["StoredModel"]:
        """The models now; those removed from the store are let go."""
        manifests = {known: manifest for known, manifest in self._store.manifests().items() if self._chosen(manifest)}
        for gone in set(self._models) - set(manifests):
            del self._models[gone]
        for known, manifest in manifests.items():
            if known not in self._models:
                self._models[known] = StoredModel(
                    manifest,
                    self._store,
                    self._experts,
                    self._options,
                    self._peer_id,
                    planner=lambda: self.planner,
                    stages=lambda: self.stages,
                    privacy=self._privacy,
                    homes=self._homes,
                    text_walls_demanded=self._walls_demanded,
                )
        return sorted(self._models.values(), key=lambda model: (model.name, model.id))

    def text_walls(self) -> list[tuple[Wall, ...]]:
        """What is in force around each process for a tokenizer and its chat template."""
        return [walls for model in self._models.values() if (walls := model.text_walls)]

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
        stages: Callable[[], StageCaller | None] = lambda: None,
        privacy: Privacy = OPEN,
        homes: Homes | None = None,
        text_walls_demanded: bool = False,
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
        self._stages = stages
        self._privacy = privacy
        self._homes = homes
        self._walls_demanded = text_walls_demanded
        self._tokenizer = _Once(self._load_tokenizer)
        self._ends = _Once(self._load_ends)
        self._home_local = _Once(lambda: self._at_home().layers(manifest, "local"))
        self._home_fused = _Once(lambda: self._at_home().layers(manifest, "fused"))
        self._trunk = _Once(lambda: Pieces(manifest, open_files(manifest, store, [manifest.trunk]), options))
        self._local = _Once(lambda: layers.local_experts(manifest, store, options))
        self._fused = _Once(lambda: FusedSegment(manifest, open_files(manifest, store, manifest.parts), options))
        self._runners: dict[Route, Runner] = {}
        self._making = trio.Lock()
        self._private: dict[PrivacyWish, StoredModel] = {}

    def under(self, asked: PrivacyWish) -> "StoredModel":
        """This model for requests that want more privacy than the operator: what is loaded is shared, who is called is
        not."""
        if not asked:
            return self
        if asked not in self._private:
            other = self._private[asked] = copy.copy(self)
            other._privacy = self._privacy.tightened(asked)
            other._runners, other._making, other._private = {}, trio.Lock(), {}
        return self._private[asked]

    def fault(self, route: RouteWish) -> RiosError | None:
        """Why the model cannot answer by this route now, or None. By ``auto``: only if it cannot by any."""
        if route == "auto":
            faults = {each: self.fault(each) for each in PREFERRED}
            return None if None in faults.values() else faults["experts"]
        if self._homes is not None and (refused := self._homes.fault(self.manifest)) is not None:
            return refused
        spread = route == "experts" or (route == "stages" and self._stages() is not None)
        needed = [self.manifest.trunk, *self._kept(route)] if spread else list(self.manifest.parts)
        absent = [shard for shard in needed if not is_here(self._store, self.manifest, shard)]
        if absent:
            return LocalError(
                "unavailable",
                f"{self.name}: {_named(absent)} not on this node",
                self._hint(absent, spread=spread),
            )
        if route == "stages":
            return self._fault_of_stages()
        if route != "experts":
            return None
        if self._experts is None:
            return LocalError("unavailable", "this node calls no experts", 'use the route "local"')
        kept = {shard.id for shard in self._kept(route)}
        missing = [each for each in self._experts.missing(self.manifest, self._privacy) if each.id not in kept]
        if missing:
            return RemoteError(
                "no_replica",
                f"{self.name}: no replica of {_named(missing)}{self._why(missing)}",
                "start a node that serves this model, or raise its replica count",
            )
        return None

    def _kept(self, route: RouteWish) -> list[Shard]:
        """The expert shards of layers that stay here, where their experts would else be anywhere."""
        groups = range(len(self.manifest.sum_groups))
        layers = kept_layers(self.manifest, self._privacy) if route == "experts" else ()
        return [self.manifest.expert_shard(layer, group) for layer in layers for group in groups]

    def _hint(self, absent: Sequence[Shard], *, spread: bool) -> str:
        if spread and any(shard.kind == "expert" for shard in absent):
            return f"{self._privacy.described()}; wait until they are fetched (see: rios model list)"
        return "wait until fetched (see: rios model list)" if spread else 'use the route "experts"'

    def _why(self, missing: Sequence[Shard]) -> str:
        """The privacy rule, where others have what is missing; else where it has gone and when it was last seen."""
        assert self._experts is not None
        absent = set() if self._privacy.is_open else {shard.id for shard in self._experts.missing(self.manifest, OPEN)}
        held = not self._privacy.is_open and any(shard.id not in absent for shard in missing)
        if held:
            return f" (others have it, but {self._privacy.described()})"
        return f": {self._experts.where_gone(self.manifest, missing)}"

    def _fault_of_stages(self) -> RiosError | None:
        if not self.manifest.stages:
            return without_stages(self.manifest)
        caller = self._stages()
        return None if caller is None else caller.fault(self.manifest, self._privacy)

    def route_for(self, ask: Ask) -> Route:
        """What ``auto`` means for such a request now. Raises RiosError where no route is possible."""
        planner = self._planner()
        if planner is not None:
            kind = planner.route(self.manifest, ask, self._privacy).kind
            return "stages" if kind == "mixed" else kind  # the route stages carries both out
        is_dense = self.manifest.architecture.router.kind == "all"
        possible = [each for each in PREFERRED if self.fault(each) is None and (is_dense or each != "fused")]
        if not possible:
            raise self.fault("experts") or LocalError("unavailable", f"{self.name}: no route is possible")
        return possible[0]

    def resident(self) -> frozenset[int]:
        """Shards that are in memory for answers made here."""
        whole = (self._fused, self._local, self._home_fused, self._home_local)
        if any(part.is_loaded for part in whole):
            return frozenset(range(len(self.manifest.shards)))
        return frozenset({self.manifest.shard_index(self.manifest.trunk.id)} if self._trunk.is_loaded else ())

    @property
    def text_walls(self) -> tuple[Wall, ...]:
        """What is in force around the tokenizer's process; empty if none was started."""
        made = self._tokenizer.part
        return made.walls if isinstance(made, AsideTokenizer) else ()

    async def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once."""
        return await self._tokenizer.get()

    async def runner(self, route: Route) -> Runner:
        """The model by this route, the same object each time. Loads what the route needs. Raises RiosError."""
        async with self._making:
            if route not in self._runners:
                self._runners[route] = self._timed(route, await self._make_runner(route))
            return self._runners[route]

    def _timed(self, route: Route, runner: Runner) -> Runner:
        """What runs here alone tells the planner how fast this machine is."""
        planner = self._planner()
        if planner is None or route not in ("local", "fused"):
            return runner
        return TimedRunner(runner, partial(planner.measured, self.manifest, route))

    async def _make_runner(self, route: Route) -> Runner:
        own = OwnMeter(self.manifest, self._peer_id)
        ends = await self._ends.get()
        if route == "stages":
            return await self._by_stages(ends, own)
        if route in ("fused", "local"):
            return layers.ModelRunner(self.manifest, ends, [await self._whole(route)], own)
        experts = await trio.to_thread.run_sync(self._spread_experts)
        return layers.ModelRunner(self.manifest, ends, [await self._attention(experts)], experts)

    def _home(self) -> Home | None:
        """The cell in which the model runs; None: this process. Raises LocalError if it may not run."""
        return None if self._homes is None else self._homes.home(self.manifest)

    def _at_home(self) -> Home:
        home = self._home()
        assert home is not None, "asked only where there is one"
        return home

    def _load_ends(self) -> layers.AnyEnds:
        home = self._home()
        if home is not None:
            return home.ends(self.manifest)
        return layers.Ends(self.manifest, open_files(self.manifest, self._store, [self.manifest.trunk]), self._options)

    async def _whole(self, route: Route) -> layers.AnySegment:
        """All layers, with their experts."""
        if self._home() is not None:
            return await (self._home_fused if route == "fused" else self._home_local).get()
        if route == "fused":
            return await self._fused.get()
        return PieceSegment(self.manifest, await self._trunk.get(), await self._local.get())

    async def _attention(self, experts: MeteredExperts) -> layers.AnySegment:
        """All layers, without."""
        home = self._home()
        if home is not None:
            return await trio.to_thread.run_sync(home.attention, self.manifest, experts)
        return PieceSegment(self.manifest, await self._trunk.get(), experts)

    def _spread_experts(self) -> MeteredExperts:
        """Experts wherever they are, but for those of layers that stay here; blocking if there are such."""
        assert self._experts is not None, "fault() is asked first"
        experts = self._experts.experts(self.manifest, self._privacy)
        if not kept_layers(self.manifest, self._privacy):
            return experts
        home = self._home()
        load = None if home is None else home.experts
        return kept_experts(self.manifest, self._store, self._options, self._peer_id, self._privacy, experts, load)

    async def _by_stages(self, ends: layers.AnyEnds, own: OwnMeter) -> Runner:
        """Stages wherever they are; without a caller, all of them here: the reference of this route."""
        if not self.manifest.stages:
            raise without_stages(self.manifest)
        caller = self._stages()
        if caller is not None:
            return caller.runner(self.manifest, ends, self._stage_here, self._privacy)
        loaded = [await trio.to_thread.run_sync(self._load_stage, shard) for shard in self.manifest.stages]
        return layers.ModelRunner(self.manifest, ends, loaded, own, self.manifest.wire_dtype)

    def _stage_here(self, index: int) -> LoadedStage:
        """A stage in this process; its experts elsewhere if they are not here, or shall be."""
        shard, planner, home = self.manifest.stages[index], self._planner(), self._home()
        plan = stage_plan_of(self.manifest, shard)
        if planner is not None and self._experts is not None and planner.spreads(self.manifest, *shard.layers):
            experts = self._spread_experts()
            if home is not None:
                return LoadedStage(
                    plan,
                    SpreadLayers(self.manifest, shard, home.attention(self.manifest, experts, *shard.layers), experts),
                )
            return LoadedStage(plan, load_spread(self.manifest, shard, self._store, self._options, experts))
        if home is not None:
            return LoadedStage(plan, home.stage(self.manifest, shard))
        return LoadedStage(plan, load_stage(self.manifest, shard, self._store, self._options))

    def _load_stage(self, shard: Shard) -> Segment:
        return load_stage(self.manifest, shard, self._store, self._options).opened

    def _load_tokenizer(self) -> Tokenizer:
        data, refused = self._store.read(self.manifest, self.manifest.tokenizer), self._store.refused
        return AsideTokenizer(
            data, self.manifest.chat_template, demanded=self._walls_demanded, stopped=partial(refused.count, "text")
        )


class _Once(Generic[_Part]):
    """A part that is loaded in a thread by whoever needs it first; a failed load is tried again by the next."""

    def __init__(self, load: Callable[[], _Part]) -> None:
        self._load = load
        self._lock = trio.Lock()
        self._part: _Part | None = None

    @property
    def part(self) -> _Part | None:
        """It, if it is in memory."""
        return self._part

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
                    await trio.to_thread.run_sync(use_huge_pages)
                except MemoryError as error:
                    message = "not enough memory to load the model"
                    raise LocalError("local", message, "free memory, or use another route") from error
            return self._part


def is_here(store: ModelStore, manifest: Manifest, shard: Shard) -> bool:
    """Whether all files of a shard exist; what is in them shows when they are loaded."""
    return all(store.path(manifest.model_id, file).is_file() for file in shard.files)


def _named(shards: Collection[Shard]) -> str:
    """``shard a (layers 0 to 9, experts 1), ...``"""
    names = [
        f"shard {shard.id} (layers {shard.layers[0]} to {shard.layers[1]}"
        + (f", experts {', '.join(map(str, shard.experts[:8]))})" if shard.kind == "expert" else ")")
        for shard in list(shards)[:_NAMED_SHARDS_MAX]
    ]
    more = len(shards) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
