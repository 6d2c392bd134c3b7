"""Walls that a system may or may not have: control groups, gVisor, namespaces of one's own."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config.errors import LocalError
from dmoe.cells import cgroups, gvisor, kernel, sandbox
from dmoe.cells.cell import Cell, Counters
from dmoe.cells.cells import Cells
from dmoe.cells.cgroups import Tree, Unavailable, own_group
from dmoe.cells.link import Options
from dmoe.cells.shard import CellShard
from dmoe.runtime import ExpertShard, RuntimeOptions
from tests.unit.dmoe.model_kit import HIDDEN, tiny

walls = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no cells here: {sandbox.missing()}")


ROOT = Path(__file__).resolve().parents[3]

# --- control groups, over a folder that looks like the kernel's


def delegated(tmp_path, *, processes=(), controllers="cpuset cpu io memory pids"):
    own = tmp_path / "own"
    own.mkdir()
    (own / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in processes))
    (own / "cgroup.controllers").write_text(controllers)
    (own / "cgroup.subtree_control").write_text("")
    return own


def test_a_node_moves_into_a_leaf_and_gives_each_process_a_group(tmp_path):
    own = delegated(tmp_path, processes=[os.getpid()])
    tree = Tree(own, os.getpid())
    assert (own / "node" / "cgroup.procs").read_text() == str(os.getpid())
    assert (own / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    group = tree.join(4711, 1 << 30, 2)
    (path,) = own.glob("cell-*")
    read = {file.name: file.read_text() for file in path.iterdir()}
    assert read == {
        "cgroup.procs": "4711",
        "memory.max": str(1 << 30),
        "pids.max": str(sandbox.THREADS_MAX),
        "cpu.max": "200000 100000",
    }
    group.allow_memory(5 << 30)
    assert (path / "memory.max").read_text() == str(5 << 30)
    assert group.wall == sandbox.Wall("cgroup", True, "memory, pids, cpu")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"processes": [1]}, "shared with 1 other"),
        ({"controllers": "cpu pids"}, "no memory controller"),
    ],
)
def test_what_is_not_this_nodes_alone_is_left_alone(tmp_path, change, why):
    own = delegated(tmp_path, **change)
    with pytest.raises(Unavailable, match=why):
        Tree(own, os.getpid())
    assert {path.name for path in own.iterdir()} == {"cgroup.procs", "cgroup.controllers", "cgroup.subtree_control"}


def test_a_step_that_fails_is_undone(tmp_path, monkeypatch):
    own = delegated(tmp_path, processes=[os.getpid()])
    (own / "cgroup.subtree_control").unlink()
    (own / "cgroup.subtree_control").mkdir()  # writing fails
    with pytest.raises(Unavailable, match="directory"):
        Tree(own, os.getpid())
    assert (own / "cgroup.procs").read_text() == str(os.getpid())


def test_where_the_own_group_is():
    mountinfo = "25 30 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
    assert str(own_group("0::/system.slice/rios.service\n", mountinfo)) == "/sys/fs/cgroup/system.slice/rios.service"
    assert str(own_group("0::/\n", mountinfo)) == "/sys/fs/cgroup"
    nested = mountinfo.replace(" / /sys", " /docker/x /sys")
    assert str(own_group("0::/docker/x/a\n", nested)) == "/sys/fs/cgroup/a"
    for text, mounts in (("4:memory:/x\n", mountinfo), ("0::/x\n", "25 30 0:23 / / rw - ext4 /dev/x rw\n")):
        with pytest.raises(Unavailable, match="no cgroup v2"):
            own_group(text, mounts)


@walls
def test_a_real_group_bounds_a_real_cell(tmp_path):
    wall = cgroups.available()
    if not wall.in_force:
        pytest.skip(f"no control groups of one's own here: {wall.why}")
    store, manifest = tiny(tmp_path, kind="F32")
    cell = Cell("somebody", Options(), Counters())
    cell.start()
    try:
        cell.wait_up()
        CellShard(cell, manifest, manifest.expert_shard(0, 0), store)
        assert "cgroup" in {each.name for each in cell.walls if each.in_force}
        path = cell._process.group._path
        assert str(cell.pid) in (path / "cgroup.procs").read_text().split()
        assert int((path / "memory.max").read_text()) < 4 << 30
    finally:
        cell.close()
    assert not path.exists()


# --- gVisor

RUNSC = """#!{python}
# A fake of gVisor's runsc: checks how it is called, then runs the command without another kernel.
import os, sys
arguments = sys.argv[1:]
at = arguments.index("do")
assert "--network=none" in arguments[:at] and "--host-uds=none" in arguments[:at], arguments
rest = arguments[at + 1 :]
passed = [each for each in rest if each.startswith("--pass-fd=")]
for each in passed:
    host, _, guest = each.removeprefix("--pass-fd=").partition(":")
    assert host == guest and os.fstat(int(host)), each
command = rest[len(passed) :]
assert command[:2] == ["env", "-i"], command
os.execvp(command[0], command)
"""


@pytest.fixture
def runsc(tmp_path, monkeypatch):
    path = tmp_path / "bin" / "runsc"
    path.parent.mkdir()
    path.write_text(RUNSC.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


@walls
def test_without_runsc_whoever_wants_gvisor_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    store, manifest = tiny(tmp_path / "store", kind="F32")
    cells = Cells(store, lambda *_: None, lambda *_: None, own="me", options=Options(gvisor=True))
    with pytest.raises(LocalError, match=r"dmoe\.gvisor is on, and there is no runsc in PATH"):
        cells.load(manifest, manifest.expert_shard(0, 0))
    assert "runsc" in cells.statistics()["refusal"]
    with pytest.raises(LocalError, match="runsc") as caught:
        gvisor.wrapped(["true"], {}, [])
    assert "gvisor.dev" in caught.value.hint


@walls
def test_a_cell_in_a_fake_runsc_answers_with_the_same_bits(tmp_path, runsc):
    store, manifest = tiny(tmp_path / "store", kind="F32")
    shard = manifest.expert_shard(0, 0)
    h = np.random.default_rng(0).standard_normal((3, HIDDEN)).astype(np.float32)
    cell = Cell("somebody", Options(gvisor=True), Counters())
    cell.start()
    try:
        cell.wait_up()
        there = CellShard(cell, manifest, shard, store)
        here = ExpertShard(manifest, shard, store, RuntimeOptions(device="cpu", threads=1))
        assert np.array_equal(there.partial(0, h), here.partial(0, h))
        found = {wall.name: wall for wall in cell.walls}
        assert found["gvisor"].in_force
        assert found["seccomp"].in_force
    finally:
        cell.close()


# --- namespaces


@walls
@pytest.mark.parametrize(("how", "code"), [("os._exit(7)", 7), ("ctypes.string_at(0)", -11), ("os._exit(0)", 0)])
def test_a_process_of_its_own_numbers_ends_as_the_one_inside_did(how, code):
    """The one outside tells how: exit codes and signals pass through."""
    program = (
        f"import os, ctypes; from dmoe.cells import apart; apart.leave(); apart.is_inside() or os._exit(99); {how}"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    if done.returncode == 99:
        pytest.skip("this system gives no process numbers of one's own")
    assert done.returncode == code


def test_calls_that_walls_need_have_numbers_on_both_machines():
    names = set(kernel._NUMBERS["x86_64"])
    assert names == set(kernel._NUMBERS["aarch64"])
    assert {"mount", "umount2", "pivot_root", "unshare"} <= names
