"""The ledger between nodes: grants, transfers, channels, vouchers, claims, faults; over the in-memory network."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

import msgspec
import pytest
import trio

from config.errors import RemoteError, RequestError, RiosError
from config.settings import LedgerSettings
from ledger.core.certificate import Verifier
from ledger.core.genesis import Genesis
from ledger.core.objects import Entry, Open, Receipt, Transfer, Voucher, open_signed, parse, sign
from ledger.ledger import Ledger, open_ledger
from ledger.voting import read_signed
from p2p.core import codec
from p2p.core.identity import Identity
from p2p.face import Reply
from p2p.memory import MemoryHub
from p2p.services import Service

CREDIT = 1_000_000
LEAF = bytes(32)


@dataclass(frozen=True)
class Quote:
    number: int = 1
    microcredits_per_tflop: int = 1_000_000
    microcredits_per_kv_unit: int = 0


QUOTE = Quote()


def identity(n: int) -> Identity:
    return Identity.from_seed(bytes([n]) * 32)


async def until(condition) -> None:
    """Wait for something that the tasks in the background bring about; the caller holds the time limit."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.05)


class Swarm:
    """Several ledgers on one hub. Node 0 is the issuer; the first ``3f+1`` are witnesses."""

    def __init__(self, tmp_path, nursery, *, nodes=3, f=0, seed=1, in_thread=False):
        self.in_thread = in_thread
        self.hub = MemoryHub(seed)
        self.tmp_path = tmp_path
        self.nursery = nursery
        self.ids = [identity(i + 1) for i in range(nodes)]
        keys = [i.public_key for i in self.ids]
        self.genesis = Genesis(issuer=keys[0], root=keys[0], witnesses=tuple(keys[: 3 * f + 1]), f=f)
        self.witnesses = 3 * f + 1
        self.ledgers: dict[int, Ledger] = {}
        self.now_ms = 1_800_000_000_000

    async def start(self, n, *, payout=None, **changes):
        settings = replace(LedgerSettings(sync_seconds=1, witness=n < self.witnesses, lag_calls=0), **changes)
        network = self.hub.add(self.ids[n])
        self.ledgers[n] = await open_ledger(
            network,
            self.ids[n],
            self.genesis,
            self.tmp_path / f"{n}.db",
            settings,
            nursery=self.nursery,
            payout=payout,
            in_thread=self.in_thread,
            now_ms=lambda: self.now_ms,
        )
        return self.ledgers[n]

    async def stop(self, n):
        self.hub.kill(self.ids[n].peer_id)
        await self.ledgers.pop(n).aclose()

    async def converged(self):
        await until(lambda: len({ledger.book.state.digest() for ledger in self.ledgers.values()}) == 1)


@asynccontextmanager
async def swarm(tmp_path, **options) -> AsyncIterator[Swarm]:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            made = Swarm(tmp_path, nursery, **options)
            for n in range(len(made.ids)):
                await made.start(n)
            yield made
            for n in list(made.ledgers):
                made.ledgers[n].book.state.check_invariants()
                await made.ledgers[n].aclose()
            nursery.cancel_scope.cancel()


def admitted(seller, payer, channel) -> bool:
    with suppress(RemoteError):
        seller.admit(payer, channel, QUOTE)
        return True
    return False


async def work(payer: Ledger, worker: Ledger, calls: int, kflop: int = 1_000_000) -> bytes:
    """Calls as dmoe makes them: admit, serve, use."""
    buyer, seller = payer.buyer, worker.seller
    me, them = payer._identity.peer_id, worker._identity.peer_id
    for _ in range(calls):
        channel = buyer.channel(them) or await buyer.open_channel(them)
        if not admitted(seller, me, channel):
            channel = await buyer.open_channel(them)  # shows the worker a voucher of what was counted here
            seller.admit(me, channel, QUOTE)
        seller.served(me, channel, QUOTE, kflop, LEAF)
        buyer.used(them, channel, QUOTE, kflop, LEAF)
        await trio.sleep(0.001)
    return channel


