"""Which objects are final and which are refused, by name of the rule."""

from itertools import permutations

import msgspec
import pytest

from config.errors import ConfigError, IntegrityError
from ledger.core import certificate as certificates
from ledger.core import merkle
from ledger.core.certificate import Collector, Verifier
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis, from_json
from ledger.core.objects import (
    NO_HEAD,
    Certificate,
    Claim,
    Committee,
    Entry,
    Grant,
    Issuer,
    Open,
    Reclaim,
    Signed,
    TopUp,
    Transfer,
    Vote,
    Votes,
    Voucher,
    channel_id,
    parse,
    sign,
)
from ledger.core.state import State
from ledger.core.witness import Witness
from p2p.core import codec
from p2p.core.identity import Identity

A, B, C, X = (Identity.from_seed(bytes([n]) * 32) for n in (1, 2, 3, 4))
WITNESSES = [Identity.from_seed(bytes([n]) * 32) for n in range(10, 14)]


def genesis(f=0, **changes) -> Genesis:
    keys = tuple(w.public_key for w in WITNESSES[: 3 * f + 1])
    return Genesis(issuer=A.public_key, root=A.public_key, witnesses=keys, f=f, min_lock=10, **changes)


class World:
    """A committee with one shared view of what is final."""

    def __init__(self, f=0, **changes):
        self.genesis = genesis(f, **changes)
        self.state = State(self.genesis)
        self.witnesses = [Witness(w, self.state) for w in WITNESSES[: 3 * f + 1]]
        self.verifier = Verifier(self.genesis)

    def entry(self, who, *ops, seq=None, prev=None, net=None):
        account = self.state.account(who.public_key)
        seq = account.seq + 1 if seq is None else seq
        return sign(who, Entry(net or self.genesis.net, who.public_key, seq, prev or account.head, tuple(ops)))

    def certify(self, signed, witnesses=None):
        item = parse(signed)
        collector = Collector(self.verifier, signed)
        for witness in witnesses or self.witnesses[: self.genesis.quorum]:
            if isinstance(item.object, Entry):
                witness.consider_entry(item)
            else:
                witness.consider_claim(item)
            collector.add(witness.seal().votes[0])
        return collector.certificate()

    def final(self, signed):
        item = self.verifier.open(certificates.decode(certificates.encode(self.certify(signed))))
        assert self.state.add(item)
        return item

    def refused(self, signed) -> RuleError:
        with pytest.raises(RuleError) as caught:
            self.witnesses[0].consider_entry(parse(signed))
        return caught.value


@pytest.fixture
def world():
    w = World()
    w.final(w.entry(A, Grant(A.public_key, 1000), Grant(B.public_key, 100)))
    return w


def test_entries_are_refused_by_name(world):
    key = world.state.account(A.public_key).head
    for rule, signed in {
        "network": world.entry(B, Transfer(C.public_key, 1), net=bytes(16)),
        "sequence": world.entry(B, Transfer(C.public_key, 1), seq=2),
        "prev": world.entry(B, Transfer(C.public_key, 1), prev=bytes([1]) * 32),
        "funds": world.entry(B, Transfer(C.public_key, 60), Transfer(C.public_key, 41)),
        "issuer": world.entry(B, Grant(B.public_key, 1)),
        "supply": world.entry(A, Grant(B.public_key, 10**15)),
        "amount": world.entry(B, Open(C.public_key, C.public_key, 9, 0)),
        "ownership": world.entry(B, TopUp(key, 5)),
        "signer": world.entry(B, Open(bytes(32), C.public_key, 10, 0)),
        "epoch": world.entry(A, Committee(2, (B.public_key,), 0)),
        "committee": world.entry(A, Committee(1, (B.public_key, C.public_key), 0)),
        "keys": world.entry(A, Committee(1, (B.public_key,) * 4, 1)),
        "listed": world.entry(A, Committee(1, (B.public_key,), 0)),
        "alone": world.entry(A, Issuer(B.public_key), Transfer(C.public_key, 1)),
        "root": world.entry(B, Issuer(B.public_key)),
        "signature": Signed(world.entry(B, Transfer(C.public_key, 1)).body, bytes(64)),
    }.items():
        assert world.refused(signed).rule == rule
    assert world.refused(world.entry(A, Issuer(A.public_key))).rule == "issuer"
    assert world.refused(world.entry(A, Issuer(B.public_key))).wait, "the operator may list it later"
    assert world.refused(world.entry(B, Transfer(C.public_key, 101))).wait, "credits may still arrive"


def test_equivocation_is_refused_and_proven(world):
    first, second = (world.entry(B, Transfer(to.public_key, 1)) for to in (A, C))
    witness = world.witnesses[0]
    witness.consider_entry(parse(first))
    error = world.refused(second)
    assert error.rule == "equivocation"
    assert witness.proofs[B.public_key, 1] == (first, second)
    forged = Signed(world.entry(B, Transfer(X.public_key, 1)).body, bytes(64))
    assert world.refused(forged).rule == "signature", "nobody else can frame an account"


