"""Whatever comes in is refused with the rule that it broke, and nothing is changed by it.

One table: how it is made from something good, and what the refusal names. Every row goes through the book (the way in
for everything that peers send), and through a witness where it asks for a vote.
"""

import msgspec
import pytest
from nacl.bindings import crypto_core_ed25519_is_valid_point

from config.errors import RiosError
from ledger.book import Book
from ledger.core import certificate as certificates
from ledger.core import merkle
from ledger.core.objects import (
    AMOUNT_MAX,
    Certificate,
    Claim,
    Entry,
    Grant,
    Open,
    Signed,
    Transfer,
    Vote,
    Votes,
    Voucher,
    parse,
    sign,
)
from ledger.core.witness import Witness
from ledger.store import Store
from ledger.writer import Writer
from p2p.core import codec
from tests.unit.ledger.ledger_kit import START_MS, Maker

CREDIT = 1_000_000
SMALL_ORDER = [bytes(32), b"\x01" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"]
MIXED_ORDER = bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a")
NOT_ON_CURVE = b"\x02" + bytes(31)


@pytest.fixture(scope="module")
def made():
    maker = Maker(5, f=1)
    maker.entry(0, *(Grant(p.public_key, 100 * CREDIT) for p in maker.people))
    maker.channel = maker.open(1, 2, 10 * CREDIT)
    maker.entry(2, Transfer(maker.people[3].public_key, 5))
    maker.claim(maker.channel, CREDIT)
    return maker


def raw(value) -> bytes:
    return msgspec.msgpack.encode(value)


def next_entry(made, who, *ops, **changes):
    known = made.state.account(made.people[who].public_key)
    fields = {"net": made.genesis.net, "account": made.people[who].public_key, "seq": known.seq + 1, "prev": known.head}
    return Entry(**{**fields, "ops": ops, **changes})


def entry_with(made, **changes):
    ops = changes.pop("ops", (Transfer(made.people[3].public_key, 5),))
    return sign(made.people[1], next_entry(made, 1, *ops, **changes))


def body_with(made, change):
    """A validly signed body that was changed before it was signed."""
    body = msgspec.msgpack.decode(codec.encode(next_entry(made, 1, Transfer(made.people[3].public_key, 5))))
    data = change(body)
    data = data if isinstance(data, bytes) else raw(data)
    return Signed(data, made.people[1].sign(b"", codec.digest(Entry.TAG, data)))


def replaced(body, index, value):
    return [*body[:index], value, *body[index + 1 :]]


def hostile(made, key):
    """An entry of an account whose key is hostile, with signatures that some libraries take."""
    body = Entry(made.genesis.net, key, 1, bytes(32), (Transfer(made.people[3].public_key, 5),))
    return Signed(codec.encode(body), key + bytes(32))


def claim_with(made, cumulative, *, signer=2, payer=1, channel=None, **changes):
    known = made.state.channels[made.channel]
    voucher = Voucher(made.genesis.net, channel or made.channel, 9, cumulative, bytes(32))
    fields = {"account": known.payer, "seq": known.seq, "op_index": known.op_index, **changes}
    body = Claim(**fields, voucher=voucher, voucher_signature=sign(made.people[payer], voucher).signature)
    return sign(made.people[signer], body)


FOREIGN = bytes(16)
OBJECTS = {
    "an integer that is not the shortest": (
        lambda m: body_with(m, lambda b: raw(b).replace(b"\x02\xc4\x20", b"\xcc\x02\xc4\x20", 1)),
        "canonical",
    ),
    "a map instead of the array": (lambda m: body_with(m, lambda b: {str(i): v for i, v in enumerate(b)}), "malformed"),
    "a map with one key twice": (lambda m: body_with(m, lambda b: b"\x82\xa1a\x01\xa1a\x02"), "malformed"),
    "an unknown kind": (lambda m: body_with(m, lambda b: replaced(b, 0, 99)), "malformed"),
    "an operation of a later version": (
        lambda m: body_with(m, lambda b: replaced(b, 5, [[99, b"x" * 32, 5]])),
        "malformed",
    ),
    "one more field": (lambda m: body_with(m, lambda b: [*b, 0]), "malformed"),
    "bytes after the end": (lambda m: body_with(m, lambda b: raw(b) + b"\x00"), "malformed"),
    "a body cut short": (lambda m: body_with(m, lambda b: raw(b)[:-3]), "malformed"),
    "no operations": (lambda m: body_with(m, lambda b: replaced(b, 5, [])), "malformed"),
    "65 operations": (lambda m: body_with(m, lambda b: replaced(b, 5, b[5] * 65)), "malformed"),
    "a negative amount": (lambda m: body_with(m, lambda b: replaced(b, 5, [[2, b"x" * 32, -5]])), "malformed"),
    "an amount above 2**62": (
        lambda m: body_with(m, lambda b: replaced(b, 5, [[2, b"x" * 32, AMOUNT_MAX + 1]])),
        "malformed",
    ),
    "a float": (lambda m: body_with(m, lambda b: replaced(b, 5, [[2, b"x" * 32, 5.0]])), "malformed"),
    "a key of 31 bytes": (lambda m: body_with(m, lambda b: replaced(b, 5, [[2, b"x" * 31, 5]])), "malformed"),
    "another network": (lambda m: entry_with(m, net=FOREIGN), "network"),
    "somebody else's signature": (lambda m: Signed(entry_with(m).body, m.people[2].sign(b"", b"x" * 32)), "signature"),
    "a small-order key": (lambda m: hostile(m, SMALL_ORDER[0]), "signature"),
    "another small-order key": (lambda m: hostile(m, SMALL_ORDER[1]), "signature"),
    "a non-canonical small-order key": (lambda m: hostile(m, SMALL_ORDER[2]), "signature"),
    "a mixed-order key": (lambda m: hostile(m, MIXED_ORDER), "signature"),
    "a key that is no point": (lambda m: hostile(m, NOT_ON_CURVE), "signature"),
    "a claim of another network": (
        lambda m: sign(
            m.people[2],
            msgspec.structs.replace(
                parse(claim_with(m, 2 * CREDIT)).object, voucher=Voucher(FOREIGN, m.channel, 1, 5, bytes(32))
            ),
        ),
        "network",
    ),
}
"""Refused however many witnesses certify it."""

VOTES = {
    "an entry too far ahead": (lambda m: entry_with(m, seq=9), "sequence"),
    "an entry once more": (lambda m: m.finals[1].item.signed, "sequence"),
    "another head": (lambda m: entry_with(m, prev=b"p" * 32), "prev"),
    "more than there is": (lambda m: entry_with(m, ops=(Transfer(b"x" * 32, 1000 * CREDIT),)), "funds"),
    "sums that overflow": (lambda m: entry_with(m, ops=(Transfer(b"x" * 32, AMOUNT_MAX),) * 64), "funds"),
    "a grant by nobody": (lambda m: entry_with(m, ops=(Grant(b"x" * 32, 5),)), "issuer"),
    "dust": (lambda m: entry_with(m, ops=(Transfer(b"x" * 32, 0),)), "amount"),
    "a lock that is too small": (
        lambda m: entry_with(m, ops=(Open(m.people[2].public_key, b"x" * 32, 5, START_MS),)),
        "amount",
    ),
    "a signer of small order": (
        lambda m: entry_with(m, ops=(Open(SMALL_ORDER[1], b"x" * 32, 10**7, START_MS),)),
        "signer",
    ),
    "a claim above the lock": (lambda m: claim_with(m, 11 * CREDIT), "lock"),
    "a claim that does not rise": (lambda m: claim_with(m, CREDIT), "step"),
    "a claim signed by the payer": (lambda m: claim_with(m, 2 * CREDIT, signer=1), "signature"),
    "a voucher signed by the worker": (lambda m: claim_with(m, 2 * CREDIT, payer=2), "signature"),
    "a claim that names another entry": (lambda m: claim_with(m, 2 * CREDIT, seq=2), "channel"),
    "a claim on a channel that never was": (lambda m: claim_with(m, 2 * CREDIT, channel=b"c" * 32), "closed"),
}
"""Signed rightly, but no witness votes for it."""


def book_of(made, tmp_path):
    store = Store(tmp_path / "l.db", made.genesis.net)
    book = Book(made.genesis, store, Writer(store, in_thread=False), lambda: 1)
    for final in made.finals:
        book.state.add(final.item)
    return book


def certified(made, signed):
    """A certificate by the witnesses themselves, who would have to lie for it."""
    item_id = codec.digest(Claim.TAG if signed.body[1:2] == b"\x04" else Entry.TAG, signed.body)
    return Certificate(signed, 0, votes_for(made, item_id, people=(0, 1, 2)))


def votes_for(made, item_id, *, people, epoch=0, net=None):
    root = merkle.build([item_id])[-1][0]
    votes = []
    for n in people:
        person = made.people[n]
        header = sign(person, Votes(net or made.genesis.net, epoch, person.public_key, 10**6, bytes(32), root))
        votes.append(Vote(header.body, header.signature, 0, ()))
    return tuple(votes)


def consider(witness, signed):
    item = parse(signed)
    (witness.consider_entry if isinstance(item.object, Entry) else witness.consider_claim)(item)


@pytest.mark.parametrize("name", OBJECTS)
async def test_objects_are_refused_whoever_certified_them(made, tmp_path, name):
    make, rule = OBJECTS[name]
    book = book_of(made, tmp_path)
    before, rows = book.state.digest(), list(book.store.items())
    with pytest.raises(RiosError, match=rule):
        await book.learn([certified(made, make(made))])
    with pytest.raises(RiosError):
        consider(Witness(made.people[0], made.state), make(made))
    assert book.state.digest() == before
    assert list(book.store.items()) == rows
    assert book.state.waiting() == 0
    book.store.close()


@pytest.mark.parametrize("name", VOTES)
def test_no_vote_for_what_breaks_a_rule(made, name):
    make, rule = VOTES[name]
    witness, before = Witness(made.people[0], made.state), made.state.digest()
    with pytest.raises(RiosError) as refused:
        consider(witness, make(made))
    assert refused.value.rule == rule
    assert witness.pending == 0
    assert made.state.digest() == before


CERTIFICATES = {
    "votes of strangers": (lambda m, c: with_votes(m, c, people=[4]), "witness"),
    "too few": (lambda m, c: msgspec.structs.replace(c, votes=c.votes[:2]), "quorum"),
    "one witness three times": (lambda m, c: msgspec.structs.replace(c, votes=(c.votes[0],) * 3), "quorum"),
    "an epoch to come": (lambda m, c: msgspec.structs.replace(c, epoch=7), "epoch"),
    "votes of an epoch to come": (lambda m, c: with_votes(m, c, people=[0, 1, 2], epoch=1), "epoch"),
    "votes of another network": (lambda m, c: with_votes(m, c, people=[0, 1, 2], net=FOREIGN), "witness"),
    "votes for something else": (
        lambda m, c: msgspec.structs.replace(c, object=m.finals[0].certificate.object),
        "path",
    ),
    "an index outside its path": (
        lambda m, c: msgspec.structs.replace(c, votes=tuple(msgspec.structs.replace(v, index=1) for v in c.votes)),
        "path",
    ),
    "a forged signature": (
        lambda m, c: msgspec.structs.replace(
            c, votes=tuple(msgspec.structs.replace(v, signature=bytes(64)) for v in c.votes)
        ),
        "signature",
    ),
}


def with_votes(made, certificate, **changes):
    return msgspec.structs.replace(certificate, votes=votes_for(made, parse(certificate.object).id, **changes))


@pytest.mark.parametrize("name", CERTIFICATES)
async def test_certificates_that_prove_nothing_are_refused(made, tmp_path, name):
    change, rule = CERTIFICATES[name]
    store = Store(tmp_path / "l.db", made.genesis.net)
    book = Book(made.genesis, store, Writer(store, in_thread=False), lambda: 1)
    await book.learn(made.certificates[:2])
    before = book.state.digest()
    with pytest.raises(RiosError) as refused:
        await book.learn([change(made, made.finals[2].certificate)])
    assert refused.value.rule == rule
    assert book.state.digest() == before
    assert len(list(store.items())) == 2
    assert await book.learn(made.certificates) != []
    store.close()


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93", b"\x80", b"\x94" * 5000, bytes(400_000)])
def test_bytes_that_are_no_certificate(data):
    with pytest.raises(RiosError) as refused:
        certificates.decode(data)
    assert refused.value.code in ("integrity", "too_large")


def test_the_hostile_keys_are_what_they_are_called():
    for key in (*SMALL_ORDER, MIXED_ORDER, NOT_ON_CURVE):
        assert not crypto_core_ed25519_is_valid_point(key)
