"""A stranger's model that a node answers with runs in a cell as a whole: the same bits, also when the cell dies."""

import gc
import os
import signal
import threading
import time

import numpy as np
import pytest
import trio

from config.errors import LocalError, RemoteError
from config.generation import Delta, GenerationRequest, Message, Sampling
from dmoe.cells import sandbox
from dmoe.cells.blame import ENDS_MAX
from dmoe.cells.cell import Cell
from dmoe.cells.cells import Cells
from dmoe.cells.home import HomeLayers, Homes
from dmoe.cells.link import Options
from dmoe.core.privacy import OPEN
from dmoe.models import StoredModels
from dmoe.runner import Feed
from dmoe.runtime import RuntimeOptions
from dmoe.segment import Part
from dmoe.stages.loading import SpreadLayers, load_spread
from dmoe.threads import here_or_aside
from tests.unit.dmoe.engine_kit import SelfRunningEngine
from tests.unit.dmoe.lent_kit import LentExperts
from tests.unit.dmoe.model_kit import tiny
from tests.unit.dmoe.stages_kit import staged

pytestmark = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no cells here: {sandbox.missing()}")

OPTIONS = RuntimeOptions(device="cpu", threads=1)
PROMPT = tuple(range(3, 40))
FORMS = {"dense": {"kind": "Q4_1"}, "sparse": {"kind": "F32", "experts": 4, "quantisation": "int8"}}


def feed(sequence, tokens, outputs=1, want="logits"):
    return Feed(sequence=sequence, tokens=tuple(tokens), outputs=outputs, want=want)


class Lenders:
    def __init__(self, store):
        self._store = store

    def experts(self, manifest, privacy=OPEN):
        return LentExperts(manifest, self._store, OPTIONS)

    def missing(self, manifest, privacy=OPEN):
        return ()


def rule(store, own="me", **kwargs):
    return Cells(store, lambda *_: None, lambda *_: None, own=own, **kwargs)


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS)
def model(request, tmp_path_factory):
    return staged(tmp_path_factory.mktemp("home"), **request.param)


@pytest.fixture
def homes(model):
    made = Homes(rule(model[0]), model[0], Options(threads=1, kv_bytes_max=64 << 20))
    yield made
    made.close()


def models(model, homes):
    return StoredModels(model[0], Lenders(model[0]), OPTIONS, "me", homes=homes)


async def logits(found, route, *, between=lambda: None):
    """Of a prompt in two pieces, then single tokens, with a sequence that begins like the first."""
    (one,) = found.models()
    runner = await one.runner(route)
    first = await runner.open(64)
    out = [*await runner.forward([feed(first, PROMPT[:20], 2)])]
    between()
    out += await runner.forward([feed(first, PROMPT[20:], 1)])
    other = await runner.open(64, like=first, length=25)
    between()
    for token in (5, 9, 7):
        out += await runner.forward([feed(first, (token,), 1), feed(other, (token, 11), 2, "hidden")])
    other.truncate(20)
    out += await runner.forward([feed(other, (1, 2, 3), 1)])
    first.close()
    other.close()
    return out


def same(found, expected):
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def routes(model):
    dense = model[1].architecture.router.kind == "all"
    return ("local", "experts", "fused") if dense else ("local", "experts")


async def test_every_route_gives_the_bits_of_this_process(model, homes):
    here, there = models(model, None), models(model, homes)
    for route in routes(model):
        assert same(await logits(there, route), await logits(here, route)), route
    (cell,) = homes.cells
    assert cell.walls
    assert cell.shards == 1 + len(routes(model))
    del there
    gc.collect()
    assert cell.shards == 0


@pytest.mark.parametrize("route", ["local", "experts"])
async def test_an_answer_goes_on_when_its_cell_dies(model, homes, route):
    """The caches went with it: what was in them is fed again."""
    expected = await logits(models(model, None), route)

    def kill():
        (cell,) = homes.cells
        pid = cell.pid
        os.kill(pid, signal.SIGKILL)

    assert same(await logits(models(model, homes), route, between=kill), expected)


