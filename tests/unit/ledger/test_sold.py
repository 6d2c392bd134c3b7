"""The table of channels a worker is paid on: a full disk, a disk that lost something, closed channels, strangers."""

import sqlite3

import pytest
import trio

from config.errors import LocalError, RiosError
from ledger import selling
from ledger.core import certificate as certificates
from ledger.core.objects import Certificate, Entry, Open, Signed, Vote, Voucher, channel_id, parse, sign
from p2p.core import codec
from tests.unit.ledger.committee_kit import full_disk
from tests.unit.ledger.test_committee_change import NEW, USER, epochs
from tests.unit.ledger.test_network import CREDIT, LEAF, QUOTE, Swarm, identity, swarm, until, work

HOUR_MS = 3600 * 1000


async def funded(s: Swarm, *nodes: int) -> None:
    for n in nodes:
        await s.ledgers[0].grant(s.ids[n].public_key, 100 * CREDIT)
    await s.converged()


async def hello(network, s: Swarm, channel: bytes, signed: Signed, shown=()):
    header = {"channel": channel, "certificates": list(shown), "voucher": codec.encode(signed)}
    return await network.call(s.ids[2].peer_id, "ledger.channel", header, deadline_ms=20_000)


def rot(path, account: bytes, seq: int) -> None:
    """One entry of the file is lost, as if its bytes had rotted and the file had been repaired."""
    db = sqlite3.connect(path)
    db.execute(
        "DELETE FROM entries WHERE seq = ? AND account = (SELECT id FROM accounts WHERE key = ?)", (seq, account)
    )
    db.commit()
    db.close()


# a full disk


async def test_a_dispute_while_the_disk_is_full_ends_that_channel_only_and_is_written_later(
    tmp_path, autojump_clock, monkeypatch
):
    monkeypatch.setattr(selling, "TICK_S", 2.0)
    async with swarm(tmp_path) as s:
        await funded(s, 1)
        payer, worker = s.ledgers[1], s.ledgers[2]
        channel = await work(payer, worker, 3)
        await trio.sleep(1)
        with full_disk(worker.book.store):
            payer.buyer._by_id[channel].stopped = "no more"
            worker.seller.served(s.ids[1].peer_id, channel, QUOTE, 1_000_000, LEAF)
            await trio.sleep(5)
            assert "disputes" in worker.channels()[0]["stopped"]
        await until(lambda: "disputes" in worker.book.store.channels("sell")[0].stopped)


async def test_a_payer_that_stops_while_the_disk_is_full_says_so_and_writes_it_later(
    tmp_path, autojump_clock, monkeypatch
):
    monkeypatch.setattr("ledger.buying.TICK_S", 2.0)
    async with swarm(tmp_path) as s:
        await funded(s, 1)
        payer, worker = s.ledgers[1], s.ledgers[2]
        channel = await work(payer, worker, 40)
        await trio.sleep(1)
        with full_disk(payer.book.store):
            for _ in range(10):
                worker.seller.served(s.ids[1].peer_id, channel, QUOTE, 1_000_000, LEAF)
            await until(lambda: "disputes" in worker.channels()[0]["stopped"])
            await payer.buyer.stop(s.ids[2].peer_id, "proved wrong")
        await until(lambda: "more than can be in doubt" in payer.book.store.channels("buy")[0].stopped)


# what the disk forgot


async def lost_open(s: Swarm, tmp_path, node: int) -> bytes:
    """A channel of node 1 to node 2 that is worked on; ``node`` starts again without the entry that opened it."""
    channel = await work(s.ledgers[1], s.ledgers[2], 200, 40_000_000)
    await until(lambda: not s.ledgers[2].seller._channels[channel].leaves)
    known = s.ledgers[1].book.state.channels[channel]
    await s.stop(node)
    rot(tmp_path / f"{node}.db", known.payer, known.seq)
    return channel


async def test_a_voucher_is_taken_up_when_its_channel_comes_back_from_others(tmp_path, autojump_clock):
    async with swarm(tmp_path) as s:
        await funded(s, 1)
        channel = await lost_open(s, tmp_path, 2)
        held = s.ledgers[1].buyer._by_id[channel].promised
        worker = await s.start(2)
        assert channel not in worker.book.state.channels
        await s.converged()
        low = sign(s.ids[1], Voucher(s.genesis.net, channel, 0, 1, LEAF))
        shown = await hello(s.hub.nodes[s.ids[1].peer_id], s, channel, low)
        voucher = codec.decode(Signed, shown.header["voucher"], bytes_max=4096).body
        assert codec.decode(Voucher, voucher, bytes_max=4096).cumulative == held
        await worker.settle_all()
        assert worker.balance() == held
        (row,) = worker.book.store.channels("sell")
        assert codec.decode(Voucher, row.voucher, bytes_max=4096).cumulative == held


