"""Prompts go through several hosts in pieces: the hosts work at the same time, and no bit changes."""

import numpy as np
import pytest
import trio
import trio.lowlevel
import trio.testing

from config.errors import RemoteError
from dmoe.runner import Feed
from dmoe.stages.chain import Link, Rows, StageError, Way
from dmoe.stages.host import ORDER_SECONDS
from dmoe.stages.pieces import PIECES_AT_ONCE, Turn, one_behind_the_other
from tests.unit.dmoe.stages_kit import staged, swarm

LONG = tuple(n % 90 + 3 for n in range(300))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return staged(tmp_path_factory.mktemp("staged"), kind="F32")[1]


async def outputs(runner, text=LONG, sequence=None):
    sequence = sequence or await runner.open(400)
    found = await runner.forward([Feed(sequence=sequence, tokens=text, outputs=len(text))])
    return found[0]


@pytest.fixture
async def alone(manifest):
    async with swarm(manifest) as net:
        return await outputs(await net.runner(here=(0, 1, 2)))


@pytest.mark.parametrize("forward", [True, False])
async def test_a_long_prompt_goes_in_pieces_and_no_bit_changes(manifest, alone, forward):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner(may_forward=forward)
        assert np.array_equal(await outputs(runner), alone)
        for index, node in enumerate(nodes):
            assert node.segments[index].batches == [[50]] * 6


async def test_what_fails_here_is_told_as_what_it_is():
    async def through(piece: int, turn: Turn) -> None:
        if piece == 1:
            raise RemoteError("unavailable", "the head's cell is being restarted")
        await trio.lowlevel.checkpoint()

    with pytest.raises(RemoteError, match="being restarted"):
        await one_behind_the_other(3, through)


async def test_hosts_work_at_the_same_time(manifest, alone):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        nodes[2].segments[2].gate = gate = trio.Event()
        found = []
        async with trio.open_nursery() as nursery:

            async def ask():
                found.append(await outputs(runner))

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(nodes[0].segments[0].batches) == 6, "the first host has all, while the last has not one"
            gate.set()
        assert np.array_equal(found[0], alone)


async def test_short_prompts_and_other_sequences_of_the_pass_keep_their_rows(manifest):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        texts = [LONG, LONG[:7], LONG[5:130]]
        feeds = [Feed(sequence=await runner.open(400), tokens=text, outputs=2) for text in texts]
        found = await runner.forward(feeds)
        for text, rows in zip(texts, found, strict=True):
            assert np.array_equal(rows, (await outputs(runner, text))[-2:])
        assert nodes[1].segments[1].batches[0] == [50, 7, 50]


@pytest.mark.parametrize("dies", [0, 1, 2])
async def test_a_host_that_dies_between_two_pieces_changes_no_bit(manifest, alone, dies):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        sequence = await runner.open(400)
        segment = nodes[dies].segments[dies]
        found = []
        async with trio.open_nursery() as nursery:

            async def ask():
                found.append(await outputs(runner, sequence=sequence))

            nursery.start_soon(ask)
            while len(segment.batches) < 2:  # noqa: ASYNC110
                await trio.sleep(0.001)
            await net.node(dies)
            net.hub.kill(nodes[dies].peer_id)
        assert np.array_equal(found[0], alone)
        assert sequence.length == len(LONG)


async def test_a_lost_cache_is_rebuilt_in_pieces(manifest, alone):
    async with swarm(manifest) as net:
        nodes = [await net.node(index) for index in range(3)]
        runner = await net.runner()
        sequence = await runner.open(400)
        await outputs(runner, LONG[:-1], sequence=sequence)
        spare = await net.node(2)
        net.hub.kill(nodes[2].peer_id)
        assert np.array_equal(await outputs(runner, LONG[-1:], sequence=sequence), alone[-1:])
        assert spare.segments[2].batches == [[50]] * 5 + [[49], [1]]


async def direct(net, node, tickets):
    """Tickets at a node for the first stage, and what runs rows on them past the orchestrator's passes."""
    manifest = net.manifest
    runner = await net.runner()
    stage = node.host.local(manifest.model_id, manifest.stages[0].layers)
    made = [await node.host.open(stage, runner.node.peer_id, 100, signed=True) for _ in range(tickets)]
    link = Link(0, node.peer_id, manifest.stages[0].layers, 1000, b"", None)
    way = Way(manifest.model_id, manifest.wire_dtype, manifest.architecture.hidden, (link,), False)
    return made, runner._passes._shared.chains, way


async def test_pieces_that_reach_a_host_in_another_order_wait_for_each_other(manifest):
    async with swarm(manifest) as net:
        node = await net.node(0)
        (ticket,), chains, way = await direct(net, node, 1)
        width = manifest.architecture.hidden
        numbers = iter((2, 1, 3))  # who was sent later, comes first
        chains.number = lambda: next(numbers)
        x = np.ones((4, width), np.float32)
        done = []

        async def send(position, wait):
            await trio.sleep(wait)
            await chains.run(
                way, [Rows((ticket.token,), position, 4, 4)], x, trio.current_time() + 5, lambda account: None
            )
            done.append(position)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, 4, 0)
            nursery.start_soon(send, 0, 0.05)
        assert done == [0, 4]
        assert ticket.cache.length == 8
        with pytest.raises(StageError, match="run begins at 50"):
            await send(50, 0)


async def test_a_run_of_many_sequences_waits_once_for_what_is_gone(manifest, autojump_clock):
    async with swarm(manifest) as net:
        node = await net.node(0)
        tickets, chains, way = await direct(net, node, 6)
        x = np.ones((6, manifest.architecture.hidden), np.float32)
        parts = [Rows((ticket.token,), 50, 1, 1) for ticket in tickets]
        before = trio.current_time()
        with pytest.raises(StageError, match="run begins at 50"):
            await chains.run(way, parts, x, before + 60, lambda account: None)
        assert trio.current_time() - before < 2 * ORDER_SECONDS


async def test_turns_keep_the_order_and_bound_what_is_under_way():
    entered, under_way, most = [], 0, 0

    async def through(piece, turn):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for part in range(3):
            await turn.enter(part)
            entered.append((part, piece))
            await trio.sleep(0.001 * (piece % 3))
            turn.leave(part)
        under_way -= 1

    await one_behind_the_other(20, through)
    for part in range(3):
        assert [piece for at, piece in entered if at == part] == list(range(20))
    assert 1 < most <= PIECES_AT_ONCE


async def test_a_piece_that_fails_ends_the_others():
    link = Link(1, "peer", (0, 1), 1, b"", None)
    ended = []

    async def through(piece: int, turn: Turn) -> None:
        if piece == 2:
            raise StageError(link, RemoteError("unavailable", "gone"))
        try:
            await trio.sleep_forever()
        finally:
            ended.append(piece)

    with pytest.raises(StageError, match="gone"):
        await one_behind_the_other(5, through)
    assert 0 in ended
    assert 1 in ended
