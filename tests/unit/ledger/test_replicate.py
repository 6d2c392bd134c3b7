"""Anti-entropy: ranges, not scans; two nodes that lack different things; peers that lie, stall or die in the middle."""

from contextlib import asynccontextmanager

import pytest
import trio

from config.errors import IntegrityError, RemoteError
from ledger import replicate
from ledger.book import Book
from ledger.core import certificate as certificates
from ledger.core.objects import Grant, Transfer
from ledger.core.state import State
from ledger.core.sync import Digests, Heads, behind, differing, lacking, slices
from ledger.replicate import Replicator
from ledger.store import Store
from ledger.writer import Writer
from p2p.core import codec
from p2p.face import Reply
from p2p.memory import MemoryHub
from p2p.services import Service
from tests.unit.ledger.ledger_kit import Maker, identity

CREDIT = 1_000_000


@pytest.fixture(scope="module")
def made():
    """120 entries of eight people, two channels with claims, one of them closed again."""
    maker = Maker(8)
    maker.entry(0, *(Grant(p.public_key, 100 * CREDIT) for p in maker.people))
    channels = [maker.open(1, 2, 10 * CREDIT), maker.open(2, 1, 10 * CREDIT)]
    for n in range(117):
        maker.entry(n % 8, Transfer(maker.people[(n * 3 + 1) % 8].public_key, 1 + n))
    for channel in channels:
        maker.claim(channel, 3 * CREDIT)
    return maker


class Node:
    def __init__(self, hub, made, n, path):
        self.store = Store(path, made.genesis.net)
        self.book = Book(made.genesis, self.store, Writer(self.store, in_thread=False), lambda: 1)
        self.network = hub.add(identity(100 + n))
        self.replicator = Replicator(self.network, self.book, 0.01)
        self.peer_id = self.network.peer_id


@asynccontextmanager
async def nodes(made, tmp_path, count=2):
    hub = MemoryHub(1)
    some = [Node(hub, made, n, tmp_path / f"{n}.db") for n in range(count)]
    with trio.fail_after(30):
        yield some
    for node in some:
        node.store.close()


async def test_both_get_what_they_lack_in_one_round(made, tmp_path):
    certs = list(made.certificates)
    async with nodes(made, tmp_path) as (a, b):
        # chains are filled from the beginning, so each lacks the ends of some chains and has the ends of others
        await a.book.learn(
            [c for c in certs if certificates.parse(c.object).object.account != made.people[3].public_key]
        )
        await b.book.learn(certs[:60])
        assert await a.replicator.sync_with(b.peer_id)
        assert a.book.state.digest() == b.book.state.digest()
        assert a.book.state.waiting() == 0
        await b.book.learn(certs)
        assert await a.replicator.sync_with(b.peer_id)
        assert a.book.state.digest() == made.state.digest()


async def test_what_is_fetched_is_what_is_lacking_in_few_answers(made, tmp_path):
    async with nodes(made, tmp_path) as (a, b):
        await b.book.learn(made.certificates)
        await a.book.learn(made.certificates[:100])
        assert await a.replicator.sync_with(b.peer_id)
        sizes = [len(certificates.encode(c)) for c in made.certificates[100:]]
        assert a.replicator.fetched_bytes == sum(sizes)
        assert a.replicator.answers <= 18  # a group of 16 buckets that differ: one answer


async def test_small_answers_are_continued_where_they_ended(made, tmp_path, monkeypatch):
    monkeypatch.setattr(replicate, "ANSWER_BYTES_MAX", 2000)
    async with nodes(made, tmp_path) as (a, b):
        await b.book.learn(made.certificates)
        assert await a.replicator.sync_with(b.peer_id)
        assert a.book.state.digest() == made.state.digest()
        assert a.replicator.answers > 25


async def test_many_lines_are_told_bucket_by_bucket(made, tmp_path, monkeypatch):
    monkeypatch.setattr("ledger.core.sync.LINES_PER_ANSWER", 2)
    async with nodes(made, tmp_path) as (a, b):
        await b.book.learn(made.certificates)
        assert await a.replicator.sync_with(b.peer_id)
        assert a.book.state.digest() == made.state.digest()


async def test_interrupted_rounds_go_on_where_they_were(made, tmp_path, monkeypatch):
    monkeypatch.setattr(replicate, "ANSWER_OBJECTS_MAX", 8)
    async with nodes(made, tmp_path) as (a, b):
        await b.book.learn(made.certificates)
        real, calls, seen = b.replicator._serve_fetch, 0, []

        async def breaks(call):
            nonlocal calls
            calls += 1
            if calls % 4 == 0:
                raise RemoteError("unavailable", "the link broke")
            return await real(call)

        serve(b, "ledger.fetch", breaks)
        while a.book.state.digest() != made.state.digest():
            try:
                await a.replicator.sync_with(b.peer_id)
            except RemoteError:
                seen.append(len(list(a.store.items())))
        assert len(seen) >= 2
        assert seen == sorted(set(seen))  # each round kept what came before it broke
        assert a.replicator.fetched_bytes < 1.5 * sum(len(certificates.encode(c)) for c in made.certificates)


