"""Deployment records: only signed, allowed and newer ones count; the book is bounded; garbage is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import IntegrityError
from dmoe.core.deployment import PER_DEPLOYER_MAX, RECORDS_MAX, TAG, Book, Deployment, open_record, sign
from p2p.core import codec
from p2p.core.identity import Identity

ALICE, BOB, ME = (Identity.from_seed(name * 32) for name in (b"a", b"b", b"m"))
MODEL = "1" * 64


def record(identity=ALICE, *, model=MODEL, replicas=2, seq=1):
    return sign(identity, Deployment(model, b"h" * 32, replicas, identity.peer_id, seq))


def book(*allowed):
    return Book(ME.peer_id, frozenset(allowed))


def test_a_record_survives_its_way():
    signed = record()
    assert open_record(signed.data) == signed


@given(st.integers(0, len(record().data) - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(position, change):
    data = bytearray(record().data)
    data[position] ^= change
    with pytest.raises(IntegrityError):
        open_record(bytes(data))


@given(st.binary(max_size=2000))
def test_garbage_is_refused(data):
    with pytest.raises(IntegrityError):
        open_record(data)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1), st.randoms(use_true_random=False))
def test_the_highest_sequence_number_wins_in_any_order(entries, random):
    records = [record(replicas=replicas, seq=seq) for replicas, seq in {seq: (r, seq) for r, seq in entries}.values()]
    random.shuffle(records)
    mine = book(ALICE.peer_id)
    for signed in records:
        mine.add(signed)
    assert mine.replicas() == {MODEL: max(records, key=lambda signed: signed.record.seq).record.replicas}


def test_deployers_do_not_overrule_each_other_and_strangers_do_not_count():
    mine = book(ALICE.peer_id)
    assert mine.add(record(ALICE, replicas=2))
    assert not mine.add(record(BOB, replicas=5))
    assert mine.replicas() == {MODEL: 2}
    everybody = book("*")
    everybody.add(record(ALICE, replicas=2))
    everybody.add(record(BOB, replicas=5))
    assert everybody.replicas() == {MODEL: 5}
    everybody.add(record(BOB, replicas=0, seq=2))
    assert everybody.replicas() == {MODEL: 2}
    assert sorted(everybody.deployers(MODEL)) == sorted([ALICE.peer_id, BOB.peer_id])


def test_own_records_always_count():
    mine = book()
    assert mine.add(record(ME))
    assert mine.own(MODEL).replicas == 2


def test_one_deployer_cannot_fill_the_book():
    everybody = book("*")
    taken = sum(everybody.add(record(ALICE, model=f"{n:064x}")) for n in range(PER_DEPLOYER_MAX + 5))
    assert taken == PER_DEPLOYER_MAX < RECORDS_MAX
    assert everybody.add(record(BOB))
    assert everybody.add(record(ALICE, model=f"{1:064x}", seq=2)), "known ones can still change"


def test_a_mode_says_which_kinds_of_shards_are_wanted_and_the_default_costs_no_byte():
    experts, staged = record(ALICE, replicas=2), sign(BOB, Deployment(MODEL, b"h" * 32, 3, BOB.peer_id, 1, "stages"))
    assert len(record(BOB, replicas=3).data) < len(staged.data)
    assert open_record(staged.data).record.mode == "stages"
    mine = book("*")
    mine.add(experts)
    assert [mine.wanted(MODEL, kind) for kind in ("trunk", "expert", "stage")] == [2, 2, 0]
    mine.add(staged)
    assert [mine.wanted(MODEL, kind) for kind in ("trunk", "expert", "stage")] == [3, 2, 3]
    assert mine.wanted("2" * 64, "trunk") == 0


def test_records_of_the_first_version_and_of_later_ones_are_read():
    fields = [MODEL, b"h" * 32, 2, ALICE.peer_id, 1]
    for body in (fields, [*fields, "a mode of later"], [*fields, "both", {"more": 1}]):
        data = codec.encode(body)
        signed = open_record(codec.encode([data, ALICE.sign(TAG, data)]))
        assert signed.record.replicas == 2
        assert "expert" in signed.record.kinds
    assert record(replicas=2).data == codec.encode([codec.encode(fields), ALICE.sign(TAG, codec.encode(fields))])
