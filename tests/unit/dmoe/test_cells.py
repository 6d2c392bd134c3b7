"""Cells: real processes behind real walls, honest ones and hostile ones."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pytest
import trio

from config.errors import IntegrityError, LocalError, RemoteError
from dmoe.batches import Batches
from dmoe.cells import kernel, lanes, sandbox, trial
from dmoe.cells.cell import Cell, Counters
from dmoe.cells.cells import Cells
from dmoe.cells.link import BOOT, Options
from dmoe.cells.shard import CellShard
from dmoe.loaded import LoadedShard, Together, plan_of
from dmoe.runtime import ExpertShard, RuntimeOptions
from dmoe.stages.loading import load_stage
from tests.unit.dmoe import hostile_cell
from tests.unit.dmoe.model_kit import HIDDEN, PUBLISHER, tiny

pytestmark = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no cells here: {sandbox.missing()}")

OPTIONS = RuntimeOptions(device="cpu", threads=1)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("dense"), kind="F32")


@contextmanager
def running(boot=BOOT, *, threads=1, seconds=10.0, name="somebody"):
    counters = Counters()
    cell = Cell(name, Options(threads=threads, boot=boot, call_seconds_max=seconds), counters)
    cell.start()
    try:
        cell.wait_up()
        yield cell, counters
    finally:
        cell.close()


@contextmanager
def hostile(model, **kwargs):
    store, manifest = model
    with running(hostile_cell.BOOT, **kwargs) as (cell, counters):
        yield cell, CellShard(cell, manifest, manifest.expert_shard(0, 0), store), counters


def rows(count=2, deed=hostile_cell.HONEST, seed=0):
    h = np.random.default_rng(seed).standard_normal((count, HIDDEN)).astype(np.float32)
    h[0, 0] = deed
    return h


def again(shard, h, seconds=30.0):
    """The answer once the cell is up again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(RemoteError):
            return shard.partial(0, h)
        time.sleep(0.02)
    return shard.partial(0, h)


def here(model):
    store, manifest = model
    return ExpertShard(manifest, manifest.expert_shard(0, 0), store, OPTIONS)


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- the same answers


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kind": "F32"},
        {"kind": "F32", "quantisation": "int8"},
        {"kind": "Q4_1"},
        {"kind": "F32", "experts": 4},
        {"kind": "F32", "experts": 4, "quantisation": "int8"},
        {"kind": "F32", "experts": 4, "quantisation": "int4"},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
def test_a_cell_answers_with_the_same_bits(tmp_path, kwargs):
    store, manifest = tiny(tmp_path, **kwargs)
    with running() as (cell, counters):
        for shard in manifest.expert_shards()[:2]:
            local = ExpertShard(manifest, shard, store, OPTIONS)
            there = CellShard(cell, manifest, shard, store)
            for count in (1, 3, 40):
                h, routing = rows(count, seed=count), ()
                if "experts" in kwargs:
                    chosen = np.random.default_rng(count).integers(0, 4, (count, 2)).astype(np.int32)
                    chosen[:, 1] = (chosen[:, 0] + 1) % 4
                    routing = (chosen, np.random.default_rng(count).random((count, 2)).astype(np.float32))
                layer = shard.layers[0]
                assert (there.partial(layer, h, *routing) == local.partial(layer, h, *routing)).all()
        assert counters.calls == 6
        assert cell.shards == 2