async def test_a_payer_takes_up_its_count_when_its_channel_comes_back_from_others(tmp_path, autojump_clock):
    async with swarm(tmp_path) as s:
        await funded(s, 1)
        channel = await lost_open(s, tmp_path, 1)
        payer = await s.start(1)
        assert channel not in payer.book.state.channels
        await s.converged()
        await work(payer, s.ledgers[2], 40, 1_000_000)
        await until(lambda: not s.ledgers[2].seller._channels[channel].leaves)
        (bought,) = payer.channels()
        assert (bought["channel"], bought["calls"], bought["stopped"]) == (channel.hex(), 240, "")


# closed channels


async def test_closed_channels_make_room_for_others(tmp_path, autojump_clock, monkeypatch):
    monkeypatch.setattr("ledger.sold.CHANNELS_MAX", 2)
    monkeypatch.setattr(selling, "TICK_S", 2.0)
    monkeypatch.setattr("ledger.buying.TICK_S", 2.0)
    async with swarm(tmp_path, nodes=4) as s:
        await funded(s, 1, 3)
        payer, worker = s.ledgers[1], s.ledgers[2]
        key = s.ids[2].public_key
        for _ in range(2):
            opened = await payer.wallet.append([Open(key, key, s.genesis.min_lock, s.now_ms + HOUR_MS + 60_000)])
            channel = channel_id(opened.id, 0)
            await s.converged()
            zero = sign(s.ids[1], Voucher(s.genesis.net, channel, 0, 0, LEAF))
            await hello(s.hub.nodes[s.ids[1].peer_id], s, channel, zero)
        with pytest.raises(RiosError, match="too many channels"):
            await s.ledgers[3].buyer.open_channel(s.ids[2].peer_id)
        s.now_ms += 2 * HOUR_MS
        await payer.buyer.reclaim_expired()
        await s.converged()
        assert [each["closed"] for each in worker.channels()] == [True, True]
        mine = await s.ledgers[3].buyer.open_channel(s.ids[2].peer_id)
        await until(lambda: list(worker.seller._channels) == [mine])
        assert len(worker.book.store.channels("sell")) == 3, "the file keeps them for people"


async def test_a_payer_forgets_its_closed_channels(tmp_path, autojump_clock, monkeypatch):
    monkeypatch.setattr("ledger.buying.TICK_S", 2.0)
    async with swarm(tmp_path) as s:
        await funded(s, 1)
        payer = s.ledgers[1]
        channel = await work(payer, s.ledgers[2], 3)
        assert [each["closed"] for each in payer.channels()] == [False]
        await trio.sleep(1)
        s.now_ms += 73 * HOUR_MS
        await until(lambda: payer.book.state.channels[channel].closed_at is not None)
        await until(lambda: not payer.channels())
        assert not payer.buyer._answers
        assert len(payer.book.store.channels("buy")) == 1, "the gateway's books are compared with it"


async def test_a_stop_that_finds_no_room_after_its_channel_was_closed_ends_nothing(
    tmp_path, autojump_clock, monkeypatch
):
    monkeypatch.setattr("ledger.buying.TICK_S", 2.0)
    async with swarm(tmp_path) as s:
        await funded(s, 1)
        payer = s.ledgers[1]
        await work(payer, s.ledgers[2], 3)
        commit = payer.book.writer.commit

        async def stalls(records):
            if any(getattr(record, "side", "") == "buy" for record in records):
                await trio.sleep(10)
                raise LocalError("disk_full", "no room")
            await commit(records)

        monkeypatch.setattr(payer.book.writer, "commit", stalls)
        s.nursery.start_soon(payer.buyer.stop, s.ids[2].peer_id, "proved wrong")
        await trio.sleep(1)
        s.now_ms += 73 * HOUR_MS
        await payer.buyer.reclaim_expired()
        await until(lambda: not payer.channels())
        await trio.sleep(15)
        assert not payer.buyer._unsaved


