"""A wallet finishes what it signed in the order in which it signed it, and is sure of itself once its disk says so."""

import pytest

from config.errors import LocalError
from ledger.core.objects import Entry, Transfer, parse, sign
from ledger.records import Own
from ledger.store import Store
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
