"""Processes for text, grammars and imports: what a stranger who got control of one could still do."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from config.errors import BusyError, IntegrityError, LocalError, RequestError
from config.generation import Constraint
from dmoe import aside, asidework, constraint, grammarwork
from dmoe.aside import Aside
from dmoe.cells import apart, launch, sandbox
from dmoe.constraint import Constraints
from dmoe.importer import walled, walledwork
from dmoe.importer.build import Wishes, import_model
from dmoe.importer.walled import import_walled
from dmoe.store import ModelStore
from dmoe.text import Tokenizer
from dmoe.textaside import AsideTokenizer
from tests.unit.dmoe.folder_kit import write_folder
from tests.unit.dmoe.hostile_cell import DEEDS
from tests.unit.dmoe.model_kit import PUBLISHER, write_gguf

pytestmark = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no walls here: {sandbox.missing()}")

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "tests.unit.dmoe.hostile_walled"
TINY = asidework.rehearsed_json()


def tried(report):
    """What was attempted from inside; fails the test for every attempt that came through."""
    assert set(report) == set(DEEDS)
    return [name for name, result in report.items() if result == "DID"]


def hostile_aside(**kwargs):
    """The product's process, whose work is a stranger's."""
    return Aside("a stranger's text", ("open",), 20.0, memory_bytes=256 << 20, **kwargs)


@pytest.fixture
def taken(monkeypatch):
    monkeypatch.setattr(aside, "BOOT", launch.boot(f"{HOSTILE}_text"))


# --- text


def test_from_a_process_for_text_nothing_outside_can_be_reached(taken):
    with closing(hostile_aside()) as process:
        assert tried(process.ask(("attempts",), 20.0)) == []
    assert not Path("/tmp/rios-cell-was-here").exists()


@pytest.mark.parametrize(("deed", "says"), [("exec", "ended its process"), ("trace", "ended its process")])
def test_a_forbidden_call_ends_it_and_the_next_question_gets_another(taken, deed, says):
    told = []
    with closing(hostile_aside(stopped=told.append)) as process:
        with pytest.raises(IntegrityError, match=says):
            process.ask((deed,), 20.0)
        assert process.ask(("honest", 7), 20.0) == 7
    assert len(told) == 1


def test_it_is_killed_past_the_deadline_whatever_it_does_with_signals(taken, monkeypatch):
    monkeypatch.setattr(aside, "_MORE_SECONDS", 0.2)
    with closing(hostile_aside()) as process:
        process.start()
        inside = process._process._popen.walled_pid
        with pytest.raises(IntegrityError, match="took longer than 0 s"):
            process.ask(("spin",), 0.4)
        assert not psutil.pid_exists(inside)
        assert process.ask(("honest", 1), 20.0) == 1


def test_memory_has_its_limit(taken):
    with closing(hostile_aside()) as process:
        with pytest.raises(IntegrityError, match=r"too much memory|ended its process"):
            process.ask(("bomb",), 60.0)
        assert process.ask(("honest", 2), 20.0) == 2


def test_a_tokenizer_says_what_keeps_it_in(monkeypatch):
    with closing(AsideTokenizer(TINY, "{{ messages[0]['content'] }}")) as made:
        walls = {wall.name: wall for wall in made.walls}
        for wall in sandbox.available():
            assert walls[wall.name].in_force == wall.in_force
        pid = made._aside._process._popen.walled_pid
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Seccomp:\t2" in status
        assert "CapEff:\t0000000000000000" in status
        links = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
        assert all(link.startswith("socket:") or link in ("/dev/null", "/null") for link in links)


def test_where_walls_are_demanded_and_none_can_be_had_nothing_is_read(monkeypatch):
    monkeypatch.setattr(aside, "BOOT", launch.boot(f"{HOSTILE}_wallless"))
    monkeypatch.setattr(constraint, "_BOOT", launch.boot(f"{HOSTILE}_wallless_grammars"))
    with pytest.raises(LocalError, match="this kernel has none"):
        AsideTokenizer(TINY, demanded=True)
    with pytest.raises(LocalError, match="this kernel has none"):
        Constraints(Tokenizer(TINY), (), demanded=True)
    with closing(AsideTokenizer(TINY)) as made:  # with limits alone
        assert [wall.name for wall in made.walls if wall.in_force] == ["limits"]
        assert made.encode("ab") == (2,)
    with closing(Constraints(Tokenizer(TINY), ())) as constraints:
        assert not constraints.compile_here(Constraint(kind="regex", text="a")).begin().done


UNPRIVILEGED = """
import json, os
os.setgroups([]); os.setresgid(10001, 10001, 10001); os.setresuid(10001, 10001, 10001)
from tests.unit.dmoe.test_walled import TINY
from dmoe.textaside import AsideTokenizer
made = AsideTokenizer(TINY)
print(json.dumps([made.encode("ab"), sorted(wall.name for wall in made.walls if not wall.in_force)]))
made.close()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_an_unprivileged_node_gets_the_same_walls():
    """As a user without any right: the namespaces are made inside a user namespace."""
    done = subprocess.run([sys.executable, "-c", UNPRIVILEGED], cwd=ROOT, capture_output=True, text=True, check=False)
    if "PermissionError" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip("another user cannot read this checkout's files, or its interpreter's")
    if "did not start" in done.stderr:
        pytest.skip("another user cannot run this interpreter")
    tokens, missing = json.loads(done.stdout)
    assert tokens == [2]
    assert set(missing) <= {"cgroup", "user"}


