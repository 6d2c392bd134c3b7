"""What a witness keeps of votes that are not final: as little as it must, and never more than it can hand over."""

import pytest
import trio

from ledger.core import unfinished
from ledger.core.errors import RuleError
from ledger.core.objects import Committee, Entry, Grant, Signed, Transfer, parse, sign
from ledger.core.unfinished import FRAME_BYTES, LOCKS_BYTES_MAX
from ledger.core.witness import HANDED_OVER, VOTING
from ledger.promises import Handed
from ledger.seats import PIECE_BYTES, TOO_LARGE_PAUSE_S
from ledger.store import Store
from p2p.core import codec
from p2p.core.identity import Identity
from tests.unit.ledger.committee_kit import ISSUER, OTHER, PAYER, ROOT, Net
from tests.unit.ledger.test_committee_change import OLD, epochs
from tests.unit.ledger.test_network import swarm, until

PEOPLE = [Identity.from_seed(bytes([200 + n]) * 32) for n in range(8)]


@pytest.fixture
def net() -> Net:
    made = Net()
    made.settle(made.entry(ISSUER, *(Grant(p.public_key, 10) for p in (PAYER, *PEOPLE))))
    return made


def dust(net: Net, who: Identity):
    return net.entry(who, Transfer(OTHER.public_key, 1))


def room_for(monkeypatch, net: Net, count: int) -> None:
    size = len(dust(net, PAYER).body) + FRAME_BYTES
    monkeypatch.setattr(unfinished, "LOCKS_BYTES_MAX", count * size)


def refusal(net: Net, signed) -> RuleError:
    with pytest.raises(RuleError) as caught:
        net.votes(0, (0,), signed)
    return caught.value


def test_votes_that_nobody_finishes_are_bounded_and_what_becomes_final_makes_room(net, monkeypatch):
    room_for(monkeypatch, net, 3)
    held = [dust(net, who) for who in PEOPLE[:4]]
    votes = [net.votes(0, (0,), signed) for signed in held]
    late = dust(net, PEOPLE[4])
    error = refusal(net, late)
    assert (error.rule, error.wait) == ("rate", True)
    assert net.votes(0, (0,), held[0]), "the same vote again takes no room"
    keys = tuple(key.public_key for key in net.keys[1])
    change = net.entry(ROOT, Committee(1, keys, 1))
    net.nodes[0][0].witness.listed.add(parse(change).id)
    assert net.votes(0, (0,), change), "the next committee may be what the others wait for"
    for signed, vote in zip(held[:3], votes[:3], strict=True):
        net.publish(net.certify(0, signed, [*vote, *net.votes(0, (1, 2), signed)]))
    assert net.votes(0, (0,), late)


def test_what_was_applied_without_being_told_makes_room_as_well(net, monkeypatch):
    """An entry that is final waits for another one; when that comes, only that one is told."""
    room_for(monkeypatch, net, 3)
    node = net.nodes[0][0]
    held = [dust(net, who) for who in PEOPLE[:4]]
    certificates = [net.certify(0, each, net.votes(0, (0, 1, 2), each)) for each in held]
    assert refusal(net, dust(net, PEOPLE[4])).rule == "rate"
    for certificate in certificates:
        node.state.add(node.verifier.open(certificate))
    assert net.votes(0, (0,), dust(net, PEOPLE[4]))


def test_a_restart_counts_the_votes_it_finds(net, monkeypatch):
    room_for(monkeypatch, net, 1)
    witness = net.nodes[0][0].witness
    for who in PEOPLE[:2]:
        witness.restore_entry_vote(parse(dust(net, who)))
    assert refusal(net, dust(net, PEOPLE[2])).rule == "rate"


def test_a_full_handover_of_locks_stays_readable(net):
    lock = dust(net, PAYER)
    assert len(codec.encode(lock)) <= len(lock.body) + FRAME_BYTES
    assert LOCKS_BYTES_MAX * 2 <= 128 << 20


def test_a_slot_with_two_entries_is_forgotten_once_it_is_final(net):
    witness = net.nodes[0][0].witness
    for n in range(1, 4):
        first, second = (net.entry(PAYER, Transfer(to.public_key, n)) for to in (OTHER, ISSUER))
        votes = net.votes(0, (0, 1, 2), first)
        assert refusal(net, second).rule == "equivocation"
        net.publish(net.certify(0, first, votes))
    assert len(witness._voted) == 0


async def test_a_proof_that_was_kept_leaves_the_witness(tmp_path, autojump_clock):
    async with swarm(tmp_path) as s:
        await s.ledgers[0].grant(s.ids[1].public_key, 100)
        await s.converged()
        me, voting = s.ids[1], s.ledgers[0].voting
        head = s.ledgers[0].book.state.account(me.public_key).head
        for amount in (1, 2, 3):
            ops = (Transfer(s.ids[2].public_key, amount),)
            signed = sign(me, Entry(s.genesis.net, me.public_key, 1, head, ops))
            if amount == 1:
                await voting.vote(parse(signed))
                continue
            with pytest.raises(RuleError, match="equivocation"):
                await voting.vote(parse(signed))
        assert s.ledgers[0].notes.is_offender(me.public_key)
        assert voting.witness.proofs == {}


def test_a_witness_whose_handover_nobody_could_read_does_not_stop(net, monkeypatch):
    net.change(1)
    witness = net.nodes[0][0].witness
    monkeypatch.setattr("ledger.core.witness.HANDOVER_BYTES_MAX", 100)
    with pytest.raises(RuleError, match="100 may be read") as caught:
        witness.advance()
    assert caught.value.rule == "handover"
    assert (witness.phase, witness.handover) == (VOTING, None)
    monkeypatch.undo()
    assert witness.advance() is not None, "its key is still there"
    witness.confirm_handover()
    assert witness.phase == HANDED_OVER


async def test_a_handover_that_is_too_large_erases_nothing_and_holds_up_no_other_seat(
    tmp_path, autojump_clock, monkeypatch
):
    monkeypatch.setattr("ledger.core.witness.HANDOVER_BYTES_MAX", 50)
    async with epochs(tmp_path, seconds=600) as s:
        s.made = {n: s.ledgers[n].new_epoch_key() for n in OLD}
        await s.change(s.committee(1, s.made.values()))
        await until(lambda: all(s.phase(n) == "collecting" for n in OLD))
        await trio.sleep(5)
        for n in OLD:
            seats, store = s.ledgers[n].seats, s.ledgers[n].book.store
            assert seats._seats[0].phase == "voting", "it has not stopped"
            assert not store.promises.handovers(0)
            assert seats._seats[1].epoch == 1, "the next seat goes on"
        monkeypatch.undo()
        await trio.sleep(TOO_LARGE_PAUSE_S)
        await until(lambda: all(s.phase(n) == "voting" for n in OLD))


def test_a_handover_is_read_in_pieces(tmp_path):
    body, signature = bytes(range(256)) * (PIECE_BYTES // 100), bytes(64)
    store = Store(tmp_path / "l.db", bytes(16))
    store.commit([Handed(3, bytes(32), Signed(body, signature))])
    read = b""
    while (found := store.handover_piece(3, bytes(32), len(read), PIECE_BYTES)) and found[1]:
        assert found[::2] == (len(body), signature)
        read += found[1]
    assert read == body
    assert store.handover_piece(3, bytes(32), len(body) + 9, 1) == (len(body), b"", signature)
    assert store.handover_piece(2, bytes(32), 0, 1) is None
    store.close()
