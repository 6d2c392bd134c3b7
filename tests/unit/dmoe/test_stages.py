"""Stages over a network in memory: whoever computes, and whatever fails, the same bits come out."""

import re

import msgspec
import numpy as np
import pytest
import trio
import trio.testing

from config.errors import BusyError, IntegrityError, RemoteError, RequestError
from dmoe.core import stagecalls, wire
from dmoe.core.hedge import SAVED_MAX, SHARE
from dmoe.runner import Feed
from dmoe.stages.legs import GIVEN_UP_SECONDS
from tests.unit.dmoe.stages_kit import PRICED, staged, swarm
from tests.unit.dmoe.swarm_kit import CountingBuyer, CountingSeller

TEXT = tuple(range(3, 40))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return staged(tmp_path_factory.mktemp("staged"), kind="F32")[1]


async def answer(runner, text=TEXT, steps=6, sequence=None):
    """Logits of a greedy answer, and its tokens."""
    sequence = sequence or await runner.open(200)
    tokens, rows = list(text[sequence.length :]), []
    for _ in range(steps):
        (logits,) = await runner.forward([Feed(sequence=sequence, tokens=tuple(tokens))])
        rows.append(logits[0])
        tokens = [int(logits[0].argmax())]
    return np.stack(rows)


async def single(manifest, text=TEXT, steps=6):
    """The reference: every stage in one process."""
    async with swarm(manifest) as net:
        return await answer(await net.runner(here=(0, 1, 2)), text, steps)


@pytest.fixture
async def alone(manifest):
    return await single(manifest)


@pytest.mark.parametrize("forward", [True, False])
async def test_three_hosts_give_the_bits_of_one_process(manifest, alone, forward):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner(may_forward=forward)
        sequence = await runner.open(200)
        found = await answer(runner, sequence=sequence)
        assert np.array_equal(found, alone)
        assert all(node.host.statistics()["runs"] == 6 for node in nodes)
        assert nodes[0].host.statistics()["forwarded"] == (6 if forward else 0)
        report = sequence.report()
        assert report.expert_rows == {node.peer_id: len(TEXT) + 5 for node in nodes}
        assert report.serving[nodes[1].peer_id] == {"layers": [1], "experts": []}
        sequence.close()
        await trio.testing.wait_all_tasks_blocked(0.02)  # the accounts follow behind the rows
        assert all(node.host.statistics()["sequences"] == 0 for node in nodes)
        assert all(cache.closed for node in nodes for each in node.segments.values() for cache in each.opened)


async def test_a_stage_here_between_two_elsewhere_gives_the_same_bits(manifest, alone):
    async with swarm(manifest) as net:
        nodes = [await net.node(0), await net.node(2)]
        runner = await net.runner(here=(1,))
        assert np.array_equal(await answer(runner), alone)
        assert [node.host.statistics()["runs"] for node in nodes] == [6, 6]


async def test_a_pass_of_several_sequences_is_one_message_and_changes_no_bit(manifest, alone):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        texts = [TEXT, TEXT[:5], TEXT[3:20]]
        sequences = [await runner.open(200) for _ in texts]
        singles = [await single(manifest, text) for text in texts]
        feeds = list(texts)
        runs = nodes[0].host.statistics()["runs"]
        for step in range(6):
            wanted = [Feed(sequence=s, tokens=tuple(t)) for s, t in zip(sequences, feeds, strict=True)]
            found = await runner.forward(wanted)
            for logits, expected in zip(found, singles, strict=True):
                assert np.array_equal(logits[0], expected[step])
            feeds = [(int(logits[0].argmax()),) for logits in found]
        assert nodes[2].host.statistics()["runs"] - runs == 6
        assert nodes[1].segments[1].batches[-1] == [1, 1, 1]


async def test_outputs_of_the_last_rows_and_hidden_rows(manifest):
    async with swarm(manifest) as net:
        for index in range(3):
            await net.node(index)
        runner = await net.runner()
        for want in ("logits", "hidden"):
            found, none = await runner.forward(
                [
                    Feed(sequence=await runner.open(64), tokens=TEXT, outputs=4, want=want),
                    Feed(sequence=await runner.open(64), tokens=TEXT[:3], outputs=0),
                ]
            )
            assert none.shape[0] == 0
            sequence = await runner.open(64)
            for n, token in enumerate(TEXT):
                (one,) = await runner.forward([Feed(sequence=sequence, tokens=(token,), want=want)])
                if n >= len(TEXT) - 4:
                    assert np.array_equal(found[n - len(TEXT) + 4], one[0])


