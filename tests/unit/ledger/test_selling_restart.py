"""A worker goes on selling after a restart with whatever its disk still knows."""

from ledger.core.channel import NANO
from ledger.store import Store
from tests.unit.ledger.test_network import CREDIT, LEAF, QUOTE, admitted, swarm, until, work


def lose_top_ups(path, net: bytes, account: bytes) -> None:
    """Everything on an account's chain after the entry that opened its channel."""
    store = Store(path, net)
    (row,) = store._writer.execute("SELECT id FROM accounts WHERE key = ?", (account,)).fetchone()
    store._writer.execute("DELETE FROM entries WHERE account = ? AND seq > 1", (row,))
    store.close()


async def test_a_voucher_above_the_lock_that_is_known_is_kept_until_the_top_up_comes_back(tmp_path, autojump_clock):
    """The top-up was applied, but its commit failed, or the file was saved without it."""
    async with swarm(tmp_path, nodes=4) as s:
        payer, me = s.ledgers[3], s.ids[3]
        await s.ledgers[0].grant(me.public_key, 50 * CREDIT)
        await s.converged()
        channel = await work(payer, s.ledgers[1], 160, kflop=40_000_000)
        await until(lambda: s.ledgers[1].seller._channels[channel].promised > 5 * CREDIT)
        await s.stop(1)
        lose_top_ups(tmp_path / "1.db", s.genesis.net, me.public_key)
        worker = await s.start(1)
        sold, known = worker.seller._channels[channel], worker.book.state.channels[channel]
        assert sold.promised > known.lock == 5 * CREDIT
        while admitted(worker.seller, me.peer_id, channel):
            worker.seller.served(me.peer_id, channel, QUOTE, 1_000_000, LEAF)
        assert sold.earned <= sold.promised + 1_000, "no more than the call that went over"
        assert sold.limit_nano == sold.promised * NANO
        await until(lambda: worker.book.state.channels[channel].lock > 5 * CREDIT)
        await worker.settle_all()
        assert worker.book.state.channels[channel].paid > 5 * CREDIT
