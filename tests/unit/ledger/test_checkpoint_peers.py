"""Checkpoints among peers that lie, stall, or send without end; and proposals of one node at once."""

import random

import msgspec
import pytest
import trio

from config.errors import RiosError
from ledger import checkpoints, offers
from ledger.core import certificate as certificates
from ledger.core import checkpoint
from ledger.core.checkpoint import AccountLine, Page, check_proposal, proposal_steps
from ledger.core.errors import RuleError
from ledger.core.objects import Grant, Transfer
from ledger.offers import Offers
from p2p.core import codec
from p2p.core.identity import peer_id_of
from p2p.face import Reply
from p2p.memory import MemoryHub
from tests.unit.ledger.ledger_kit import Maker, identity
from tests.unit.ledger.test_checkpoint import CREDIT, grown, history_of, network, nodes, summary_of
from tests.unit.ledger.test_network import until


@pytest.fixture
def maker():
    return Maker(5, f=1)


def with_entries(proof, entries):
    """Signatures are not over the number of entries: only the pages show that it is wrong."""
    return msgspec.structs.replace(proof, summary=msgspec.structs.replace(proof.summary, entries=entries))


def junk(call, lines=4096):
    first = call.header["number"] * lines
    keys = [(first + n).to_bytes(32, "big") for n in range(lines)]
    return codec.encode(Page(tuple(AccountLine(key, 0, bytes(32), 1) for key in keys), ()))


async def test_a_stranger_that_has_pages_looked_at_costs_one_page(tmp_path, maker):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        stranger, served = s.hub.add(identity(700)), []

        async def page(call):
            served.append(call.header["number"])
            return Reply({}, [junk(call)])

        stranger.serve("ledger.page", page)
        summary, _ = summary_of(s.made[0].book.state)
        for pages, asked in ((1 << 16, 0), (2, 1)):
            header = {"net": maker.genesis.net, "summary": codec.encode(summary), "pages": pages}
            with pytest.raises(RiosError, match="frontier"):
                await stranger.call(s.made[0]._identity.peer_id, "ledger.attest", header, deadline_ms=5000)
            assert len(served) == asked
            await trio.sleep(0.2)