@pytest.mark.parametrize("room", [lanes.ASKED_BYTES, 16384])
def test_groups_of_a_layer_are_asked_together_for_the_same_bits(model, room):
    store, manifest = model
    groups = [manifest.expert_shard(0, group) for group in range(len(manifest.sum_groups))]
    assert len(groups) > 1
    counters = Counters()
    cell = Cell("somebody", Options(asked_bytes=room, answer_bytes=room), counters)
    cell.start()
    try:
        cell.wait_up()
        there = [CellShard(cell, manifest, shard, store) for shard in groups]
        assert all(isinstance(shard, Together) for shard in there)
        local = [ExpertShard(manifest, shard, store, OPTIONS) for shard in groups]
        assert not any(isinstance(shard, Together) for shard in local)
        for count in (1, 40):
            h, calls = rows(count, seed=count), counters.calls
            found = there[0].partials(there, 0, h)
            for one, other in zip(found, local, strict=True):
                assert (one == other.partial(0, h)).all()
            if room == lanes.ASKED_BYTES or count == 1:
                assert counters.calls - calls == 1
        batches = Batches(threads=1, queue_rows_max=100, batch_rows_max=100)
        loaded = [LoadedShard(plan_of(manifest, shard), each) for shard, each in zip(groups, there, strict=True)]
        calls = counters.calls
        found = batches.now(loaded, 0, rows(2), None, None)
        assert found is not None
        assert counters.calls == calls + 1
        for one, other in zip(found, local, strict=True):
            assert (one == other.partial(0, rows(2))).all()
    finally:
        cell.close()


def test_calls_that_come_again_follow_shards_that_come_and_go(model):
    """What is kept ready for a call must not outlive its shards, nor mix up rows, layers or choices of shards."""
    store, manifest = model
    groups = [manifest.expert_shard(0, group) for group in range(len(manifest.sum_groups))]
    local = [ExpertShard(manifest, shard, store, OPTIONS) for shard in groups]
    with running(threads=2) as (cell, _):
        there = [CellShard(cell, manifest, shard, store) for shard in groups]

        def agree(chosen):
            asked = tuple(there[n] for n in chosen)
            for seed, count in enumerate((1, 1, 2, 8, 9, 1)):
                for layer in manifest.layers_of(groups[0]):
                    h = rows(count, seed=seed)
                    found = asked[0].partials(asked, layer, h)
                    assert all((one == local[n].partial(layer, h)).all() for n, one in zip(chosen, found, strict=True))

        for _ in range(2):
            agree([0, 1])
            agree([1, 0])
            agree(range(len(groups)))
            there[1].close()
            there[0].partial(0, rows(1))
            there[1] = CellShard(cell, manifest, groups[1], store)
        os.kill(cell.pid, signal.SIGKILL)
        again(there[0], rows())
        agree([1, 0])


def test_rows_that_exceed_a_lane_go_in_pieces(model):
    store, manifest = model
    cell = Cell("somebody", Options(asked_bytes=16384, answer_bytes=16384), Counters())
    cell.start()
    try:
        cell.wait_up()
        there = CellShard(cell, manifest, manifest.expert_shard(0, 0), store)
        h = rows(100)
        assert (there.partial(0, h) == here(model).partial(0, h)).all()
        assert cell._counters.calls == 4
    finally:
        cell.close()