async def test_witnesses_that_hang_hold_up_no_top_up(tmp_path, autojump_clock, monkeypatch):
    monkeypatch.setattr("ledger.buying.TICK_S", 2.0)
    async with swarm(tmp_path) as s:
        await funded(s, 1)
        payer = s.ledgers[1]
        for _ in range(8):
            await payer.wallet.append([Open(s.ids[2].public_key, s.ids[2].public_key, 5 * CREDIT, s.now_ms + HOUR_MS)])
        channel = await payer.buyer.open_channel(s.ids[2].peer_id)

        async def hangs(*_):
            await trio.sleep_forever()

        monkeypatch.setattr(payer.buyer._quorum, "freezes", hangs)
        s.now_ms += 3 * HOUR_MS
        await trio.sleep(3)  # the reclaims are under way
        for _ in range(80):
            payer.buyer.used(s.ids[2].peer_id, channel, QUOTE, 50_000_000, LEAF)
        began = trio.current_time()
        await until(lambda: payer.book.state.channels[channel].lock > 5 * CREDIT)
        assert trio.current_time() - began < 4


# strangers


def strange_open(s: Swarm, stranger) -> tuple[bytes, Certificate]:
    """What costs nothing: an own entry that opens a channel, under a certificate of an epoch that nobody knows."""
    key = s.ids[2].public_key
    entry = sign(
        stranger, Entry(s.genesis.net, stranger.public_key, 1, bytes(32), (Open(key, key, 5 * CREDIT, 1 << 60),))
    )
    return channel_id(parse(entry).id, 0), Certificate(entry, 7, (Vote(b"", bytes(64), 0, ()),))


async def test_strangers_cannot_make_a_worker_fetch_from_them(tmp_path, autojump_clock):
    async with swarm(tmp_path) as s:
        asked = []

        async def buckets(call):
            asked.append(call.peer_id)
            await trio.sleep_forever()

        def stranger(n):
            network = s.hub.add(identity(n))
            network.serve("ledger.buckets", buckets)
            return network

        s.ledgers[2].replicator._next_peer = lambda: None  # its own rounds are another matter
        network, mine = stranger(99), identity(99)
        unsigned = Signed(codec.encode(Voucher(s.genesis.net, bytes(32), 0, 0, LEAF)), bytes(64))
        channel, shown = strange_open(s, mine)
        foreign = sign(s.ids[1], Voucher(s.genesis.net, channel, 0, 0, LEAF))
        with pytest.raises(RiosError, match="not final here"):
            await hello(network, s, bytes(32), unsigned)
        for certificate in ([], [certificates.encode(shown)]):
            with pytest.raises(RiosError):
                await hello(network, s, channel, foreign, certificate)
        assert s.ids[2].peer_id not in asked

        async def well_made(n, network):
            channel, shown = strange_open(s, identity(n))
            voucher = sign(identity(n), Voucher(s.genesis.net, channel, 0, 0, LEAF))
            with pytest.raises(RiosError):
                await hello(network, s, channel, voucher, [certificates.encode(shown)])

        async with trio.open_nursery() as nursery:
            for n in range(100, 108):
                nursery.start_soon(well_made, n, stranger(n))
        assert asked.count(s.ids[2].peer_id) == 1, "of those that may be anybody one at a time"


async def test_a_payer_whose_channel_did_not_get_round_yet_is_let_in(tmp_path, autojump_clock):
    async with swarm(tmp_path) as s:
        await funded(s, 1)
        await s.stop(2)
        for _ in range(3):
            await s.ledgers[1].transfer(s.ids[0].public_key, 1000)
        worker = await s.start(2, sync_seconds=10_000)
        worker.replicator._next_peer = lambda: None
        assert await s.ledgers[1].buyer.open_channel(s.ids[2].peer_id) in worker.seller._channels


async def test_a_payer_that_knows_of_a_newer_committee_is_let_in(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        await s.stop(1)
        await s.change(s.committee(1, s.made.values()), (0, 2, 3))
        await until(lambda: all(s.phase(n) == "voting" for n in NEW))
        worker = await s.start(1, sync_seconds=10_000)
        worker.replicator._next_peer = lambda: None
        assert worker.book.state.committees.epoch == 0
        assert await s.ledgers[USER].buyer.open_channel(s.ids[1].peer_id) in worker.seller._channels
