"""A fresh node comes by its checkpoint: slow peers, peers that stall, peers that have none, many of them."""

from random import Random

import msgspec
import pytest
import trio

from config.errors import RemoteError
from ledger import offers
from ledger.core import checkpoint
from ledger.core.errors import RuleError
from ledger.core.objects import Committee, Entry, Grant, Issuer, Transfer, parse, sign
from ledger.core.sync import Digests
from ledger.offers import Offer, Offers
from p2p.core import codec
from p2p.core.identity import peer_id_of
from p2p.face import Reply
from p2p.memory import MemoryHub
from p2p.services import Service
from tests.unit.ledger.ledger_kit import Maker, identity
from tests.unit.ledger.test_checkpoint import nodes, summary_of
from tests.unit.ledger.test_checkpoint_peers import junk, offers_of, with_entries
from tests.unit.ledger.test_network import CREDIT, swarm, until, work


@pytest.fixture
def maker():
    return Maker(5, f=1)


async def pruned(s):
    """Four witnesses with one checkpoint and nothing below it."""
    await s.four()
    proof = await s.made[0].checkpoints.propose()
    for n in (1, 2, 3):
        await s.made[n].checkpoints.obtain()
    for n in range(4):
        await s.made[n].checkpoints.prune()
    return proof


def slow(s, n, seconds):
    """Node ``n`` takes so long for every page."""
    services = s.hub.nodes[s.made[n]._identity.peer_id]._services
    page = services["ledger.page"].handler

    async def later(call):
        await trio.sleep(seconds)
        return await page(call)

    services["ledger.page"] = Service(later)


def bare(s, count):
    """Peers that know the ledger and keep no checkpoint."""

    async def none(_call):
        return Reply({}, [])

    for n in range(count):
        s.hub.add(identity(800 + n)).serve("ledger.checkpoint", none)


async def starts(s, seconds):
    """A new node, and how long it took to start from a checkpoint."""
    begin = trio.current_time()
    new = await s.start(7)
    with trio.move_on_after(seconds):
        await until(new.book.store.shelf.base)
    assert new.book.store.shelf.base(), f"no checkpoint after {seconds} s"
    return new, trio.current_time() - begin


async def test_a_checkpoint_may_take_longer_than_a_round(tmp_path, maker, autojump_clock, monkeypatch):
    monkeypatch.setattr(checkpoint, "PAGE_LINES", 1)
    async with nodes(tmp_path, maker) as s:
        await pruned(s)
        for n in range(4):
            slow(s, n, 18)
        _, took = await starts(s, 200)
        assert took > 60
        await s.same()


