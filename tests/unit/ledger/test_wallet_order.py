"""A wallet finishes what it signed in the order in which it signed it, and is sure of itself once its disk says so."""

import shutil

import pytest
import trio

from config.errors import LocalError, RemoteError
from ledger.core.objects import Entry, Transfer, parse, sign
from ledger.records import Own
from ledger.store import Store
from p2p.face import Reply
from tests.unit.ledger.committee_kit import full_disk
from tests.unit.ledger.test_network import swarm, until


async def test_two_entries_without_certificates_are_finished_in_order(tmp_path, autojump_clock):
    """As after a full disk: the first one's certificate could not be kept, the second was signed on top of it."""
    async with swarm(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[1].public_key, 100)
        await s.converged()
        await s.stop(1)
        me, net = s.ids[1], s.genesis.net
        first = sign(me, Entry(net, me.public_key, 1, bytes(32), (Transfer(s.ids[2].public_key, 30),)))
        ops = (Transfer(s.ids[2].public_key, 20),)
        second = sign(me, Entry(net, me.public_key, 2, parse(first).id, ops))
        store = Store(tmp_path / "1.db", net)
        store.commit([Own(1, first), Own(2, second)])
        store.close()
        wallet = (await s.start(1)).wallet
        assert wallet.balance == 50
        await until(lambda: not wallet.pending)
        await s.converged()
        assert s.ledgers[2].balance() == 50
        assert s.ledgers[0].book.state.account(me.public_key).seq == 2


async def test_a_first_entry_on_a_full_disk_leaves_the_wallet_as_it_was(tmp_path, autojump_clock):
    """Seed 2769: it was sure in memory only, signed, and after a restart had entries but "no history": it waited for
    every witness, of which one was silent for good."""
    async with swarm(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[1].public_key, 100)
        await s.converged()
        ledger, pay = s.ledgers[1], (Transfer(s.ids[2].public_key, 5),)
        with full_disk(ledger.book.store), pytest.raises(LocalError):
            await ledger.wallet.append(pay)
        assert ledger.is_restored, "what the disk does not say is not so"
        await ledger.wallet.append(pay)
        assert not ledger.is_restored
        await s.stop(1)
        assert not (await s.start(1)).is_restored


async def test_an_entry_whose_mark_could_not_be_written_keeps_its_slot(tmp_path, autojump_clock, monkeypatch):
    async with swarm(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[1].public_key, 100)
        await s.converged()
        ledger = s.ledgers[1]
        await ledger.wallet.append((Transfer(s.ids[2].public_key, 1),))

        def full(seq: int) -> None:
            raise LocalError("local", f"no room to mark entry {seq}")

        monkeypatch.setattr(ledger.wallet._lineage, "signed", full)
        with pytest.raises(LocalError):
            await ledger.wallet.append((Transfer(s.ids[2].public_key, 5),))
        monkeypatch.undo()
        assert ledger.wallet.pending
        await ledger.wallet.append((Transfer(s.ids[2].public_key, 20),))
        await s.converged()
        assert s.ledgers[2].balance() == 26
        signed = [parse(each) for each in ledger.book.store.wallet()]
        final = ledger.book.store.entry_items(s.ids[1].public_key)
        assert [item.id for item in signed] == [item.id for item in final]


USER = 5


async def put_back(s, tmp_path):
    """Node 5 pays twice; its whole folder is then as it was after the first time."""
    await s.ledgers[0].grant(s.ids[USER].public_key, 100)
    await s.converged()
    await s.ledgers[USER].transfer(s.ids[1].public_key, 1)
    await s.converged()
    await s.stop(USER)
    (tmp_path / "copy").mkdir()
    for file in tmp_path.glob(f"{USER}.db*"):
        shutil.copy(file, tmp_path / "copy")
    await (await s.start(USER)).transfer(s.ids[2].public_key, 2)
    await s.converged()
    await s.stop(USER)
    for file in (tmp_path / "copy").iterdir():
        shutil.copy(file, tmp_path)


async def test_a_wallet_whose_whole_folder_is_put_back_signs_nothing_in_a_slot_that_is_filled(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=6, f=1) as s:
        await put_back(s, tmp_path)
        back = await s.start(USER, sync_seconds=3600)
        assert back.book.state.account(back.account).seq == 1
        assert not back.is_restored, "nothing on this disk shows it"
        await back.transfer(s.ids[3].public_key, 3)
        await s.converged()
        assert [s.ledgers[n].balance() for n in (1, 2, 3)] == [1, 2, 3]
        assert back.book.state.account(back.account).seq == 3
        assert not any(ledger.notes.offenders for ledger in s.ledgers.values())


