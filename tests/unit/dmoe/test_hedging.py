"""Late calls: another replica is asked as well, the first answer is taken, both are paid, within a budget."""

import itertools

import numpy as np
import pytest
import trio
import trio.testing

from config.errors import BusyError, RemoteError
from dmoe.bills import Bills
from dmoe.core.dispatch import RETRIES_MAX
from dmoe.core.hedge import SAVED_MAX, SHARE, HedgeBudget
from dmoe.ports import Quote
from p2p.face import Reply
from p2p.services import Service
from tests.unit.dmoe.swarm_kit import ALL, QUOTE, CountingBuyer, CountingSeller, make_manifest
from tests.unit.dmoe.test_calling import answer, expected, rows, swarm

EVERYTHING = range(8)
FREE = Quote(0, 0, 0)


class Pair:
    """A caller beside two replicas of everything, after enough calls to know what is late; ``first`` is asked first,
    ``second`` is the other."""

    def __init__(self, net, caller, session, manifest):
        self.net, self.caller, self.session, self.manifest = net, caller, session, manifest
        self.hub, self.hedges = net.hub, caller.hedges

    def prefer(self, first, second):
        self.first, self.second = first.peer_id, second.peer_id
        for network, us in ((first, 100.0), (second, 50_000.0)):
            known = self.caller.dispatcher.estimate(network.peer_id)
            known.round_trip_us, known.row_us = us, 1.0

    def network(self, peer):
        return self.hub.nodes[peer]

    async def layer(self, layer=0, seed=0):
        h = rows(1, seed)
        got = await self.session.run(layer, h, ALL)
        assert got.tobytes() == expected(self.manifest, layer, h).tobytes()


async def pair(net, manifest, *, quote=FREE, buyer=None, sellers=(None, None), **options):
    await net.node(())
    nodes = [await net.node(EVERYTHING, quote=quote, seller=seller) for seller in sellers]
    if buyer is not None:
        buyer.sellers = {node.peer_id: seller for node, seller in zip(nodes, sellers, strict=True)}
    caller = await net.caller(buyer=buyer, **options)
    session = caller.session(manifest)
    for token in range(10):
        await answer(session, manifest, rows(1, token))
    made = Pair(net, caller, session, manifest)
    await trio.testing.wait_all_tasks_blocked(0.02)  # what was late on the way here is over
    caller.hedges.won, caller.hedges.budget = 0, HedgeBudget()
    made.prefer(*nodes)
    session._plans.clear()
    return made


async def until(condition):
    """Return once it holds."""
    for _ in range(4000):
        if condition():
            return
        await trio.sleep(0.005)
    raise AssertionError("it never held")


@pytest.fixture
def manifest():
    return make_manifest()


async def test_a_stalled_peer_costs_a_hedge_and_not_the_patience(manifest):
    async with swarm(manifest) as net:
        two = await pair(net, manifest)
        before = two.session.report()
        two.hub.stall(two.first)
        for layer in range(4):
            await two.layer(layer)
        after = two.session.report()
        assert two.hedges.won >= 1
        assert after.retries == before.retries, "no call ran into its deadline"
        assert after.rows[two.second] > before.rows.get(two.second, 0)
        assert two.caller.dispatcher.held(two.first, 0, 0), "the others do not wait for it as well"


async def test_without_a_second_replica_a_late_call_is_waited_for(manifest):
    async with swarm(manifest) as net:
        await net.node(())
        only = await net.node(EVERYTHING)
        caller = await net.caller()
        session = caller.session(manifest)
        for token in range(10):
            await answer(session, manifest, rows(1, token))
        net.hub.stall(only.peer_id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, session, manifest, rows(1))
            await trio.sleep(0.1)
            net.hub.wake(only.peer_id)
        assert caller.hedges.budget.hedges == 0


async def test_both_replicas_answer_and_both_are_paid_alike(manifest):
    sellers, buyer = (CountingSeller(), CountingSeller()), CountingBuyer()
    async with swarm(manifest) as net:
        two = await pair(net, manifest, quote=QUOTE, buyer=buyer, sellers=sellers)
        two.hub.stall(two.first)
        await two.layer()
        assert two.hedges.won == 1
        rows_then = sum(two.session.report().rows.values())
        two.hub.wake(two.first)
        await until(lambda: not two.caller.dispatcher.estimate(two.first).in_flight)
        await trio.testing.wait_all_tasks_blocked(0.02)
        await two.layer(3)  # the last layer counts what is owed
        await trio.testing.wait_all_tasks_blocked(0.02)
        for node, seller in zip(net.nodes[1:], sellers, strict=True):
            assert buyer.leaves[node.peer_id] == seller.leaves
            assert buyer.kflop[node.peer_id] == sum(seller.kflop.values())
        assert sum(two.session.report().rows.values()) == rows_then + 4, "who lost computed nothing of the answer"
        assert two.caller.dispatcher.estimate(two.first).in_flight == 0


