"""Checkpoints: what a witness signs follows from final objects alone; who starts from one is like the others."""

import random
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest
import trio

from config.errors import IntegrityError, RemoteError, RequestError
from config.settings import LedgerSettings
from ledger.checkpoints import Checkpoints
from ledger.core import checkpoint
from ledger.core.checkpoint import AccountLine, Page, Proof, check_proof, check_proposal
from ledger.core.committee import CommitteeChain
from ledger.core.errors import RuleError
from ledger.core.objects import Entry, Grant, Reclaim, TopUp, Transfer
from ledger.core.state import State
from ledger.ledger import open_ledger
from ledger.store import Store
from ledger.verify import verify_file
from p2p.memory import MemoryHub
from p2p.services import Service
from tests.unit.ledger.ledger_kit import START_MS, Maker, identity

CREDIT = 1_000_000


def grown(maker: Maker, rng: random.Random, steps: int) -> None:
    """Random transfers, channels, top-ups, claims and reclaims."""
    channels = [key for key, c in maker.state.channels.items() if c.closed_at is None]
    for _ in range(steps):
        who, other = rng.sample(range(len(maker.people)), 2)
        kind = rng.randrange(6)
        if kind <= 1:
            maker.entry(who, Transfer(maker.people[other].public_key, rng.randrange(1, 9)))
        elif kind == 2:
            channels.append(maker.open(who, other, 5 * CREDIT, START_MS))
        elif channels:
            key = rng.choice(channels)
            channel = maker.state.channels[key]
            payer = maker.people.index(maker.person(channel.payer))
            if kind == 3:
                maker.entry(payer, TopUp(key, rng.randrange(1, 9)))
            elif kind == 4 and channel.paid + CREDIT <= channel.lock:
                maker.claim(key, channel.paid + rng.randrange(1000, CREDIT))
            elif kind == 5 and not rng.randrange(2):
                freezes = [w.freeze(key, START_MS * 3).signed for w in maker.witnesses[: maker.genesis.quorum]]
                maker.entry(payer, Reclaim(key, channel.paid, tuple(freezes)))
                channels.remove(key)


def network(seed: int, people: int = 5) -> Maker:
    maker = Maker(people)
    maker.entry(0, *(Grant(p.public_key, 500 * CREDIT) for p in maker.people))
    grown(maker, random.Random(seed), 60)
    return maker


def summary_of(state: State):
    pages = list(checkpoint.pages(state))
    return checkpoint.summarise(pages, state.committees, state.supply, state.applied), pages


def history_of(maker: Maker):
    def history(account, first, last):
        bodies = [(f.item, f.item.object) for f in maker.finals if isinstance(f.item.object, Entry)]
        return [item for item, b in bodies if b.account == account and first <= b.seq <= last]

    return history


@pytest.mark.parametrize("seed", range(12))
def test_a_state_that_went_on_recognises_what_it_was_and_nothing_else(seed):
    maker = network(seed)
    summary, pages = summary_of(maker.state)
    proposed = checkpoint.read(pages)
    check_proposal(maker.state, summary, proposed, history_of(maker))
    before = maker.state.digest()
    grown(maker, random.Random(seed + 1000), 60)
    later = maker.state.digest()
    check_proposal(maker.state, summary, proposed, history_of(maker))
    assert maker.state.digest() == later != before
    rng = random.Random(seed)
    key = rng.choice(sorted(proposed.accounts))
    line = proposed.accounts[key]
    changes = [
        msgspec.structs.replace(line, balance=line.balance + 1),
        msgspec.structs.replace(line, seq=line.seq + 1000),
        msgspec.structs.replace(line, head=b"h" * 32),
    ]
    if line.seq:
        changes.append(msgspec.structs.replace(line, seq=line.seq - 1))
    for changed in changes:
        wrong = checkpoint.Snapshot({**proposed.accounts, key: changed}, proposed.channels)
        with pytest.raises(RuleError) as refused:
            check_proposal(maker.state, summary, wrong, history_of(maker))
        assert refused.value.rule == "frontier"
    others = {k: v for k, v in proposed.accounts.items() if k != key}
    with pytest.raises(RuleError):
        check_proposal(maker.state, summary, checkpoint.Snapshot(others, proposed.channels), history_of(maker))
    for changed in (replace_summary(summary, supply=1), replace_summary(summary, entries=summary.entries + 1)):
        with pytest.raises(RuleError):
            check_proposal(maker.state, changed, proposed, history_of(maker))
    for channel, open_line in proposed.channels.items():
        for field, value in (("lock", open_line.lock + 1), ("paid", open_line.paid + 10**9), ("payout", b"p" * 32)):
            wrong = msgspec.structs.replace(open_line, **{field: value})
            bad = checkpoint.Snapshot(proposed.accounts, {**proposed.channels, channel: wrong})
            with pytest.raises(RuleError):
                check_proposal(maker.state, summary, bad, history_of(maker))
        gone = {k: v for k, v in proposed.channels.items() if k != channel}
        with pytest.raises(RuleError):
            check_proposal(maker.state, summary, checkpoint.Snapshot(proposed.accounts, gone), history_of(maker))


