"""The ledger's state under random histories: invariants at every step, and any order gives the same digest.

Committees and issuers change in between. A model remembers what a witness promised and what stayed hidden, so that
whatever one committee promised binds the next ones.
"""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import (
    Claim,
    Committee,
    Entry,
    Freeze,
    Grant,
    Issuer,
    Item,
    Open,
    Reclaim,
    Signed,
    TopUp,
    Transfer,
    Voucher,
    parse,
    sign,
)
from ledger.core.state import State
from ledger.core.witness import VOTING, Witness
from p2p.core import codec
from p2p.core.identity import Identity

PEOPLE = [Identity.from_seed(bytes([n]) * 32) for n in range(1, 5)]
ISSUER, ROOT, WITNESS = PEOPLE[0], PEOPLE[3], Identity.from_seed(b"w" * 32)
GENESIS = Genesis(
    issuer=ISSUER.public_key,
    root=ROOT.public_key,
    witnesses=(WITNESS.public_key,),
    max_supply=1000,
    min_lock=5,
    min_claim_step=2,
)
EXPIRY_MS = 1000
EPOCHS_MAX = 4
person = st.sampled_from(PEOPLE)
amount = st.integers(1, 120)


def voucher_claim(payer: Identity, worker: Identity, key: bytes, channel, total: int) -> Item:
    voucher = Voucher(GENESIS.net, key, 1, total, bytes(32))
    claim = Claim(payer.public_key, channel.seq, channel.op_index, voucher, sign(payer, voucher).signature)
    return parse(sign(worker, claim))


def parse_freeze(signed: Signed) -> int:
    return codec.decode(Freeze, signed.body, bytes_max=4096).total