async def test_a_wallet_that_turns_out_to_be_an_older_copy_asks_every_witness(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=6, f=1) as s:
        await put_back(s, tmp_path)
        await s.stop(3)
        back = await s.start(USER, sync_seconds=3600)
        with pytest.raises(RemoteError, match="3 of 4 witnesses"):
            await back.transfer(s.ids[2].public_key, 3)
        assert back.is_restored
        assert back.book.store.last_own() == 1, "nothing new was signed"
        await s.start(3)
        await back.transfer(s.ids[2].public_key, 3)
        assert not back.is_restored


async def claims_more(s, *, stalls):
    """Witness 3 says that it has a million entries of everybody's, and shows none."""
    await s.stop(3)
    liar = s.hub.add(s.ids[3])

    async def answer(call):
        return Reply({"epoch": 0, "head": 10**6})

    async def buckets(call):
        await trio.sleep(9)
        return Reply({"buckets": b"junk"})

    liar.serve("ledger.next", answer)
    if stalls:
        liar.serve("ledger.buckets", buckets)


async def test_a_witness_that_claims_what_it_cannot_show_does_not_hold_a_wallet_up(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=6, f=1) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 100)
        await s.converged()
        await s.ledgers[USER].transfer(s.ids[1].public_key, 1)
        await claims_more(s, stalls=False)
        await s.stop(USER)
        again = await s.start(USER)
        await again.transfer(s.ids[2].public_key, 2)
        assert not again.is_restored


async def test_a_witness_that_never_finishes_showing_holds_nobody_up(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=6, f=1) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 100)
        await s.converged()
        await s.ledgers[USER].transfer(s.ids[1].public_key, 1)
        await claims_more(s, stalls=True)
        await s.stop(USER)
        again = await s.start(USER)
        await again.wallet.append((Transfer(s.ids[2].public_key, 2),), timeout_s=2)
        assert not again.is_restored


async def test_the_word_of_one_witness_stands_until_a_quorum_says_otherwise(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=6, f=1) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 100)
        await s.converged()
        await s.ledgers[USER].transfer(s.ids[1].public_key, 1)
        await claims_more(s, stalls=False)
        await s.stop(USER)
        await s.stop(2)
        again = await s.start(USER)
        for _ in range(4):
            with pytest.raises(RemoteError, match="1 of 4 witnesses say"):
                await again.wallet.append((Transfer(s.ids[4].public_key, 2),), timeout_s=2)
        assert again.book.store.last_own() == 1, "nothing new was signed"
        assert not again.is_restored, "one may lie"
        await s.start(2)
        await again.transfer(s.ids[4].public_key, 2)


async def refuses(ledger, to, times, match):
    """The ledger's wallet does not sign, however often it is asked; the failures."""
    before, failures = ledger.book.store.last_own(), []
    for _ in range(times):
        with pytest.raises(RemoteError, match=match) as caught:
            await ledger.wallet.append((Transfer(to, 3),), timeout_s=2)
        assert caught.value.code == "unavailable"
        failures.append(caught.value)
    assert ledger.book.store.last_own() == before, "nothing new was signed"
    assert ledger.is_restored
    return failures


async def prune_all(s, nodes):
    await s.ledgers[nodes[0]].checkpoints.propose()
    for n in nodes[1:]:
        await s.ledgers[n].checkpoints.obtain()
    for n in nodes:
        await s.ledgers[n].checkpoints.prune()


async def test_a_wallet_put_back_among_pruned_witnesses_waits_for_a_node_that_keeps_all(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=6, f=1) as s:
        await put_back(s, tmp_path)
        await prune_all(s, range(4))
        await s.stop(4)
        back = await s.start(USER, sync_seconds=3600)
        for failure in await refuses(back, s.ids[3].public_key, 4, "4 of 4 witnesses say .* above a checkpoint"):
            assert "ledger.archive" in failure.hint
        full = await s.start(4)
        await full.replicator.sync_with(s.ids[USER].peer_id)
        await back.replicator.sync_with(s.ids[4].peer_id)
        await back.transfer(s.ids[3].public_key, 3)
        await s.converged()
        assert [s.ledgers[n].balance() for n in (1, 2, 3)] == [1, 2, 3]
        assert not back.is_restored
        assert not any(ledger.notes.offenders for ledger in s.ledgers.values())


async def test_a_wallet_put_back_whose_fetches_are_cut_off_waits(tmp_path, autojump_clock, monkeypatch):
    async with swarm(tmp_path, nodes=6, f=1) as s:
        await put_back(s, tmp_path)
        back = await s.start(USER, sync_seconds=3600)
        digests_of = back.replicator._digests_of

        async def slow(peer_id):
            await trio.sleep(12)
            return await digests_of(peer_id)

        monkeypatch.setattr(back.replicator, "_digests_of", slow)
        for ledger in s.ledgers.values():
            monkeypatch.setattr(ledger.replicator, "_next_peer", lambda: None)
        await refuses(back, s.ids[3].public_key, 4, "4 of 4 witnesses say")


