"""A shard that keeps ending its cell is withdrawn for a while; what cells take counts as the models' memory."""

import logging
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import numpy as np
import pytest
import trio

from config.errors import RemoteError
from dmoe import hosting, taking
from dmoe.caller import Caller
from dmoe.cells import sandbox
from dmoe.cells.blame import ENDS_MAX, WINDOW_SECONDS, Blame
from dmoe.cells.cells import Cells
from dmoe.cells.link import BOOT, Options
from dmoe.cells.shard import CellShard
from dmoe.hosting import Hosting
from dmoe.ports import Quote
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.taking import Withdrawal
from dmoe.worker import Worker
from node import online, replicas
from p2p.memory import MemoryHub
from tests.unit.dmoe import hostile_cell
from tests.unit.dmoe.model_kit import HIDDEN, PUBLISHER, made

needs_cells = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no cells here: {sandbox.missing()}")
OPTIONS = RuntimeOptions(device="cpu", threads=1)
ROOM = 1 << 30


class Host:
    """A node that serves a stranger's model out of a cell."""

    def __init__(self, model, folder, boot, ram_bytes_max=ROOM):
        self.network = MemoryHub(1).add()
        self.store, self.manifest = model
        self.model_id = self.manifest.model_id
        self.worker = Worker(self.network, quote=Quote(0, 0, 0))
        self.cells = Cells(
            self.store,
            lambda manifest, shard: ExpertShard(manifest, shard, self.store, OPTIONS),
            lambda manifest, shard: None,
            own=self.network.peer_id,
            options=Options(boot=boot, call_seconds_max=5.0),
        )
        self.hosting = Hosting(
            self.network,
            self.store,
            self.worker,
            load=self.cells.load,
            state_file=folder / "hosting.json",
            publishers=frozenset({"*"}),
            disk_bytes_max=1 << 30,
            ram_bytes_max=ram_bytes_max,
            settle_seconds=0.0,
            check_seconds=0.2,
            cells=self.cells,
        )

    @property
    def advertised(self):
        offer = self.network.directory.own().offer(self.model_id)
        return {index for index in range(len(self.manifest.shards)) if offer is not None and offer.holds(index)}

    @property
    def experts(self):
        return {self.manifest.shard_index(shard.id) for shard in self.manifest.expert_shards()}

    def ask(self, group, deed=hostile_cell.HONEST):
        h = np.ones((1, HIDDEN), np.float32)
        h[0, 0] = deed
        loaded = self.worker.local(self.model_id, 0, group)
        return None if loaded is None else loaded.shard.partial(0, h, None, None)

    async def crash_until_withdrawn(self, group):
        """The number of ends that it took."""
        before, ends = self.cells.counters.withdrawn, 0
        with trio.fail_after(60):
            while self.cells.counters.withdrawn == before:
                died = self.cells.counters.died
                with suppress(RemoteError):
                    await trio.to_thread.run_sync(self.ask, group, hostile_cell.LEAVE)
                await trio.sleep(0.02)
                ends += self.cells.counters.died - died
        return ends


@asynccontextmanager
async def hosted(folder, boot=hostile_cell.BOOT, **kwargs):
    host = Host(await made(folder, kind="F32"), folder, boot, **kwargs)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(host.worker.run)
            await nursery.start(host.hosting.run)
            await host.hosting.deploy(host.model_id, 1, "experts")
            yield host
            nursery.cancel_scope.cancel()
    finally:
        host.cells.close()


async def until(condition, seconds=60):
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - what other threads and processes do
            await trio.sleep(0.02)