def replace_summary(summary, **changes):
    return msgspec.structs.replace(summary, **changes)


@pytest.mark.parametrize("seed", range(4))
def test_starting_from_a_checkpoint_leads_to_the_same_state(seed):
    maker = network(seed)
    summary, pages = summary_of(maker.state)
    known = len(maker.finals)
    grown(maker, random.Random(seed + 7), 60)
    state = State(maker.genesis)
    checkpoint.load(state, checkpoint.read(pages), summary)
    rest = maker.finals[known:]
    random.Random(seed).shuffle(rest)
    for final in rest:
        state.add(final.item)
    state.check_invariants()
    assert state.digest() == maker.state.digest()
    assert state.waiting() == 0
    assert (state.applied, state.supply) == (maker.state.applied, maker.state.supply)
    assert summary_of(state)[0] == summary_of(maker.state)[0]


def test_a_claim_on_a_channel_that_the_checkpoint_shows_closed_is_refused():
    maker = network(3)
    key = maker.open(1, 2, 5 * CREDIT, START_MS)
    claim = maker.claim(key, CREDIT)
    freezes = tuple(w.freeze(key, START_MS * 3).signed for w in maker.witnesses)
    maker.entry(1, Reclaim(key, CREDIT, freezes))
    summary, pages = summary_of(maker.state)
    state = State(maker.genesis)
    checkpoint.load(state, checkpoint.read(pages), summary)
    with pytest.raises(RuleError, match="closed"):
        state.add(claim)
    assert state.digest() == maker.state.digest()


def test_pages_may_be_cut_anywhere_but_not_reordered(monkeypatch):
    maker = network(4)
    summary, pages = summary_of(maker.state)
    monkeypatch.setattr(checkpoint, "PAGE_LINES", 2)
    assert summary_of(maker.state)[0] == summary
    lines = pages[0].accounts
    chain = maker.state.committees
    for wrong in ((lines[1], lines[0], *lines[2:]), (*lines, lines[-1])):
        with pytest.raises(IntegrityError, match="order"):
            checkpoint.summarise([Page(wrong, ()), *pages[1:]], chain, summary.supply, summary.entries)


def test_a_proof_needs_a_quorum_of_distinct_witnesses_of_the_newest_epoch():
    maker = Maker(5, f=1)
    maker.entry(0, Grant(maker.people[1].public_key, CREDIT))
    summary, _ = summary_of(maker.state)
    signed = [checkpoint.sign_checkpoint(p, maker.genesis.net, summary) for p in maker.people]
    chain = CommitteeChain(maker.genesis)
    check_proof(chain, Proof(summary, tuple(signed[:3])))
    for signatures, rule in (
        (signed[:2], "quorum"), ([signed[0]] * 3, "quorum"), ([*signed[:2], signed[4]], "witness"),
    ):  # fmt: skip
        with pytest.raises(RuleError) as refused:
            check_proof(chain, Proof(summary, tuple(signatures)))
        assert refused.value.rule == rule
    other = replace_summary(summary, supply=summary.supply + 1)
    with pytest.raises(RuleError, match="over another checkpoint"):
        check_proof(chain, Proof(other, tuple(signed[:3])))
    forged = [msgspec.structs.replace(s, signature=bytes(64)) for s in signed[:3]]
    with pytest.raises(RuleError, match="not signed by its witness"):
        check_proof(chain, Proof(summary, tuple(forged)))
    with pytest.raises(RuleError, match="the newest is 0"):
        check_proof(chain, Proof(replace_summary(summary, epoch=1), tuple(signed[:3])))