@pytest.mark.parametrize("away", [False, True])
async def test_the_word_of_the_only_witness_stands(tmp_path, autojump_clock, away):
    """Without tolerance (f = 0) there is nobody who could say otherwise."""
    async with swarm(tmp_path, nodes=USER + 1, f=0) as s:
        await put_back(s, tmp_path)
        await prune_all(s, range(USER))
        back = await s.start(USER, sync_seconds=3600)
        await refuses(back, s.ids[1].public_key, 1, "1 of 1 witnesses say .* above a checkpoint")
        if away:
            await s.stop(0)
        for failure in await refuses(back, s.ids[1].public_key, 4, "1 of 1 witnesses say"):
            assert "ledger.archive" in failure.hint


async def with_own_entry_waiting(s, tmp_path):
    """Node 5 is put back to before it was given what it then spent; what it spent came by gossip, the gift did not."""
    me = s.ids[USER].public_key
    await s.ledgers[0].grant(me, 10)
    await s.converged()
    await s.ledgers[USER].transfer(s.ids[1].public_key, 1)
    await s.converged()
    await s.stop(USER)
    (tmp_path / "copy").mkdir()
    for file in tmp_path.glob(f"{USER}.db*"):
        shutil.copy(file, tmp_path / "copy")
    await s.start(USER)
    await s.ledgers[0].grant(me, 100)
    await s.converged()
    await s.ledgers[USER].transfer(s.ids[2].public_key, 50)
    await s.converged()
    await s.stop(USER)
    for file in (tmp_path / "copy").iterdir():
        shutil.copy(file, tmp_path)
    for ledger in s.ledgers.values():
        ledger.replicator._next_peer = lambda: None
    back = await s.start(USER, sync_seconds=3600)
    back.replicator._next_peer = lambda: None
    await back.book.learn([s.ledgers[1].book.store.entry_certificate(me, 2)])
    assert back.book.state.account(me).seq == 1
    assert back.book.state.has_entry(me, 2)
    return back


@pytest.mark.parametrize("witnesses_away", [False, True])
async def test_nothing_is_signed_in_a_slot_whose_final_entry_waits(
    tmp_path, autojump_clock, monkeypatch, witnesses_away
):
    async with swarm(tmp_path, nodes=6, f=1) as s:
        back = await with_own_entry_waiting(s, tmp_path)

        async def fails(peer_id):
            raise RemoteError("unavailable", "no line")

        monkeypatch.setattr(back.wallet._recovering, "_heal", fails)
        if witnesses_away:
            for n in range(4):
                await s.stop(n)
        await refuses(back, s.ids[3].public_key, 3, "this wallet may")
        if witnesses_away:
            for n in range(4):
                await s.start(n)
        monkeypatch.undo()
        await back.transfer(s.ids[3].public_key, 3)
        await s.converged()
        assert [s.ledgers[n].balance() for n in (2, 3)] == [50, 3]


async def test_a_wallet_sure_of_itself_waits_for_its_own_entry_too(tmp_path, autojump_clock):
    """As where the same key signs elsewhere: what is final elsewhere fills the slot here."""
    async with swarm(tmp_path, nodes=6, f=1) as s:
        back = await with_own_entry_waiting(s, tmp_path)
        back.wallet._recovering._glanced = True
        with pytest.raises(RemoteError, match="final and waits") as caught:
            await back.wallet.append((Transfer(s.ids[3].public_key, 3),))
        assert caught.value.code == "unavailable"
        with pytest.raises(RemoteError, match="final and waits"):
            back.wallet.preview((Transfer(s.ids[3].public_key, 3),))
        assert back.book.store.last_own() == 1, "nothing new was signed"


async def test_own_entries_that_wait_and_are_remembered_make_no_older_copy(tmp_path, autojump_clock):
    """A repair lost final entries, not the wallet's rows."""
    async with swarm(tmp_path, nodes=6, f=1) as s:
        me = s.ids[USER].public_key
        await s.ledgers[0].grant(me, 100)
        await s.converged()
        await s.ledgers[USER].transfer(s.ids[1].public_key, 1)
        await s.ledgers[USER].transfer(s.ids[1].public_key, 2)
        await s.converged()
        await s.stop(USER)
        store = Store(tmp_path / f"{USER}.db", s.genesis.net)
        store._writer.execute("DELETE FROM entries")
        store.close()
        again = await s.start(USER)
        await until(lambda: not again.wallet.pending)
        await again.transfer(s.ids[2].public_key, 3)
        await s.converged()
        assert s.ledgers[2].balance() == 3
        assert not again.is_restored