async def test_refused_drafts_leave_no_trace(manifest, alone):
    async with swarm(manifest) as net:
        for index in range(3):
            await net.node(index)
        runner = await net.runner()
        sequence = await runner.open(200)
        tokens, rows = TEXT, []
        for _ in range(6):
            (logits,) = await runner.forward([Feed(sequence=sequence, tokens=(*tokens, 1, 2, 3), outputs=4)])
            sequence.truncate(sequence.length - 3)
            rows.append(logits[0])
            tokens = (int(logits[0].argmax()),)
        assert np.array_equal(np.stack(rows), alone)


async def test_a_fork_starts_with_anothers_prefix_without_computing_it(manifest):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        first = await runner.open(200)
        await runner.forward([Feed(sequence=first, tokens=TEXT)])
        rows = nodes[1].segments[1].batches
        fork = await runner.open(100, like=first, length=20)
        assert fork.length == 20
        found = await answer(runner, (*TEXT[:20], 7, 8), sequence=fork)
        assert sum(map(sum, rows)) == len(TEXT) + 2 + 5
        assert np.array_equal(found, await single(manifest, (*TEXT[:20], 7, 8)))
        (after,) = await runner.forward([Feed(sequence=first, tokens=(5,))])
        assert np.array_equal(after, await single(manifest, (*TEXT, 5), steps=1))


@pytest.mark.parametrize("dies", [0, 1, 2])
@pytest.mark.parametrize("forward", [True, False])
async def test_the_death_of_a_host_changes_no_bit(manifest, alone, dies, forward):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner(may_forward=forward)
        sequence = await runner.open(200)
        other = await runner.open(200)
        await runner.forward([Feed(sequence=other, tokens=TEXT[:9])])
        head = await answer(runner, sequence=sequence, steps=3)
        spare = await net.node(dies)
        net.hub.kill(nodes[dies].peer_id)
        tokens, rows = int(head[-1].argmax()), list(head)
        for _ in range(3):
            (logits, _) = await runner.forward(
                [Feed(sequence=sequence, tokens=(tokens,)), Feed(sequence=other, tokens=(tokens,))]
            )
            rows.append(logits[0])
            tokens = int(logits[0].argmax())
        assert np.array_equal(np.stack(rows), alone)
        assert spare.host.statistics()["sequences"] == 2
        report = sequence.report()
        assert report.retries > 0
        assert {nodes[dies].peer_id, spare.peer_id} <= set(report.serving)
        behind = [node.segments[index] for index, node in enumerate(nodes) if index > dies]
        assert all(sum(map(sum, segment.batches)) < 2 * len(TEXT) + 20 for segment in behind), "only what is needed"


async def test_a_death_in_the_middle_of_a_pass(manifest, alone):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        sequence = await runner.open(200)
        nodes[1].segments[1].gate = trio.Event()
        found = []
        async with trio.open_nursery() as nursery:

            async def ask():
                found.append(await answer(runner, sequence=sequence))

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.02)  # the accounts follow behind the rows
            await net.node(1)
            net.hub.kill(nodes[1].peer_id)
        assert np.array_equal(found[0], alone)


@pytest.fixture
def autojump_clock():
    """Time jumps once nothing happens for a while: a stage's thread must not look like a peer that hangs."""
    return trio.testing.MockClock(autojump_threshold=0.01)


@pytest.mark.parametrize("stalls", [0, 1, 2])
@pytest.mark.parametrize("forward", [True, False])
async def test_a_host_that_stalls_is_left_long_before_the_timeout(manifest, stalls, forward, autojump_clock):
    alone = await single(manifest)
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner(may_forward=forward, timeout_ms=10_000)
        usual = await runner.open(200)
        for _ in range(24):
            await runner.forward([Feed(sequence=usual, tokens=(5,))])
        spares = [await net.node(index) for index in range(3)]
        sequence = await runner.open(200)
        for stage, leg in sequence.legs.items():
            assert leg.link.peer in (nodes[stage].peer_id, spares[stage].peer_id)
        head = await answer(runner, sequence=sequence, steps=3)
        stalled = sequence.legs[stalls].link.peer
        net.hub.stall(stalled)
        before = trio.current_time()
        (logits,) = await runner.forward([Feed(sequence=sequence, tokens=(int(head[-1].argmax()),))])
        assert trio.current_time() - before < 4
        assert np.array_equal(logits[0], alone[3])
        assert sequence.legs[stalls].link.peer != stalled
        assert sequence.retries > 0
        net.hub.wake(stalled)
        other = await runner.open(200)
        assert np.array_equal(await answer(runner, sequence=other), alone)