async def test_grant_transfer_and_the_same_state_everywhere(tmp_path):
    async with swarm(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[1].public_key, 50 * CREDIT)
        await s.converged()
        await s.ledgers[1].transfer(s.ids[2].public_key, 20 * CREDIT)
        await s.converged()
        assert [ledger.balance() for ledger in s.ledgers.values()] == [0, 30 * CREDIT, 20 * CREDIT]
        for ledger in s.ledgers.values():
            report = await ledger.verify()
            assert report.verified
            assert report.sum_ok
            assert (report.entries, report.certificates) == (2, 2)
            assert "no Byzantine tolerance" in report.tolerance
        lines = await s.ledgers[1].statement()
        assert [(line.kind, line.amount) for line in lines] == [("grant", 50 * CREDIT), ("transfer", -20 * CREDIT)]


@pytest.mark.parametrize("in_thread", [False, True])
async def test_work_is_metered_paid_and_settled(tmp_path, in_thread):
    async with swarm(tmp_path, in_thread=in_thread) as s:
        payer, worker = s.ledgers[0], s.ledgers[1]
        await payer.grant(s.ids[0].public_key, 20 * CREDIT)
        await work(payer, worker, 300)
        paid = await worker.settle_all()
        await s.converged()
        spent = 300 * 1_000  # 300 calls of 1 GFLOP at 1 credit per TFLOP
        (bought,) = payer.channels()
        (sold,) = worker.channels()
        assert bought["spent"] == sold["earned"] == spent
        assert spent <= paid == worker.balance() <= spent + 50_000
        assert bought["paid"] == paid
        assert (await s.ledgers[2].verify()).claims == 1


async def busy_stream(s, calls_per_ms: int, milliseconds: int, kflop: int) -> int:
    """Calls from node 0 to node 1 at a steady rate; how many receipts were exchanged meanwhile."""
    payer, worker = s.ledgers[0], s.ledgers[1]
    me, them = s.ids[0].peer_id, s.ids[1].peer_id
    channel = await payer.buyer.open_channel(them)
    for _ in range(milliseconds):
        for _ in range(calls_per_ms):
            worker.seller.admit(me, channel, QUOTE)  # raises where the provider would be owed too much
            worker.seller.served(me, channel, QUOTE, kflop, LEAF)
            payer.buyer.used(them, channel, QUOTE, kflop, LEAF)
        await trio.sleep(0.001)
    return worker.seller.receipts


async def test_many_small_calls_share_a_voucher_and_the_last_one_comes_at_once(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=2) as s:
        await s.ledgers[0].grant(s.ids[0].public_key, 20 * CREDIT)
        receipts = await busy_stream(s, 3, 1000, kflop=1_000)
        assert 3 <= receipts <= 6, "one for 250 ms, not one for 32 calls"
        before = trio.current_time()
        await until(lambda: not next(iter(s.ledgers[1].seller._channels.values())).leaves)
        assert trio.current_time() - before <= 0.25


async def test_a_busy_channel_is_paid_before_half_of_what_is_lent_is_used_up(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=2) as s:
        await s.ledgers[0].grant(s.ids[0].public_key, 20 * CREDIT)
        # 1,000 microcredits a millisecond: 250 ms would cost more than what is lent and prepaid together
        receipts = await busy_stream(s, 1, 1000, kflop=1_000_000)
        assert receipts > 12
        sold = next(iter(s.ledgers[1].seller._channels.values()))
        assert sold.nano <= sold.limit_nano


async def test_settling_collects_what_waits_between_two_receipts(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=2) as s:
        await s.ledgers[0].grant(s.ids[0].public_key, 20 * CREDIT)
        s.ledgers[0].buyer._settings = replace(s.ledgers[0].buyer._settings, prepay=0)
        await busy_stream(s, 3, 250, kflop=10_000)
        assert next(iter(s.ledgers[1].seller._channels.values())).hurry is not None, (
            "the exchange is between two receipts"
        )
        assert await s.ledgers[1].settle_all() == s.ledgers[1].channels()[0]["earned"]


