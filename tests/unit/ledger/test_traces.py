"""The traces that shaped the rules, each with its rule on (nothing happens) and off (the trace bites).

A trace is a function of a small network (``committee_kit``) that plays the known attack step by step and returns what
went wrong, or None. ``RULES`` says where each rule can be switched off: always one named function.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from config.errors import IntegrityError
from ledger.core import certificate as certificates
from ledger.core import handover, quorums, rules
from ledger.core.errors import RuleError
from ledger.core.objects import (
    Certificate,
    Committee,
    Entry,
    Held,
    Issuer,
    Open,
    Reclaim,
    Signed,
    Transfer,
    parse,
    sign,
)
from ledger.core.recovery import Recovery
from ledger.core.state import State
from ledger.core.witness import STOPPED, VOTING, Witness
from tests.unit.ledger.committee_kit import (
    EXPIRY_MS,
    LATE_MS,
    OTHER,
    PAYEE,
    PAYER,
    ROOT,
    Net,
    Node,
    member,
)

ALL = (0, 1, 2, 3)


def contradiction(net: Net, *finals: Certificate) -> str | None:
    """What a node sees that learns these certificates, in this order, on top of what was published."""
    node = Node(net.genesis)
    node.learn(net.final)
    try:
        for certificate in finals:
            node.state.add(node.verifier.open(certificate))
            node.state.check_invariants()
    except IntegrityError as error:
        return error.message
    return "; ".join(node.state.broken.values()) or None


def two_entries(net: Net) -> tuple[Signed, Signed]:
    """What an equivocating payer signs."""
    return net.entry(PAYER, Transfer(OTHER.public_key, 5)), net.entry(PAYER, Transfer(OTHER.public_key, 6))


# --- rule 1


def one_liar_as_three_witnesses() -> str | None:
    net = Net()
    signed = net.entry(ROOT, Transfer(OTHER.public_key, 5))
    votes = tuple(net.vote_by(member(0, 3), 0, parse(signed), number) for number in (7, 8, 9))
    try:
        net.observer.verifier.open(Certificate(signed, 0, votes))
    except RuleError:
        return None
    return "batches 7, 8 and 9 of one liar make a certificate"


def a_committee_of_five() -> str | None:
    return odd_committee(5, 1, [(0, 1), (3, 4)], liars=(2,))


def a_committee_of_four_with_quorum_one() -> str | None:
    return odd_committee(4, 0, [(0,), (1,)], liars=())


def odd_committee(n: int, f: int, quorums_: list[tuple[int, ...]], liars: tuple[int, ...]) -> str | None:
    net = Net()
    net.fund()
    keys = [member(1, i) for i in range(n)]
    signed = net.entry(ROOT, Committee(1, tuple(key.public_key for key in keys), f))
    for node in net.nodes[0]:
        node.witness.listed.add(parse(signed).id)
    try:
        net.settle(signed)
    except RuleError:
        return None
    handovers = net.handovers(0, ALL)
    witnesses = []
    for key in keys:
        node = Node(net.genesis)
        node.learn(net.final)
        node.witness = Witness(key, node.state, 1)
        witnesses.append(node)
    net.nodes[1] = witnesses
    net.begin(1, handovers, range(n))
    finals = []
    for honest, entry in zip(quorums_, two_entries(net), strict=True):
        votes = net.votes(1, honest, entry) + [net.vote_by(keys[i], 1, parse(entry)) for i in liars]
        finals.append(net.certify(1, entry, votes))
    return contradiction(net, *finals)


# --- rule 2 and 3


def a_channel_reclaimed_twice_in_one_entry() -> str | None:
    net = Net()
    channel = net.fund()
    freezes = [net.nodes[0][n].witness.freeze(channel, LATE_MS).signed for n in (0, 1, 2)]
    op = Reclaim(channel, 0, tuple(freezes))
    signed = net.entry(PAYER, op, op)
    try:
        final = net.certify(0, signed, net.votes(0, (0, 1, 2), signed))
    except RuleError:
        return None
    return contradiction(net, final)


class Clock:
    now_ms = 0


def an_entry_that_some_see_late() -> str | None:
    Clock.now_ms = 0
    net = Net()
    net.fund()
    signed = net.entry(PAYER, Open(PAYEE.public_key, PAYEE.public_key, 10, EXPIRY_MS))
    votes = net.votes(0, (0, 1), signed)
    Clock.now_ms = LATE_MS
    for n in (2, 3):
        try:
            votes += net.votes(0, (n,), signed)
        except RuleError:
            continue
    if len(votes) >= 3:
        net.certify(0, signed, votes)
        return None
    with pytest.raises(RuleError, match="equivocation"):
        net.votes(0, (0,), net.entry(PAYER, Transfer(OTHER.public_key, 1)))
    return "an honest payer has two votes for an entry that nobody votes for any more, and none for another"


def gate_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is that nothing of the kind exists, so that switching it off puts a gate in."""
    honest = Witness.consider_entry

    def consider_entry(self: Witness, item: Any) -> None:
        if any(isinstance(op, Open) and op.expiry_ms <= Clock.now_ms for op in item.object.ops):
            raise RuleError("expiry", "the channel would be expired at once")
        honest(self, item)

    monkeypatch.setattr(Witness, "consider_entry", consider_entry)


