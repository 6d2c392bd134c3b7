"""Stages in cells, caches included: the same bits as in this process, also when the cell dies in the middle."""

import os
import signal

import numpy as np
import psutil
import pytest
import trio

from config.errors import RemoteError, RequestError
from dmoe import layers
from dmoe.cells import sandbox
from dmoe.cells.cell import Cell, Counters
from dmoe.cells.link import Options
from dmoe.cells.stage import CellStage
from dmoe.runtime import open_files
from dmoe.segment import Part
from dmoe.stages.loaded import stage_plan_of
from dmoe.stages.loading import load_stage
from tests.unit.dmoe.stages_kit import staged, swarm
from tests.unit.dmoe.test_stage_bits import FORMS, OPTIONS, lived, reference

pytestmark = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no cells here: {sandbox.missing()}")


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS)
def model(request, tmp_path_factory):
    store, manifest = staged(tmp_path_factory.mktemp("cells"), **request.param)
    ends = layers.Ends(manifest, open_files(manifest, store, [manifest.trunk]), OPTIONS)
    return store, manifest, ends


@pytest.fixture
def cell():
    made = Cell(
        "somebody", Options(threads=2, asked_bytes=1 << 16, answer_bytes=1 << 16, kv_bytes_max=64 << 20), Counters()
    )
    made.start()
    made.wait_up()
    yield made
    made.close()


async def alive(cell, last):
    with trio.fail_after(30):
        while cell.pid in (0, last):  # noqa: ASYNC110 - another process's state
            await trio.sleep(0.02)


@pytest.mark.parametrize("dies", [False, True], ids=["lives", "dies"])
async def test_stages_in_cells_compute_what_one_process_does(model, cell, dies, monkeypatch):
    monkeypatch.setattr("dmoe.stages.host.ORDER_SECONDS", 0.05)  # no piece is on its way to a cache that is gone
    store, manifest, ends = model
    expected = await lived(reference(model))
    segments = {}

    def segment(index):
        segments[index] = CellStage(cell, manifest, manifest.stages[index], store)
        return segments[index]

    async with swarm(manifest, segment=segment, ends=ends) as nodes:
        await nodes.node(0, 1, 2)
        runner = await nodes.runner()

        async def kill():
            last = cell.pid
            os.kill(last, signal.SIGKILL)
            await alive(cell, last)

        found = await lived(runner, kill if dies else None)
    assert len(found) == len(expected)
    assert all((one == two).all() for one, two in zip(found, expected, strict=True))
    assert cell.restarts == dies


async def test_a_run_larger_than_a_lane_goes_in_pieces(model, cell):
    store, manifest, _ = model
    stage = manifest.stages[0]
    local, there = load_stage(manifest, stage, store, OPTIONS), CellStage(cell, manifest, stage, store)
    width = manifest.architecture.hidden
    x = np.random.default_rng(0).standard_normal((300, width)).astype(np.float32)
    assert x.nbytes > 2 * cell.options.asked_bytes
    answers = []
    for segment in (local, there):
        first, second = await segment.open(300), await segment.open(200)
        y = (await segment.run(x, [Part(first, 180), Part(second, 120)])).copy()
        assert (first.length, second.length) == (180, 120)
        fork = await segment.open(300, first, 100)
        answers.append((y, (await segment.run(x[:5], [Part(fork, 5)])).copy()))
    assert all((one == two).all() for one, two in zip(*answers, strict=True))


async def test_caches_of_a_process_that_ended_are_empty_and_begin_again(model, cell):
    store, manifest, _ = model
    there = CellStage(cell, manifest, manifest.stages[0], store)
    x = np.random.default_rng(0).standard_normal((6, manifest.architecture.hidden)).astype(np.float32)
    cache = await there.open(20)
    before = await there.run(x, [Part(cache, 6)])
    assert cache.length == 6
    last = cell.pid
    os.kill(last, signal.SIGKILL)
    await alive(cell, last)
    assert cache.length == 0
    with pytest.raises(RequestError, match="missing first"):  # it ended after somebody had looked at the length
        await there.run(x, [Part(cache, 6)])
    cache.truncate(0)
    assert (await there.run(x, [Part(cache, 6)]) == before).all()
    assert cache.length == 6
    with pytest.raises(RequestError, match="context"):
        await there.open(100_000)


async def test_closed_caches_are_freed_in_the_cell(model, cell):
    """One sequence after the other finds room where the last one was."""
    store, manifest, _ = model
    there = CellStage(cell, manifest, manifest.stages[0], store)
    x = np.zeros((400, manifest.architecture.hidden), np.float32)
    resident = []
    for _ in range(48):
        cache = await there.open(400)
        await there.run(x, [Part(cache, 400)])
        cache.close()
        assert not cache.is_open
        with trio.fail_after(20):
            while cell._said:  # noqa: ASYNC110 - another thread's state
                await trio.sleep(0.01)
        with cell._control:  # not before the cell has obeyed
            resident.append(psutil.Process(cell.pid).memory_info().rss)
    position_bytes = stage_plan_of(manifest, manifest.stages[0]).position_bytes
    assert resident[-1] - resident[7] < 20 * 400 * position_bytes  # of 40 caches since then


async def test_a_closed_stage_is_gone_from_the_cell(model, cell):
    store, manifest, _ = model
    there = CellStage(cell, manifest, manifest.stages[0], store)
    there.close()

    async def open_on():
        while True:
            await there.open(10)

    with trio.fail_after(20), pytest.raises(RemoteError, match="KeyError"):
        await open_on()