def test_a_restarted_witness_keeps_its_word(world):
    first, second = (parse(world.entry(B, Transfer(to.public_key, 1))) for to in (A, C))
    again = Witness(WITNESSES[0], world.state)
    again.restore_entry_vote(first)
    with pytest.raises(RuleError, match="equivocation"):
        again.consider_entry(second)
    again.consider_entry(first)
    assert again.seal().items == (first,)


def test_the_same_witness_thrice_is_no_quorum():
    world = World(f=1)
    signed = world.entry(A, Grant(B.public_key, 5))
    item = parse(signed)
    votes = []
    for _ in range(3):
        world.witnesses[0].consider_entry(item)
        votes.append(world.witnesses[0].seal().votes[0])
    assert len({vote.header for vote in votes}) == 3
    with pytest.raises(RuleError) as caught:
        world.verifier.open(Certificate(signed, 0, tuple(votes)))
    assert caught.value.rule == "quorum"
    assert world.verifier.open(world.certify(signed, world.witnesses[1:])) == item


def test_certificates_of_strangers_wrong_paths_and_other_objects_prove_nothing(world):
    signed = world.entry(B, Transfer(C.public_key, 1))
    good = world.certify(signed)
    vote = good.votes[0]
    other = world.entry(B, Transfer(C.public_key, 2))
    stranger = sign(X, Votes(world.genesis.net, 0, X.public_key, 0, bytes(32), merkle.root_of([parse(signed).id])))
    for rule, bad in {
        "path": Certificate(other, 0, (vote,)),
        "witness": Certificate(signed, 0, (Vote(stranger.body, stranger.signature, 0, ()),)),
        "epoch": Certificate(signed, 1, (vote,)),
    }.items():
        with pytest.raises(RuleError) as caught:
            world.verifier.open(bad)
        assert caught.value.rule == rule
    with pytest.raises(RuleError, match="index"):
        world.verifier.open(Certificate(signed, 0, (msgspec.structs.replace(vote, index=1),)))
    with pytest.raises(RuleError, match="signature"):
        world.verifier.open(Certificate(signed, 0, (msgspec.structs.replace(vote, signature=bytes(64)),)))


def test_a_batch_of_256_is_proven_leaf_by_leaf():
    world = World(min_claim_step=1)
    world.final(world.entry(A, *(Grant(Identity.from_seed(n.to_bytes(32, "big")).public_key, 9) for n in range(1, 65))))
    people = [Identity.from_seed(n.to_bytes(32, "big")) for n in range(1, 65)]
    items = [parse(world.entry(p, Transfer(B.public_key, 1))) for p in people[:37]]
    for item in items:
        world.witnesses[0].consider_entry(item)
    batch = world.witnesses[0].seal()
    for item, vote in zip(batch.items, batch.votes, strict=True):
        assert world.verifier.check_vote(item.id, vote) == WITNESSES[0].public_key
        assert merkle.climb(item.id, vote.index, vote.path) == codec.decode(Votes, vote.header, bytes_max=999).root
        with pytest.raises(RuleError):
            world.verifier.check_vote(bytes(32), vote)


def open_channel(world, lock=50, expiry_ms=100):
    item = world.final(world.entry(B, Open(C.public_key, X.public_key, lock, expiry_ms)))
    return channel_id(item.id, 0)


def claim(world, key, total, *, payer=B, signer=C):
    channel = world.state.channels[key]
    voucher = Voucher(world.genesis.net, key, 1, total, bytes(32))
    body = Claim(channel.payer, channel.seq, channel.op_index, voucher, sign(payer, voucher).signature)
    return parse(sign(signer, body))


@pytest.fixture
def small():
    w = World(min_claim_step=5)
    w.final(w.entry(A, Grant(B.public_key, 100)))
    return w


def test_claims_pay_the_payout_and_only_what_is_new(small):
    key = open_channel(small)
    small.final(claim(small, key, 20).signed)
    small.final(claim(small, key, 30).signed)
    assert small.state.balance(X.public_key) == 30
    assert small.state.balance(C.public_key) == 0
    assert not small.state.add(claim(small, key, 20)), "an older claim changes nothing"
    for rule, item in {
        "step": claim(small, key, 34),
        "lock": claim(small, key, 51),
        "signature": claim(small, key, 40, payer=C),
    }.items():
        with pytest.raises(RuleError) as caught:
            small.witnesses[0].consider_claim(item)
        assert caught.value.rule == rule
    with pytest.raises(RuleError, match="signer"):
        small.witnesses[0].consider_claim(claim(small, key, 40, signer=X))


