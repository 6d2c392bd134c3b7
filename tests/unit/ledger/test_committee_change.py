"""Committees that change between real nodes: keys, seats, handovers, restarts, backups; over the in-memory network."""

import shutil
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from config.errors import ConfigError, LocalError, RemoteError, RequestError, RiosError
from config.settings import LedgerSettings
from ledger.core.committee import EpochCommittee
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import (
    Claim,
    Committee,
    Entry,
    Equivocation,
    Freeze,
    Frontier,
    Grant,
    Handover,
    Issuer,
    Reclaim,
    Signed,
    Transfer,
    Votes,
    Voucher,
    parse,
    sign,
)
from ledger.keys import EpochKeys
from ledger.ledger import open_ledger
from p2p.core import codec
from p2p.core.identity import Identity
from p2p.face import Reply
from p2p.memory import MemoryHub
from tests.unit.ledger.test_network import CREDIT, Swarm, swarm, until, work

OLD, NEW, USER = range(4), range(4, 8), 8


class Epochs(Swarm):
    """Nodes 0 to 3 are the first committee, 4 to 7 have keys for the next, 8 pays. Node 0 is issuer and root."""

    def __init__(self, tmp_path, nursery, **options):
        super().__init__(tmp_path, nursery, nodes=9, f=1, **options)
        self.keys = [EpochKeys(who, tmp_path / f"keys-{n}") for n, who in enumerate(self.ids)]
        self.made = {n: self.keys[n].create().public_key for n in NEW}

    async def start(self, n, **changes):
        settings = replace(LedgerSettings(sync_seconds=1, witness=n < 8, lag_calls=0), **changes)
        self.ledgers[n] = await open_ledger(
            self.hub.add(self.ids[n]),
            self.ids[n],
            self.genesis,
            self.tmp_path / f"{n}.db",
            settings,
            nursery=self.nursery,
            in_thread=self.in_thread,
            now_ms=lambda: self.now_ms,
            epoch_keys=EpochKeys(self.ids[n], self.tmp_path / f"keys-{n}"),
        )
        return self.ledgers[n]

    def committee(self, epoch: int, keys) -> Committee:
        return Committee(epoch, tuple(keys), 1)

    async def change(self, op, listers=OLD):
        entry_id = self.ledgers[0].change_id(op)
        for n in listers:
            await self.ledgers[n].allow(entry_id)
        await self.ledgers[0].change(op)

    def phase(self, n) -> str:
        witness = self.ledgers[n].voting.witness
        return witness.phase if witness is not None else "no seat"


@asynccontextmanager
async def epochs(tmp_path, seconds=60):
    with trio.fail_after(seconds):
        async with trio.open_nursery() as nursery:
            made = Epochs(tmp_path, nursery)
            for n in range(9):
                await made.start(n)
            yield made
            for n in list(made.ledgers):
                made.ledgers[n].book.state.check_invariants()
                assert not made.ledgers[n].book.state.broken
                await made.ledgers[n].aclose()
            nursery.cancel_scope.cancel()