# --- rule 6


def freezes_after_the_handover() -> str | None:
    """Hand over unfrozen, freeze at 0 under the old epoch, claim 50 in the new one, reclaim with X* = 0."""
    net = Net()
    channel = net.fund()
    net.change(1)
    witnesses = [net.nodes[0][n].witness for n in (0, 1, 2)]
    handovers = [witness.advance().signed for witness in witnesses]
    assert all(witness.phase == STOPPED for witness in witnesses)
    net.begin(1, handovers)
    try:
        freezes = [witness.freeze(channel, LATE_MS).signed for witness in witnesses]
    except RuleError:
        return None
    claim, reclaim = net.claim(channel, 50), net.reclaim(channel, freezes, 0)
    finals = [net.certify(1, signed, net.votes(1, (0, 1, 2), signed)) for signed in (claim, reclaim)]
    return contradiction(net, *reversed(finals))


def votes_after_the_handover() -> str | None:
    """The same with votes: e1 certified late by the old committee, e2 by the new one."""
    net = Net()
    net.fund()
    net.change(1)
    first, second = two_entries(net)
    witnesses = [net.nodes[0][n].witness for n in (0, 1, 2)]
    net.begin(1, [witness.advance().signed for witness in witnesses])
    try:
        late = net.certify(0, first, net.votes(0, (0, 1, 2), first))
    except RuleError:
        return None
    return contradiction(net, late, net.certify(1, second, net.votes(1, (0, 1, 2), second)))


def a_change_that_no_operator_listed() -> str | None:
    """The thief of the root key names its own committee; the issuer falls the same way."""
    net = Net()
    thief = tuple(member(2, i).public_key for i in ALL)
    for op in (Committee(1, thief, 1), Issuer(PAYER.public_key)):
        signed = net.entry(ROOT, op)
        try:
            net.certify(0, signed, net.votes(0, (0, 1, 2), signed))
        except RuleError:
            continue
        return "the root key alone changes who decides"
    return None


def a_committee_that_its_own_members_certify() -> str | None:
    net = Net()
    net.fund()
    net.change(1)
    signed = net.entry(ROOT, Committee(2, tuple(member(2, i).public_key for i in ALL), 1))
    net.nodes[0][0].state.committees.of(1)
    votes = [net.vote_by(member(0, i), 0, parse(signed)) for i in ALL[:3]]  # the old set, long after its end
    certificate = Certificate(signed, 0, tuple(votes))
    try:
        net.observer.verifier.open(certificate)
    except RuleError:
        return None
    return "a committee two epochs back names the next one"


# --- rule 7