@needs_cells
async def test_a_shard_that_keeps_ending_its_cell_is_withdrawn_and_tried_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(taking, "WITHDRAWN_SECONDS_FIRST", 5.0)
    monkeypatch.setattr("dmoe.cells.cell.PAUSE_SECONDS_MAX", 0.1)
    async with hosted(tmp_path) as host:
        await until(lambda: host.experts <= host.advertised)
        bad = host.manifest.shard_index(host.manifest.expert_shard(0, 1).id)
        shard_id = host.manifest.shards[bad].id
        expected = host.ask(0)
        assert isinstance(host.worker.local(host.model_id, 0, 1).shard, CellShard)

        with caplog.at_level(logging.WARNING):
            await host.crash_until_withdrawn(1)
            begun = trio.current_time()
            await until(lambda: host.hosting.status()["withdrawn"])
        await until(lambda: bad not in host.advertised)
        assert host.experts - {bad} <= host.advertised
        assert host.cells.counters.died == ENDS_MAX
        assert host.worker.local(host.model_id, 0, 1) is None
        (row,) = host.hosting.status()["withdrawn"]
        assert (row["shard"], row["times"]) == (shard_id, 1)
        assert f"ended {ENDS_MAX} times" in row["why"]
        assert shard_id in online._withdrawn_line(row)
        shown = SimpleNamespace(
            store=host.store,
            network=host.network,
            hosting=host.hosting,
            caller=Caller(host.network, worker=host.worker),
        )
        listed = await replicas.shards(shown, {"model": host.manifest.name}, None)
        assert [each["id"] for each in listed["shards"] if "withdrawn here" in online._remarks(each)] == [shard_id]
        assert host.cells.statistics()["withdrawn"] == 1
        said = [r for r in caplog.records if r.name == "rios.security.cells" and "is not served for" in r.getMessage()]
        assert len(said) == 1
        (deployed,) = host.hosting.status()["deployments"]
        assert [s["state"] for s in deployed["shards"] if s["id"] == shard_id] == ["withdrawn"]
        assert host.hosting.take_in(host.network.peer_id, host.model_id, bad) != ""

        def answers():
            with suppress(RemoteError):
                return (host.ask(0) == expected).all()

        await until(answers)  # those beside it are served by the cell that was started again

        await until(lambda: bad in host.advertised)  # tried again, not before its time
        assert trio.current_time() - begun >= 4.0
        assert not host.hosting.status()["withdrawn"]
        await host.crash_until_withdrawn(1)
        await until(lambda: host.hosting.status()["withdrawn"])
        (row,) = host.hosting.status()["withdrawn"]
        assert row["times"] == 2
        assert row["again_s"] > 5
    assert not host.hosting.status()["ram_bytes_cells"]


@needs_cells
async def test_what_cells_take_counts_as_memory_of_models(tmp_path):
    async with hosted(tmp_path, BOOT) as host:
        await until(lambda: host.experts <= host.advertised)
        status, weights = host.hosting.status(), sum(s.ram_bytes for s in host.manifest.expert_shards())
        (cell,) = host.cells.statistics()["cells"]
        assert status["ram_bytes_cells"] == host.cells.ram_bytes() == cell["ram_bytes"] > 20 << 20
        assert status["ram_bytes"] == weights + cell["ram_bytes"]
        assert "for cells" in online._memory_line(status)
        assert host.cells.ram_bytes_for(PUBLISHER.peer_id) == 0
        assert host.cells.ram_bytes_for("another") == host.cells.counters.ram_bytes > 0
        assert host.cells.ram_bytes_for(host.network.peer_id) == 0


@needs_cells
async def test_a_cell_that_does_not_fit_is_not_started(tmp_path):
    _, manifest = await made(tmp_path / "sized", kind="F32")
    weights = sum(shard.ram_bytes for shard in manifest.expert_shards())
    async with hosted(tmp_path, BOOT, ram_bytes_max=weights + (8 << 20)) as host:

        def errors():
            return [s["error"] for d in host.hosting.status()["deployments"] for s in d["shards"] if s["error"]]

        await until(lambda: any("raise dmoe.ram_bytes_max" in error for error in errors()))
        assert not host.cells.counters.started
        assert not host.experts & host.advertised


def test_ends_count_against_a_shard_within_a_window():
    blame = Blame()
    assert [blame.ended([1], n) for n in range(ENDS_MAX)] == [[]] * (ENDS_MAX - 1) + [[1]]
    assert blame.ended([1, 2], 100.0) == []  # it began anew
    for n in range(3 * ENDS_MAX):  # too far apart
        assert blame.ended([3], n * WINDOW_SECONDS / (ENDS_MAX - 2)) == []
    for n in range(ENDS_MAX - 1):
        assert blame.ended([4], n) == []
    blame.forget(4)
    assert blame.ended([4], ENDS_MAX) == []


def test_pauses_double_up_to_an_hour_and_are_forgotten():
    found, now, pauses = Withdrawal(), 1e6, []
    for _ in range(9):
        pauses.append(found.again("why", now))
        now += pauses[-1] + 1
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    assert found.again("why", now + taking.WITHDRAWN_FORGIVEN_AFTER * 3600) == 60
    assert hosting.NoCells().ram_bytes() == 0
