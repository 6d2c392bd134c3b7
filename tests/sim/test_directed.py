"""What random seeds seldom reach, step by step: each test fails under the mutant that names it (``catalogue``)."""

import pytest

from config.errors import IntegrityError
from ledger.core.certificate import Verifier
from ledger.core.errors import RuleError
from ledger.core.handover import open_handover
from ledger.core.objects import (
    Claim,
    Freeze,
    Grant,
    Held,
    Issuer,
    Open,
    Reclaim,
    Signed,
    TopUp,
    Transfer,
    channel_id,
    parse,
    sign,
)
from ledger.core.state import State
from tests.unit.ledger.committee_kit import EXPIRY_MS, ISSUER, LATE_MS, OTHER, PAYEE, PAYER, ROOT, Net
from tests.unit.ledger.test_channel import call, exchange, pair


def refused(net: Net, signed, n: int = 1, epoch: int = 0) -> str:
    """The rule by which an honest witness refuses."""
    with pytest.raises(RuleError) as caught:
        net.votes(epoch, (n,), signed)
    return caught.value.rule


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def channel(net) -> bytes:
    """100 for the payer, of which 50 are locked; the channel expires."""
    return net.fund()


def lies(net: Net, channel: bytes, *totals: int):
    """Freezes at these totals, by as many witnesses."""
    return tuple(net.freeze_by(key, 0, channel, total) for key, total in zip(net.keys[0], totals, strict=False))


def freezes(net: Net, channel: bytes, who=(1, 2, 3), epoch: int = 0):
    """Freezes of honest witnesses."""
    return tuple(net.nodes[epoch][n].witness.freeze(channel, LATE_MS).signed for n in who)