async def test_what_a_loser_costs_is_on_the_bill_of_an_answer_that_is_over(manifest):
    """Nobody holds the bill any more but the call itself, and another pass is under way."""
    sellers, buyer, bills = (CountingSeller(), CountingSeller()), CountingBuyer(), Bills()
    async with swarm(manifest) as net:
        two = await pair(net, manifest, quote=QUOTE, buyer=buyer, sellers=sellers, bills=bills)
        bills.take()
        before = buyer.kflop.total()
        two.hub.stall(two.first)
        two.session.begin([bills.of("over")], [1])
        await two.layer()
        (early,) = bills.take(["over"]) or [None]
        two.session.begin([bills.of("next")], [1])
        two.hub.wake(two.first)
        await until(lambda: not two.caller.dispatcher.estimate(two.first).in_flight)
        await trio.testing.wait_all_tasks_blocked(0.02)
        lines = {}
        for spent in (early, *bills.take()):
            if spent is not None:
                assert spent.bill == "over"
                lines |= {cost.channel: cost.nano for cost in spent.costs}
        assert len(lines) == 2
        spent_nano = (buyer.kflop.total() - before) * QUOTE.microcredits_per_tflop
        assert sum(lines.values()) == spent_nano > 0


async def test_the_first_answers_after_all_while_the_hedge_is_open(manifest):
    async with swarm(manifest) as net:
        two = await pair(net, manifest)
        two.hub.stall(two.first)
        two.hub.stall(two.second)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.layer)
            await until(lambda: two.hedges.budget.hedges)
            two.hub.wake(two.first)
        assert two.hedges.won == 0
        two.hub.wake(two.second)
        await trio.testing.wait_all_tasks_blocked(0.02)
        for peer in (two.first, two.second):
            assert two.caller.dispatcher.estimate(peer).in_flight == 0


@pytest.mark.parametrize("liar", ["first", "second"])
async def test_a_wrong_answer_within_a_race_is_not_the_answer(manifest, liar):
    """The hedge is asked, then one of the two answers with something that is none: the other one's answer counts."""
    async with swarm(manifest) as net:
        two = await pair(net, manifest)
        wrong = two.first if liar == "first" else two.second
        right = two.second if liar == "first" else two.first
        go, real = trio.Event(), two.network(wrong)._services["expert.run"]

        async def lies(call):
            await go.wait()
            return Reply({"shape": [9, 9], "dtype": "fp16"}, [b"\0" * 162])

        two.network(wrong)._services["expert.run"] = Service(lies)
        two.hub.stall(right)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.layer)
            await until(lambda: two.hedges.budget.hedges)
            go.set()
            await trio.testing.wait_all_tasks_blocked(0.05)
            two.hub.wake(right)
        assert two.caller.dispatcher.held(wrong, 0, 0)
        two.network(wrong)._services["expert.run"] = real


async def test_a_dead_peer_within_a_race_is_not_asked_again(manifest):
    async with swarm(manifest) as net:
        two = await pair(net, manifest)
        two.hub.stall(two.first)
        two.hub.stall(two.second)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.layer)
            await until(lambda: two.hedges.budget.hedges)
            calls = two.hedges.budget.calls
            two.hub.kill(two.first)
            await trio.testing.wait_all_tasks_blocked(0.05)
            two.hub.wake(two.second)
        assert two.hedges.budget.calls == calls, "its hedge was waited for"


async def test_a_cancelled_layer_takes_its_hedge_with_it(manifest):
    async with swarm(manifest) as net:
        two = await pair(net, manifest)
        two.hub.stall(two.first)
        two.hub.stall(two.second)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.layer)
            await until(lambda: two.hedges.budget.hedges)
            nursery.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked(0.02)
        for peer in (two.first, two.second):
            assert two.caller.dispatcher.estimate(peer).in_flight == 0
            two.hub.wake(peer)
        await answer(two.session, manifest, rows(1))


async def test_a_budget_that_is_used_up_leaves_late_calls_to_the_patience(manifest, autojump_clock):
    autojump_clock.autojump_threshold = 0.02
    async with swarm(manifest) as net:
        two = await pair(net, manifest)
        two.hedges.budget.saved = 0.0
        two.hub.stall(two.first)
        await two.layer()
        assert two.hedges.budget.hedges == 0
        assert two.session.report().retries == 1


async def test_where_all_are_slow_the_load_stays_bounded(manifest):
    """Every call is suddenly far past what was usual: hedges stay a twentieth of the calls, and a few."""
    async with swarm(manifest) as net:
        two = await pair(net, manifest)
        net.hub.delay_s = (0.02, 0.06)
        calls, saved = two.hedges.budget.calls, two.hedges.budget.saved
        for token in range(15):
            await answer(two.session, manifest, rows(1, token))
        made = two.hedges.budget.calls - calls
        assert two.hedges.budget.hedges <= min(SAVED_MAX, saved) + SHARE * made