async def test_a_host_that_nobody_could_replace_is_waited_for(manifest, autojump_clock):
    alone = await single(manifest)
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner(timeout_ms=10_000)
        usual = await runner.open(200)
        for _ in range(24):
            await runner.forward([Feed(sequence=usual, tokens=(5,))])
        sequence = await runner.open(200)
        head = await answer(runner, sequence=sequence, steps=3)
        net.hub.stall(nodes[1].peer_id)
        found = []
        async with trio.open_nursery() as nursery:

            async def ask():
                found.extend(await runner.forward([Feed(sequence=sequence, tokens=(int(head[-1].argmax()),))]))

            nursery.start_soon(ask)
            await trio.sleep(9)
            net.hub.wake(nodes[1].peer_id)
        assert np.array_equal(found[0][0], alone[3])
        assert sequence.retries == 0


async def test_a_swarm_that_is_slow_as_a_whole_is_waited_for(manifest, autojump_clock):
    """Every pass is suddenly far slower than usual: few are given up, and every answer comes."""
    async with swarm(manifest) as net:
        for index in (0, 1, 2, 0, 1, 2):
            await net.node(index)
        runner = await net.runner(timeout_ms=10_000)
        sequence = await runner.open(200)
        for _ in range(24):
            await runner.forward([Feed(sequence=sequence, tokens=(5,))])
        net.hub.delay_s = (1.0, 1.2)
        for _ in range(20):
            await runner.forward([Feed(sequence=sequence, tokens=(5,))])
        assert sequence.length == 44
        budget = runner._passes._patience.budget
        assert budget.hedges <= SAVED_MAX + SHARE * budget.calls


async def test_a_stage_that_nobody_holds_is_named_with_its_layers(manifest):
    async with swarm(manifest) as net:
        await net.node(0)
        last = await net.node(2)
        runner = await net.runner()
        with pytest.raises(RemoteError, match=r"layers 1 to 1 \(stage-l01-01\)") as error:
            await runner.open(100)
        assert error.value.code == "no_replica"
        middle = await net.node(1)
        sequence = await runner.open(100)
        await runner.forward([Feed(sequence=sequence, tokens=TEXT)])
        net.hub.kill(middle.peer_id)
        with pytest.raises(RemoteError, match="stage-l01-01") as error:
            await runner.forward([Feed(sequence=sequence, tokens=(1,))])
        assert error.value.code == "no_replica"
        assert sequence.length == len(TEXT), "a pass that fails changes nothing"
        await net.node(1)
        (after,) = await runner.forward([Feed(sequence=sequence, tokens=(1,))])
        assert np.array_equal(after, await single(manifest, (*TEXT, 1), steps=1))
        assert last.host.statistics()["sequences"] == 1


async def test_the_error_says_where_a_stage_has_gone_and_when_it_was_last_seen(manifest, autojump_clock):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        await nodes[1].unload(1)
        with pytest.raises(RemoteError, match=r"stage-l01-01 \(layers 1 to 1\): it was never seen"):
            await runner.open(100)
        nodes[1].load(1)
        sequence = await runner.open(100)
        await runner.forward([Feed(sequence=sequence, tokens=TEXT)])
        await trio.sleep(60)
        await runner.forward([Feed(sequence=sequence, tokens=(1,))])  # it answers: seen, though nobody looked for it
        await trio.sleep(20)
        net.hub.kill(nodes[1].peer_id)
        await trio.sleep(20)
        gone = re.escape(nodes[1].peer_id) + r" \(last seen (\d+) s ago, last answered \d+ s ago\)"
        for ask in (
            lambda: runner.forward([Feed(sequence=sequence, tokens=(1,))]),
            lambda: runner.open(100),
        ):
            await trio.sleep(GIVEN_UP_SECONDS)
            with pytest.raises(RemoteError) as error:
                await ask()
            assert error.value.code == "no_replica"
            told = re.search(gone, error.value.message)
            assert told, error.value.message
            assert 35 < int(told[1]) < 75
        assert f"stage-l01-01 (layers 1 to 1): last seen {told[1]} s ago; replicas: " in error.value.message
        assert "stage-l00-00" not in error.value.message


