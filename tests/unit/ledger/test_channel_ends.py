"""The two ends of a channel with others in the way: hellos at once, freezes by strangers, witnesses that are away."""

import pytest
import trio

from config.errors import RemoteError
from ledger.core.objects import Open, Voucher, channel_id, sign
from p2p.core import codec
from tests.unit.ledger.test_network import CREDIT, Swarm, swarm, until, work


async def spent(s: Swarm, n: int) -> bytes:
    """A channel of node 4 to worker ``n``, paid in vouchers only."""
    channel = await work(s.ledgers[4], s.ledgers[n], 100)
    await until(lambda: {c["channel"]: c["promised"] for c in s.ledgers[n].channels()}[channel.hex()] >= 100_000)
    return channel


async def test_a_stranger_cannot_freeze_a_channel_before_its_payer_shows_the_voucher(tmp_path):
    async with swarm(tmp_path, nodes=6, f=1) as s:
        payer, worker, stranger = s.ledgers[4], s.ledgers[1], s.hub.nodes[s.ids[5].peer_id]
        await s.ledgers[0].grant(s.ids[4].public_key, 6 * CREDIT)
        await s.converged()
        channel = await spent(s, 1)
        s.now_ms += 73 * 3600 * 1000
        for n in range(4):
            with pytest.raises(RemoteError, match="only its payer") as refused:
                await stranger.call(s.ids[n].peer_id, "ledger.freeze", {"channel": channel}, deadline_ms=1000)
            assert refused.value.code == "forbidden"
        await payer.buyer.reclaim_expired()
        await s.converged()
        assert worker.balance() >= 100_000


async def test_a_channel_that_cannot_be_reclaimed_keeps_no_other_waiting(tmp_path, monkeypatch):
    async with swarm(tmp_path, nodes=5, f=1) as s:
        payer = s.ledgers[4]
        await s.ledgers[0].grant(s.ids[4].public_key, 15 * CREDIT)
        await s.converged()
        first, second = await spent(s, 1), await spent(s, 2)
        s.now_ms += 73 * 3600 * 1000
        freezes = payer.buyer._quorum.freezes

        async def without_the_first(channel, *args):
            if channel == first:
                raise RemoteError("unavailable", "0 of 3 witnesses froze it")
            return await freezes(channel, *args)

        monkeypatch.setattr(payer.buyer._quorum, "freezes", without_the_first)
        with pytest.raises(RemoteError, match="froze it"):
            await payer.buyer.reclaim_expired()
        channels = payer.book.state.channels
        assert (channels[first].closed_at is None, channels[second].closed_at is None) == (True, False)


async def test_two_first_hellos_at_once_are_about_one_channel(tmp_path):
    async with swarm(tmp_path) as s:
        payer, worker = s.ledgers[1], s.ledgers[2]
        await s.ledgers[0].grant(s.ids[1].public_key, 6 * CREDIT)
        await s.converged()
        opened = await payer.wallet.append([Open(s.ids[2].public_key, s.ids[2].public_key, 5 * CREDIT, s.now_ms * 2)])
        channel = channel_id(opened.id, 0)
        await s.converged()

        async def hello(cumulative):
            voucher = sign(s.ids[1], Voucher(s.genesis.net, channel, 0, cumulative, bytes(32)))
            header = {"channel": channel, "certificates": [], "voucher": codec.encode(voucher)}
            await s.hub.nodes[s.ids[1].peer_id].call(s.ids[2].peer_id, "ledger.channel", header, deadline_ms=1000)

        commit = worker.book.writer.commit
        entered = []

        async def slow(records):
            entered.append(None)
            await trio.sleep(0.3 if len(entered) == 1 else 0.6)  # the higher voucher is durable first
            await commit(records)

        worker.book.writer.commit = slow
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hello, 900_000)
            await until(lambda: entered)
            nursery.start_soon(hello, 400_000)
        assert [c["promised"] for c in worker.channels()] == [900_000]
        (row,) = worker.book.store.channels("sell")
        assert codec.decode(Voucher, row.voucher, bytes_max=4096).cumulative == 900_000