# --- between nodes


class Nodes:
    def __init__(self, tmp_path, nursery, maker):
        self.hub, self.tmp_path, self.nursery, self.maker = MemoryHub(1), tmp_path, nursery, maker
        self.made = {}

    async def start(self, n, *, archive=False, **changes):
        """Node ``n`` holds person ``n``'s key, or one of its own."""
        me = self.maker.people[n] if n < len(self.maker.people) else identity(500 + n)
        path = self.tmp_path / f"{n}.db"
        witness = n < len(self.maker.witnesses)
        settings = LedgerSettings(witness=witness, archive=archive, sync_seconds=1, lag_calls=0, **changes)
        network = self.hub.add(me)
        self.made[n] = await open_ledger(
            network, me, self.maker.genesis, path, settings, nursery=self.nursery, in_thread=False,
            now_ms=lambda: START_MS,
        )  # fmt: skip
        return self.made[n]

    async def four(self, **changes):
        """The witnesses, and a ledger of a dozen entries."""
        for n in range(4):
            await self.start(n, **changes)
        people = self.maker.people
        await self.made[0].wallet.append([Grant(p.public_key, 500 * CREDIT) for p in people[:4]])
        await self.same()
        for n in range(11):
            await self.made[n % 4].transfer(people[(n * 3 + 1) % 5].public_key, 1 + n)
        await self.same()

    async def stop(self, n):
        self.hub.kill(self.made[n]._identity.peer_id)
        await self.made.pop(n).aclose()

    async def same(self):
        while len({ledger.book.state.digest() for ledger in self.made.values()}) > 1:  # noqa: ASYNC110
            await trio.sleep(0.05)


@asynccontextmanager
async def nodes(tmp_path, maker):
    with trio.fail_after(300):
        async with trio.open_nursery() as nursery:
            made = Nodes(tmp_path, nursery, maker)
            yield made
            for n in list(made.made):
                await made.made.pop(n).aclose()
            nursery.cancel_scope.cancel()


@pytest.fixture
def maker():
    return Maker(5, f=1)


