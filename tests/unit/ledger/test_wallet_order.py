"""A wallet finishes what it signed in the order in which it signed it."""

from ledger.core.objects import Entry, Transfer, parse, sign
from ledger.store import Own, Store
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