async def test_replicas_of_a_stage_that_are_there_and_fail_are_named(manifest):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        sequence = await runner.open(100)
        nodes[1].segments[1].fault = ValueError("broken")
        with pytest.raises(RemoteError, match=r"stage-l01-01 \(layers 1 to 1\): ") as error:
            await runner.forward([Feed(sequence=sequence, tokens=TEXT)])
        assert f"replicas: {nodes[1].peer_id} (seen now, " in error.value.message


@pytest.mark.parametrize("last", [0, 1])
async def test_who_failed_a_stage_last_is_probed_last(manifest, alone, last):
    """All replicas rest after a failure: the one that failed earlier may be well again."""
    async with swarm(manifest) as net:
        await net.node(0)
        both = [await net.node(1), await net.node(1)]
        await net.node(2)
        latest, older = both[last], both[1 - last]
        runner = await net.runner()
        now = trio.current_time()
        runner._legs._refused[1] = {latest.peer_id: now + 30, older.peer_id: now + 20}
        sequence = await runner.open(200)
        assert sequence.legs[1].link.peer == older.peer_id
        assert np.array_equal(await answer(runner, sequence=sequence), alone)
        net.hub.kill(older.peer_id)
        sequence = await runner.open(200)
        assert sequence.legs[1].link.peer == latest.peer_id, "at last even that one: better a probe than an error"


@pytest.mark.parametrize("last", [0, 1])
async def test_what_stands_is_kept_where_its_host_was_the_last_to_fail(manifest, last):
    async with swarm(manifest) as net:
        ends, middles = await net.node(0, 2), [await net.node(1), await net.node(1)]
        latest, older = middles[last], middles[1 - last]
        runner = await net.runner()
        sequence = await runner.open(200)
        await runner.forward([Feed(sequence=sequence, tokens=TEXT)])
        sequence.drop(1)
        now = trio.current_time()
        refused = {0: {ends.peer_id: now + 30}, 1: {latest.peer_id: now + 30, older.peer_id: now + 20}}
        runner._legs._refused.update(refused)
        await runner.forward([Feed(sequence=sequence, tokens=(1,))])
        assert [sequence.legs[stage].link.peer for stage in range(3)] == [ends.peer_id, older.peer_id, ends.peer_id]
        assert ends.host.statistics()["sequences"] == 2, "its caches are those it had"


async def test_a_host_that_drains_answers_what_it_has_taken_and_takes_nothing_more(manifest, alone):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        sequence = await runner.open(200)
        head = await answer(runner, sequence=sequence, steps=3)
        leaving, found, drained = nodes[1], [], trio.Event()
        gate = leaving.segments[1].gate = trio.Event()

        async def ask():
            found.extend(await runner.forward([Feed(sequence=sequence, tokens=(int(head[-1].argmax()),))]))

        async def drain():
            await leaving.host.drain()
            drained.set()
            net.hub.kill(leaving.peer_id)  # as a process that ends

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while not leaving.host.statistics()["active"]:  # noqa: ASYNC110 - it tells nobody when that changes
                await trio.sleep(0.001)
            nursery.start_soon(drain)
            await trio.sleep(0.05)
            assert not drained.is_set(), "it waits for the run that it has taken"
            gate.set()
        assert np.array_equal(found[0][0], alone[3])
        assert sequence.retries == 0, "the call was not lost"
        await net.node(1)
        (after,) = await runner.forward([Feed(sequence=sequence, tokens=(int(found[0][0].argmax()),))])
        assert np.array_equal(after[0], alone[4])


async def test_hosts_that_do_not_reach_each_other_answer_here(manifest, alone):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        net.hub.partition(nodes[0].peer_id, nodes[1].peer_id)
        runner = await net.runner()
        sequence = await runner.open(200)
        assert np.array_equal(await answer(runner, sequence=sequence), alone)
        assert sequence.hub
        assert nodes[0].host.statistics()["forwarded"] == 1


