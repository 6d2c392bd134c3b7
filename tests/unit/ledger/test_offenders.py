"""Proofs of equivocation: of whom they are kept, how many, and that nobody with money escapes."""

import pytest
import trio

from config.errors import RemoteError
from ledger import offenders
from ledger.core.objects import Entry, Equivocation, Open, Reclaim, Signed, Transfer, sign
from p2p.core.identity import Identity
from tests.unit.ledger.test_network import CREDIT, identity, swarm, until


def proof(net: bytes, who: Identity, seq: int = 1, padding: int = 0) -> Equivocation:
    """Two entries for one slot, with as many kilobytes of nothing."""
    junk = Signed(bytes(padding << 10), bytes(64))
    ops = [Reclaim(bytes(32), n, (junk,)) if padding else Transfer(bytes([n]) * 32, n) for n in (1, 2)]
    return Equivocation(*(sign(who, Entry(net, who.public_key, seq, bytes(32), (op,))) for op in ops))


async def test_keys_that_cost_nothing_fill_no_table(tmp_path):
    async with swarm(tmp_path) as s:
        notes = s.ledgers[1].notes
        for n in range(20):
            assert not await notes.add_proof(proof(s.genesis.net, identity(100 + n), padding=200))
        assert not notes.offenders
        assert s.ledgers[1].book.store.promises.proofs() == []


async def test_who_gets_money_later_is_caught_by_the_next_round_of_notes(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=4) as s:
        who = s.ids[3]
        await s.ledgers[0].grant(who.public_key, 10 * CREDIT)
        await s.converged()
        assert await s.ledgers[0].notes.add_proof(proof(s.genesis.net, who))
        assert not await s.ledgers[0].notes.add_proof(proof(s.genesis.net, who, seq=2)), "one is enough"
        s.hub.partition(s.ids[0].peer_id, s.ids[2].peer_id)
        await s.ledgers[3].transfer(s.ids[1].public_key, 10 * CREDIT)
        await s.stop(2)
        (tmp_path / "2.db").unlink()
        s.hub.partition(s.ids[0].peer_id, s.ids[2].peer_id, heal=True)
        late = await s.start(2)
        await s.converged()
        assert not await late.notes.add_proof(proof(s.genesis.net, who)), "it has nothing to pay with"
        await trio.sleep(5)
        assert not late.notes.offenders
        assert s.ledgers[0].notes.is_offender(who.public_key), "who knew it goes on to know it"
        await s.ledgers[1].transfer(who.public_key, 6 * CREDIT)
        await until(lambda: late.notes.is_offender(who.public_key))


async def test_all_money_locked_in_a_channel_matters_too(tmp_path, autojump_clock):
    async with swarm(tmp_path) as s:
        who = s.ids[1]
        await s.ledgers[0].grant(who.public_key, 5 * CREDIT)
        await s.converged()
        await s.ledgers[1].wallet.append([Open(s.ids[2].public_key, s.ids[2].public_key, 5 * CREDIT, s.now_ms * 2)])
        await s.converged()
        assert s.ledgers[2].balance(who.public_key) == 0
        assert await s.ledgers[2].notes.add_proof(proof(s.genesis.net, who), announce=True)
        await until(lambda: all(ledger.notes.is_offender(who.public_key) for ledger in s.ledgers.values()))
        await s.stop(2)
        assert (await s.start(2)).notes.is_offender(who.public_key)
        with pytest.raises(RemoteError, match="two entries"):
            await s.ledgers[1].buyer._introduce(s.ids[2].peer_id, s.ledgers[1].buyer._find(s.ids[2].peer_id))


async def test_a_full_table_keeps_those_with_the_most_money_for_their_bytes(tmp_path, monkeypatch, autojump_clock):
    async with swarm(tmp_path, nodes=6) as s:
        poor, padded, rich, richest = s.ids[2:]
        for who, credits in ((poor, 1), (padded, 20), (rich, 3), (richest, 4)):
            await s.ledgers[0].grant(who.public_key, credits * CREDIT)
        await s.converged()
        notes, net = s.ledgers[1].notes, s.genesis.net
        monkeypatch.setattr(offenders, "PROOFS_MAX", 2)
        assert await notes.add_proof(proof(net, padded, padding=100))
        assert await notes.add_proof(proof(net, rich))
        assert await notes.add_proof(proof(net, richest)), "it takes the place of the one that is worth least a byte"
        assert notes.offenders == {rich.public_key, richest.public_key}
        assert not await notes.add_proof(proof(net, poor))
        stored = {account for account, _, _ in s.ledgers[1].book.store.promises.proofs()}
        assert stored == notes.offenders
        await s.stop(1)
        monkeypatch.setattr(offenders, "PROOFS_BYTES_MAX", 2 * len(proof(net, richest).a.body))
        again = await s.start(1)
        await until(lambda: len(again.book.store.promises.proofs()) == 1)
        assert again.notes.offenders == {richest.public_key}