def a_lock_without_evidence() -> str | None:
    """One liar reports a random id in an honest payer's next slot; one honest old witness is cut off."""
    net = Net()
    net.fund()
    net.change(1)
    account = net.observer.state.account(PAYER.public_key)
    made_up = Entry(net.genesis.net, PAYER.public_key, account.seq + 1, account.head, (Transfer(OTHER.public_key, 9),))
    lie = net.handover_by(member(0, 2), 0, locks=[sign(member(0, 2), made_up)])
    net.begin(1, [*net.handovers(0, (0, 1)), lie])
    signed = net.entry(PAYER, Transfer(OTHER.public_key, 1))
    try:
        net.certify(1, signed, net.votes(1, (0, 1, 2), signed))
    except RuleError as error:
        return f"an honest payer is stuck: {error.message}"
    return None


def an_inherited_lock_is_forgotten() -> str | None:
    """e1 certified in epoch 0 and hidden, epoch 1 votes nothing, epoch 2 certifies e2 in the same slot."""
    net = Net()
    net.fund()
    first, second = two_entries(net)
    hidden = net.certify(0, first, net.votes(0, (0, 1, 2), first))
    net.change(1)
    net.begin(1, net.handovers(0, (1, 2, 3)))
    net.change(2)
    net.begin(2, net.handovers(1, (1, 2, 3)))
    try:
        other = net.certify(2, second, net.votes(2, (0, 1, 2), second))
    except RuleError:
        votes = net.votes(2, (0, 1, 2), first)  # the payer completes what it signed
        assert contradiction(net, hidden, net.certify(2, first, votes)) is None
        return None
    return contradiction(net, hidden, other)


def an_inherited_freeze_is_forgotten() -> str | None:
    """The same with a freeze: certified in epoch 0, no freeze in epoch 1, a claim in epoch 2."""
    net = Net()
    channel = net.fund()
    freezes = [net.nodes[0][n].witness.freeze(channel, LATE_MS).signed for n in (0, 1, 2)]
    net.change(1)
    net.begin(1, net.handovers(0, (1, 2, 3)))
    net.change(2)
    net.begin(2, net.handovers(1, (1, 2, 3)))
    claim, reclaim = net.claim(channel, 50), net.reclaim(channel, freezes, 0)
    try:
        paid = net.certify(2, claim, net.votes(2, (0, 1, 2), claim))
    except RuleError:
        return None
    return contradiction(net, net.certify(2, reclaim, net.votes(2, (0, 1, 2), reclaim)), paid)


def an_empty_witness_votes() -> str | None:
    """What was final for the old committee has not reached the new one yet, and no handover names it as a lock."""
    net = Net()
    net.fund()
    first, second = two_entries(net)
    known = len(net.final)
    net.settle(first)
    final = net.final[-1]
    net.change(1)
    changed = net.final.pop()
    net.final[known:] = []
    late = Node(net.genesis)
    late.learn([*net.final, changed])
    for key, node in zip(net.keys[1], net.nodes[1], strict=True):
        node.state, node.verifier = State(net.genesis), late.verifier
        node.learn([*net.final, changed])
        node.witness = Witness(key, node.state, 1)
    net.begin(1, net.handovers(0, (0, 1, 2)))
    try:
        other = net.certify(1, second, net.votes(1, (0, 1, 2), second))
    except RuleError:
        for node in net.nodes[1]:
            assert node.witness.phase != VOTING
            node.learn([final])
            node.witness.advance()
            assert node.witness.phase == VOTING, "everything up to the frontiers is there"
        return None
    net.final.append(changed)
    return contradiction(net, final, other)


def two_handovers_are_too_few() -> str | None:
    """e1 certified by 0, 1 and the liar 2, and hidden; the liar and 3, who never heard of it, hand over first."""
    net = Net()
    net.fund()
    first, second = two_entries(net)
    hidden = net.certify(0, first, [*net.votes(0, (0, 1), first), net.vote_by(member(0, 2), 0, parse(first))])
    net.change(1)
    net.begin(1, [net.handover_by(member(0, 2), 0), *net.handovers(0, (3,))])
    try:
        other = net.certify(1, second, net.votes(1, (0, 1, 2), second))
    except RuleError:
        assert [net.nodes[1][n].witness.advance() for n in ALL] == [None] * 4
        return None
    return contradiction(net, hidden, other)


# --- rule 8