def test_several_threads_call_one_cell_at_the_same_time(model):
    store, manifest = model
    local, wrong = here(model), []
    with running(threads=2) as (cell, _):
        there = CellShard(cell, manifest, manifest.expert_shard(0, 0), store)

        def work(seed):
            for _ in range(50):
                h = rows(5, seed=seed)
                if not (there.partial(0, h) == local.partial(0, h)).all():
                    wrong.append(seed)

        threads = [Thread(target=work, args=[seed]) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# --- the walls


def test_nothing_outside_can_be_reached(model):
    with hostile(model) as (_cell, shard, _), pytest.raises(RemoteError) as caught:
        shard.partial(0, rows(deed=hostile_cell.ATTEMPTS))
    found = json.loads(caught.value.message.partition(": ")[2])
    assert set(found) == set(hostile_cell.DEEDS)
    assert not [name for name, result in found.items() if result == "DID"]
    assert not Path("/tmp/rios-cell-was-here").exists()


def test_a_cell_holds_no_descriptor_but_its_own(model):
    with hostile(model) as (cell, _, _):
        held = {os.readlink(path) for path in Path(f"/proc/{cell.pid}/fd").iterdir()}
        strange = [each for each in held if not each.startswith("socket:") and each not in ("/dev/null", "/null")]
        store, manifest = model
        files = {str(store.path(manifest.model_id, file)) for file in manifest.expert_shard(0, 0).files}
        own = f"/{cell.pid}/smaps"  # its own memory's map; where it has a file system of its own, without /proc
        assert set(strange) <= {*files, own, f"/proc{own}"}
        assert not Path(f"/proc/{cell.pid}/environ").read_bytes().strip(b"\0").count(b"PATH=")
        status = Path(f"/proc/{cell.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
        assert "CapEff:\t0000000000000000" in status


def test_every_wall_that_the_system_has_is_in_force():
    walls = {wall.name: wall for wall in trial.walls()}
    for wall in sandbox.available():
        assert walls[wall.name].in_force == wall.in_force, walls[wall.name]


@pytest.mark.flaky(reruns=1)  # a busy machine may kill it for being late first
@pytest.mark.parametrize(("deed", "end"), [(hostile_cell.EXEC, "SIGSYS"), (hostile_cell.TRACE, "SIGSYS")])
def test_a_forbidden_call_ends_the_cell(model, deed, end):
    with hostile(model) as (cell, shard, counters):
        with pytest.raises(RemoteError, match="ended"):
            shard.partial(0, rows(deed=deed))
        h = rows()
        assert (again(shard, h) == here(model).partial(0, h)).all()
        assert end in cell.last_end
        assert (counters.died, counters.restarted) == (1, 1)


# --- limits, deadlines, restarts


def test_a_memory_bomb_meets_its_limit_while_others_are_served(model):
    store, manifest = model
    with hostile(model) as (_, bad, _), running(name="an honest one") as (cell, _):
        good = CellShard(cell, manifest, manifest.expert_shard(0, 0), store)
        outcome = []

        def bomb():
            try:
                bad.partial(0, rows(deed=hostile_cell.BOMB))
            except RemoteError as error:
                outcome.append(error)

        thread = Thread(target=bomb)
        thread.start()
        h = rows()
        for _ in range(20):
            assert (good.partial(0, h) == here(model).partial(0, h)).all()
        thread.join()
        assert outcome
        assert outcome[0].code == "unavailable"
        assert (again(bad, h) == here(model).partial(0, h)).all()


def test_shared_memory_is_no_way_around_the_limit(model):
    with hostile(model) as (_, shard, _), pytest.raises(RemoteError, match="Permission"):
        shard.partial(0, rows(deed=hostile_cell.SHARED_BOMB))


def test_an_endless_loop_ends_with_its_deadline(model):
    with hostile(model, seconds=0.3) as (cell, shard, counters):
        first = cell.pid
        with pytest.raises(RemoteError, match="did not answer within") as caught:
            shard.partial(0, rows(deed=hostile_cell.LOOP))
        assert caught.value.code == "unavailable"
        h = rows()
        assert (again(shard, h) == here(model).partial(0, h)).all()
        assert counters.killed == 1
        assert cell.pid != first
        assert not psutil.pid_exists(first)


@pytest.mark.flaky(reruns=1)
def test_a_cell_that_computes_for_itself_is_ended(model, monkeypatch):
    monkeypatch.setattr("dmoe.cells.cell.IDLE_CHECK_SECONDS", 0.5)
    with hostile(model) as (cell, shard, counters):
        for _ in range(300):  # an honest one may be asked all the time
            shard.partial(0, rows())
        shard.partial(0, rows(deed=hostile_cell.MINE))
        until(lambda: counters.killed == 1)
        assert "without being asked" in cell.last_end
        h = rows()
        assert (again(shard, h) == here(model).partial(0, h)).all()


async def test_a_cell_that_hears_no_bell_holds_up_nobody(model):
    with hostile(model) as (cell, shard, _):
        h = rows(deed=hostile_cell.DEAF)

        def ask_on():  # on the event loop
            for _ in range(5000):
                shard.partial(0, h)

        with pytest.raises(RemoteError, match="takes no call"):
            ask_on()
        await trio.to_thread.run_sync(until, lambda: cell.restarts == 1)
        h = rows()
        found = await trio.to_thread.run_sync(again, shard, h)
        assert (found == here(model).partial(0, h)).all()


async def test_the_event_loop_is_not_held_up_by_a_late_cell(model, monkeypatch):
    monkeypatch.setattr("dmoe.cells.call.LOOP_SECONDS", 0.05)
    _store, _manifest = model
    with hostile(model, seconds=3.0) as (_cell, shard, counters):
        with pytest.raises(RemoteError, match="did not answer"):
            shard.partial(0, rows(deed=hostile_cell.LOOP))
        assert not counters.killed  # the call still has its time
        with pytest.raises(RemoteError, match="late with another"):
            shard.partial(0, rows())
        h = rows()
        found = await trio.to_thread.run_sync(again, shard, h)  # a thread may wait for it
        assert (found == here(model).partial(0, h)).all()
        await trio.to_thread.run_sync(until, lambda: counters.killed == 1)


@pytest.mark.flaky(reruns=1)
def test_a_cell_that_computes_what_it_was_asked_is_not_ended(model, monkeypatch):
    """However long one call takes, and whenever somebody looks."""
    monkeypatch.setattr("dmoe.cells.cell.IDLE_CHECK_SECONDS", 1.0)
    with hostile(model, seconds=60.0) as (cell, shard, counters):
        with cell.ask((shard.number, 0, 2, HIDDEN, 0), [rows(deed=hostile_cell.LONG)], 60.0) as lane:
            assert lane.rows(2, HIDDEN).any()
        assert not counters.killed, cell.last_end


async def test_the_loop_does_not_wait_again_and_again_for_a_late_cell(model, monkeypatch):
    monkeypatch.setattr("dmoe.cells.call.LOOP_SECONDS", 0.05)
    monkeypatch.setattr("dmoe.loaded.AWAY_SECONDS_FIRST", 60.0)
    with hostile(model, seconds=60.0) as (cell, shard, _):
        assert not cell.is_late
        numbers = (shard.number, 0, 2, HIDDEN, 0)
        with await cell.begin(numbers, [rows(deed=hostile_cell.LONG)], 60.0).answer() as lane:
            assert lane.rows(2, HIDDEN).any()
        assert cell.is_late, "though the call was answered: the next may be late, too"
        with cell.ask(numbers, [rows()], 9.0):
            assert len(cell._link.asked) == 0


@pytest.mark.parametrize("deed", [hostile_cell.LEAVE, hostile_cell.CRASH, hostile_cell.RING])
def test_a_cell_that_ends_is_started_again_with_its_shards(model, deed):
    with hostile(model) as (cell, shard, counters):
        with pytest.raises(RemoteError) as caught:
            shard.partial(0, rows(deed=deed))
        assert caught.value.code == "unavailable"
        h = rows()
        assert (again(shard, h) == here(model).partial(0, h)).all()
        assert counters.restarted == 1
        assert cell.shards == 1


def test_a_cell_killed_from_outside_comes_back_and_leaves_no_zombie(model):
    with hostile(model) as (cell, shard, counters):
        pids = [cell.pid]
        h = rows()
        for _ in range(3):
            os.kill(cell.pid, signal.SIGKILL)
            until(lambda: cell.pid not in (0, *pids))
            pids.append(cell.pid)
            assert (again(shard, h) == here(model).partial(0, h)).all()
        assert counters.died == 3
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_crash_loop_is_slowed_down(model, caplog):
    with hostile(model) as (_, shard, counters):
        for _ in range(3):
            with pytest.raises(RemoteError):
                shard.partial(0, rows(deed=hostile_cell.LEAVE))
            again(shard, rows())
        pauses = [
            float(r.getMessage().split(" in ")[-1].removesuffix(" s")) for r in caplog.records if "ended" in r.msg
        ]
        assert pauses == [0.1, 0.2, 0.4]
        assert counters.restarted == 3


def test_a_shard_that_ends_its_cell_while_it_loads_is_refused(model):
    store, manifest = model
    boot = hostile_cell.BOOT.replace("import main;", "import main_mortal as main;")
    with running(boot) as (cell, _), pytest.raises(LocalError, match="ended while it loaded"):
        CellShard(cell, manifest, manifest.expert_shard(0, 0), store)


def test_an_altered_shard_is_named_as_in_the_process(tmp_path):
    store, manifest = tiny(tmp_path, kind="F32")
    shard = manifest.expert_shard(0, 0)
    path = store.path(manifest.model_id, shard.files[0])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with running() as (cell, _), pytest.raises(IntegrityError, match=path.name):
        CellShard(cell, manifest, shard, store)


# --- shared memory


def test_what_a_cell_scribbles_later_changes_no_answer(model):
    h = rows(deed=hostile_cell.SCRIBBLE)
    with hostile(model) as (_, shard, _):
        for _ in range(30):
            with suppress(RemoteError):
                found = shard.partial(0, h)
                assert found.shape == h.shape
                assert np.isfinite(found).all()


def test_answers_that_are_not_numbers_are_refused(model):
    with hostile(model) as (_, shard, _):
        with pytest.raises(RemoteError, match="not finite"):
            shard.partial(0, rows(deed=hostile_cell.NAN))
        shard.partial(0, rows())  # the lane is free again


def test_lengths_that_lie_are_cut(model):
    with hostile(model) as (_, shard, _), pytest.raises(RemoteError) as caught:
        shard.partial(0, rows(deed=hostile_cell.LIE))
    assert len(caught.value.message) <= 2048


def test_sealed_memory_cannot_be_changed_in_size():
    descriptor = lanes.sealed_memory(8192, "x")
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)
    descriptor = lanes.sealed_copy(b"manifest", "x")
    with pytest.raises(PermissionError):
        os.write(descriptor, b"other")
    os.close(descriptor)


# --- the end


def test_cells_end_with_their_node(tmp_path):
    """The node is killed: nothing of it has a chance to tidy up."""
    script = (
        "import os, signal, sys\n"
        "from dmoe.cells.cell import Cell, Counters\n"
        "from dmoe.cells.link import Options\n"
        "cell = Cell('x', Options(), Counters())\n"
        "cell.start(); cell.wait_up()\n"
        "print(cell.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    pid = int(done.stdout)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


# --- which shard goes where


@pytest.fixture
def make(model):
    store, manifest = model
    made = []

    def build(**kwargs):
        cells = Cells(
            store,
            lambda manifest, shard: ExpertShard(manifest, shard, store, OPTIONS),
            lambda manifest, shard: load_stage(manifest, shard, store, OPTIONS),
            **{"own": "somebody else", **kwargs},
        )
        made.append(cells)
        return cells, cells.load(manifest, manifest.expert_shard(0, 0))

    yield build
    for cells in made:
        cells.close()


def test_a_strangers_shards_run_in_a_cell_that_ends_with_the_last(make, model):
    cells, shard = make()
    assert isinstance(shard, CellShard)
    figures = cells.statistics()
    assert (figures["running"], figures["cells"][0]["publisher"]) == (1, PUBLISHER.peer_id)
    pid = figures["cells"][0]["pid"]
    second = cells.load(model[1], model[1].expert_shard(0, 1))
    shard.close()
    assert cells.statistics()["running"] == 1
    second.close()
    assert not cells.statistics()["cells"]
    until(lambda: not psutil.pid_exists(pid))


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"own": PUBLISHER.peer_id}, ExpertShard),
        ({"own": PUBLISHER.peer_id, "mode": "required"}, CellShard),
        ({"mode": "off"}, ExpertShard),
    ],
)
def test_the_mode_decides(make, kwargs, kind):
    assert isinstance(make(**kwargs)[1], kind)


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_without_a_sandbox_strangers_shards_are_refused(make, monkeypatch, mode):
    monkeypatch.setattr(kernel, "is_known", lambda: False)
    with pytest.raises(LocalError, match="needs a cell, and none can be had: seccomp: cells need Linux"):
        make(mode=mode, allow_unsandboxed=mode == "required")


def test_unless_the_operator_allows_them(make, monkeypatch):
    monkeypatch.setattr(kernel, "is_known", lambda: False)
    cells, shard = make(allow_unsandboxed=True)
    assert isinstance(shard, ExpertShard)
    assert cells.statistics()["unsandboxed"]
