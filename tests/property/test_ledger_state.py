"""The ledger's state under random histories: invariants at every step, and any order gives the same digest."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import Claim, Entry, Grant, Item, Open, Reclaim, TopUp, Transfer, Voucher, parse, sign
from ledger.core.state import State
from ledger.core.witness import Witness
from p2p.core.identity import Identity

PEOPLE = [Identity.from_seed(bytes([n]) * 32) for n in range(1, 5)]
ISSUER, WITNESS = PEOPLE[0], Identity.from_seed(b"w" * 32)
GENESIS = Genesis(
    issuer=ISSUER.public_key,
    root=ISSUER.public_key,
    witnesses=(WITNESS.public_key,),
    max_supply=1000,
    min_lock=5,
    min_claim_step=2,
)
EXPIRY_MS = 1000
person = st.sampled_from(PEOPLE)
amount = st.integers(1, 120)


def voucher_claim(payer: Identity, worker: Identity, key: bytes, channel, total: int) -> Item:
    voucher = Voucher(GENESIS.net, key, 1, total, bytes(32))
    claim = Claim(payer.public_key, channel.seq, channel.op_index, voucher, sign(payer, voucher).signature)
    return parse(sign(worker, claim))


class LedgerMachine(RuleBasedStateMachine):
    """One witness decides, one copy applies at once, and in the end other copies apply in other orders."""

    def __init__(self):
        super().__init__()
        self.state = State(GENESIS)
        self.witness = Witness(WITNESS, self.state)
        self.final: list[Item] = []
        self.random = None

    @initialize(random=st.randoms(use_true_random=False))
    def start(self, random):
        self.random = random
        self.submit(ISSUER, Grant(PEOPLE[1].public_key, 300), Grant(ISSUER.public_key, 200))

    def submit(self, who: Identity, *ops) -> bool:
        account = self.state.account(who.public_key)
        entry = Entry(GENESIS.net, who.public_key, account.seq + 1, account.head, tuple(ops))
        item = parse(sign(who, entry))
        before = self.state.digest()
        try:
            self.witness.consider_entry(item)
        except RuleError:
            assert self.state.digest() == before, "a refused entry must change nothing"
            return False
        self.add(item)
        return True

    def add(self, item: Item) -> None:
        self.witness.seal()
        assert self.state.add(item)
        assert not self.state.add(item), "an object counts once"
        self.witness.forget_slot(item)
        self.final.append(item)

    @rule(to=person, value=amount)
    def grant(self, to, value):
        fits = self.state.supply + value <= GENESIS.max_supply
        assert self.submit(ISSUER, Grant(to.public_key, value)) == fits

    @rule(who=person, to=person, value=amount)
    def transfer(self, who, to, value):
        fits = value <= self.state.balance(who.public_key)
        assert self.submit(who, Transfer(to.public_key, value)) == fits

    @rule(who=person, to=person, value=amount)
    def open(self, who, to, value):
        fits = 5 <= value <= self.state.balance(who.public_key)
        assert self.submit(who, Open(to.public_key, to.public_key, value, EXPIRY_MS)) == fits

    def some_channel(self, data):
        key = data.draw(st.sampled_from(sorted(self.state.channels)))
        channel = self.state.channels[key]
        who = {p.public_key: p for p in PEOPLE}
        return key, channel, who[channel.payer], who[channel.signer]

    @precondition(lambda self: self.state.channels)
    @rule(data=st.data(), value=amount, total=amount)
    def topup_then_claim(self, data, value, total):
        key, channel, payer, worker = self.some_channel(data)
        self.submit(payer, TopUp(key, value))
        item = voucher_claim(payer, worker, key, channel, total)
        try:
            self.witness.consider_claim(item)
        except RuleError:
            return
        assert total <= channel.lock
        self.add(item)

    @precondition(lambda self: self.state.channels)
    @rule(data=st.data(), twice=st.booleans())
    def reclaim(self, data, twice):
        key, channel, payer, _ = self.some_channel(data)
        if channel.closed_at is None:
            freeze = self.witness.freeze(key, EXPIRY_MS).signed
            assert self.witness.freeze(key, EXPIRY_MS).signed == freeze
            op = Reclaim(key, max(channel.paid, 0), (freeze,))
            assert self.submit(payer, op, op) is False, "a channel is reclaimed once"
            assert self.submit(payer, op)

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
            assert other.digest() == self.state.digest()


LedgerMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLedger = LedgerMachine.TestCase