KILLED = """
import json, signal
from tests.unit.dmoe.test_walled import TINY
from dmoe.textaside import AsideTokenizer
made = AsideTokenizer(TINY)
popen = made._aside._process._popen
print(json.dumps([popen.pid, popen.walled_pid]), flush=True)
signal.pause()
"""


def test_nothing_is_left_of_a_process_whose_node_was_killed():
    """Outside, inside: both end with it."""
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE) as node:
        pids = json.loads(node.stdout.readline())
        node.kill()
    end = time.monotonic() + 20
    while any(psutil.pid_exists(each) and psutil.Process(each).status() != "zombie" for each in pids):
        assert time.monotonic() < end
        time.sleep(0.02)


# --- grammars


@pytest.fixture(scope="module")
def grammars():
    made = Constraints(Tokenizer(TINY), ())
    yield made
    made.close()


def said(state, count=3):
    tokens = []
    for _ in range(count):
        tokens.append(int(np.argmax(state.mask(np.zeros(3, np.float32)))))
        state.accept(tokens[-1])
    return tokens


def test_from_a_grammars_process_nothing_outside_can_be_reached(monkeypatch):
    """Also not the process that it is a copy of, nor another copy."""
    monkeypatch.setattr(constraint, "_BOOT", launch.boot(f"{HOSTILE}_grammars"))
    with closing(Constraints(Tokenizer(TINY), ())) as made:
        honest = made.compile_here(Constraint(kind="regex", text="(ab)*a"))
        with pytest.raises(RequestError) as caught:
            made.compile_here(Constraint(kind="regex", text="attempts"))
        found = json.loads(caught.value.message.partition("used: ")[2])
        assert tried(found) == []
        for deed in ("exec", "spin", "bomb", "kill host"):
            monkeypatch.setattr(constraint, "SECONDS_MAX", 0.5)
            monkeypatch.setattr(constraint, "_MORE_SECONDS", 0.5)
            with pytest.raises(RequestError, match="the regular expression cannot be used: ") as caught:
                made.compile_here(Constraint(kind="regex", text=deed, where="guided_regex"))
            assert caught.value.param == "guided_regex"
            assert said(honest.begin()) == [0, 1, 0]


def test_a_bomb_is_refused_by_name_while_others_go_on(grammars, monkeypatch):
    monkeypatch.setattr(constraint, "SECONDS_MAX", 1.0)
    monkeypatch.setattr(constraint, "_MORE_SECONDS", 0.2)
    bomb = Constraint(
        kind="regex", text="|".join(f"{n}.*{n}.*(a|b){{1,400}}" for n in range(3000)), where="guided_regex"
    )
    other, outcome = grammars.compile_here(Constraint(kind="regex", text="(ab)*")), []

    def explode():
        with pytest.raises(RequestError) as caught:
            grammars.compile_here(bomb)
        outcome.append(caught.value)

    thread = threading.Thread(target=explode)
    thread.start()
    answers = 0
    while thread.is_alive():
        assert said(other.begin()) == [0, 1, 0]
        answers += 1
    assert answers > 1
    assert outcome[0].message.startswith("guided_regex: the regular expression cannot be used: ")
    assert outcome[0].code == "invalid_request"