async def test_a_payer_that_does_not_pay_is_cut_off(tmp_path):
    async with swarm(tmp_path) as s:
        payer, worker = s.ledgers[0], s.ledgers[1]
        await payer.grant(s.ids[0].public_key, 20 * CREDIT)
        channel = await payer.buyer.open_channel(s.ids[1].peer_id)
        # W0 of 50,000 and the 50,000 (a hundredth of the lock) that are lent, at 1,000 a call; the one that went over
        for _ in range(101):
            worker.seller.admit(s.ids[0].peer_id, channel, QUOTE)
            worker.seller.served(s.ids[0].peer_id, channel, QUOTE, 1_000_000, LEAF)
        with pytest.raises(RiosError, match="owes") as caught:
            worker.seller.admit(s.ids[0].peer_id, channel, QUOTE)
        assert caught.value.code == "payment_required"


async def test_vouchers_lag_by_a_hundred_calls_until_they_could_be_audited(tmp_path, autojump_clock, monkeypatch):
    monkeypatch.setattr("ledger.buying.AUDITED_S", 10.0)
    monkeypatch.setattr("ledger.selling.TICK_S", 3.0)
    async with swarm(tmp_path) as s:
        payer, worker = s.ledgers[0], s.ledgers[1]
        s.hub.kill(s.ids[0].peer_id)
        await s.ledgers.pop(0).aclose()
        payer = await s.start(0, lag_calls=100)
        await payer.grant(s.ids[0].public_key, 20 * CREDIT)
        channel = await payer.buyer.open_channel(s.ids[1].peer_id)
        assert payer.channels()[0]["promised"] == 0, "nothing is paid ahead"
        await work(payer, worker, 400, kflop=100_000)  # 100 microcredits each
        await until(lambda: worker.channels()[0]["promised"] >= 30_000)
        assert worker.channels()[0]["promised"] == payer.channels()[0]["promised"] == 30_000
        await payer.buyer.open_channel(s.ids[1].peer_id)  # as a worker would make it do that says it is owed
        assert payer.channels()[0]["promised"] == 30_000
        with trio.move_on_after(5):
            await trio.sleep_forever()
        assert worker.channels()[0]["promised"] == 30_000
        await until(lambda: worker.channels()[0]["promised"] == 40_000)
        assert channel in payer.buyer._by_id


async def test_a_worker_that_is_stopped_keeps_what_was_paid_and_loses_the_last_hundred_calls(tmp_path):
    async with swarm(tmp_path) as s:
        payer, worker = s.ledgers[0], s.ledgers[1]
        await payer.grant(s.ids[0].public_key, 20 * CREDIT)
        payer.buyer._settings = replace(payer.buyer._settings, lag_calls=100)
        await work(payer, worker, 160, kflop=100_000)
        await until(lambda: worker.channels()[0]["promised"] == 6_000)
        await payer.buyer.stop(s.ids[1].peer_id, "proved wrong")
        worker.seller.served(s.ids[0].peer_id, next(iter(payer.buyer._by_id)), QUOTE, 1, LEAF)
        await until(lambda: worker.statistics()["stopped_channels"])
        assert worker.channels()[0]["promised"] == 6_000
        with pytest.raises(RemoteError, match="stopped"):
            await payer.buyer.open_channel(s.ids[1].peer_id)


async def test_another_channel_may_be_opened_while_a_worker_is_stopped(tmp_path):
    async with swarm(tmp_path) as s:
        payer = s.ledgers[0]
        await payer.grant(s.ids[0].public_key, 20 * CREDIT)
        await payer.buyer.open_channel(s.ids[1].peer_id)
        stop = payer.buyer._stop

        async def busy_stop(*args):
            await stop(*args)
            await payer.buyer.open_channel(s.ids[2].peer_id)  # as an answer under way does

        payer.buyer._stop = busy_stop
        await payer.buyer.stop(s.ids[1].peer_id, "proved wrong")
        assert {each["peer_id"]: bool(each["stopped"]) for each in payer.channels()} == {
            s.ids[1].peer_id: True,
            s.ids[2].peer_id: False,
        }


async def test_a_worker_that_overcounts_is_stopped_and_both_see_why(tmp_path, autojump_clock):
    async with swarm(tmp_path) as s:
        payer, worker = s.ledgers[0], s.ledgers[1]
        await payer.grant(s.ids[0].public_key, 20 * CREDIT)
        channel = await work(payer, worker, 40)
        for _ in range(10):
            worker.seller.served(s.ids[0].peer_id, channel, QUOTE, 1_000_000, LEAF)
        await until(lambda: payer.statistics()["stopped_channels"] and worker.statistics()["stopped_channels"])
        assert "more than can be in doubt" in payer.channels()[0]["stopped"]
        assert "disputes" in worker.channels()[0]["stopped"]
        with pytest.raises(RiosError) as caught:
            worker.seller.admit(s.ids[0].peer_id, channel, QUOTE)
        assert caught.value.code == "payment_required"
        assert payer.buyer.channel(s.ids[1].peer_id) is None


