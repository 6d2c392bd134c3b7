"""What a trace shows of stages: every call for a ticket and every run, at whom, and under which part of the request."""

from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from config.errors import RiosError
from dmoe.runner import Feed
from p2p import trace
from tests.unit.dmoe.stages_kit import staged, swarm

OUTSIDE = f"00-{'a' * 32}-{'b' * 16}-01"
TEXT = tuple(range(3, 12))


@dataclass
class Kept:
    name: str
    kind: str
    parent: str
    traceparent: str
    known: dict
    error: str | None = None

    def end(self, attributes, error):
        assert self.error is None, "it ended twice"
        self.error = error


@dataclass
class Recorder:
    kept: list[Kept] = field(default_factory=list)

    def start(self, name, kind, parent, links, attributes):
        self.kept.append(Kept(name, kind, parent, f"00-{'a' * 32}-{len(self.kept) + 1:016x}-01", attributes))
        return self.kept[-1]

    def named(self, name, kind):
        return [each for each in self.kept if (each.name, each.kind) == (name, kind)]

    def under(self, span):
        return [each for each in self.kept if each.parent == span.traceparent]


@pytest.fixture
def recorder():
    made = Recorder()
    with trace.recording(made):
        yield made


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return staged(tmp_path_factory.mktemp("staged"), kind="F32")[1]


async def asked(runner):
    with trace.during(OUTSIDE):
        sequence = await runner.open(50)
        await runner.forward([Feed(sequence=sequence, tokens=TEXT)])
    await trio.testing.wait_all_tasks_blocked(0.02)  # the accounts follow behind the rows


async def test_hosts_that_answer_here_have_a_call_each(manifest, recorder):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        await asked(await net.runner(may_forward=False))
    tickets, runs = recorder.named("stage.open", "client"), recorder.named("stage.run", "client")
    assert {each.known["stage"]: each.known["peer"] for each in tickets} == {n: nodes[n].peer_id for n in range(3)}
    assert [each.known for each in runs] == [
        {"peer": nodes[n].peer_id, "stage": n, "layers": f"{n}-{n}", "rows": len(TEXT), "hosts": 1} for n in range(3)
    ]
    assert {each.parent for each in (*tickets, *runs)} == {OUTSIDE}
    for each in (*tickets, *runs):
        [served] = recorder.under(each)
        assert (served.name, served.kind) == (each.name, "server")
    assert {each.error for each in recorder.kept} == {""}


async def test_hosts_that_give_rows_on_are_a_chain_that_leads_home(manifest, recorder):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        await asked(await net.runner())
    [run] = [each for each in recorder.named("stage.run", "client") if each.parent == OUTSIDE]
    assert (run.known["peer"], run.known["hosts"], run.known["rows"]) == (nodes[0].peer_id, 3, len(TEXT))
    chain, span = [], run
    while under := recorder.under(span):
        [span] = under
        chain.append((span.name, span.kind, span.known.get("peer") if span.kind == "client" else ""))
    on = [("stage.run", "client", nodes[n].peer_id) for n in (1, 2)]
    served = ("stage.run", "server", "")
    assert chain[:-1] == [served, on[0], served, on[1], served]
    assert chain[-1][:2] == ("stage.result", "client")
    assert {each.error for each in recorder.kept} == {""}


async def test_stages_here_are_shown_and_are_no_calls(manifest, recorder):
    async with swarm(manifest) as net:
        runner = await net.runner(here=(0, 1, 2))
        await asked(runner)
        assert [each.known["peer"] for each in recorder.named("stage.run", "internal")] == [runner.node.peer_id] * 3
    assert not recorder.named("stage.run", "client")


@pytest.mark.parametrize("forward", [True, False])
async def test_a_run_that_fails_says_so(manifest, recorder, forward):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        nodes[1].segments[1].fault = RiosError("internal", "it broke")
        with pytest.raises(RiosError):
            await asked(await net.runner(may_forward=forward, timeout_ms=500))
    failed = [each for each in recorder.named("stage.run", "client") if each.error]
    assert failed
    assert all("stage 1" in each.error for each in failed if each.parent == OUTSIDE)


async def test_without_a_trace_nothing_is_shown(manifest, recorder):
    async with swarm(manifest) as net:
        for index in range(3):
            await net.node(index)
        runner = await net.runner()
        sequence = await runner.open(50)
        await runner.forward([Feed(sequence=sequence, tokens=TEXT)])
    assert recorder.kept == []