async def test_what_cannot_be_filled_again_is_no_empty_context(model, homes, monkeypatch):
    """The next process may not take the caches at once: whoever comes next tries again, and nothing is computed on top
    of nothing."""
    expected = await logits(models(model, None), "local")
    made, failures = HomeLayers.made, []

    def failing(layers, capacity):
        if len(failures) < 2:
            failures.append(capacity)
            raise RemoteError("unavailable", "no memory for a cache")
        return made(layers, capacity)

    (one,) = models(model, homes).models()
    runner = await one.runner("local")
    sequence = await runner.open(64)
    found = [*await runner.forward([feed(sequence, PROMPT[:20], 2)])]
    os.kill(homes.cells[0].pid, signal.SIGKILL)
    monkeypatch.setattr(HomeLayers, "made", failing)
    with pytest.raises(RemoteError, match="no memory"):
        await runner.forward([feed(sequence, PROMPT[20:], 1)])
    assert sequence.length == 20
    found += await runner.forward([feed(sequence, PROMPT[20:], 1)])
    assert same(found, expected[:2])


def _until_another(cell: Cell, pid: int) -> None:
    end = time.monotonic() + 30
    while not cell.is_up or cell.pid in (0, pid):
        assert time.monotonic() < end
        time.sleep(0.02)


async def test_a_cell_that_keeps_ending_is_asked_again(model, homes):
    """Nobody but this node has its own answers: nothing of them is withdrawn."""
    expected = await logits(models(model, None), "local")
    found = models(model, homes)
    (one,) = found.models()
    await one.runner("local")
    (cell,) = homes.cells
    for _ in range(ENDS_MAX + 1):
        pid = cell.pid
        os.kill(pid, signal.SIGKILL)
        await trio.to_thread.run_sync(_until_another, cell, pid)
    assert not cell.withdrawn
    assert same(await logits(found, "local"), expected)


async def test_embedding_and_head_wait_for_the_next_process(model, homes):
    (one,) = models(model, homes).models()
    await one.runner("local")
    ends = await one._ends.get()
    rows = np.arange(4)
    expected = ends.embedding.gather(rows)
    for _ in range(2):
        os.kill(homes.cells[0].pid, signal.SIGKILL)
        assert np.array_equal(await here_or_aside(lambda: ends.embedding.gather(rows)), expected)
    assert homes.cells[0].restarts


@pytest.mark.parametrize("call", range(4))  # the embedding, the first layers, behind some experts, the head
async def test_a_cell_that_is_late_on_the_event_loop_is_waited_for_in_a_thread(model, homes, call, monkeypatch):
    """As on a machine that is busy with something else: nobody but this node has its own answers."""
    monkeypatch.setattr("dmoe.cells.call.LOOP_SECONDS", 0.02)
    expected = await logits(models(model, None), "experts")
    begin, calls, timers = Cell.begin, 0, []

    def stopped(cell, *args):
        nonlocal calls
        if trio.lowlevel.in_trio_run():
            if calls == call:
                os.kill(cell.pid, signal.SIGSTOP)
                timers.append(threading.Timer(0.2, os.kill, (cell.pid, signal.SIGCONT)))
                timers[0].start()
            calls += 1
        return begin(cell, *args)

    monkeypatch.setattr(Cell, "begin", stopped)
    assert same(await logits(models(model, homes), "experts"), expected)
    assert timers
    assert not homes.cells[0].restarts