async def test_channels_are_topped_up_before_they_run_dry(tmp_path):
    async with swarm(tmp_path) as s:
        payer, worker = s.ledgers[0], s.ledgers[1]
        await payer.grant(s.ids[0].public_key, 20 * CREDIT)
        await work(payer, worker, 220, kflop=40_000_000)  # 8.8 credits through locks of 5
        (bought,) = payer.channels()
        assert bought["spent"] == 8_800_000
        assert bought["lock"] == 15_000_000  # topped up whenever three quarters are used


async def test_too_little_money_says_so_and_signs_nothing(tmp_path):
    async with swarm(tmp_path) as s:
        with pytest.raises(RequestError, match="at least 5000000 microcredits") as caught:
            await s.ledgers[1].buyer.open_channel(s.ids[2].peer_id)
        assert caught.value.code == "payment_required"
        with pytest.raises(RequestError) as caught:
            await s.ledgers[1].transfer(s.ids[2].public_key, 5)
        assert caught.value.code == "payment_required"
        with pytest.raises(RequestError) as caught:
            await s.ledgers[1].grant(s.ids[2].public_key, 5)
        assert caught.value.code == "forbidden"
        assert s.ledgers[1].book.store.wallet() == []


async def test_four_witnesses_one_silent(tmp_path):
    async with swarm(tmp_path, nodes=5, f=1) as s:
        await s.stop(3)
        await s.ledgers[0].grant(s.ids[4].public_key, 30 * CREDIT)
        await s.converged()
        await work(s.ledgers[4], s.ledgers[1], 50)
        assert await s.ledgers[1].settle_all() >= 50_000
        await s.start(3)
        await s.converged()
        report = await s.ledgers[3].verify()
        assert report.verified
        assert (report.entries, report.claims) == (2, 1)


async def test_without_a_quorum_nothing_is_final_and_the_entry_is_sent_again(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=5, f=1) as s:
        await s.ledgers[0].grant(s.ids[4].public_key, 30 * CREDIT)
        await s.converged()
        await s.ledgers[4].transfer(s.ids[0].public_key, 1)  # with a quorum, a new database learns that it is new
        await s.stop(2)
        await s.stop(3)
        with pytest.raises(RiosError, match="votes missing") as caught:
            await s.ledgers[4].wallet.append([Transfer(s.ids[1].public_key, 7)], timeout_s=1)
        assert caught.value.code == "unavailable"
        first = s.ledgers[4].book.store.wallet()
        await s.stop(4)
        await s.start(4)
        assert s.ledgers[4].wallet.pending
        await s.start(2)
        await until(lambda: not s.ledgers[4].wallet.pending)
        assert s.ledgers[4].book.store.wallet() == first
        await s.converged()
        assert s.ledgers[1].balance() == 7


async def test_what_gossip_missed_comes_by_anti_entropy(tmp_path):
    async with swarm(tmp_path) as s:
        await s.stop(2)
        for n in range(30):
            await s.ledgers[0].grant(s.ids[1].public_key, 1000 + n)
        assert await s.start(2)
        await s.ledgers[2].replicator.sync_with(s.ids[0].peer_id)
        assert s.ledgers[2].book.state.digest() == s.ledgers[0].book.state.digest()


async def test_restart_of_worker_and_payer_keeps_vouchers_and_counts(tmp_path):
    async with swarm(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[1].public_key, 20 * CREDIT)
        await s.converged()
        channel = await work(s.ledgers[1], s.ledgers[2], 100)
        await s.ledgers[2].settle_all()
        promised = s.ledgers[2].channels()[0]["promised"]
        for n in (2, 1):
            await s.stop(n)
            await s.start(n)
        assert s.ledgers[2].channels()[0]["promised"] == promised
        assert s.ledgers[1].channels()[0]["promised"] >= promised
        again = await work(s.ledgers[1], s.ledgers[2], 100)
        assert again == channel
        await s.ledgers[2].settle_all()
        (sold,) = s.ledgers[2].channels()
        assert sold["earned"] == 200_000
        assert sold["paid"] >= 200_000