def serve(node, method, handler):
    node.network._services[method] = Service(handler)


async def heads_of_a_liar(_call):
    lines = [(bytes([n]) + bytes(31), 1 << 62) for n in range(256)]
    return Reply({"covered": 1}, [codec.encode(Heads(lines, [(bytes(32), 1 << 62)]))])


@pytest.mark.parametrize("lie", ["nothing", "old news", "forgeries", "too many"])
async def test_a_lying_peer_wastes_little_and_is_left(made, tmp_path, lie):
    async with nodes(made, tmp_path) as (a, b):
        await a.book.learn(made.certificates[:50])
        old = [certificates.encode(c) for c in made.certificates[:5]]
        bad = certificates.encode(made.certificates[60]).replace(made.certificates[60].object.signature, bytes(64))
        answers = {"nothing": [], "old news": old, "forgeries": [bad], "too many": old * 500}[lie]
        asked = 0

        async def fetch(_call):
            nonlocal asked
            asked += 1
            return Reply({"more": True}, answers)

        serve(b, "ledger.heads", heads_of_a_liar)
        serve(b, "ledger.fetch", fetch)
        with pytest.raises(IntegrityError):
            await a.replicator.sync_with(b.peer_id)
        assert asked <= 6
        assert a.book.state.applied == 50


async def test_slow_and_lying_peers_do_not_keep_the_news_away(made, tmp_path, monkeypatch):
    monkeypatch.setattr(replicate, "ROUND_SECONDS_MAX", 0.2)
    async with nodes(made, tmp_path, count=4) as (a, slow, liar, good):
        await good.book.learn(made.certificates)

        async def never(_call):
            await trio.sleep_forever()

        serve(slow, "ledger.buckets", never)
        serve(liar, "ledger.heads", heads_of_a_liar)
        serve(liar, "ledger.fetch", never)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.replicator.run)
            while a.book.state.digest() != made.state.digest():  # noqa: ASYNC110
                await trio.sleep(0.02)
            nursery.cancel_scope.cancel()


async def test_peers_that_failed_are_asked_last(made, tmp_path):
    async with nodes(made, tmp_path, count=3) as (a, b, c):
        a.replicator._sync_seconds = 60
        a.replicator._shun(b.peer_id)
        assert {a.replicator._next_peer() for _ in range(50)} == {c.peer_id}
        a.replicator._shun(c.peer_id)
        assert {a.replicator._next_peer() for _ in range(50)} == {b.peer_id, c.peer_id}


def test_digests_follow_every_change_and_do_not_depend_on_order(made):
    states = [State(made.genesis), State(made.genesis)]
    digests = [Digests(state) for state in states]
    for final in made.finals:
        states[0].add(final.item)
        digests[0].buckets()
    for final in reversed(made.finals):
        states[1].add(final.item)
    assert digests[0].buckets() == digests[1].buckets() == Digests(states[0]).buckets()
    short = State(made.genesis)
    for final in made.finals[:-1]:
        short.add(final.item)
    last = made.finals[-1].item.object.voucher.channel
    assert differing(Digests(short).buckets(), digests[0].buckets()) == [last[0]]


def test_ranges_are_cut_and_what_waits_is_not_asked_for_again(made):
    state = State(made.genesis)
    for final in made.finals[1:30]:
        state.add(final.item)  # the first grant is missing: all of it waits
    theirs = Digests(made.state).heads(range(256))[0]
    ranges, _ = lacking(state, theirs)
    asked = dict((key, first) for key, first, _ in ranges)
    person = made.people[5].public_key
    assert asked[person] == 1 + len(state.waiting_entries[person])
    assert behind(Heads([], []), theirs)[0] == [(key, 1, seq) for key, seq in theirs.accounts]
    endless = slices([(bytes(32), 1, 1 << 62)], ranges_max=10, objects_max=100)
    assert [next(endless)[0][1:] for _ in range(2)] == [(1, 100), (101, 200)]
    parts = list(slices([(b"a", 1, 5), (b"b", 1, 7)], ranges_max=10, objects_max=6))
    assert parts == [[(b"a", 1, 5), (b"b", 1, 1)], [(b"b", 2, 7)]]


def test_a_channel_that_a_peer_closed_is_asked_for_while_something_waits(made):
    """Its claim may be what everything here waits for, also the entry that closes it; heads do not list it any more."""
    digests = Digests(made.state)
    key = next(key for key, channel in made.state.channels.items() if channel.closed_at is None)
    heads = digests.heads(range(256))[0]
    theirs = Heads(heads.accounts, [each for each in heads.channels if each[0] != key])
    assert digests.maybe_closed(heads, [key[0]]) == []
    assert digests.maybe_closed(theirs, [key[0]]) == [key]
    assert digests.maybe_closed(theirs, [(key[0] + 1) % 256]) == []