def test_grants_of_one_entry_add_up_to_the_supply(net, channel):
    left = net.genesis.max_supply - net.observer.state.supply
    grant = Grant(PAYER.public_key, left // 2 + 1)
    assert refused(net, net.entry(ISSUER, grant, grant)) == "supply"
    net.votes(0, (1,), net.entry(ISSUER, grant))


def replace_issuer(net: Net, who) -> None:
    """Root names another issuer; every operator has agreed."""
    signed = net.entry(ROOT, Issuer(who.public_key))
    for node in net.nodes[net.observer.state.committees.epoch]:
        node.witness.listed.add(parse(signed).id)
    net.settle(signed)


def half_of_what_is_left(net: Net) -> int:
    return (net.genesis.max_supply - net.observer.state.supply) // 2


def test_what_the_replaced_issuer_may_have_granted_is_kept_free(net, channel):
    """Its grant may be final without the witnesses that voted for it knowing: the new one's comes on top."""
    half = half_of_what_is_left(net)
    old = net.entry(ISSUER, Grant(PAYER.public_key, half))
    certificate = net.certify(0, old, net.votes(0, (0, 1, 2), old))  # and nobody is shown it
    replace_issuer(net, OTHER)
    too_much = net.entry(OTHER, Grant(PAYER.public_key, half + 2))
    assert [refused(net, too_much, n) for n in (1, 2)] == ["supply", "supply"]
    net.votes(0, (3,), too_much)  # it never saw the first: with one liar these two are no quorum
    net.settle(net.entry(OTHER, Grant(PAYER.public_key, half)), who=(0, 1, 2))
    net.publish(certificate)
    assert net.observer.state.supply <= net.genesis.max_supply
    assert not net.observer.state.broken


def test_what_the_replaced_issuer_may_have_granted_is_kept_free_by_the_next_committee(net, channel):
    half = half_of_what_is_left(net)
    old = net.entry(ISSUER, Grant(PAYER.public_key, half))
    net.votes(0, (0, 1, 2), old)
    replace_issuer(net, OTHER)
    net.change(1)
    net.begin(1, net.handovers(0, (1, 2, 3)))
    assert refused(net, net.entry(OTHER, Grant(PAYER.public_key, half + 2)), epoch=1) == "supply"
    net.votes(1, (1,), net.entry(OTHER, Grant(PAYER.public_key, half)))


def test_the_replaced_issuer_grants_no_more_and_spends_as_ever(net, channel):
    net.settle(net.entry(ISSUER, Grant(ISSUER.public_key, 10)))
    replace_issuer(net, OTHER)
    assert refused(net, net.entry(ISSUER, Grant(PAYER.public_key, 5))) == "issuer"
    net.settle(net.entry(ISSUER, Transfer(PAYER.public_key, 5)))


def test_an_entry_spends_final_credits_only(net, channel):
    assert refused(net, net.entry(PAYER, Transfer(PAYER.public_key, 51))) == "funds"
    assert refused(net, net.entry(ISSUER, Grant(ISSUER.public_key, 5), Transfer(OTHER.public_key, 5))) == "funds"


def test_a_channel_belongs_to_its_payer(net, channel):
    assert refused(net, net.entry(OTHER, TopUp(channel, 5))) == "ownership"
    assert refused(net, net.entry(OTHER, Reclaim(channel, 0, lies(net, channel, 0, 0, 0)))) == "ownership"


def test_a_reclaim_stays_within_the_lock(net, channel):
    assert refused(net, net.entry(PAYER, Reclaim(channel, 60, lies(net, channel, 60, 0, 0)))) == "lock"


def test_a_reclaim_pays_no_less_than_was_claimed(net, channel):
    net.settle(net.claim(channel, 30))
    assert refused(net, net.entry(PAYER, Reclaim(channel, 0, lies(net, channel, 0, 0, 0)))) == "paid"


def test_a_reclaim_pays_the_highest_of_its_freezes(net, channel):
    assert refused(net, net.entry(PAYER, Reclaim(channel, 0, lies(net, channel, 20, 0, 0)))) == "freeze"


def test_a_reclaim_needs_a_quorum_of_freezes(net, channel):
    one, two, _ = freezes(net, channel)
    assert refused(net, net.entry(PAYER, Reclaim(channel, 0, (one, two)))) == "quorum"
    assert refused(net, net.entry(PAYER, Reclaim(channel, 0, (one, two, two)))) == "quorum"


def test_freezes_of_another_channel_free_nothing(net, channel):
    opened = net.settle(net.entry(PAYER, Open(PAYEE.public_key, PAYEE.public_key, 10, EXPIRY_MS)))
    other = channel_id(opened.id, 0)
    assert refused(net, net.entry(PAYER, Reclaim(channel, 0, freezes(net, other)))) == "freeze"


def test_freezes_of_strangers_free_nothing(net, channel):
    strangers = tuple(net.freeze_by(key, 0, channel) for key in (OTHER, PAYEE, ISSUER))
    assert refused(net, net.entry(PAYER, Reclaim(channel, 0, strangers))) == "freeze"


def test_a_freeze_above_nothing_carries_the_payer_s_voucher(net, channel):
    body = forged_freeze(net, channel, 20, *net.voucher(channel, 20, payer=OTHER))
    ops = Reclaim(channel, 20, (body, *freezes(net, channel, (1, 2))))
    assert refused(net, net.entry(PAYER, ops)) == "freeze"


def forged_freeze(net: Net, channel: bytes, total: int, voucher, signature):
    """A liar's freeze with a voucher of its choice."""
    liar = net.keys[0][0]
    return sign(liar, Freeze(net.genesis.net, 0, liar.public_key, channel, total, voucher, signature))


def test_freezes_of_two_epochs_do_not_add_up(net, channel):
    old = freezes(net, channel, (1, 2))
    net.change(1)
    net.begin(1, net.handovers(0, (1, 2, 3)))
    new = freezes(net, channel, (1,), epoch=1)
    assert refused(net, net.entry(PAYER, Reclaim(channel, 0, (*old, *new))), epoch=1) == "epoch"


def test_an_entry_has_eight_reclaims_at_most(net, channel):
    opens = [Open(PAYEE.public_key, PAYEE.public_key, 10, EXPIRY_MS)] * 5
    keys = []
    for who in (PAYER, OTHER):
        opened = net.settle(net.entry(who, *opens))
        keys += [channel_id(opened.id, index) for index in range(5)]
    net.settle(net.entry(OTHER, *opens[:4]))
    opened = net.observer.state.account(OTHER.public_key).head
    mine = keys[5:] + [channel_id(opened, index) for index in range(4)]
    ops = [Reclaim(key, 0, freezes(net, key)) for key in mine]
    assert refused(net, net.entry(OTHER, *ops)) == "reclaims"
    net.votes(0, (1,), net.entry(OTHER, *ops[:8]))


def test_a_claim_carries_the_payer_s_voucher(net, channel):
    known = net.observer.state.channels[channel]
    claim = Claim(known.payer, known.seq, known.op_index, *net.voucher(channel, 20, payer=PAYEE))
    assert refused(net, sign(PAYEE, claim)) == "signature"


def test_a_claim_is_signed_by_the_channel_s_signer(net, channel):
    claim = parse(net.claim(channel, 20)).object
    assert refused(net, sign(PAYER, claim)) == "signature"


def test_a_claim_names_the_entry_that_opened_its_channel(net, channel):
    known = net.observer.state.channels[channel]
    claim = Claim(known.payer, known.seq, known.op_index + 1, *net.voucher(channel, 20))
    assert refused(net, sign(PAYEE, claim)) == "channel"


def test_a_claim_stays_within_the_lock_and_off_closed_channels(net, channel):
    assert refused(net, net.claim(channel, 51)) == "lock"
    net.settle(net.entry(PAYER, Reclaim(channel, 0, freezes(net, channel))))
    assert refused(net, net.claim(channel, 20)) == "closed"


def test_a_freeze_binds_and_stays_what_it_was(net, channel):
    (first,) = freezes(net, channel, (1,))
    assert refused(net, net.claim(channel, 20)) == "frozen"
    net.nodes[0][1].witness.saw_voucher(*net.voucher(channel, 20))
    assert freezes(net, channel, (1,)) == (first,)


def test_a_freeze_honours_what_was_voted_for(net, channel):
    net.votes(0, (1,), net.claim(channel, 20))
    assert net.nodes[0][1].witness.freeze(channel, LATE_MS).signed != net.freeze_by(net.keys[0][1], 0, channel, 0)


def test_certificates_of_earlier_epochs_stay_good(net, channel):
    net.change(1)
    state = State(net.genesis)
    for certificate in net.final:  # each with a verifier that remembers no headers
        state.add(Verifier(net.genesis, state.committees).open(certificate))
    assert state.digest() == net.observer.state.digest()
    for certificate in net.final:
        Verifier(net.genesis, state.committees).open(certificate)


def test_votes_of_two_epochs_do_not_add_up(net, channel):
    signed = net.entry(PAYER, Transfer(OTHER.public_key, 5))
    old = net.votes(0, (1,), signed)
    net.change(1)
    net.begin(1, net.handovers(0, (1, 2, 3)))
    votes = [*net.votes(1, (1, 2), signed), *old]
    with pytest.raises(IntegrityError):
        net.certify(1, signed, votes)


def test_handovers_that_come_late_still_free_what_a_liar_invented(net, channel):
    net.change(1)
    honest = net.handovers(0, (1, 2, 3))
    invented = net.handover_by(net.keys[0][0], 0, freezes=[held(channel)])
    net.begin(1, [invented, *honest[:2]])
    witness = net.nodes[1][1].witness
    assert witness.is_banned(channel)
    net.begin(1, honest[2:])
    assert not witness.is_banned(channel)
    net.votes(1, (1,), net.claim(channel, 20))


def held(channel: bytes):
    """A freeze as it is handed over."""
    return Held(channel, 0, None)


def test_a_voucher_shown_on_a_banned_channel_is_kept_and_paid(net, channel):
    freezes(net, channel, (1, 2, 3))
    net.change(1)
    net.begin(1, net.handovers(0, (1, 2, 3)))
    witness = net.nodes[1][1].witness
    assert refused(net, net.claim(channel, 20), epoch=1) == "frozen"
    shown = witness.take_shown()
    assert [each.voucher.cumulative for each in shown] == [20]
    assert not witness.take_shown()
    witness.put_back(shown)  # the disk was full
    assert witness.take_shown() == shown
    assert net.nodes[1][1].witness.freeze(channel, LATE_MS).signed.body.endswith(witness._best[channel][1])


def test_the_handover_says_everything_that_was_signed(net, channel):
    net.votes(0, (1,), net.entry(PAYER, Transfer(OTHER.public_key, 5)))
    net.votes(0, (1,), net.claim(channel, 20))
    freezes(net, channel, (1,))
    net.change(1)
    (signed,) = net.handovers(0, (1,))
    body = open_handover(net.observer.state, signed)
    assert len(body.locks) == 1
    assert [shown.voucher.cumulative for shown in body.claims] == [20]
    assert [frozen.channel for frozen in body.freezes] == [channel]


def test_a_freeze_is_signed_by_its_witness(net, channel):
    one, two, three = freezes(net, channel)
    forged = Signed(three.body, bytes(64))
    assert refused(net, net.entry(PAYER, Reclaim(channel, 0, (one, two, forged)))) == "signature"


def test_an_entry_that_was_voted_for_keeps_its_signature(net, channel):
    """Seed 4117: an id covers the body only, so whoever has seen an entry can send it again with another signature."""
    signed = net.entry(PAYER, Transfer(OTHER.public_key, 5))
    witness, forged = net.nodes[0][1].witness, parse(Signed(signed.body, bytes(64)))
    witness.consider_entry(parse(signed))
    with pytest.raises(RuleError, match="signature"):
        witness.consider_entry(forged)
    assert [item.signed for item in witness.seal().items] == [signed], "what is written must be evidence later"


def test_a_lower_claim_is_nothing_new(net, channel):
    lower = net.claim(channel, 20)
    certificate = net.certify(0, lower, net.votes(0, (1, 2, 3), lower))
    net.settle(net.claim(channel, 30))
    state = net.observer.state
    assert not state.add(net.observer.verifier.open(certificate))
    assert state.claimed(channel) == 30
    assert state.waiting() == 0


def test_a_new_committee_waits_for_the_old_one(net, channel):
    net.change(1)
    assert refused(net, net.entry(PAYER, Transfer(OTHER.public_key, 5)), epoch=1) == "ready"


def test_where_two_entries_may_be_final_nobody_votes(net, channel):
    first, second = (net.entry(PAYER, Transfer(OTHER.public_key, amount)) for amount in (5, 6))
    net.votes(0, (1,), first)
    net.votes(0, (2,), second)
    net.change(1)
    net.begin(1, net.handovers(0, (1, 2, 3)))
    assert refused(net, first, epoch=1) == "locked"
    assert refused(net, second, epoch=1) == "locked"


def test_a_replayed_receipt_lowers_no_voucher():
    seller, payer = pair()
    for _ in range(40):
        call(seller, payer)
    first, _ = exchange(seller, payer)
    for _ in range(40):
        call(seller, payer)
    _, newest = exchange(seller, payer)
    assert payer.pay(first).cumulative == newest.cumulative