async def test_restart_of_the_witness_does_not_vote_twice_in_one_slot(tmp_path):
    async with swarm(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[1].public_key, 100)
        await s.converged()
        genesis, me = s.genesis, s.ids[1]
        head = s.ledgers[0].book.state.account(me.public_key).head
        first, second = (
            parse(sign(me, Entry(genesis.net, me.public_key, 1, head, (Transfer(s.ids[to].public_key, 100),))))
            for to in (0, 2)
        )
        await s.ledgers[0].voting.vote(first)
        await s.stop(0)
        await s.start(0)
        with pytest.raises(RiosError, match="equivocation"):
            await s.ledgers[0].voting.vote(second)
        assert (await s.ledgers[0].voting.vote(first)).index == 0
        assert s.ledgers[0].statistics()["witness"]["equivocations"] == 1


async def test_objects_of_another_network_are_refused(tmp_path):
    async with swarm(tmp_path) as s:
        other = Genesis(
            issuer=s.ids[0].public_key, root=s.ids[0].public_key, witnesses=s.genesis.witnesses, max_supply=10**12
        )
        assert other.net != s.genesis.net
        await s.ledgers[0].grant(s.ids[1].public_key, 100)
        certificate = s.ledgers[0].book.store.entry_certificate(s.ids[0].public_key, 1)
        with pytest.raises(RiosError, match="network"):
            Verifier(other).open(certificate)
        with pytest.raises(RiosError, match="another ledger network"):
            await s.hub.nodes[s.ids[2].peer_id].call(
                s.ids[0].peer_id, "ledger.buckets", {"net": other.net}, deadline_ms=1000
            )


async def test_receipts_are_signed_and_cover_the_answers(tmp_path):
    async with swarm(tmp_path) as s:
        payer, worker = s.ledgers[0], s.ledgers[1]
        await payer.grant(s.ids[0].public_key, 20 * CREDIT)
        seen = []
        original = payer.buyer._receipt
        s.hub.nodes[s.ids[0].peer_id]._services["ledger.receipt"] = Service(
            lambda call: seen.append(call) or original(call)
        )
        await work(payer, worker, 40)
        await worker.settle_all()
        receipts = [open_signed(Receipt, read_signed(call.header["receipt"]), s.ids[1].public_key) for call in seen]
        assert receipts[-1].calls == 40
        assert receipts[-1].kflop == 40_000_000
        assert receipts[-1].cumulative == 40_000


async def test_what_is_left_in_an_expired_channel_returns_and_the_worker_is_paid(tmp_path):
    async with swarm(tmp_path, nodes=5, f=1) as s:
        payer, worker = s.ledgers[4], s.ledgers[1]
        await s.ledgers[0].grant(s.ids[4].public_key, 6 * CREDIT)
        await s.converged()
        channel = await work(payer, worker, 100)
        await until(lambda: payer.channels()[0]["promised"] >= 100_000)
        assert await payer.buyer.reclaim_expired() == 0
        s.now_ms += 73 * 3600 * 1000
        with pytest.raises(RiosError):
            worker.seller.admit(s.ids[4].peer_id, bytes(32), QUOTE)
        returned = await payer.buyer.reclaim_expired()
        await s.converged()
        assert worker.balance() >= 100_000
        assert returned == 5 * CREDIT - worker.balance()
        assert payer.balance() == 6 * CREDIT - worker.balance()
        assert s.ledgers[2].book.state.channels[channel].closed_at == worker.balance()
        assert payer.buyer.channel(s.ids[1].peer_id) != await payer.buyer.open_channel(s.ids[1].peer_id)