async def test_who_stalls_keeps_no_witness_from_making_a_checkpoint(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        stranger = s.hub.add(identity(700))

        async def page(call):
            await trio.sleep_forever()

        stranger.serve("ledger.page", page)
        summary, _ = summary_of(s.made[0].book.state)
        header = {"net": maker.genesis.net, "summary": codec.encode(summary), "pages": 1}
        async with trio.open_nursery() as nursery:

            async def stall(n):
                peer_id = s.made[n]._identity.peer_id
                with pytest.raises(RiosError):
                    await stranger.call(peer_id, "ledger.attest", header, deadline_ms=10**7)

            for n in range(4):
                nursery.start_soon(stall, n)
            await trio.sleep(0.1)
            with trio.fail_after(10):
                await s.made[0].checkpoints.propose()
            start = trio.current_time()
        assert trio.current_time() - start < checkpoints.LOOK_S + 1, "a look has an end"


async def test_a_proposal_too_far_back_is_not_looked_at(tmp_path, maker, monkeypatch):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        await s.made[0].checkpoints.propose()
        for _ in range(3):
            await s.made[1].transfer(maker.people[2].public_key, 7)
        await s.same()
        monkeypatch.setattr(checkpoint, "BEHIND_MAX", 2)
        assert await s.made[1].checkpoints.obtain(), "of itself a node goes back as far as it must"
        summary = s.made[0].book.store.shelf.newest().summary
        header = {"net": maker.genesis.net, "summary": codec.encode(summary), "pages": 1}
        with pytest.raises(RiosError, match="entries back"):
            await s.hub.nodes[s.made[0]._identity.peer_id].call(
                s.made[1]._identity.peer_id, "ledger.attest", header, deadline_ms=5000
            )


async def test_two_checkpoints_of_one_state_at_once(tmp_path, maker):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        found = []

        async def propose():
            found.append(await s.made[0].checkpoints.propose())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(propose)
            nursery.start_soon(propose)
        assert found[0].summary == found[1].summary


def offers_of(me, maker):
    async def aside(work, *args):
        return work(*args)

    return Offers(me, maker.state.committees, lambda _epoch, key: peer_id_of(key), aside)


@pytest.mark.parametrize("copies", [1, 64])
async def test_committees_that_do_not_rise_are_not_followed(autojump_clock, copies):
    maker, hub = Maker(), MemoryHub(1)
    maker.entry(0, Grant(maker.people[1].public_key, 1))  # the root's, and no change of the committee
    me, liar, asked = hub.add(identity(700)), hub.add(identity(701)), []

    async def newest(call):
        asked.append(None)
        await trio.sleep(0.01)
        return Reply({}, [certificates.encode(maker.certificates[0])] * copies)

    liar.serve("ledger.checkpoint", newest)
    with trio.fail_after(5):
        assert await offers_of(me, maker).best(1, above=0) == []
    assert len(asked) == 1


async def lie(s, n, proof, entries, pages=5):
    """Node ``n`` shows a proof with another number of entries, and pages of nothing."""
    services = s.hub.nodes[s.made[n]._identity.peer_id]._services
    asked = []

    async def newest(call):
        return Reply({"proof": codec.encode(with_entries(proof, entries)), "pages": pages}, [])

    async def page(call):
        asked.append(None)
        return Reply({}, [junk(call)])

    for name, handler in (("ledger.checkpoint", newest), ("ledger.page", page)):
        services.pop(name)
        s.hub.nodes[s.made[n]._identity.peer_id].serve(name, handler)
    return asked


async def test_a_liar_with_the_most_entries_is_left_out(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        await s.four()
        proof = await s.made[0].checkpoints.propose()
        for n in (1, 2):
            await s.made[n].checkpoints.obtain()
        asked = await lie(s, 3, proof, 1 << 40)
        new = await s.start(7)
        with trio.fail_after(60):
            await until(new.book.store.shelf.base)
        assert new.book.store.shelf.base() == proof, "it started from what the others prove"
        await s.same()
        assert not asked, "what one peer alone shows comes last"


async def test_a_liar_keeps_no_witness_from_making_checkpoints(tmp_path, maker, autojump_clock):
    async with nodes(tmp_path, maker) as s:
        await s.four(checkpoint_entries=5)
        await trio.sleep(60)
        proof = s.made[0].book.store.shelf.newest()
        assert proof.summary.entries == 12
        await s.stop(3)
        await s.start(3, checkpoint_entries=0)
        for entries, pages in ((1 << 40, 5), (17, 5), (22, 1 << 16)):
            await lie(s, 3, proof, entries, pages)
            for _ in range(5):
                await s.made[1].transfer(maker.people[2].public_key, 7)
            await s.same()
            await trio.sleep(60)
        assert [s.made[n].book.store.shelf.newest().summary.entries for n in range(3)] == [27] * 3


async def test_pages_without_end_have_one(autojump_clock, monkeypatch):
    maker, hub = Maker(), MemoryHub(1)
    me, liar, asked = hub.add(identity(700)), hub.add(identity(701)), []
    monkeypatch.setattr(offers, "PAGES_BYTES_MAX", 1 << 20)

    async def page(call):
        asked.append(None)
        await trio.sleep(1)
        return Reply({}, [junk(call)] if call.header["root"] == b"junk" else [codec.encode(Page((), ()))])

    async def pages(root, seconds):
        summary = msgspec.structs.replace(summary_of(maker.state)[0], state_root=root)
        ask = offers_of(me, maker)
        await ask.pages(liar.peer_id, summary, maker.state.committees, 1 << 16, lambda _: None, seconds)

    liar.serve("ledger.page", page)
    for root, seconds, why in ((b"empty", 100, "empty"), (b"junk", 100, "too many"), (b"junk", 1.5, "did not come")):
        asked.clear()
        with pytest.raises(RiosError, match=why):
            await pages(root, seconds)
        assert len(asked) < 10


@pytest.mark.parametrize("seed", range(3))
def test_the_state_may_go_on_while_a_proposal_is_checked(seed, monkeypatch):
    monkeypatch.setattr(checkpoint, "STEP_ENTRIES", 1)
    maker = network(seed)
    summary, pages = summary_of(maker.state)
    proposed = checkpoint.read(pages)
    grown(maker, random.Random(seed + 1000), 40)
    for _ in proposal_steps(maker.state, summary, proposed, history_of(maker)):
        maker.entry(1, Transfer(maker.people[2].public_key, 1))
    check_proposal(maker.state, summary, proposed, history_of(maker))
    key = next(iter(proposed.accounts))
    richer = msgspec.structs.replace(proposed.accounts[key], balance=proposed.accounts[key].balance + CREDIT)
    wrong = checkpoint.Snapshot({**proposed.accounts, key: richer}, proposed.channels)
    steps = proposal_steps(maker.state, summary, wrong, history_of(maker))
    next(steps)
    maker.entry(1, Transfer(maker.people[2].public_key, 1))
    with pytest.raises(RuleError, match="another balance"):
        list(steps)