async def test_a_peer_that_dribbles_with_a_higher_number_wedges_nobody(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        proof = await pruned(s)
        liar = s.hub.add(identity(700))

        async def newest(_call):
            return Reply({"proof": codec.encode(with_entries(proof, 1 << 40)), "pages": 1 << 16}, [])

        async def page(call):
            await trio.sleep(15)
            return Reply({}, [junk(call, 8)])

        liar.serve("ledger.checkpoint", newest)
        liar.serve("ledger.page", page)
        _, took = await starts(s, 250)
        assert took < 30


@pytest.mark.parametrize("gives_up", [False, True])
async def test_a_slow_peer_has_another_beside_it_and_is_left_out(autojump_clock, gives_up):
    """It shows what the others show, only its pages never come; whether or not the caller waits for another's."""
    maker, hub = Maker(5, f=1), MemoryHub(1)
    maker.entry(0, Grant(maker.people[1].public_key, 1))
    summary, (page,) = summary_of(maker.state)
    me, dribbler, good = (hub.add(identity(700 + n)) for n in range(3))

    async def serve_never(_call):
        await trio.sleep_forever()

    async def serve(_call):
        await trio.sleep(10)
        return Reply({}, [codec.encode(page)])

    dribbler.serve("ledger.page", serve_never)
    good.serve("ledger.page", serve)
    ask = offers_of(me, maker)
    signed = tuple(checkpoint.sign_checkpoint(p, maker.genesis.net, summary) for p in maker.people[:3])
    shown = [
        Offer(node.peer_id, checkpoint.Proof(summary, signed), 1, (), maker.state.committees)
        for node in (dribbler, good)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offers, "DEADLINE_MS", 10**7)
        with trio.move_on_after(5 if gives_up else 80):
            offer, encoded, _ = await ask.fetch(shown, lambda _: None, 5)
            assert (offer.peer_id, encoded) == (good.peer_id, [codec.encode(page)])
            assert trio.current_time() < offers.BESIDE_AFTER_S + 15
    assert {*ask._shunned} == {dribbler.peer_id}


async def test_who_wastes_long_is_left_out_for_longer(autojump_clock, monkeypatch):
    monkeypatch.setattr(offers, "DEADLINE_MS", 10**7)
    maker, hub = Maker(5, f=1), MemoryHub(1)
    me, dribbler = hub.add(identity(700)), hub.add(identity(701))

    async def never(_call):
        await trio.sleep_forever()

    dribbler.serve("ledger.page", never)
    ask, (summary, _) = offers_of(me, maker), summary_of(maker.state)
    offer = Offer(dribbler.peer_id, checkpoint.Proof(summary, ()), 1, (), maker.state.committees)
    with pytest.raises(Exception, match="did not come"):
        await ask.fetch([offer], lambda _: None, 5)
    assert ask._shunned[dribbler.peer_id] - trio.current_time() > offers.FETCH_S


@pytest.mark.parametrize("strangers", [8, 40])
async def test_older_links_without_a_checkpoint_keep_nobody_from_one(tmp_path, maker, autojump_clock, strangers):
    async with nodes(tmp_path, maker) as s:
        bare(s, strangers)
        await pruned(s)
        _, took = await starts(s, 100)
        assert took < 60
        await s.same()


async def test_witnesses_are_asked_without_a_link_and_by_chance_else(autojump_clock):
    maker, hub = Maker(5, f=1), MemoryHub(1)
    me, asked = hub.add(identity(700)), []

    def serve(network):
        async def none(_call):
            asked.append(network.peer_id)
            return Reply({}, [])

        network.serve("ledger.checkpoint", none)
        return network.peer_id

    witnesses = {serve(hub.add(person)) for person in maker.people[:4]}
    strangers = [serve(hub.add(identity(800 + n))) for n in range(100)]
    me.peers = lambda: strangers
    seen = set()
    for seed in range(3):
        asked.clear()
        ask = offers_of(me, maker)
        ask._random = Random(seed)
        assert await ask.best(1, above=0) == []
        assert {*asked[:8]} > witnesses
        assert len(asked) == len({*asked}) == offers.ASKED_MAX * offers.GROUPS_MAX
        seen |= {*asked}
    assert len(seen) > 60


async def test_a_group_that_stalls_does_not_hold_up_the_next(autojump_clock):
    maker, hub = Maker(5, f=1), MemoryHub(1)
    me = hub.add(identity(700))

    async def never(_call):
        await trio.sleep_forever()

    for n in range(30):
        hub.add(identity(800 + n)).serve("ledger.checkpoint", never)
    start = trio.current_time()
    await offers_of(me, maker).best(1, above=0)
    assert trio.current_time() - start < 2 * offers.OFFER_S


def test_an_unsigned_number_is_believed_last():
    maker = Maker(5, f=1)
    ask = offers_of(MemoryHub(1).add(identity(700)), maker)
    summary, _ = summary_of(maker.state)

    def offer(peer_id, entries):
        changed = msgspec.structs.replace(summary, entries=entries)
        return Offer(peer_id, checkpoint.Proof(changed, ()), 1, (), maker.state.committees)

    old = [offer(peer_id_of(identity(800 + n).public_key), 5) for n in range(6)]
    two = [offer(peer_id_of(identity(820 + n).public_key), 9) for n in range(2)]
    liar = [offer(peer_id_of(identity(830).public_key), 1 << 40)]
    witnesses = [offer(maker.people[n].peer_id, 7) for n in range(2)]
    ranked = ask._ranked([*old, *two, *liar, *witnesses], maker.state.committees)
    assert [each.proof.summary.entries for each in ranked] == [7] * 2 + [9] * 2 + [5] * 6 + [1 << 40]


def test_who_repeats_what_the_witnesses_show_comes_after_them():
    maker = Maker(5, f=1)
    ask = offers_of(MemoryHub(1).add(identity(700)), maker)
    summary, _ = summary_of(maker.state)

    def offer(peer_id):
        return Offer(peer_id, checkpoint.Proof(summary, ()), 1, (), maker.state.committees)

    witnesses = [maker.people[n].peer_id for n in range(3)]
    strangers = [peer_id_of(identity(800 + n).public_key) for n in range(28)]
    first = set()
    for seed in range(20):
        ask._random = Random(seed)
        ranked = [
            each.peer_id for each in ask._ranked([*map(offer, strangers), *map(offer, witnesses)], ask._committees)
        ]
        assert {*ranked[:3]} == {*witnesses}
        first.add(ranked[0])
    assert first == {*witnesses}, "by chance among themselves"


async def test_a_node_that_went_on_without_a_checkpoint_takes_one_where_all_is_pruned(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        bare(s, 3)
        await pruned(s)
        me, network = identity(507).peer_id, [node._identity.peer_id for node in s.made.values()]
        for peer_id in network:
            s.hub.partition(me, peer_id)
        new = await s.start(7)
        await trio.sleep(30)
        assert not new.checkpoints._fresh, "nobody it reached has one"
        for peer_id in network:
            s.hub.partition(me, peer_id, heal=True)
        with trio.fail_after(100):
            await s.same()
        assert new.book.store.shelf.base()


async def test_committees_are_told_at_the_cost_of_what_is_told(tmp_path, maker, monkeypatch):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        one, stranger = s.made[1], s.hub.add(identity(700))
        read = []

        async def told():
            read.clear()
            ask = {"net": maker.genesis.net}
            peer_id = one._identity.peer_id
            with pytest.MonkeyPatch.context() as patch:
                parse = one.book.store._parse
                patch.setattr(one.book.store, "_parse", lambda *row: read.append(row) or parse(*row))
                return len((await stranger.call(peer_id, "ledger.checkpoint", ask, deadline_ms=5000)).buffers)

        assert await told() == 0
        assert not read, "the root's own transfers are not looked through"
        op = Issuer(maker.people[4].public_key)
        for n in range(4):
            await s.made[n].allow(s.made[0].change_id(op))
        await s.made[0].change(op)
        await s.same()
        assert await told() == 1
        assert not read
        await s.stop(1)
        one = await s.start(1)
        assert await told() == 1
        await one.checkpoints.propose()
        await s.made[0].checkpoints.obtain()
        one = await s.start(7)
        await until(one.book.store.shelf.base)
        assert await told() == 1, "also whoever started from a checkpoint tells them"


async def test_a_link_that_drops_once_leaves_nobody_without_a_checkpoint(tmp_path, maker, autojump_clock, monkeypatch):
    """Every peer's first page is lost with it: nobody is to blame, and there is a checkpoint."""
    lost = 4

    async def page(ask, *args, fetch=offers.Offers._page):
        nonlocal lost
        if lost:
            lost -= 1
            raise RemoteError("unavailable", "the link is down")
        return await fetch(ask, *args)

    async with nodes(tmp_path, maker) as s:
        proof = await pruned(s)
        monkeypatch.setattr(offers.Offers, "_page", page)
        new, _ = await starts(s, 100)
        assert not lost
        assert new.book.store.shelf.base() == proof
        await s.same()


async def test_who_is_left_out_is_tried_only_by_who_has_nothing(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        await pruned(s)
        ask = Offers(
            s.hub.add(identity(701)),
            maker.state.committees,
            lambda _, key: peer_id_of(key),
            s.made[0].checkpoints._aside,
        )
        now = trio.current_time()
        ask._shunned = {s.made[n]._identity.peer_id: now + 1000 - n for n in range(4)}
        assert await ask.best(2, above=0) == []
        assert ask.undecided, "there is one to have"
        (offer,) = await ask.best(2, above=0, anyhow=True)
        assert offer.peer_id == s.made[3]._identity.peer_id, "the one that would be back first"


# a node that was away while its peers pruned


async def away(s, n, entries=6):
    """Node ``n`` stops, the others go on and keep only what is above a checkpoint of then."""
    await s.stop(n)
    for _ in range(entries):
        await s.made[1].transfer(s.maker.people[2].public_key, 7)
    await s.same()
    await s.made[0].checkpoints.propose()
    for each, node in s.made.items():
        if each:
            await node.checkpoints.obtain()
        await node.checkpoints.prune()


async def catches_up(s, n):
    node = await s.start(n)
    with trio.fail_after(200):
        await s.same()
    assert node.book.store.shelf.base()
    node.book.state.check_invariants()
    assert node.replicator._digests.buckets() == Digests(node.book.state).buckets()
    assert (await node.verify()).verified
    return node


@pytest.mark.parametrize("n", [3, 7])
async def test_a_node_that_was_away_catches_up(tmp_path, maker, autojump_clock, n):
    """A witness (3), and a node that began with the genesis because nobody had a checkpoint then (7)."""
    async with nodes(tmp_path, maker) as s:
        await s.four()
        await s.start(7)
        await s.same()
        await away(s, n)
        node = await catches_up(s, n)
        if n == 3:
            await node.transfer(maker.people[1].public_key, 5)
            await s.stop(2)  # the quorum now needs the one that was away
            await s.made[1].transfer(maker.people[3].public_key, 5)
        await s.stop(n)
        node = await s.start(n)
        with trio.fail_after(100):
            await s.same()
        assert (await node.verify()).verified


async def test_an_archive_that_was_away_keeps_what_it_has(tmp_path, maker, autojump_clock, caplog):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        await s.start(7, archive=True)
        await s.same()
        await away(s, 7)
        node = await s.start(7, archive=True)
        with trio.fail_after(200):
            await until(lambda: "stays behind" in caplog.text)
        assert not node.book.store.shelf.base()


async def test_a_witness_that_was_away_keeps_its_promises(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        state, me = s.made[3].book.state, maker.people[2]
        known = state.account(me.public_key)
        slot = (me.public_key, known.seq + 1)
        first, second = (
            parse(sign(me, Entry(state.genesis.net, *slot, known.head, (Transfer(maker.people[to].public_key, 1),))))
            for to in (1, 0)
        )
        await s.made[3].voting.vote(first)
        await away(s, 3)
        node = await catches_up(s, 3)
        await until(lambda: node.seats.witness.epoch in node.seats._vouched)
        with pytest.raises(RuleError, match="voted for already"):
            await node.voting.vote(second)
        assert [item.id for item in node.seats.witness.own_locks()] == [first.id]


async def test_a_witness_that_was_away_hands_over_when_it_learns_of_the_next_committee(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        await s.start(4)
        await s.same()
        await s.stop(3)
        keys = [person.public_key for person in (*maker.people[:3], maker.people[4])]
        op = Committee(1, tuple(keys), 1)
        for n in range(3):
            await s.made[n].allow(s.made[0].change_id(op))
        await s.made[0].change(op)
        await s.same()
        await s.made[0].transfer(maker.people[1].public_key, 1)
        await s.same()
        await s.made[0].checkpoints.propose()
        for n, node in s.made.items():
            if n:
                await node.checkpoints.obtain()
            await node.checkpoints.prune()
        node = await catches_up(s, 3)
        with trio.fail_after(60):
            await until(lambda: node.book.store.promises.handover(0, maker.people[3].public_key))


async def test_a_channel_that_was_closed_while_its_worker_was_away_is_closed(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=5) as s:
        await s.ledgers[0].grant(s.ids[3].public_key, 50 * CREDIT)
        await s.converged()
        channel = await work(s.ledgers[3], s.ledgers[4], 60)
        await s.stop(4)
        s.now_ms += 400 * 24 * 3600 * 1000
        await s.ledgers[3].buyer.reclaim_expired()
        await s.converged()
        await s.ledgers[0].checkpoints.propose()
        for n, node in s.ledgers.items():
            if n:
                await node.checkpoints.obtain()
            await node.checkpoints.prune()
        worker = await s.start(4)
        assert [line["channel"] for line in worker.channels()] == [channel.hex()]
        await until(worker.book.store.shelf.base)
        await s.converged()
        (line,) = worker.channels()
        assert line["closed"], "and not unknown: whoever holds it looks it up"
        assert await worker.settle_all() == 0