def test_a_step_that_never_ends_ends_its_answer_alone(monkeypatch):
    monkeypatch.setattr(constraint, "_BOOT", launch.boot(f"{HOSTILE}_grammars"))
    monkeypatch.setattr(constraint, "STEP_SECONDS", 0.3)
    with closing(Constraints(Tokenizer(TINY), ())) as made:
        honest = made.compile_here(Constraint(kind="regex", text="(ab)*")).begin()
        late = made.compile_here(Constraint(kind="regex", text="late")).begin()
        with pytest.raises(RequestError, match=r"takes longer than 0\.3 s"):
            late.mask(np.zeros(3, np.float32))
        nonsense = made.compile_here(Constraint(kind="regex", text="nonsense")).begin()
        with pytest.raises(RequestError, match=r"nonsense|ended"):
            nonsense.mask(np.zeros(3, np.float32))
        assert said(honest) == [0, 1, 0]


def test_copies_end_with_whoever_uses_them(grammars):
    host = psutil.Process(grammars._host._process.walled_pid)

    def copies():
        return {each.pid for each in host.children() if each.status() != "zombie"}

    before = copies()
    kept = [grammars.compile_here(Constraint(kind="regex", text="a*")) for _ in range(3)]
    mine = copies() - before
    assert len(mine) == 3
    kept.clear()
    end = time.monotonic() + 30
    while copies() & mine:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_host_that_was_killed_is_started_again(grammars):
    os.kill(grammars._host._process.walled_pid, signal.SIGKILL)
    wanted = Constraint(kind="regex", text="a+")
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            state = grammars.compile_here(wanted).begin()
            break
        except (LocalError, BusyError):
            continue
    assert said(state, 1) == [1] or said(state, 1) == [0]


# --- imports


@pytest.mark.parametrize("kind", ["gguf", "split folder"])
def test_a_walled_import_makes_the_same_model(tmp_path, kind):
    if kind == "gguf":
        source = write_gguf(tmp_path / "one.gguf", kind="Q4_1")
    else:
        source = write_folder(tmp_path / "one", "mixtral", files=2)
    here, there, walls = ModelStore(tmp_path / "here"), ModelStore(tmp_path / "there"), []
    manifest = import_walled(source, there, PUBLISHER, Wishes(quantisation="int8"), walls=walls.extend)
    assert manifest == import_model(source, here, PUBLISHER, Wishes(quantisation="int8"))
    for shard in manifest.shards:
        there.verify_shard(manifest.model_id, shard.id)
    in_force = {wall.name for wall in walls if wall.in_force}
    assert {wall.name for wall in sandbox.available() if wall.in_force} <= in_force


def test_a_damaged_source_is_named_as_in_this_process(tmp_path):
    source = write_gguf(tmp_path / "one.gguf", kind="Q4_1")
    source.write_bytes(source.read_bytes()[:-1000])
    found = []
    for make in (import_walled, import_model):
        with pytest.raises(IntegrityError) as caught:
            make(source, ModelStore(tmp_path / make.__name__), PUBLISHER, Wishes())
        found.append(caught.value.message)
    assert found[0] == found[1]
    assert str(source) in found[0]
    assert not list((tmp_path / "import_walled").iterdir())


@pytest.mark.parametrize(
    ("deed", "says"),
    [
        ("attempts", "{}"),
        ("leave", "ended its process"),
        ("escape", "names a file"),
        ("twice", "names a file"),
        ("more", "writes more than it said"),
        ("other", "asks for"),
        ("thief", "another publisher"),
        ("nonsense", "says nonsense"),
        ("silent", "made no step for"),
    ],
)
def test_a_process_that_imports_and_is_taken_over(tmp_path, monkeypatch, deed, says):
    monkeypatch.setattr(walled, "_BOOT", launch.boot(f"{HOSTILE}_import"))
    monkeypatch.setattr(walled, "SILENT_SECONDS_MAX", 1.0)
    source = write_folder(tmp_path / "one", "llama")
    store = ModelStore(tmp_path / "store")
    with pytest.raises(IntegrityError, match=says if deed != "attempts" else None) as caught:
        import_walled(source, store, PUBLISHER, Wishes(name=deed))
    if deed == "attempts":
        assert tried(json.loads(caught.value.message)) == []
    assert not list((tmp_path / "store").iterdir())
    assert not (tmp_path / "escaped").exists()


def test_the_modules_of_the_processes_need_no_file_once_they_are_walled():
    """What a kind imports late would be missing behind its walls: everything is there after a rehearsal."""
    assert walledwork.FAMILIES["IntegrityError"] is IntegrityError
    grammarwork.rehearse()
    assert not apart.is_inside()