async def test_the_text_stays_when_the_cell_is_killed_in_the_middle_of_an_answer(model, homes):
    asked = GenerationRequest(
        model=model[1].name,
        messages=(Message(role="user", content="hello"),),
        sampling=Sampling(temperature=1, seed=7, max_tokens=30, min_tokens=30),
    )

    async def text(engine, after=None):
        tokens = []
        async with engine.stream(await engine.prepare(asked)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    tokens += event.tokens
                    if after is not None and len(tokens) >= 8:
                        after, kill = None, after
                        kill()
        return tokens

    expected = await text(SelfRunningEngine(models(model, None), default_route="local"))
    engine = SelfRunningEngine(models(model, homes), default_route="local")
    assert await text(engine, lambda: os.kill(homes.cells[0].pid, signal.SIGKILL)) == expected


async def test_a_stage_of_a_strangers_model_runs_in_the_cell_too(model, homes):
    (one,) = models(model, homes).models()
    (plain,) = models(model, None).models()
    x = np.random.default_rng(0).standard_normal((3, model[1].architecture.hidden)).astype(np.float32)
    found = []
    for each in (one, plain):
        stage = await trio.to_thread.run_sync(each._stage_here, 0)
        cache = await stage.segment.open(16)
        found.append((await stage.segment.run(x, [Part(cache, 3)])).copy())
    assert np.array_equal(*found)
    assert homes.cells[0].shards == 1


async def test_attention_of_a_stage_in_a_cell_with_its_experts_elsewhere(model, homes):
    shard = model[1].stages[0]
    x = np.random.default_rng(1).standard_normal((4, model[1].architecture.hidden)).astype(np.float32)
    experts = LentExperts(model[1], model[0], OPTIONS)
    home = await trio.to_thread.run_sync(homes.home, model[1])
    there = await trio.to_thread.run_sync(lambda: home.attention(model[1], experts, *shard.layers))
    found = []
    for spread in (
        SpreadLayers(model[1], shard, there, experts),
        load_spread(model[1], shard, model[0], OPTIONS, experts),
    ):
        cache = await spread.open(16)
        found.append((await spread.run(x, [Part(cache, 4)])).copy())
        assert spread.report(cache).expert_rows
    assert np.array_equal(*found)


async def test_a_pass_that_failed_elsewhere_has_changed_nothing(model, homes):
    (one,) = models(model, homes).models()
    runner = await one.runner("experts")
    sequence = await runner.open(32)
    await runner.forward([feed(sequence, PROMPT[:8], 1)])
    experts = runner._segments[0]._experts
    run, calls = experts.run, []

    async def failing(layer, h, routing):
        calls.append(layer)
        if len(calls) == 2:
            raise RemoteError("no_replica", "gone")
        return await run(layer, h, routing)

    experts.run = failing
    with pytest.raises(RemoteError, match="gone"):
        await runner.forward([feed(sequence, PROMPT[8:12], 1)])
    assert sequence.length == 8
    (found,) = await runner.forward([feed(sequence, PROMPT[8:12], 1)])
    (plain,) = models(model, None).models()
    other = await (await plain.runner("experts")).open(32)
    await (await plain.runner("experts")).forward([feed(other, PROMPT[:8], 1)])
    (expected,) = await (await plain.runner("experts")).forward([feed(other, PROMPT[8:12], 1)])
    assert np.array_equal(found, expected)


def test_whose_models_need_a_cell_and_what_happens_without(tmp_path, monkeypatch):
    store, manifest = tiny(tmp_path, kind="F32")
    assert Homes(rule(store, own=manifest.publisher), store, Options()).home(manifest) is None
    assert Homes(rule(store, mode="off"), store, Options()).home(manifest) is None
    monkeypatch.setattr(sandbox, "missing", lambda: "seccomp: this kernel has none")
    for cells in (rule(store), rule(store, own=manifest.publisher, mode="required")):
        (one,) = StoredModels(store, None, OPTIONS, "me", homes=Homes(cells, store, Options())).models()
        fault = one.fault("local")
        assert isinstance(fault, LocalError)
        assert "needs a cell: seccomp: this kernel has none" in fault.message
        with pytest.raises(LocalError, match="needs a cell"):
            Homes(cells, store, Options()).home(manifest)
    allowed = Homes(rule(store, allow_unsandboxed=True), store, Options())
    assert allowed.home(manifest) is None
    assert allowed.fault(manifest) is None
