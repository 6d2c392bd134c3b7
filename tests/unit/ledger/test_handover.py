"""What a new witness takes from handovers, and what it does not."""

import msgspec
import pytest

from config.errors import IntegrityError
from ledger.core import checkpoint
from ledger.core.errors import RuleError
from ledger.core.handover import Inheritance, frontier_of
from ledger.core.objects import (
    Committee,
    Frontier,
    Handover,
    Held,
    Shown,
    Signed,
    Transfer,
    parse,
    sign,
)
from ledger.core.state import State
from ledger.core.witness import COLLECTING, HANDED_OVER, VOTING, Witness
from p2p.core import codec
from tests.unit.ledger.committee_kit import LATE_MS, OTHER, PAYER, Net, member


@pytest.fixture
def net() -> Net:
    made = Net()
    made.channel = made.fund()
    return made


def new(net: Net) -> Inheritance:
    net.change(1)
    return net.nodes[1][0].witness.inheritance


def test_handovers_of_strangers_other_networks_and_epochs_are_refused_by_name(net):
    inheritance = new(net)
    good = codec.decode(Handover, net.handover_by(member(0, 0), 0).body, bytes_max=1 << 20)
    for rule, signed in {
        "handover": net.handover_by(member(9, 9), 0),
        "signature": Signed(net.handover_by(member(0, 0), 0).body, bytes(64)),
        "epoch": net.handover_by(member(1, 1), 1),
    }.items():
        with pytest.raises(RuleError) as caught:
            inheritance.receive(signed)
        assert caught.value.rule == rule
    with pytest.raises(RuleError, match="no committee of epoch 7"):
        inheritance.receive(net.handover_by(member(0, 0), 7))
    with pytest.raises(RuleError, match="not by a witness"):
        inheritance.receive(sign(member(0, 0), msgspec.structs.replace(good, net=bytes(16))))
    for junk in (b"", b"\x00" * 99, net.handover_by(member(0, 0), 0).body + b"\xc0"):
        with pytest.raises(IntegrityError):
            inheritance.receive(Signed(junk, bytes(64)))
    assert inheritance.received == frozenset()


def test_the_first_handover_of_a_witness_counts(net):
    inheritance = new(net)
    assert inheritance.receive(net.handover_by(member(0, 0), 0, freezes=[Held(net.channel, 0, None)]))
    assert inheritance.receive(net.handover_by(member(0, 0), 0)) is None
    assert inheritance.settle()
    assert not inheritance.settle()
    assert inheritance.counted == 1
    assert net.channel in inheritance.bans


def test_a_frontier_that_nobody_reaches_holds_nobody_up(net):
    inheritance = new(net)
    inheritance.receive(net.handover_by(member(0, 2), 0, frontier=Frontier(((PAYER.public_key, 99),), ())))
    for signed in net.handovers(0, (0, 1, 3)):
        inheritance.receive(signed)
    inheritance.settle()
    assert inheritance.ready
    assert inheritance.counted == 3
    assert len(inheritance.received) == 4


def pruned(net: Net) -> State:
    """What a node knows that starts from a checkpoint of now."""
    known, state = net.observer.state, State(net.genesis)
    pages = list(checkpoint.pages(known))
    summary = checkpoint.summarise(pages, known.committees, known.supply, known.applied)
    items = [parse(certificate.object) for certificate in net.final]
    adopted = [item for item in items if getattr(item.object, "account", None) == net.genesis.root]
    checkpoint.adopt_committees(state.committees, adopted)
    checkpoint.load(state, checkpoint.read(pages), summary)
    assert state.digest() == known.digest()
    return state


def test_a_witness_begins_again_though_a_channel_of_the_handovers_was_closed_and_pruned(net):
    net.settle(net.claim(net.channel, 20))
    net.change(1)
    handovers = net.handovers(0, range(4))
    net.begin(1, handovers)
    freezes = [net.nodes[1][n].witness.freeze(net.channel, LATE_MS).signed for n in range(3)]
    net.settle(net.reclaim(net.channel, freezes, 20))
    witness = Witness(net.keys[1][0], pruned(net), 1)
    for signed in handovers:
        witness.receive(signed)
    witness.advance()
    assert (witness.phase, witness.inheritance.counted) == (VOTING, 4)


def test_a_made_up_channel_makes_no_made_up_account_reached(net):
    frontier = frontier_of(net.observer.state)
    inheritance = new(net)
    unknown = Frontier(frontier.accounts, ((bytes(32), 7),))
    inheritance.receive(net.handover_by(member(0, 0), 0, frontier=unknown))
    unreached = Frontier(((PAYER.public_key, 99),), unknown.channels)
    inheritance.receive(net.handover_by(member(0, 1), 0, frontier=unreached))
    inheritance.settle()
    assert inheritance.counted == 1


