"""A swarm in memory with the real engine and a tiny sparse model, whose hosts can be killed, stalled or slowed down.

Every expert shard and every stage is at two of the hosts; the orchestrator holds the trunk alone. A :class:`Case` is
one or more requests at the same time, a :class:`FaultSwarm` answers them, with a fault at a chosen token.
"""

import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import trio

from config.errors import RiosError
from config.generation import Delta, GenerationRequest, Sampling
from dmoe.caller import Caller
from dmoe.core.manifest import Manifest
from dmoe.engine import Engine
from dmoe.models import StoredModels, SwarmExperts
from dmoe.passes import PassOptions
from dmoe.planning import Planner, wishes_of
from dmoe.ports import Quote
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.stages.caller import StageCaller
from dmoe.stages.directions import Directions
from dmoe.stages.host import StageHost
from dmoe.stages.loaded import stage_plan_of
from dmoe.stages.loading import load_stage
from dmoe.store import ModelStore
from dmoe.worker import Worker, plan_of
from p2p.core.advert import ModelOffer, bitmap
from p2p.memory import MemoryHub, MemoryNetwork
from tests.unit.dmoe.stages_kit import staged

OPTIONS = RuntimeOptions(device="cpu", threads=1)
FREE = Quote(0, 0, 0)
CALL_TIMEOUT_MS = 10_000
RUN_SECONDS_MAX = 120.0
REPLICAS = 2


def model(folder: Path) -> tuple[ModelStore, Manifest]:
    """A sparse model of three layers with random weights, four experts and a stage per layer."""
    made: tuple[ModelStore, Manifest] = staged(folder, kind="F32", experts=4)
    return made


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that run at the same time, by one route; ``drafts``: the engine may guess."""

    name: str
    route: str
    asked: tuple[GenerationRequest, ...]
    drafts: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens come at least."""
        return sum(each.sampling.min_tokens for each in self.asked)


def request(prompt: str, tokens: int, **sampling: object) -> GenerationRequest:
    """A request for exactly so many tokens."""
    asked = Sampling(**{"max_tokens": tokens, "min_tokens": tokens, **sampling})  # type: ignore[arg-type]
    return GenerationRequest(model="tiny", prompt=prompt, sampling=asked)


def cases(tokens: int) -> list[Case]:
    """Greedy and sampled with a seed, with drafts, and several at once; by both routes."""
    greedy = request("some words to begin with", tokens, temperature=0.0)
    sampled = request("other words", tokens, temperature=1.0, seed=11)
    again = request("and so on and so on and so on and so on", tokens, temperature=0.0)
    warm = request("some more", tokens, temperature=0.7, top_p=0.9, seed=5)
    found = []
    for route in ("experts", "stages"):
        found += [
            Case(f"{route}, greedy", route, (greedy,)),
            Case(f"{route}, sampled", route, (sampled,)),
            Case(f"{route}, drafts", route, (again,), drafts=True),
            Case(f"{route}, mixed batch", route, (greedy, sampled, again, warm), drafts=True),
        ]
    return found


@dataclass(slots=True)
class Told:
    """What came of a case: tokens per request, an error's text in the place of those that failed, and how long it took.
    ``gaps`` are seconds between tokens."""

    tokens: list[tuple[int, ...] | str]
    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)


class Host:
    """A node that serves some expert shards and stages."""

    def __init__(self, hub: MemoryHub, manifest: Manifest) -> None:
        self.network = hub.add()
        self.manifest = manifest
        self.worker = Worker(self.network, quote=FREE)
        self.stages = StageHost(self.network, quote=FREE)

    def load(self, store: ModelStore, number: int, hosts: int) -> None:
        """Every shard that falls to host ``number`` of so many; blocking."""
        manifest = self.manifest

        def is_mine(index: int) -> bool:
            return (number - index) % hosts < REPLICAS

        for index, shard in enumerate(manifest.expert_shards()):
            if is_mine(index):
                self.worker.load(plan_of(manifest, shard), ExpertShard(manifest, shard, store, OPTIONS))
        for index, stage in enumerate(manifest.stages):
            if is_mine(index):
                self.stages.load(stage_plan_of(manifest, stage), load_stage(manifest, stage, store, OPTIONS))

    def advertise(self) -> None:
        """Say what is here."""
        known = self.manifest.model_id
        held = self.worker.indices(known) | self.stages.indices(known)
        offer = ModelOffer(known, bitmap(held), 0, 0, 0)
        self.network.directory.update(lambda advert: msgspec.structs.replace(advert, models=(offer,)))