def test_freeze_then_reclaim_pays_the_highest_voucher_and_returns_the_rest(small):
    key = open_channel(small)
    witness = small.witnesses[0]
    small.final(claim(small, key, 20).signed)
    with pytest.raises(RuleError, match="expires"):
        witness.freeze(key, 99)
    frozen = witness.freeze(key, 100).signed
    with pytest.raises(RuleError, match="frozen"):
        witness.consider_claim(claim(small, key, 30))
    assert small.refused(small.entry(B, Reclaim(key, 19, (frozen,)))).rule == "paid"
    assert small.refused(small.entry(B, Reclaim(key, 25, (frozen,)))).rule == "freeze"
    assert small.refused(small.entry(B, Reclaim(key, 51, (frozen,)))).rule == "lock"
    op = Reclaim(key, 20, (frozen,))
    assert small.refused(small.entry(B, op, op)).rule == "closed", "two reclaims in one entry would mint"
    small.final(small.entry(B, op))
    assert (small.state.balance(B.public_key), small.state.balance(X.public_key)) == (80, 20)
    assert small.refused(small.entry(B, TopUp(key, 5))).rule == "closed"
    assert small.refused(small.entry(B, op)).rule == "closed"
    small.state.check_invariants()


def test_objects_wait_for_what_they_build_on(small):
    key = open_channel(small, lock=90)
    paid = claim(small, key, 60)
    small.final(paid.signed)
    spent = small.final(small.entry(X, Transfer(A.public_key, 55)))
    objects = [spent, paid]
    late = State(small.genesis)
    for item in objects:
        assert late.add(item)
    assert late.waiting() == 2
    assert late.balance(A.public_key) == 0
    chain = World(min_claim_step=5)
    grant = chain.final(chain.entry(A, Grant(B.public_key, 100)))
    opened = chain.final(chain.entry(B, Open(C.public_key, X.public_key, 90, 100)))
    late.add(opened)
    late.add(grant)
    assert late.waiting() == 0
    assert late.digest() == small.state.digest()


def test_non_canonical_and_oversized_bodies_are_refused(world):
    signed = world.entry(B, Transfer(C.public_key, 1))
    padded = signed.body.replace(b"\x01\xcc", b"\x01") + b"\xc0"
    for body in (padded, signed.body[:-1], b"", b"\x96\x01", b"\xc1" * 40, bytes(300_000)):
        with pytest.raises(IntegrityError):
            parse(Signed(body, bytes(64)))
    wide = signed.body[:-1] + b"\xcd\x00\x01"  # the amount 1 in three bytes
    with pytest.raises(IntegrityError, match="canonical"):
        parse(Signed(wide, bytes(64)))
    with pytest.raises(IntegrityError):
        parse(sign(B, Entry(world.genesis.net, B.public_key, 1, NO_HEAD, (Transfer(C.public_key, 1 << 63),))))


def test_genesis_file_round_trips_and_bad_ones_say_why():
    made = genesis(1)
    assert from_json(made.to_json()) == made
    assert from_json(made.to_json()).net == made.net
    assert made.quorum == 3
    with pytest.raises(ConfigError, match="exactly 4 witnesses"):
        Genesis(issuer=A.public_key, root=A.public_key, witnesses=(A.public_key,), f=1)
    with pytest.raises(ConfigError, match="twice"):
        Genesis(issuer=A.public_key, root=A.public_key, witnesses=(A.public_key,) * 4, f=1)
    with pytest.raises(ConfigError, match="not a valid"):
        Genesis(issuer=bytes(32), root=A.public_key, witnesses=(A.public_key,))
    for text, why in {
        "{": "not JSON",
        "[]": "not an object",
        made.to_json().replace('"f"', '"g"'): "f, g",
        made.to_json().replace("rios-genesis/1", "rios-genesis/9"): "reads rios-genesis/1",
        made.to_json().replace("12D3", "12E3", 1): "peer id",
        made.to_json().replace('"min_lock": 10', '"min_lock": -1'): "min_lock",
    }.items():
        with pytest.raises(ConfigError, match=why):
            from_json(text)


def test_a_higher_claim_that_comes_first_does_not_hide_the_lower_one_its_top_up_is_paid_from():
    """The payee lends the payer the first claim's money for the top-up that the second claim needs."""
    world = World(min_claim_step=1)
    items = [world.final(world.entry(A, Grant(B.public_key, 50)))]
    items.append(world.final(world.entry(B, Open(C.public_key, C.public_key, 50, 10**6))))
    key = next(iter(world.state.channels))

    def claim(total):
        channel = world.state.channels[key]
        voucher = Voucher(world.genesis.net, key, 1, total, bytes(32))
        made = Claim(B.public_key, channel.seq, channel.op_index, voucher, sign(B, voucher).signature)
        return sign(C, made)

    items.append(world.final(claim(40)))
    items.append(world.final(world.entry(C, Transfer(B.public_key, 40))))
    items.append(world.final(world.entry(B, TopUp(key, 40))))
    items.append(world.final(claim(90)))
    for order in permutations(items):
        other = State(world.genesis)
        for item in order:
            other.add(item)
            other.check_invariants()
        assert other.waiting() == 0
        assert not other.broken
        assert other.digest() == world.state.digest()