async def test_forged_replayed_and_foreign_vouchers_and_receipts_change_nothing(tmp_path):
    async with swarm(tmp_path) as s:
        payer, worker, thief = s.ledgers[0], s.ledgers[1], s.ledgers[2]
        await payer.grant(s.ids[0].public_key, 20 * CREDIT)
        channel = await work(payer, worker, 40)
        await worker.settle_all()
        await s.converged()
        before = worker.channels(), payer.channels()
        promised = worker.channels()[0]["promised"]
        network = {n: s.hub.nodes[s.ids[n].peer_id] for n in range(3)}

        def hello(who, cumulative, key=channel):
            signed = sign(s.ids[who], Voucher(s.genesis.net, key, 9, cumulative, LEAF))
            return {"channel": channel, "certificates": [], "voucher": codec.encode(signed)}

        def receipt(who, cumulative, net=s.genesis.net):
            body = Receipt(net, channel, 9, cumulative, 99, 99, 0, LEAF)
            return {"receipt": codec.encode(sign(s.ids[who], body))}

        to_worker, to_payer = s.ids[1].peer_id, s.ids[0].peer_id
        for sender, target, method, header in (
            (0, to_worker, "ledger.channel", hello(2, promised + 1)),
            (2, to_worker, "ledger.channel", hello(2, promised + 1)),
            (0, to_worker, "ledger.channel", hello(0, 6 * CREDIT)),
            (0, to_worker, "ledger.channel", hello(0, promised + 1, key=LEAF)),
            (0, to_worker, "ledger.channel", {"channel": channel, "certificates": [], "voucher": b"junk"}),
            (2, to_payer, "ledger.receipt", receipt(2, 1)),
            (1, to_payer, "ledger.receipt", receipt(2, 1)),
            (1, to_payer, "ledger.receipt", receipt(1, 1, net=bytes(16))),
        ):
            with pytest.raises(RiosError):
                await network[sender].call(target, method, header, deadline_ms=5000)
        # an old voucher and an old receipt are answered with what is held, and nothing falls
        await network[0].call(to_worker, "ledger.channel", hello(0, 1), deadline_ms=5000)
        await network[1].call(to_payer, "ledger.receipt", receipt(1, 5), deadline_ms=5000)
        assert (worker.channels(), payer.channels()) == before
        with pytest.raises(RiosError, match="not known here"):
            worker.seller.admit(thief._identity.peer_id, channel, QUOTE)


async def test_a_payer_that_goes_silent_is_cut_off_and_its_last_voucher_is_claimed(tmp_path):
    async with swarm(tmp_path, nodes=4) as s:
        await s.ledgers[0].grant(s.ids[3].public_key, 20 * CREDIT)
        await s.converged()
        payer, worker = s.ledgers[3], s.ledgers[1]
        channel = await work(payer, worker, 40)
        await s.stop(3)
        # what the last voucher prepaid and the credit on it; then no more
        for _ in range(200):
            if not admitted(worker.seller, s.ids[3].peer_id, channel):
                break
            worker.seller.served(s.ids[3].peer_id, channel, QUOTE, 1_000_000, LEAF)
        assert not admitted(worker.seller, s.ids[3].peer_id, channel)
        (sold,) = worker.channels()
        assert sold["earned"] - sold["promised"] <= sold["lock"] // 100 + 1_000
        assert await worker.settle_all() == sold["promised"] == worker.balance()


@pytest.mark.parametrize("payout", [b"x", b"", bytes(31), bytes(33), bytes(32), 7, None])
async def test_a_worker_with_an_impossible_payout_does_not_block_the_payer_s_chain(tmp_path, payout):
    async with swarm(tmp_path) as s:
        payer = s.ledgers[0]
        await payer.grant(s.ids[0].public_key, 20 * CREDIT)

        async def terms(call):
            return Reply({"net": s.genesis.net, "signer": s.ids[1].public_key, "payout": payout})

        s.hub.nodes[s.ids[1].peer_id]._services["ledger.terms"] = Service(terms)
        with pytest.raises(RemoteError, match="no account"):
            await payer.buyer.open_channel(s.ids[1].peer_id)
        await payer.transfer(s.ids[2].public_key, 5)
        assert payer.balance() == 20 * CREDIT - 5


async def test_an_entry_that_no_witness_could_read_is_not_kept(tmp_path):
    async with swarm(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[0].public_key, CREDIT)
        with pytest.raises(RequestError, match="cannot be written"):
            await s.ledgers[0].transfer(b"short", 5)
        await s.ledgers[0].transfer(s.ids[2].public_key, 5)