async def test_a_new_node_starts_from_a_checkpoint_two_peers_prove_and_works(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        proof = await s.made[0].checkpoints.propose()
        assert proof.summary.entries == 12
        assert len(proof.signatures) >= 3
        assert (await s.made[1].checkpoints.obtain()).summary == proof.summary
        assert await s.made[1].checkpoints.obtain() is None
        await s.made[1].transfer(maker.people[2].public_key, 7)
        new = await s.start(7)
        await s.same()
        assert len([i for i in new.book.store.items() if isinstance(i.object, Entry)]) < 5
        report = await new.verify()
        assert report.verified
        assert report.below_checkpoint == proof.summary.entries
        assert report.digest == (await s.made[0].verify()).digest
        await s.made[1].transfer(new.account, 3 * CREDIT)
        await s.same()
        await new.transfer(maker.people[2].public_key, CREDIT)
        await s.same()
        await s.stop(7)
        again = await s.start(7)
        await s.same()
        assert again.balance() == 2 * CREDIT


def checkpoints_of(s, n):
    """Entries under each checkpoint on a node's disk."""
    return [row[0] for row in s.made[n].book.store._query("SELECT entries FROM checkpoints ORDER BY entries")]


async def test_witnesses_make_checkpoints_on_their_own_and_keep_two(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        made = []
        propose = Checkpoints.propose
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "propose", lambda self: made.append(self) or propose(self))
            await s.four(checkpoint_entries=5)
            await trio.sleep(60)
            assert [checkpoints_of(s, n) for n in range(4)] == [[12]] * 4
            for total in (17, 22):
                for _ in range(5):
                    await s.made[1].transfer(maker.people[2].public_key, 7)
                await s.same()
                await trio.sleep(60)
                assert all(checkpoints_of(s, n)[-1] == total for n in range(4))
            assert [checkpoints_of(s, n) for n in range(4)] == [[17, 22]] * 4
        assert len(made) == 3, "one witness makes it, the others find it"
        assert len(set(made)) > 1, "they take turns"


async def test_no_checkpoint_is_made_with_zero(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        await s.four(checkpoint_entries=0)
        await trio.sleep(60)
        assert [checkpoints_of(s, n) for n in range(4)] == [[]] * 4


async def test_one_prover_is_not_enough_and_an_archive_wants_everything(tmp_path, maker, monkeypatch):
    monkeypatch.setattr("ledger.checkpoints.HELD_MAX", 1)
    async with nodes(tmp_path, maker) as s:
        await s.four()
        await s.made[0].checkpoints.propose()
        new = await s.start(7)
        await s.same()
        assert new.book.store.shelf.base() is None
        await s.made[1].checkpoints.obtain()
        archive = await s.start(8, archive=True)
        await s.same()
        assert archive.book.store.shelf.base() is None
        with pytest.raises(RequestError, match="archive"):
            await archive.checkpoints.prune()


async def test_pruning_keeps_the_state_and_serves_the_rest(tmp_path, maker):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        one = s.made[1]
        with pytest.raises(RequestError, match="no checkpoint"):
            await one.checkpoints.prune()
        proof = await one.checkpoints.propose()
        await s.made[0].transfer(one.account, 5)
        await s.same()
        digest, items = one.book.state.digest(), len(list(one.book.store.items()))
        await one.checkpoints.prune()
        assert len(list(one.book.store.items())) < items // 2
        assert one.book.state.digest() == digest
        report = await one.verify()
        assert (report.verified, report.below_checkpoint) == (True, proof.summary.entries)
        await s.stop(1)
        one = await s.start(1)
        assert one.book.state.digest() == digest
        await one.transfer(maker.people[2].public_key, 9)
        await s.same()
        # whoever lacks what was dropped is told so, and gets it from somebody else
        for n in (0, 2, 3):
            s.hub.partition(identity(508).peer_id, s.made[n]._identity.peer_id)
        new = await s.start(8, archive=True)
        with pytest.raises(RemoteError, match="above a checkpoint"):
            await new.replicator.sync_with(one._identity.peer_id)
        for n in (0, 2, 3):
            s.hub.partition(identity(508).peer_id, s.made[n]._identity.peer_id, heal=True)
        await s.same()


async def test_forged_pages_are_refused_by_witness_and_new_node(tmp_path, maker):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        liar = s.made[3]
        real = checkpoint.pages

        def forged(state):
            pages = list(real(state))
            lines = [msgspec.structs.replace(line, balance=line.balance + 1) for line in pages[0].accounts]
            return iter([Page(tuple(lines), ()), *pages[1:]])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "pages", forged)
            patch.setattr("ledger.checkpoints.PROPOSE_S", 5.0)
            with pytest.raises(RemoteError, match="another balance"):
                await liar.checkpoints.propose()
        await s.made[0].checkpoints.propose()
        await s.made[1].checkpoints.obtain()

        async def page(call):
            return await bad_page(s.made[0].checkpoints, call)

        for n in (0, 1):
            s.hub.nodes[s.made[n]._identity.peer_id]._services["ledger.page"] = Service(page)
        new = await s.start(7)
        await s.same()
        assert new.book.store.shelf.base() is None, "it fell back to the genesis"


async def bad_page(checkpoints: Checkpoints, call):
    reply = await checkpoints._serve_page(call)
    data = bytearray(reply.buffers[0])
    data[-1] ^= 1
    return replace(reply, buffers=[bytes(data)])


def test_a_base_that_was_tampered_with_does_not_verify(tmp_path, maker):
    maker.entry(0, *(Grant(p.public_key, 500 * CREDIT) for p in maker.people))
    grown(maker, random.Random(5), 40)
    summary, pages = summary_of(maker.state)
    signatures = tuple(checkpoint.sign_checkpoint(p, maker.genesis.net, summary) for p in maker.people[:3])
    store = Store(tmp_path / "l.db", maker.genesis.net)
    encoded = [msgspec.msgpack.encode(page) for page in pages]
    rows = store.shelf.keep(Proof(summary, signatures), encoded)
    store.commit([*rows, store.shelf.start_from(summary.state_root)])
    assert verify_file(tmp_path / "l.db", maker.genesis).verified
    first = pages[0].accounts[0]
    richer = Page((AccountLine(first.key, first.seq, first.head, first.balance + 5), *pages[0].accounts[1:]), ())
    store._writer.execute("UPDATE pages SET body = ? WHERE number = 0", (msgspec.msgpack.encode(richer),))
    store.close()
    report = verify_file(tmp_path / "l.db", maker.genesis)
    assert not report.verified
    assert "do not lead to its root" in report.problems[0]