async def test_a_new_committee_takes_over_and_the_old_one_is_silent(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        await work(s.ledgers[USER], s.ledgers[1], 40)
        await s.change(s.committee(1, s.made.values()))
        await until(lambda: all(s.phase(n) == "voting" for n in NEW))
        assert all(s.ledgers[n].voting.witness is None for n in OLD), "they have handed over"
        await work(s.ledgers[USER], s.ledgers[1], 40)
        assert await s.ledgers[1].settle_all() >= 80_000
        await s.ledgers[USER].transfer(s.ids[5].public_key, 7)
        await s.converged()
        newest = s.ledgers[0].book.store.entry_certificate(s.ids[USER].public_key, 2)
        assert newest.epoch == 1
        for n in (0, 4, USER):
            report = await s.ledgers[n].verify()
            assert report.verified, report.problems
            assert s.ledgers[n].statistics()["epoch"] == 1
        # back to four of the first nodes, with keys of their own this time; the keys of epoch 1 are erased
        keys = [s.ledgers[n].new_epoch_key() for n in OLD]
        await s.change(s.committee(2, keys), NEW)
        await until(lambda: all(s.phase(n) == "voting" for n in OLD))
        assert all(not s.keys[n].epoch_keys() for n in NEW), "an epoch's keys are erased once it has handed over"
        await s.ledgers[USER].transfer(s.ids[5].public_key, 8)
        await s.converged()
        assert s.ledgers[3].balance(s.ids[5].public_key) == 15


async def test_one_old_witness_down_and_one_new_one_late(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        await s.stop(3)
        await s.stop(7)
        await s.change(s.committee(1, s.made.values()), (0, 1, 2))
        await until(lambda: all(s.phase(n) == "voting" for n in (4, 5, 6)))
        await s.ledgers[USER].transfer(s.ids[5].public_key, 7)
        assert s.ledgers[4].voting.witness.inheritance.counted == 3
        await s.start(7)
        await until(lambda: s.phase(7) == "voting")
        await s.start(3)
        await until(lambda: s.ledgers[4].voting.witness.inheritance.counted == 4)
        await s.converged()


async def test_new_witnesses_that_restart_while_they_collect_go_on(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        user = s.ids[USER].public_key
        await s.ledgers[0].grant(user, 30 * CREDIT)
        await s.converged()
        await s.ledgers[USER].transfer(s.ids[5].public_key, 1)
        cuts = [(s.ids[new].peer_id, s.ids[old].peer_id) for new in NEW for old in (1, 2)]
        for cut in cuts:
            s.hub.partition(*cut)
        await s.change(s.committee(1, s.made.values()))
        await until(lambda: all(s.phase(n) == "collecting" for n in NEW))
        with pytest.raises(RiosError):
            await s.ledgers[USER].wallet.append([Transfer(s.ids[5].public_key, 7)], timeout_s=3)
        await until(lambda: all(len(s.ledgers[n].voting.witness.inheritance.received) == 2 for n in NEW))
        for n in (*NEW, 0):
            await s.stop(n)
        for cut in cuts:
            s.hub.partition(*cut, heal=True)
        for n in (0, *NEW):
            await s.start(n)
        assert all(len(s.ledgers[n].voting.witness.inheritance.received) >= 2 for n in NEW), "handovers are durable"
        await until(lambda: not s.ledgers[USER].wallet.pending)
        assert s.ledgers[USER].book.store.entry_certificate(user, 2).epoch == 1


async def test_a_change_is_refused_until_enough_operators_listed_it(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        op = s.committee(1, s.made.values())
        with pytest.raises(RequestError) as caught:
            await s.ledgers[1].change(op)
        assert caught.value.code == "forbidden"
        entry_id = s.ledgers[0].change_id(op)
        await s.ledgers[1].allow(entry_id)
        await s.ledgers[2].allow(entry_id)
        with pytest.raises(RemoteError, match="has not listed"):
            await s.ledgers[0].change(op, timeout_s=2)
        assert s.ledgers[0].book.state.committees.epoch == 0
        await s.stop(2)
        await s.start(2)
        await s.ledgers[3].allow(entry_id)
        await until(lambda: s.ledgers[0].book.state.committees.epoch == 1)
        assert s.ledgers[0].book.state.committees.current == EpochCommittee(1, op.keys, 1, entry_id)


async def test_a_new_issuer_grants_and_the_old_one_cannot(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        await s.change(Issuer(s.ids[USER].public_key))
        await until(lambda: s.ledgers[USER].book.state.committees.issuer == s.ids[USER].public_key)
        await s.ledgers[USER].grant(s.ids[5].public_key, 9)
        with pytest.raises(RequestError, match="not the network's issuer any more"):
            await s.ledgers[0].grant(s.ids[5].public_key, 9)
        await s.converged()
        assert s.ledgers[1].balance(s.ids[5].public_key) == 9


async def test_a_witness_whose_database_is_put_back_never_votes_again_in_its_epoch(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        await s.stop(1)
        shutil.copy(tmp_path / "1.db", tmp_path / "backup.db")
        await s.start(1)
        await until(lambda: 0 in s.ledgers[1].seats._vouched)
        await s.stop(3)  # so that 1 has to vote
        await s.ledgers[USER].transfer(s.ids[5].public_key, 7)
        await s.stop(1)
        shutil.copy(tmp_path / "backup.db", tmp_path / "1.db")
        await s.start(1)
        await s.start(3)
        assert s.ledgers[1].statistics()["witness"]["restored"]
        await s.ledgers[USER].transfer(s.ids[5].public_key, 8)
        assert s.ledgers[1].voting.votes == 0
        # neither does it hand over, and the next committee begins without it
        await s.change(s.committee(1, s.made.values()), (0, 2, 3))
        await until(lambda: all(s.phase(n) == "voting" for n in NEW))
        assert s.ledgers[4].voting.witness.inheritance.counted == 3
        await s.stop(1)
        await s.start(1)
        assert s.ledgers[1].seats._seats[0].is_restored(), "it remembers"


async def test_an_epoch_key_is_silent_though_the_loss_was_noticed_by_a_start_without_the_keys(tmp_path, autojump_clock):
    me, issuer = Identity.from_seed(b"m" * 32), Identity.from_seed(b"i" * 32)
    key = EpochKeys(me, tmp_path / "keys").create().public_key
    genesis = Genesis(issuer=issuer.public_key, root=issuer.public_key, witnesses=(key,), f=0)

    @asynccontextmanager
    async def opened(**options):
        async with trio.open_nursery() as nursery:
            settings = LedgerSettings(witness=bool(options), sync_seconds=3600)
            ledger = await open_ledger(
                MemoryHub(1).add(me),
                me,
                genesis,
                tmp_path / "l.db",
                settings,
                nursery=nursery,
                in_thread=False,
                **options,
            )
            yield ledger
            await ledger.aclose()
            nursery.cancel_scope.cancel()

    def entry(amount):
        return parse(sign(issuer, Entry(genesis.net, issuer.public_key, 1, bytes(32), (Grant(me.public_key, amount),))))

    async with opened(epoch_keys=EpochKeys(me, tmp_path / "keys")) as ledger:
        await ledger.voting.vote(entry(5))
    (tmp_path / "l.db").unlink()
    async with opened() as ledger:
        assert ledger.is_restored
    async with opened(epoch_keys=EpochKeys(me, tmp_path / "keys")) as ledger:
        with pytest.raises(RuleError, match="restored"):
            await ledger.voting.vote(entry(7))


async def test_workers_claim_at_once_when_the_committee_changes(tmp_path, autojump_clock):
    async with epochs(tmp_path, seconds=600) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        channel = await work(s.ledgers[USER], s.ledgers[1], 40)
        worker = s.ledgers[1]
        await until(lambda: worker.channels()[0]["promised"] >= 40_000)
        await trio.sleep(100)
        assert worker.book.state.channels[channel].paid == 0, "it claims once an hour"
        await s.change(s.committee(1, s.made.values()))
        await until(lambda: worker.book.state.channels[channel].paid >= 40_000)
        assert worker.book.state.committees.epoch == 1


async def test_a_witness_that_forgot_its_handover_is_silent(tmp_path, autojump_clock):
    """Seed 5363: an identity as a witness key cannot be erased; an older copy would vote on, or hand over once more."""
    async with epochs(tmp_path, seconds=200) as s:
        await s.converged()
        await s.stop(1)
        shutil.copy(tmp_path / "1.db", tmp_path / "copy.db")
        await s.start(1)
        await s.change(s.committee(1, s.made.values()), (0, 2, 3))  # 1 gives no vote, it only hands over
        await until(lambda: s.ledgers[1].book.store.promises.handover(0, s.ids[1].public_key) is not None)
        await s.stop(1)
        for tail in ("-wal", "-shm"):
            (tmp_path / f"1.db{tail}").unlink(missing_ok=True)
        shutil.copy(tmp_path / "copy.db", tmp_path / "1.db")
        back = await s.start(1)
        assert back.is_restored
        assert back.seats._seats[0].restored
        await s.converged()
        await trio.sleep(60)
        assert back.book.store.promises.handover(0, s.ids[1].public_key) is None


async def test_a_whole_folder_put_back_is_noticed_by_the_batches_that_peers_know(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        await s.stop(1)
        for name in ("1.db", "1.db.mark"):
            shutil.copy(tmp_path / name, tmp_path / f"backup-{name}")
        await s.start(1)
        await until(lambda: 0 in s.ledgers[1].seats._vouched)
        await s.stop(3)
        await s.ledgers[USER].transfer(s.ids[5].public_key, 7)
        await s.stop(1)
        for name in ("1.db", "1.db.mark"):
            shutil.copy(tmp_path / f"backup-{name}", tmp_path / name)
        await s.start(1)
        assert not s.ledgers[1].statistics()["witness"]["restored"], "nothing on this disk shows it"
        await until(lambda: s.ledgers[1].statistics()["witness"]["restored"])
        assert s.ledgers[1].voting.votes == 0


async def lose_an_entry(s: Epochs, tmp_path) -> Entry:
    """Node 8 signs an entry that only witness 1 votes for, then loses its disk."""
    await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
    await s.converged()
    await s.ledgers[USER].transfer(s.ids[5].public_key, 1)
    for n in (0, 2, 3):
        s.hub.partition(s.ids[USER].peer_id, s.ids[n].peer_id)
    with pytest.raises(RiosError):
        await s.ledgers[USER].wallet.append([Transfer(s.ids[5].public_key, 7)], timeout_s=2)
    lost = s.ledgers[USER].book.store.wallet()[-1]
    await s.stop(USER)
    (tmp_path / "8.db").unlink()
    (tmp_path / "8.db.mark").unlink()
    for n in (0, 2, 3):
        s.hub.partition(s.ids[USER].peer_id, s.ids[n].peer_id, heal=True)
    return lost


async def test_a_wallet_that_lost_its_disk_completes_what_it_had_signed(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        lost = await lose_an_entry(s, tmp_path)
        await s.start(USER)
        await s.ledgers[USER].replicator.sync_with(s.ids[0].peer_id)
        await s.ledgers[USER].transfer(s.ids[6].public_key, 8)
        assert s.ledgers[USER].book.store.entry_certificate(s.ids[USER].public_key, 2).object == lost
        assert s.ledgers[USER].balance(s.ids[6].public_key) == 8
        assert not s.ledgers[USER].notes.offenders


async def test_a_restored_wallet_waits_for_every_witness_or_the_next_committee(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        lost = await lose_an_entry(s, tmp_path)
        await s.stop(1)  # the only one that knows
        await s.start(USER)
        await s.ledgers[USER].replicator.sync_with(s.ids[0].peer_id)
        with pytest.raises(RemoteError, match="3 of 4 witnesses"):
            await s.ledgers[USER].wallet.append([Transfer(s.ids[6].public_key, 8)], timeout_s=5)
        assert len(s.ledgers[USER].book.store.wallet()) == 0, "nothing was signed"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.ledgers[USER].wallet.append, [Transfer(s.ids[6].public_key, 8)])
            await trio.sleep(2)
            await s.change(s.committee(1, s.made.values()), (0, 2, 3))
        assert s.ledgers[USER].book.store.entry_certificate(s.ids[USER].public_key, 2).object != lost
        assert s.ledgers[USER].balance(s.ids[6].public_key) == 8


async def test_whoever_signs_two_entries_is_known_to_all_and_gets_no_new_service(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        cheat, worker = s.ledgers[USER], s.ledgers[1]
        await work(cheat, worker, 40)
        account = cheat.book.state.account(cheat.account)
        two = [
            sign(s.ids[USER], Entry(s.genesis.net, cheat.account, account.seq + 1, account.head, (Transfer(to, 1),)))
            for to in (s.ids[1].public_key, s.ids[2].public_key)
        ]
        for n, signed in enumerate(two):
            with pytest.raises(RiosError) if n else trio.CancelScope():
                await cheat.wallet._quorum.certify(signed, timeout_s=3)
        await until(lambda: all(cheat.account in ledger.notes.offenders for ledger in s.ledgers.values()))
        await s.stop(2)
        assert cheat.account in (await s.start(2)).notes.offenders
        with pytest.raises(RemoteError, match="stopped"):
            worker.seller.admit(s.ids[USER].peer_id, bytes.fromhex(worker.channels()[0]["channel"]), None)
        with pytest.raises(RiosError, match="two entries"):
            await cheat.buyer.open_channel(s.ids[2].peer_id)
        await worker.settle_all()
        assert worker.balance() >= 40_000, "what it had promised is paid"
        with pytest.raises(RiosError):
            await worker.notes.add_proof(Equivocation(two[0], two[0]))
        with pytest.raises(RiosError):
            await worker.notes.add_proof(
                Equivocation(
                    two[0],
                    sign(
                        s.ids[3],
                        Entry(
                            s.genesis.net, cheat.account, account.seq + 1, account.head, (Transfer(cheat.account, 2),)
                        ),
                    ),
                )
            )


async def test_the_only_witness_of_a_network_votes_after_a_backup_if_its_operator_says_so(tmp_path, autojump_clock):
    async with swarm(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[1].public_key, 100)
        await s.converged()
        await s.stop(0)
        shutil.copy(tmp_path / "0.db", tmp_path / "backup.db")
        await s.start(0)
        await s.ledgers[1].transfer(s.ids[2].public_key, 1)
        await s.stop(0)
        shutil.copy(tmp_path / "backup.db", tmp_path / "0.db")
        await s.start(0)
        with pytest.raises(RemoteError, match="restored from a backup"):
            await s.ledgers[1].transfer(s.ids[2].public_key, 2)
        await s.ledgers[0].trust_backup()
        await until(lambda: not s.ledgers[1].wallet.pending)
        await s.stop(0)
        await s.start(0)
        assert not s.ledgers[0].statistics()["witness"]["restored"]
        with pytest.raises(RiosError, match="no witness of this node was restored"):
            await s.ledgers[0].trust_backup()
        await s.converged()
        assert s.ledgers[0].balance(s.ids[2].public_key) == 3


async def test_a_full_disk_delays_the_handover_and_nothing_else(tmp_path, autojump_clock, caplog):
    async with epochs(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        store = s.ledgers[1].book.store
        honest, full = store.commit, [True]

        def commit(records):
            if full[0] and any(type(record).__name__ == "Handed" for record in records):
                raise LocalError("disk_full", "no room")
            honest(records)

        store.commit = commit
        await s.change(s.committee(1, s.made.values()))
        await until(lambda: all(s.phase(n) == "voting" for n in NEW))
        await until(lambda: "no room" in caplog.text)
        assert s.ledgers[4].voting.witness.inheritance.counted == 3
        witness = s.ledgers[1].seats._seats[0]
        assert witness.phase == "stopped", "it neither votes nor hands over"
        full[0] = False
        await until(lambda: all(s.ledgers[n].voting.witness.inheritance.counted == 4 for n in NEW))
        await s.ledgers[USER].transfer(s.ids[5].public_key, 7)
        await s.converged()


async def test_freezes_of_the_old_committee_reclaim_under_the_new_one(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        payer, worker = s.ledgers[USER], s.ledgers[1]
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        channel = await work(payer, worker, 100)
        await until(lambda: payer.channels()[0]["promised"] >= 100_000)
        s.now_ms += 73 * 3600 * 1000
        row = payer.book.store.channels("buy")[0]
        freezes = await payer.wallet._quorum.freezes(channel, payer.account, Signed(row.voucher, row.signature))
        total = max(codec.decode(Freeze, freeze.body, bytes_max=4096).total for freeze in freezes)
        await s.change(s.committee(1, s.made.values()))
        await until(lambda: all(s.phase(n) == "voting" for n in NEW))
        with pytest.raises(RiosError, match="may have frozen"):
            await worker.seller._quorum.certify(claim(s, channel, worker), timeout_s=2)
        await payer.wallet.append([Reclaim(channel, total, freezes), Transfer(s.ids[5].public_key, 3)])
        await s.converged()
        certificate = payer.book.store.entry_certificate(payer.account, payer.book.state.account(payer.account).seq)
        assert certificate.epoch == 1
        assert worker.balance() == total >= 100_000
        assert s.ledgers[4].book.state.channels[channel].closed_at == total


def claim(s: Epochs, channel: bytes, worker) -> Signed:
    known = worker.book.state.channels[channel]
    voucher = Voucher(s.genesis.net, channel, 1, known.lock, bytes(32))
    signature = sign(s.ids[USER], voucher).signature
    return sign(s.ids[1], Claim(known.payer, known.seq, known.op_index, voucher, signature))


async def test_a_liar_that_hands_over_nonsense_holds_nobody_up(tmp_path, autojump_clock):
    async with epochs(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[USER].public_key, 30 * CREDIT)
        await s.converged()
        await s.stop(3)
        liar, net = s.hub.add(s.ids[3]), s.genesis.net
        frontier = Frontier(((s.ids[6].public_key, 1 << 40),), ())
        unreachable = sign(s.ids[3], Handover(net, 0, s.ids[3].public_key, frontier, (), (), ()))
        answers = iter([b"", b"junk", unreachable.body])

        async def hand_over(call):
            body = next(answers, unreachable.body)
            return Reply({"bytes": len(body), "signature": unreachable.signature}, [body] if body else [])

        async def batches(call):
            forged = sign(s.ids[3], Votes(net, 0, call.header["witness"], 999, bytes(32), bytes(32)))
            return Reply({"newest": 0, "header": forged.body, "signature": forged.signature})

        liar.serve("ledger.handover", hand_over)
        liar.serve("ledger.batches", batches)
        await s.change(s.committee(1, s.made.values()), (0, 1, 2))
        await until(lambda: all(s.phase(n) == "voting" for n in NEW))
        await until(lambda: all(len(s.ledgers[n].voting.witness.inheritance.received) == 4 for n in NEW))
        assert all(s.ledgers[n].voting.witness.inheritance.counted == 3 for n in NEW)
        await s.stop(0)
        assert not (await s.start(0)).statistics()["witness"]["restored"], "nobody else can say what it signed"
        await s.ledgers[USER].transfer(s.ids[5].public_key, 7)


async def test_nobody_vouches_for_a_witness_among_several(tmp_path, autojump_clock):
    async with swarm(tmp_path, nodes=4, f=1) as s:
        await s.stop(1)
        (tmp_path / "1.db.mark").unlink()
        await s.start(1)
        with pytest.raises(RiosError, match="until the next epoch"):
            await s.ledgers[1].trust_backup()


def test_epoch_keys_are_kept_like_the_identity_and_erased_for_good(tmp_path):
    identity = Identity.from_seed(b"k" * 32)
    keys = EpochKeys(identity, tmp_path / "keys", "secret")
    made = keys.create()
    (file,) = (tmp_path / "keys").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    assert made.seed.hex() not in file.read_text()
    again = EpochKeys(identity, tmp_path / "keys", "secret")
    assert again.find(made.public_key) == made
    assert again.find(identity.public_key) is identity
    assert again.find(b"x" * 32) is None
    with pytest.raises(ConfigError, match="passphrase"):
        EpochKeys(identity, tmp_path / "keys", "wrong").find(made.public_key)
    again.erase(made.public_key)
    assert again.find(made.public_key) is None
    assert list((tmp_path / "keys").iterdir()) == []
    again.erase(identity.public_key)
    assert again.find(identity.public_key) is identity
    with pytest.raises(LocalError, match="no folder"):
        EpochKeys(identity).create()