def test_a_bad_signature_under_a_known_entry_hides_nothing(net):
    lock = net.entry(PAYER, Transfer(OTHER.public_key, 1))
    net.votes(0, (0,), lock)
    inheritance = new(net)
    for signed in (*net.handovers(0, (0, 1)), net.handover_by(member(0, 2), 0, locks=[Signed(lock.body, bytes(64))])):
        inheritance.receive(signed)
    inheritance.settle()
    slot = (PAYER.public_key, parse(lock).object.seq)
    assert [item.signed for item in inheritance.locks[slot].values()] == [lock]


def test_junk_in_a_handover_is_ignored_and_the_rest_counts(net):
    voucher = Shown(*net.voucher(net.channel, 20))
    forged = Shown(*net.voucher(net.channel, 40, payer=OTHER))
    above = Shown(*net.voucher(net.channel, 51))
    unknown = Held(bytes(32), 0, None)
    unproven = Held(net.channel, 30, voucher)
    inheritance = new(net)
    locks = [Signed(b"junk", bytes(64)), net.claim(net.channel, 10)]
    lie = {"locks": locks, "claims": [forged, above, voucher], "freezes": [unknown, unproven]}
    inheritance.receive(net.handover_by(member(0, 0), 0, **lie))
    inheritance.settle()
    assert list(inheritance.shown()) == [voucher]
    assert not inheritance.locks
    assert not inheritance.bans


def test_a_freeze_above_the_lock_that_is_known_here_bans_all_the_same(net):
    """The frozen total is that of a final claim; the top-up it needs has not reached the reporter."""
    held = Held(net.channel, 90, Shown(*net.voucher(net.channel, 90)))
    inheritance = new(net)
    inheritance.receive(net.handover_by(member(0, 0), 0, freezes=[held]))
    inheritance.settle()
    assert inheritance.bans == {net.channel: held}
    assert not list(inheritance.shown()), "a freeze of one's own stays within the lock"


def test_locks_and_bans_only_become_fewer(net):
    lock = net.entry(PAYER, Transfer(OTHER.public_key, 1))
    net.votes(0, (0,), lock)
    net.nodes[0][1].witness.freeze(net.channel, LATE_MS)
    inheritance = new(net)
    first, second, third, fourth = net.handovers(0, range(4))
    seen = []
    for signed in (first, second, third, fourth):
        inheritance.receive(signed)
        inheritance.settle()
        seen.append((len(inheritance.locks), len(inheritance.bans), inheritance.ready))
    assert seen == [(1, 0, False), (1, 1, False), (1, 1, True), (0, 0, True)]


def test_a_handover_full_of_locks_is_weighed_bit_by_bit(net):
    inheritance = new(net)
    locks = [Signed(b"junk %d" % n, bytes(64)) for n in range(25)]
    inheritance.receive(net.handover_by(member(0, 0), 0, locks=locks, freezes=[Held(net.channel, 0, None)]))
    steps = 0
    while not inheritance.settle(10):
        steps += 1
        assert inheritance.is_weighing
        assert inheritance.receive(net.handover_by(member(0, 0), 0)) is None
    assert steps == 2
    assert not inheritance.is_weighing
    assert net.channel in inheritance.bans


def test_a_witness_that_stops_does_not_wait_for_what_it_was_weighing(net):
    net.change(1)
    net.begin(1, net.handovers(0, (0, 1, 3)))
    witness = net.nodes[1][0].witness
    witness.receive(net.handover_by(member(0, 2), 0, locks=[Signed(b"junk %d" % n, bytes(64)) for n in range(25)]))
    assert witness.advance(10) is None
    assert witness.is_weighing
    net.change(2)
    assert witness.advance(10) is not None
    assert not witness.is_weighing


def test_the_life_of_a_witness(net):
    old = net.nodes[0][0].witness
    assert old.advance() is None
    net.change(1)
    young = net.nodes[1][0].witness
    assert (old.phase, young.phase) == (VOTING, COLLECTING)
    with pytest.raises(RuleError, match="begins once") as caught:
        young.consider_entry(parse(net.entry(PAYER, Transfer(OTHER.public_key, 1))))
    assert caught.value.wait
    pending = net.entry(PAYER, Transfer(OTHER.public_key, 2))
    old.consider_entry(parse(pending))
    effect = old.advance()
    assert effect == old.advance(), "the same bytes until they are durable"
    assert old.seal() is None, "what was promised and not signed is handed over, not signed"
    assert pending in codec.decode(Handover, effect.signed.body, bytes_max=1 << 20).locks
    old.confirm_handover()
    assert (old.phase, old.advance(), old.handover) == (HANDED_OVER, None, effect.signed)
    for refused in (
        lambda: old.consider_entry(parse(pending)),
        lambda: old.consider_claim(parse(net.claim(net.channel, 10))),
        lambda: old.freeze(net.channel, LATE_MS),
        lambda: old.next_of(PAYER.public_key, 2),
    ):
        with pytest.raises(RuleError, match="is over") as caught:
            refused()
        assert caught.value.wait
    assert net.observer.state.committees.current.quorum == 3
    with pytest.raises(RuleError, match="epoch 1 does not follow 1"):
        net.observer.state.committees.check_committee(Committee(1, (PAYER.public_key,), 0))