class LedgerMachine(RuleBasedStateMachine):
    """One witness per epoch decides, one copy applies at once, and in the end other copies apply in other orders."""

    def __init__(self):
        super().__init__()
        self.state = State(GENESIS)
        self.witness = Witness(WITNESS, self.state)
        self.final: list[Item] = []
        self.hidden: dict[bytes, Item] = {}
        """Entries that a witness voted for and nobody else knows, by account."""
        self.voted: dict[bytes, int] = {}
        """The highest claim voted for, by channel."""
        self.freezes: dict[bytes, Signed] = {}
        """The first freeze of a channel."""
        self.banned: set[bytes] = set()
        """Channels frozen under an earlier committee."""
        self.random = None

    @initialize(random=st.randoms(use_true_random=False))
    def start(self, random):
        self.random = random
        self.submit(ISSUER, Grant(PEOPLE[1].public_key, 300), Grant(ISSUER.public_key, 200))

    def entry(self, who: Identity, *ops) -> Item:
        account = self.state.account(who.public_key)
        return parse(sign(who, Entry(GENESIS.net, who.public_key, account.seq + 1, account.head, tuple(ops))))

    def submit(self, who: Identity, *ops) -> bool:
        item = self.entry(who, *ops)
        before = self.state.digest()
        hidden = self.hidden.get(who.public_key)
        try:
            self.witness.consider_entry(item)
        except RuleError:
            assert self.state.digest() == before, "a refused entry must change nothing"
            return False
        assert hidden is None or hidden.id == item.id, "a slot that was voted for is bound, whoever votes now"
        self.add(item)
        return True

    def add(self, item: Item) -> None:
        self.witness.seal()
        assert self.state.add(item)
        assert not self.state.add(item), "an object counts once"
        self.witness.forget_slot(item)
        self.final.append(item)

    def is_free(self, who: Identity) -> bool:
        return who.public_key not in self.hidden

    @rule(to=person, value=amount)
    def grant(self, to, value):
        issuer = next(p for p in PEOPLE if p.public_key == self.state.committees.issuer)
        reserved = sum(
            op.amount
            for key, item in self.hidden.items()
            if key != issuer.public_key
            for op in item.object.ops
            if isinstance(op, Grant)
        )
        fits = self.state.supply + reserved + value <= GENESIS.max_supply
        if self.is_free(issuer):
            assert self.submit(issuer, Grant(to.public_key, value)) == fits

    @rule(who=person, to=person)
    def grant_by_others(self, who, to):
        if who.public_key != self.state.committees.issuer and self.is_free(who):
            assert self.submit(who, Grant(to.public_key, 1)) is False

    @rule(who=person, to=person, value=amount)
    def transfer(self, who, to, value):
        fits = value <= self.state.balance(who.public_key)
        if self.is_free(who):
            assert self.submit(who, Transfer(to.public_key, value)) == fits
        else:
            self.submit(who, Transfer(to.public_key, value))

    @rule(who=person, to=person, value=amount)
    def open(self, who, to, value):
        fits = 5 <= value <= self.state.balance(who.public_key)
        if self.is_free(who):
            assert self.submit(who, Open(to.public_key, to.public_key, value, EXPIRY_MS)) == fits

    @rule(who=person, to=person, value=amount, grants=st.booleans())
    def vote_in_secret(self, who, to, value, grants):
        """A vote that leads to nothing yet: the payer keeps its certificate to itself."""
        op = Grant(to.public_key, value) if grants else Transfer(to.public_key, value)
        if self.is_free(who):
            item = self.entry(who, op)
            try:
                self.witness.consider_entry(item)
            except RuleError:
                return
            self.witness.seal()
            self.hidden[who.public_key] = item

    @precondition(lambda self: self.hidden)
    @rule(data=st.data())
    def come_out(self, data):
        """The hidden entry is certified after all, whoever sits in the committee now."""
        key = data.draw(st.sampled_from(sorted(self.hidden)))
        item = self.hidden[key]
        grants = any(isinstance(op, Grant) for op in item.object.ops)
        if grants and key != self.state.committees.issuer and self.witness.epoch:
            return  # an issuer that was replaced grants no more; a witness that had voted before repeats its vote
        self.witness.consider_entry(item)
        del self.hidden[key]
        self.add(item)

    def some_channel(self, data):
        key = data.draw(st.sampled_from(sorted(self.state.channels)))
        channel = self.state.channels[key]
        who = {p.public_key: p for p in PEOPLE}
        return key, channel, who[channel.payer], who[channel.signer]

    @precondition(lambda self: self.state.channels)
    @rule(data=st.data(), value=amount, total=amount, hide=st.booleans())
    def topup_then_claim(self, data, value, total, hide):
        key, channel, payer, worker = self.some_channel(data)
        self.submit(payer, TopUp(key, value))
        item = voucher_claim(payer, worker, key, channel, total)
        try:
            self.witness.consider_claim(item)
        except RuleError:
            return
        assert total <= channel.lock
        assert key not in self.banned, "what an earlier committee froze gets no claim votes"
        self.voted[key] = max(total, self.voted.get(key, 0))
        if hide:
            self.witness.seal()
        else:
            self.add(item)

    @precondition(lambda self: self.state.channels)
    @rule(data=st.data())
    def freeze(self, data):
        key, channel, _, _ = self.some_channel(data)
        if channel.closed_at is None:
            frozen = self.witness.freeze(key, EXPIRY_MS)
            total = parse_freeze(frozen.signed)
            assert total >= self.voted.get(key, 0), "a freeze covers every claim that was voted for before it"
            self.freezes.setdefault(key, frozen.signed)

    @precondition(lambda self: self.state.channels)
    @rule(data=st.data())
    def reclaim(self, data):
        key, channel, payer, _ = self.some_channel(data)
        if channel.closed_at is None and self.is_free(payer):
            freeze = self.freezes.get(key) or self.witness.freeze(key, EXPIRY_MS).signed
            self.freezes[key] = freeze
            op = Reclaim(key, parse_freeze(freeze), (freeze,))
            assert self.submit(payer, op, op) is False, "a channel is reclaimed once"
            assert self.submit(payer, op), "a freeze holds under every later committee"

    @precondition(lambda self: self.state.committees.epoch < EPOCHS_MAX)
    @rule(listed=st.booleans())
    def change_committee(self, listed):
        epoch = self.state.committees.epoch + 1
        new = Identity.from_seed(bytes([50 + epoch]) * 32)
        item = self.entry(ROOT, Committee(epoch, (new.public_key,), 0))
        if listed:
            self.witness.listed.add(item.id)
        if not self.is_free(ROOT):
            return
        assert self.submit(ROOT, *item.object.ops) == listed
        if not listed:
            return
        old, self.witness = self.witness, Witness(new, self.state, epoch)
        for refused in (lambda: self.witness.seal(), lambda: self.witness.advance()):
            assert refused() is None
        effect = old.advance()
        old.confirm_handover()
        self.witness.receive(effect.signed)
        self.witness.advance()
        assert self.witness.phase == VOTING
        for claim in self.final:
            if isinstance(claim.object, Claim):
                self.witness.saw_voucher(claim.object.voucher, claim.object.voucher_signature)
        self.banned |= self.freezes.keys()
        for key in self.hidden:
            other = self.entry(next(p for p in PEOPLE if p.public_key == key), Transfer(key, 1), Transfer(key, 1))
            with pytest.raises(RuleError):
                self.witness.consider_entry(other)

    @rule(to=person, listed=st.booleans())
    def change_issuer(self, to, listed):
        committees = self.state.committees
        fits = listed and to.public_key not in committees.issuers and not committees.issuer_changed
        item = self.entry(ROOT, Issuer(to.public_key))
        if listed:
            self.witness.listed.add(item.id)
        if self.is_free(ROOT):
            assert self.submit(ROOT, *item.object.ops) == fits

    @invariant()
    def conserved(self):
        self.state.check_invariants()
        assert not self.state.broken

    def teardown(self):
        for _ in range(2):
            order = list(self.final)
            if self.random is not None:
                self.random.shuffle(order)
            other = State(GENESIS)
            for item in order:
                other.add(item)
                other.check_invariants()
            assert other.waiting() == 0
            assert not other.broken
            assert other.digest() == self.state.digest()


LedgerMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLedger = LedgerMachine.TestCase