async def test_a_peer_that_is_always_just_in_time_is_not_hedged(manifest):
    async with swarm(manifest) as net:
        two = await pair(net, manifest)
        tails = two.caller.dispatcher.tails
        for _ in range(200):
            tails.took(two.first, 1e5, 1e2)  # a thousand times what is expected of it, as ever

        real = two.network(two.first)._services["expert.run"].handler

        async def late(call):
            await trio.sleep(0.03)
            return await real(call)

        two.network(two.first)._services["expert.run"] = Service(late)
        await two.layer()
        assert two.hedges.budget.hedges == 0


async def test_nobody_is_hedged_before_anything_is_known(manifest, autojump_clock):
    autojump_clock.autojump_threshold = 0.02
    async with swarm(manifest) as net:
        await net.node(())
        hung = await net.node(EVERYTHING)
        await net.node(EVERYTHING)
        caller = await net.caller()
        caller.dispatcher.estimate(hung.peer_id).round_trip_us = 0.0
        net.hub.stall(hung.peer_id)
        await answer(caller.session(manifest), manifest, rows(1))
        assert caller.hedges.budget.hedges == 0


@pytest.mark.flaky(reruns=1)
async def test_one_hedge_may_take_several_peers_and_leave_groups_to_the_first(manifest):
    """The late peer's groups are held by two others in parts, one of them by nobody else."""
    async with swarm(manifest) as net:
        await net.node(())
        first = await net.node(EVERYTHING)
        await net.node((0, 4))
        await net.node((1, 2, 5, 6))
        caller = await net.caller()
        session = caller.session(manifest)
        for token in range(10):
            await answer(session, manifest, rows(1, token))
        for node in net.nodes[1:]:
            known = caller.dispatcher.estimate(node.peer_id)
            known.round_trip_us, known.row_us = (100.0 if node is first else 50_000.0), 1.0
        session._plans.clear()
        caller.hedges.budget = HedgeBudget()
        net.hub.stall(first.peer_id)
        got, h = [], rows(1)

        async def ask():
            got.append(await session.run(0, h, ALL))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: caller.hedges.budget.hedges >= 2)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not got
            net.hub.wake(first.peer_id)
        assert np.array_equal(got[0], expected(manifest, 0, h))


async def test_a_race_that_nobody_wins_is_a_failed_round_like_any_other(manifest):
    async with swarm(manifest) as net:
        two = await pair(net, manifest)
        go = trio.Event()

        async def refuses(call):
            await go.wait()
            raise RemoteError("not_found", "gone")

        for peer in (two.first, two.second):
            two.network(peer)._services["expert.run"] = Service(refuses)
        async with trio.open_nursery() as nursery:

            async def ask():
                with pytest.raises(RemoteError, match="no replica of layer 0"):
                    await two.layer()

            nursery.start_soon(ask)
            await until(lambda: two.hedges.budget.hedges)
            go.set()


async def test_a_storm_of_refusals_ends_with_the_retry_budget(manifest):
    """Twenty layers at once, peers that always say busy: the calls made again are as many as the budget, not more."""
    async with swarm(manifest) as net:
        await net.node(())
        asked = 0

        async def busy(call):
            nonlocal asked
            asked += 1
            raise BusyError("full", retry_after_ms=1)

        for _ in range(2):
            (await net.node(EVERYTHING))._services["expert.run"] = Service(busy)
        caller = await net.caller()
        refused = []

        async def one(seed):
            try:
                await caller.session(manifest).run(0, rows(1, seed), ALL)
            except BusyError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for seed in range(20):
                nursery.start_soon(one, seed)
        assert len(refused) == 20
        assert caller.dispatcher.retried <= RETRIES_MAX
        first = 2 * 20  # a layer may be shared by both peers
        assert asked <= first + 2 * RETRIES_MAX


async def test_a_busy_peer_is_asked_later_and_later(manifest, autojump_clock):
    """Its hint is honoured; if it says the same again and again, the pauses grow."""
    autojump_clock.autojump_threshold = 0.02
    async with swarm(manifest) as net:
        await net.node(())
        times = []

        async def busy(call):
            times.append(trio.current_time())
            raise BusyError("full", retry_after_ms=100)

        (await net.node(EVERYTHING))._services["expert.run"] = Service(busy)
        session = (await net.caller(call_timeout_ms=5000)).session(manifest)
        with pytest.raises((BusyError, RemoteError)):
            await session.run(0, rows(1), ALL)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert gaps[0] == pytest.approx(0.1, rel=0.3)
        assert min(gaps) > 0.0999
        assert max(gaps) > 1
        assert len(times) < 15


async def test_a_node_that_stops_leaves_nobody_waiting_for_a_call(manifest):
    """What carries late calls ends first: who waits is told, and does not hang."""
    async with swarm(manifest) as net:
        two = await pair(net, manifest)
        two.hub.stall(two.first)
        two.hub.stall(two.second)
        ended = trio.Event()

        async def ask():
            with pytest.raises(RemoteError):
                await two.layer()
            ended.set()

        net.nursery.start_soon(ask)
        await until(lambda: two.hedges.budget.hedges)
        two.hedges.nursery.cancel_scope.cancel()
        two.hub.kill(two.first)
        two.hub.kill(two.second)
        with trio.fail_after(60):
            await ended.wait()