async def test_ranges_of_strangers_are_not_looked_up(tmp_path):
    async with swarm(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[1].public_key, CREDIT)
        looked_up = []
        store = s.ledgers[0].book.store
        for name in ("entry_certificates", "entry_certificate", "claim_certificate"):
            real = getattr(store, name)
            setattr(store, name, lambda *key, real=real: looked_up.append(key) or real(*key))
        unknown = [(bytes([n % 256, n // 256]) * 16, 1, 1 << 60) for n in range(1000)]
        mine = (s.ids[0].public_key, 1, 1 << 60)
        header = {
            "net": s.genesis.net,
            "ranges": msgspec.msgpack.encode([*unknown, mine, mine]),
            "channels": [account for account, *_ in unknown],
        }
        stranger = s.hub.nodes[s.ids[2].peer_id]
        reply = await stranger.call(s.ids[0].peer_id, "ledger.fetch", header, deadline_ms=5000)
        assert len(reply.buffers) == 2
        assert len(looked_up) == 2, "one per object that is there"


@pytest.mark.parametrize("parts", [[1 << 60], [-1], ["x"], [None], 3, [b"x"] * 65])
@pytest.mark.parametrize(("method", "field"), [("ledger.channel", "certificates"), ("ledger.submit", "before")])
async def test_lists_of_no_certificates_are_refused(tmp_path, method, field, parts, caplog):
    async with swarm(tmp_path, nodes=2) as s:
        stranger = s.hub.nodes[s.ids[1].peer_id]
        with pytest.raises(RiosError) as refused:
            await stranger.call(s.ids[0].peer_id, method, {field: parts, "channel": bytes(32)}, deadline_ms=5000)
        assert refused.value.code == "invalid_request"
        assert not caplog.records


async def test_the_payout_account_is_paid_and_a_change_of_it_leaves_open_channels_alone(tmp_path):
    cold, colder = identity(77).public_key, identity(78).public_key
    async with swarm(tmp_path) as s:
        payer = s.ledgers[1]
        await s.ledgers[0].grant(s.ids[1].public_key, 20 * CREDIT)
        await s.stop(2)
        worker = await s.start(2, payout=cold)
        await s.converged()
        first = await work(payer, worker, 50)
        await worker.settle_all()
        assert payer.book.state.channels[first].payout == cold
        paid = worker.balance(cold)
        assert paid >= 50_000
        assert worker.balance() == 0
        await s.stop(2)
        worker = await s.start(2, payout=colder)
        await s.stop(1)
        payer = await s.start(1)  # it introduces the open channel again
        assert await work(payer, worker, 50) == first
        await worker.settle_all()
        assert worker.balance(cold) > paid, "what a channel says when it is opened stays"
        s.now_ms += 73 * 3600 * 1000
        await payer.buyer.reclaim_expired()
        await s.converged()
        second = await payer.buyer.open_channel(s.ids[2].peer_id)
        assert payer.book.state.channels[second].payout == colder


async def test_a_channel_that_pays_somebody_else_is_refused(tmp_path):
    async with swarm(tmp_path) as s:
        payer = s.ledgers[1]
        await s.ledgers[0].grant(s.ids[1].public_key, 20 * CREDIT)
        await s.converged()
        op = Open(s.ids[2].public_key, s.ids[1].public_key, 5 * CREDIT, s.now_ms + 72 * 3600 * 1000)
        await payer.wallet.append([op])
        await s.converged()
        with pytest.raises(RiosError, match="pays somebody else"):
            await payer.buyer.open_channel(s.ids[2].peer_id)


async def test_two_that_reclaim_at_once_reclaim_once(tmp_path):
    async with swarm(tmp_path, nodes=5, f=1) as s:
        payer, worker = s.ledgers[4], s.ledgers[1]
        await s.ledgers[0].grant(s.ids[4].public_key, 6 * CREDIT)
        await s.converged()
        await work(payer, worker, 10)
        before = payer.book.state.account(payer.account).seq
        s.now_ms += 73 * 3600 * 1000
        returned = []

        async def reclaim():
            returned.append(await payer.buyer.reclaim_expired())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reclaim)
            nursery.start_soon(reclaim)
        assert sorted(returned)[0] == 0 < sorted(returned)[1]
        assert payer.book.state.account(payer.account).seq == before + 1
