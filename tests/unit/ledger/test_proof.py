"""Answers under receipts: what is paid can be proved, what is not true cannot."""

import pytest

from config.errors import IntegrityError
from ledger.core import merkle, proof
from ledger.core.errors import RuleError
from ledger.core.objects import Receipt, Signed, sign
from p2p.core.identity import Identity

WORKER = Identity.from_seed(b"w" * 32)
NET, KEY = b"n" * 16, b"c" * 32


def leaves_of(count, first=0):
    return [(first + n).to_bytes(32, "big") for n in range(count)]


def receipt_over(leaves):
    return Receipt(NET, KEY, 1, 5, len(leaves), 5, 0, merkle.root_of(leaves))


@pytest.mark.parametrize("count", [1, 2, 3, 32, 57])
def test_every_watched_answer_can_be_proved_and_no_other(count):
    leaves, answers = leaves_of(count), proof.Answers()
    for leaf in leaves:
        answers.arrived(leaf)
        answers.watch(leaf)
    receipt = receipt_over(leaves)
    signed = sign(WORKER, receipt)
    answers.check(receipt, leaves)
    answers.covered(signed, leaves)
    for leaf in leaves:
        found = answers.proof(leaf)
        args = (found.receipt, found.signature, found.index, found.path)
        assert proof.check(WORKER.peer_id, leaf, *args) == receipt
        for other in (bytes(32), leaf[::-1] if leaf[::-1] != leaf else b"x" * 32):
            if other not in leaves:
                with pytest.raises(RuleError, match="path"):
                    proof.check(WORKER.peer_id, other, *args)
    answers.forget(leaves[0])
    assert answers.proof(leaves[0]) is None


def test_a_root_of_other_answers_and_answers_that_never_came_are_refused():
    leaves, answers = leaves_of(40), proof.Answers()
    for leaf in leaves[:19]:
        answers.arrived(leaf)
    with pytest.raises(RuleError) as refused:
        answers.check(receipt_over(leaves[1:]), leaves)
    assert refused.value.rule == "use_root"
    with pytest.raises(RuleError, match="21 never came") as refused:
        answers.check(receipt_over(leaves), leaves)
    assert refused.value.rule == "leaves"
    answers.check(receipt_over(leaves), leaves, all_known=False)  # this side was restarted
    answers.arrived(leaves[19])
    answers.check(receipt_over(leaves), leaves)


def test_few_answers_may_all_have_been_given_up():
    leaves = leaves_of(proof.FOREIGN_FROM - 1)
    proof.Answers().check(receipt_over(leaves), leaves)


def test_a_receipt_of_somebody_else_proves_nothing():
    leaves = leaves_of(3)
    signed = sign(WORKER, receipt_over(leaves))
    path = merkle.path_of(merkle.build(leaves), 1)
    other = Identity.from_seed(b"o" * 32)
    with pytest.raises(RuleError, match="signature"):
        proof.check(other.peer_id, leaves[1], signed.body, signed.signature, 1, path)
    with pytest.raises(RuleError, match="signature"):
        proof.check(WORKER.peer_id, leaves[1], signed.body, signed.signature[:-1], 1, path)
    for index, changed in ((0, path), (1, path[:-1]), (1 << 40, path), (-1, path), (1, (*path, b"short"))):
        with pytest.raises(RuleError, match="path"):
            proof.check(WORKER.peer_id, leaves[1], signed.body, signed.signature, index, changed)
    with pytest.raises(IntegrityError):
        proof.check(WORKER.peer_id, leaves[1], b"\xc1", signed.signature, 1, path)


def test_tables_are_bounded_and_malformed_leaves_refused(monkeypatch):
    monkeypatch.setattr(proof, "LEAVES_MAX", 4)
    monkeypatch.setattr(proof, "WATCHED_MAX", 2)
    answers = proof.Answers()
    for leaf in leaves_of(50):
        answers.arrived(leaf)
        answers.watch(leaf)
    assert len(answers._arrived) == 4
    assert len(answers._watched) == 2
    for data in (bytes(31), bytes(5 * 32)):
        with pytest.raises(RuleError, match="leaves"):
            proof.split(data)
    assert proof.split(memoryview(bytes(64))) == [bytes(32)] * 2


def test_the_same_answer_twice_is_known_twice_and_proved_once():
    answers = proof.Answers()
    for _ in range(3):
        answers.arrived(b"a" * 32)
    answers.watch(b"a" * 32)
    first, second = [b"a" * 32] * 2, [b"a" * 32] * (2 + proof.FOREIGN_FROM)
    assert not answers.foreign(first)
    answers.covered(Signed(b"receipt", b"s" * 64), first)
    assert answers.proof(b"a" * 32) is not None
    assert answers.foreign(second) == proof.FOREIGN_FROM - 1


def test_a_receipt_whose_voucher_was_lost_lists_its_answers_again():
    """The payer had paid it; what it had done with once had "never come" the second time, and payments ended."""
    answers, count = proof.Answers(), proof.FOREIGN_FROM + 8
    leaves = leaves_of(count)
    for more in (0, 3, 5):
        leaves = leaves + leaves_of(more, first=len(leaves))
        for leaf in leaves_of(more or count, first=len(leaves) - (more or count)):
            answers.arrived(leaf)
        answers.check(receipt_over(leaves), leaves)
        answers.covered(sign(WORKER, receipt_over(leaves)), leaves)
    assert not answers._arrived
    assert answers.foreign(leaves[1:]) == len(leaves) - 1, "only the newest receipt, whole"