async def test_a_ticket_that_expired_is_made_anew(manifest, alone):
    async with swarm(manifest) as net:
        nodes = [await net.node(index, idle_seconds=0.05) for index in range(3)]
        runner = await net.runner()
        sequence = await runner.open(200)
        head = await answer(runner, sequence=sequence, steps=3)
        await trio.sleep(0.1)
        for node in nodes:
            node.host._tickets.expire(trio.current_time())
            assert node.host.statistics()["kv_bytes"] == 0
        token = int(head[-1].argmax())
        (logits,) = await runner.forward([Feed(sequence=sequence, tokens=(token,))])
        assert np.array_equal(logits[0], alone[3])


async def test_what_runs_at_a_host_is_paid_for_and_both_sides_count_alike(manifest):
    sellers, buyer = [CountingSeller() for _ in range(3)], CountingBuyer()
    async with swarm(manifest) as net:
        nodes = [await net.node(index, quote=PRICED, seller=sellers[index]) for index in range(3)]
        buyer.sellers = {node.peer_id: seller for node, seller in zip(nodes, sellers, strict=True)}
        runner = await net.runner(buyer=buyer)
        sequence = await runner.open(200)
        await answer(runner, sequence=sequence, steps=4)
        await trio.testing.wait_all_tasks_blocked(0.02)  # the accounts follow behind the rows
        for index, node in enumerate(nodes):
            rows = [len(TEXT), 1, 1, 1]
            kflop = sum(count * manifest.stages[index].flops_per_row // 1000 for count in rows)
            assert sum(sellers[index].kflop.values()) == kflop == buyer.kflop[node.peer_id]
            assert sellers[index].leaves == buyer.leaves[node.peer_id]
        assert len({leaf for seller in sellers for leaf in seller.leaves}) == 12
        sellers[1].channels.clear()
        buyer.poor = {nodes[1].peer_id}
        with pytest.raises(RemoteError) as error:
            await runner.forward([Feed(sequence=sequence, tokens=(1,))])
        assert error.value.code == "no_replica"


async def test_a_cancelled_pass_changes_nothing(manifest, alone):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        sequence = await runner.open(200)
        head = await answer(runner, sequence=sequence, steps=3)
        gate = nodes[2].segments[2].gate = trio.Event()
        with trio.move_on_after(0.05) as scope:
            await runner.forward([Feed(sequence=sequence, tokens=(1, 2, 3))])
        assert scope.cancelled_caught
        gate.set()
        token = int(head[-1].argmax())
        (logits,) = await runner.forward([Feed(sequence=sequence, tokens=(token,))])
        assert np.array_equal(logits[0], alone[3])


async def test_tokens_that_do_not_fit_are_refused(manifest):
    async with swarm(manifest) as net:
        for index in range(3):
            await net.node(index)
        runner = await net.runner()
        with pytest.raises(RequestError, match="context"):
            await runner.open(1000)
        sequence = await runner.open(10)
        with pytest.raises(RequestError, match="10 positions"):
            await runner.forward([Feed(sequence=sequence, tokens=TEXT)])
        assert sequence.length == 0


async def test_a_host_of_several_stages_dies_with_all_of_them(manifest, alone):
    async with swarm(manifest) as net:
        both, last = await net.node(0, 1), await net.node(2)
        runner = await net.runner()
        sequence = await runner.open(200)
        head = await answer(runner, sequence=sequence, steps=3)
        spare = await net.node(0, 1, 2)
        net.hub.kill(both.peer_id)
        (logits,) = await runner.forward([Feed(sequence=sequence, tokens=(int(head[-1].argmax()),))])
        assert np.array_equal(logits[0], alone[3])
        assert set(sequence.report().serving) == {both.peer_id, last.peer_id, spare.peer_id}


async def test_a_host_without_room_is_left_for_one_with_room_and_named_if_there_is_none(manifest, alone):
    async with swarm(manifest) as net:
        full = [await net.node(index, sequences_max=1) for index in range(3)]
        runner = await net.runner()
        first = await runner.open(200)
        second = await runner.open(200)  # its legs come later, where there is room
        with pytest.raises(BusyError, match=r"stage-l0\d-0\d"):
            await runner.forward([Feed(sequence=second, tokens=TEXT)])
        assert second.length == 0
        await net.node(0, 1, 2)
        assert np.array_equal(await answer(runner, sequence=second), alone)
        assert np.array_equal(await answer(runner, sequence=first), alone)
        assert all(node.host.statistics()["sequences"] == 1 for node in full)


async def test_a_host_that_stalled_takes_work_again_and_learns_that_it_is_quick(manifest):
    async with swarm(manifest) as net:
        node = await net.node(0)
        stage = node.host.local(manifest.model_id, manifest.stages[0].layers)
        ticket = await node.host.open(stage, node.peer_id, 10)
        stage.row_seconds = 60.0  # the machine slept in the middle of a row
        x = np.ones((4, manifest.architecture.hidden), np.float32)
        await node.host.compute([ticket], [(0, 4)], x, trio.current_time() + 2, 1)
        assert stage.row_seconds < 60.0
        assert stage.refused == 0


async def test_a_cancelled_run_whose_ticket_is_closed_spoils_no_other_run(manifest):
    async with swarm(manifest) as net:
        node = await net.node(0)
        stage, segment = node.host.local(manifest.model_id, manifest.stages[0].layers), node.segments[0]
        gone, stays = [await node.host.open(stage, node.peer_id, 10) for _ in range(2)]
        x = np.ones((1, manifest.architecture.hidden), np.float32)
        segment.gate, found = trio.Event(), []

        async def ask(ticket, number):
            found.append(await node.host.compute([ticket], [(0, 1)], x, trio.current_time() + 5, number))

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as leaving:
                leaving.start_soon(ask, gone, 1)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(ask, stays, 2)
                await trio.testing.wait_all_tasks_blocked()
                leaving.cancel_scope.cancel()
            node.host.close(gone)
            assert not gone.cache.closed, "its batch is still running"
            segment.gate.set()
        assert gone.cache.closed
        assert len(found) == 1
        assert node.host.statistics()["kv_bytes"] == stays.kv_bytes


async def test_a_sequence_that_cannot_be_opened_leaves_nothing_at_its_hosts(manifest, monkeypatch):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        fault = RequestError("too_large", "no")

        async def refuse(*args, **kwargs):
            await trio.testing.wait_all_tasks_blocked()
            raise fault

        monkeypatch.setattr(nodes[2].host, "open", refuse)
        with pytest.raises((RemoteError, RequestError), match="no"):
            await runner.open(100)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert [node.host.statistics()["sequences"] for node in nodes] == [0, 0, 0]


async def test_many_answers_of_a_route_that_is_gone_fail_in_the_time_of_one(manifest, autojump_clock):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner(timeout_ms=1000)
        sequences = [await runner.open(100) for _ in range(16)]
        nodes[1].segments[1].gate = trio.Event()  # it takes runs and never answers
        feeds = [Feed(sequence=sequence, tokens=TEXT) for sequence in sequences]
        start = trio.current_time()
        with pytest.raises(RemoteError, match="stage-l01-01"):
            await runner.forward(feeds)
        once = trio.current_time() - start
        assert once < 3 * 4 * 1.0 + 5, "tries are bounded in time"
        for feed in feeds:
            with pytest.raises(RemoteError):
                await runner.forward([feed])
        assert trio.current_time() - start < 2 * once + 5


async def test_rows_do_not_go_round_in_circles(manifest):
    async with swarm(manifest) as net:
        node, other = await net.node(0), await net.node()
        stage = node.host.local(manifest.model_id, manifest.stages[0].layers)
        ticket = (await node.host.open(stage, other.peer_id, 10)).token
        x = np.ones((1, manifest.architecture.hidden), np.float32)
        shape, buffer = wire.encode(x, manifest.wire_dtype)
        hops = [stagecalls.Hop(node.peer_id, (ticket,))] * 100
        header = stagecalls.run_header(1, [stagecalls.Part(ticket, 0, 1, 1)], hops, shape, reply=False)
        with pytest.raises(RemoteError, match="twice"):
            await other.network.call(node.peer_id, stagecalls.RUN, header, (buffer,), deadline_ms=2000)
        assert node.host.statistics()["forwarded"] == 0


async def test_who_holds_most_makes_room_for_who_holds_little(manifest):
    async with swarm(manifest) as net:
        node, greedy, modest = await net.node(0, sequences_max=4), await net.node(), await net.node()
        stage = node.host.local(manifest.model_id, manifest.stages[0].layers)
        tickets = [await node.host.open(stage, greedy.peer_id, 10) for _ in range(4)]
        with pytest.raises(BusyError):
            await node.host.open(stage, greedy.peer_id, 10)
        for _ in range(2):
            await node.host.open(stage, modest.peer_id, 10)
        with pytest.raises(BusyError):
            await node.host.open(stage, modest.peer_id, 10)
        assert [ticket.closed for ticket in tickets] == [True, True, False, False]


async def test_openings_at_once_stay_within_the_bounds(manifest):
    async with swarm(manifest) as net:
        node = await net.node(0, sequences_max=2)
        stage, opened, refused = node.host.local(manifest.model_id, manifest.stages[0].layers), [], []

        async def ask():
            try:
                opened.append(await node.host.open(stage, node.peer_id, 10))
            except BusyError as error:
                refused.append(error)

        async with stage._passes, trio.open_nursery() as nursery:  # a batch is running
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert len(refused) == 3
            stage._passes.release()
            await trio.testing.wait_all_tasks_blocked()
            await stage._passes.acquire()
        assert len(opened) == 2


async def test_rows_that_cannot_be_computed_fail_their_own_run_alone(manifest):
    async with swarm(manifest) as net:
        node = await net.node(0)
        stage, segment = node.host.local(manifest.model_id, manifest.stages[0].layers), node.segments[0]
        width, run, outcome = manifest.architecture.hidden, segment.run, {}

        async def picky(x, parts):
            if (x > 100).any():
                raise IntegrityError("integrity", "activations hold a value that is not finite")
            return await run(x, parts)

        segment.run, segment.gate = picky, trio.Event()
        tickets = [await node.host.open(stage, node.peer_id, 10) for _ in range(4)]

        async def ask(number):
            x = np.full((1, width), 1000.0 if number == 2 else 1.0, np.float32)
            try:
                await node.host.compute([tickets[number]], [(0, 1)], x, trio.current_time() + 5, number)
                outcome[number] = "ok"
            except IntegrityError as error:
                outcome[number] = error.code

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 0)
            await trio.testing.wait_all_tasks_blocked()
            for number in (1, 2, 3):
                nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
            segment.gate.set()
        assert outcome == {0: "ok", 1: "ok", 2: "integrity", 3: "ok"}