def frozen_at_zero(net: Net) -> tuple[bytes, list[Signed]]:
    """A channel with a freeze certificate at 0 by 0, 1 and the liar 2."""
    channel = net.fund()
    freezes = [net.nodes[0][n].witness.freeze(channel, LATE_MS).signed for n in (0, 1)]
    return channel, [*freezes, net.freeze_by(member(0, 2), 0, channel)]


def a_partly_voted_claim_raises_a_freeze() -> str | None:
    """The old freeze certificate says 0, one witness voted a claim of 30, the new committee certifies that claim."""
    net = Net()
    channel, freezes = frozen_at_zero(net)
    claim = net.claim(channel, 30)
    net.votes(0, (3,), claim)
    net.change(1)
    net.begin(1, net.handovers(0, (0, 1, 3)))
    try:
        paid = net.certify(1, claim, net.votes(1, (0, 1, 2), claim))
    except RuleError:
        own = [net.nodes[1][n].witness.freeze(channel, LATE_MS).signed for n in (0, 1, 2)]
        reclaim = net.reclaim(channel, own, 30)
        assert contradiction(net, net.certify(1, reclaim, net.votes(1, (0, 1, 2), reclaim))) is None
        return None
    reclaim = net.reclaim(channel, freezes, 0)
    return contradiction(net, net.certify(1, reclaim, net.votes(1, (0, 1, 2), reclaim)), paid)


def a_liar_invents_a_freeze() -> str | None:
    """All four have handed over, one of them a freeze that nobody gave."""
    net = Net()
    channel = net.fund()
    net.change(1)
    lie = net.handover_by(member(0, 2), 0, freezes=[Held(channel, 0, None)])
    net.begin(1, [lie, *net.handovers(0, (0, 1))])
    claim = net.claim(channel, 30)
    with pytest.raises(RuleError, match="may have frozen"):
        net.votes(1, (0,), claim)
    net.begin(1, net.handovers(0, (3,)))
    try:
        net.certify(1, claim, net.votes(1, (0, 1, 2), claim))
    except RuleError as error:
        return f"an honest payee is not paid: {error.message}"
    return None


def a_real_freeze_is_reported_once() -> str | None:
    """Of a freeze certificate by 0, 1 and a liar, three handovers show one report: the liar omits, 1 is late."""
    net = Net()
    channel, freezes = frozen_at_zero(net)
    net.change(1)
    net.begin(1, [*net.handovers(0, (0, 3)), net.handover_by(member(0, 2), 0)])
    claim = net.claim(channel, 30)
    try:
        paid = net.certify(1, claim, net.votes(1, (0, 1, 2), claim))
    except RuleError:
        return None
    reclaim = net.reclaim(channel, freezes, 0)
    return contradiction(net, net.certify(1, reclaim, net.votes(1, (0, 1, 2), reclaim)), paid)


# --- rule 9


def restored_witnesses_vote_again() -> str | None:
    """Two witnesses are put back to before their votes for e1; peers show them the batches they forgot."""
    net = Net()
    net.fund()
    first, second = two_entries(net)
    hidden = net.certify(0, first, net.votes(0, (0, 1, 2), first))
    for n in (1, 2):
        node = net.nodes[0][n]
        node.witness = Witness(net.keys[0][n], node.state)
        assert node.witness.notice(2)
    try:
        other = net.certify(0, second, net.votes(0, (1, 2, 3), second))
    except RuleError:
        return None
    return contradiction(net, hidden, other)


def ask(net: Net, recovery: Recovery, who: tuple[int, ...]) -> None:
    for n in who:
        witness = net.nodes[0][n].witness
        recovery.add(witness.key, 0, recovery.slot, witness.next_of(PAYER.public_key, recovery.slot))


def wallet_loses_its_disk(asked: tuple[int, ...]) -> str | None:
    """After w1 voted e1 the wallet forgets it; 0 is a liar that answers and never votes."""
    net = Net()
    net.fund()
    first, second = two_entries(net)
    net.votes(0, (1,), first)
    recovery = Recovery(net.observer.state, PAYER.public_key)
    ask(net, recovery, asked)
    signed = recovery.to_complete()
    if signed is None:
        if not recovery.may_sign_anew():
            return None
        signed = second
    votes = []
    for n in (1, 2, 3):
        try:
            votes += net.votes(0, (n,), signed)
        except RuleError:
            continue
    return None if len(votes) >= 3 else f"an honest payer is stuck with {len(votes)} votes"