class FaultSwarm:
    """An orchestrator and its hosts."""

    def __init__(self, hub: MemoryHub, hosts: Sequence[Host], caller: Caller, models: StoredModels) -> None:
        self.hub = hub
        self.hosts = hosts
        self.caller = caller
        self.calls: Counter[str] = Counter()
        """Calls of the orchestrator, by method."""
        self.engines = {
            drafts: Engine(models, default_route="experts", passes=PassOptions(drafts_max=16 if drafts else 0))
            for drafts in (False, True)
        }

    @property
    def repeated(self) -> int:
        """Calls for experts that were made because another was late or failed."""
        return self.caller.hedges.budget.hedges + self.caller.dispatcher.retried

    def count(self, network: MemoryNetwork) -> None:
        """Count a node's calls."""
        real = network.call

        async def call(peer: object, method: str, *args: object, **kwargs: object) -> object:
            self.calls[method] += 1
            return await real(peer, method, *args, **kwargs)  # type: ignore[arg-type]

        network.call = call  # type: ignore[method-assign, assignment]

    async def run(self, case: Case, at: int = 0, fault: Callable[[], Awaitable[None]] | None = None) -> Told:
        """Answer a case; ``fault`` happens once ``at`` tokens have come, beside what goes on."""
        told = Told([()] * len(case.asked))
        seen, last = 0, trio.current_time()
        started = last

        async def one(number: int) -> None:
            nonlocal seen, last
            engine, said = self.engines[case.drafts], []
            try:
                prepared = await engine.prepare(by_route(case.asked[number], case.route))
                async with engine.stream(prepared) as events:
                    async for event in events:
                        if not isinstance(event, Delta):
                            continue
                        said += event.tokens
                        now = trio.current_time()
                        told.gaps.append(now - last)
                        last = now
                        before, seen = seen, seen + len(event.tokens)
                        if fault is not None and before < at <= seen:
                            nursery.start_soon(fault)
                told.tokens[number] = tuple(said)
            except RiosError as error:
                told.tokens[number] = f"{error.code}: {error}"

        with trio.fail_after(RUN_SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as answers:
                    for number in range(len(case.asked)):
                        answers.start_soon(one, number)
                told.seconds = trio.current_time() - started
                nursery.cancel_scope.cancel()
        return told


def by_route(asked: GenerationRequest, route: str) -> GenerationRequest:
    """The same request by a route."""
    return replace(asked, route=route)  # type: ignore[arg-type]


@asynccontextmanager
async def fault_swarm(
    made: tuple[ModelStore, Manifest], folder: Path, *, seed: int, hosts: int = 4, delay_s: tuple[float, float] = (0, 0)
) -> AsyncIterator[FaultSwarm]:
    """A swarm of so many hosts, for as long as the block."""
    store, manifest = made
    trunk = trunk_alone(made, folder)
    async with trio.open_nursery() as nursery:
        hub = MemoryHub(seed, delay_s=delay_s)
        here = hub.add()
        nodes = [Host(hub, manifest) for _ in range(hosts)]
        for number, node in enumerate(nodes):
            await trio.to_thread.run_sync(node.load, store, number, hosts)
            node.advertise()
            await nursery.start(node.worker.run)
            await nursery.start(node.stages.run)
        caller = Caller(here, call_timeout_ms=CALL_TIMEOUT_MS, random=hub.random)
        models = StoredModels(trunk, SwarmExperts(caller), OPTIONS, here.peer_id)
        models.planner = planner = Planner(
            here, caller, models.held, wishes_of("auto"), threads=1, runs={"experts", "stages"}
        )
        own = StageHost(here, quote=FREE)
        models.stages = StageCaller(here, own, Directions(planner, here), caller.dispatcher, timeout_ms=CALL_TIMEOUT_MS)
        for part in (caller.run, own.run, models.stages.run):
            await nursery.start(part)
        swarm = FaultSwarm(hub, nodes, caller, models)
        swarm.count(here)
        async with trio.open_nursery() as engines:  # they end before what they call
            for engine in swarm.engines.values():
                await engines.start(engine.run)
            yield swarm
            engines.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


def trunk_alone(made: tuple[ModelStore, Manifest], folder: Path) -> ModelStore:
    """A store that holds the model's trunk and nothing of its experts."""
    store, manifest = made
    copied = ModelStore(Path(shutil.copytree(store.root, folder / "trunk", dirs_exist_ok=True)))
    for shard in manifest.expert_shards():
        for file in shard.files:
            copied.path(manifest.model_id, file).unlink(missing_ok=True)
    return copied


async def references(made: tuple[ModelStore, Manifest], wanted: Sequence[Case]) -> dict[str, Told]:
    """What the cases say where nothing can fail: everything in one process, each request alone, without drafts."""
    models = StoredModels(made[0], None, OPTIONS, "me")  # type: ignore[arg-type]
    engine = Engine(models, default_route="local", passes=PassOptions(drafts_max=0))
    local = {"experts": "local", "stages": "stages"}
    found = {}
    async with engine.running():
        for case in wanted:
            said: list[tuple[int, ...] | str] = []
            for asked in case.asked:
                prepared = await engine.prepare(by_route(asked, local[case.route]))
                async with engine.stream(prepared) as events:
                    said.append(tuple([t async for event in events if isinstance(event, Delta) for t in event.tokens]))
            found[case.name] = Told(said)
    return found