@pytest.mark.parametrize("gone", ["dead", "paused", "unloaded"])
async def test_a_fork_of_a_sequence_whose_host_is_gone_is_made_elsewhere(manifest, gone):
    """What is remembered of an earlier answer must not tie the next one to a host that has left."""
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        first = await runner.open(200)
        await runner.forward([Feed(sequence=first, tokens=TEXT)])
        spare = await net.node(1)
        await _leave(net, nodes[1], gone)
        await trio.testing.wait_all_tasks_blocked(0.02)
        for _ in range(2):  # and the one after that
            fork = await runner.open(100, like=first, length=20)
            found = await answer(runner, (*TEXT[:20], 7, 8), sequence=fork)
            assert np.array_equal(found, await single(manifest, (*TEXT[:20], 7, 8)))
        assert spare.host.statistics()["runs"] > 0


@pytest.mark.parametrize("gone", ["dead", "paused", "unloaded"])
async def test_a_sequence_that_lacks_a_leg_goes_on_though_another_host_has_left_the_view(manifest, alone, gone):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        sequence = await runner.open(200)
        head = await answer(runner, sequence=sequence, steps=3)
        for index in (0, 1):
            await net.node(index)
        sequence.drop(0)
        await _leave(net, nodes[1], gone)
        await trio.testing.wait_all_tasks_blocked(0.02)
        (logits,) = await runner.forward([Feed(sequence=sequence, tokens=(int(head[-1].argmax()),))])
        assert np.array_equal(logits[0], alone[3])


async def _leave(net, node, how):
    if how == "dead":
        net.hub.kill(node.peer_id)
    elif how == "paused":
        node.paused = True
        node.network.directory.update(lambda advert: msgspec.structs.replace(advert, paused=True))
    else:
        await node.unload(1)


async def test_sequences_are_closed_without_a_word_once_nobody_calls_any_more(manifest):
    async with trio.open_nursery() as nursery:
        async with swarm(manifest) as net:
            for index in range(3):
                await net.node(index)
            runner = await net.runner()
            sequence = await runner.open(200)
            await runner.forward([Feed(sequence=sequence, tokens=TEXT)])

            async def closes_last():
                try:
                    await trio.sleep_forever()
                finally:
                    sequence.close()  # while its nursery is being left, or after that

            nursery.start_soon(closes_last)
            await trio.testing.wait_all_tasks_blocked(0.02)
        nursery.cancel_scope.cancel()