def a_wallet_hears_only_the_head() -> str | None:
    return wallet_loses_its_disk((0, 1, 2, 3))


def a_wallet_signs_after_three_answers() -> str | None:
    return wallet_loses_its_disk((0, 2, 3))


@dataclass(frozen=True)
class Rule:
    """Where a rule is switched off: ``owner.name`` is replaced by ``off``."""

    owner: Any
    name: str
    off: Any
    traces: tuple[Callable[[], str | None], ...] = field(default=())

    def switch_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.owner, self.name, self.off)


def without_signature(state: State, signed: Signed) -> Any:
    return parse(signed)


RULES = {
    "1 distinct witnesses": Rule(quorums, "distinct", list, (one_liar_as_three_witnesses,)),
    "1 n = 3f + 1": Rule(
        quorums, "is_exact", lambda n, f: True, (a_committee_of_five, a_committee_of_four_with_quorum_one)
    ),
    "2 scratch state": Rule(
        rules.Scratch, "closes", lambda self, key: False, (a_channel_reclaimed_twice_in_one_entry,)
    ),
    "6 stop freezing": Rule(Witness, "may_freeze", lambda self: True, (freezes_after_the_handover,)),
    "6 stop voting": Rule(Witness, "may_vote", lambda self: True, (votes_after_the_handover,)),
    "6 listed by operators": Rule(Witness, "is_listed", lambda self, item: True, (a_change_that_no_operator_listed,)),
    "6 certified by the old set": Rule(
        certificates, "check_certifier", lambda op, epoch: None, (a_committee_that_its_own_members_certify,)
    ),
    "7 evidence in locks": Rule(handover, "lock_evidence", without_signature, (a_lock_without_evidence,)),
    "7 inherited locks": Rule(Witness, "inherited_locks", lambda self: iter(()), (an_inherited_lock_is_forgotten,)),
    "7 inherited freezes": Rule(
        Witness, "inherited_freezes", lambda self: iter(()), (an_inherited_freeze_is_forgotten,)
    ),
    "7 frontier": Rule(handover, "is_reached", lambda arriving: True, (an_empty_witness_votes,)),
    "7 ready": Rule(
        handover.Inheritance, "ready", property(lambda self: self.counted >= 2), (two_handovers_are_too_few,)
    ),
    "8 ban": Rule(Witness, "is_banned", lambda self, channel: False, (a_partly_voted_claim_raises_a_freeze,)),
    "8 counting": Rule(quorums, "survives", lambda reports, m, f: reports >= 1, (a_liar_invents_a_freeze,)),
    "8 counting, one more": Rule(
        quorums, "survives", lambda reports, m, f: reports >= m - 2 * f + 1, (a_real_freeze_is_reported_once,)
    ),
    "9 silent after a restore": Rule(Witness, "is_restored", lambda self: False, (restored_witnesses_vote_again,)),
    "9 head and next entry": Rule(Witness, "next_of", lambda self, account, seq: None, (a_wallet_hears_only_the_head,)),
    "9 every witness": Rule(
        Recovery, "may_sign_anew", lambda self: self.answers >= 3, (a_wallet_signs_after_three_answers,)
    ),
}
CASES = [(name, trace) for name, rule in RULES.items() for trace in rule.traces]
IDS = [f"{name}: {trace.__name__}" for name, trace in CASES]


@pytest.mark.parametrize("trace", [trace for _, trace in CASES] + [an_entry_that_some_see_late])
def test_the_rules_hold_against_every_trace(trace):
    assert trace() is None


@pytest.mark.parametrize(("name", "trace"), CASES, ids=IDS)
def test_without_its_rule_the_trace_bites(name, trace, monkeypatch):
    RULES[name].switch_off(monkeypatch)
    assert trace() is not None


def test_a_gate_that_is_not_monotone_wedges_an_honest_payer(monkeypatch):
    gate_by_time(monkeypatch)
    assert an_entry_that_some_see_late() is not None
