"""Vouchers and receipts of one channel: what is counted, promised, refused."""

from dataclasses import dataclass

import pytest

from config.errors import RiosError
from ledger.core import merkle
from ledger.core.channel import LOST_CALLS_MAX, RECEIPT_CALLS, PayerChannel, SellerChannel
from ledger.core.objects import Voucher

NET, KEY, PAYER = b"n" * 16, b"c" * 32, b"p" * 32


@dataclass(frozen=True)
class Quote:
    microcredits_per_tflop: int
    number: int = 1
    microcredits_per_kv_unit: int = 0


GFLOP = 1_000_000  # kFLOP
ONE = Quote(1_000_000)  # 1,000 microcredits a GFLOP


def pair(*, lock=1_000_000, credit=50_000, prepay=50_000):
    seller = SellerChannel(NET, KEY, PAYER, lock, credit)
    payer = PayerChannel(NET, KEY, lock, prepay)
    seller.accept(payer.first_voucher(), b"s")
    return seller, payer


def call(seller, payer, kflop=GFLOP, quote=ONE):
    seller.admit()
    due = seller.served(quote, kflop, bytes(32))
    payer.used(quote, kflop)
    return due


def exchange(seller, payer):
    leaves = len(seller.leaves)
    receipt = seller.receipt()
    assert payer.excess(receipt) == 0
    voucher = payer.pay(receipt)
    seller.accept(voucher, b"s", leaves)
    return receipt, voucher


def test_money_is_rounded_down_once_on_the_cumulative():
    seller, payer = pair()
    odd = Quote(333_333_333)
    for kflop in (1, 2, 7, 1000):
        call(seller, payer, kflop, odd)
    call(seller, payer, 999, Quote(1_000_001))
    exact = (1010 * 333_333_333 + 999 * 1_000_001) // 10**9
    assert seller.earned == payer.spent == exact


def test_without_a_voucher_nothing_is_served():
    seller = SellerChannel(NET, KEY, PAYER, 100, 100)
    with pytest.raises(RiosError, match="no voucher") as caught:
        seller.admit()
    assert caught.value.code == "payment_required"


def test_credit_grows_with_what_was_paid_up_to_w():
    seller, payer = pair(lock=10_000_000)
    for _ in range(2000):
        if call(seller, payer):
            exchange(seller, payer)
    assert seller.promised >= seller.earned
    before = seller.earned
    served = 0
    while served < 500 and seller.nano <= seller.limit_nano:
        seller.served(ONE, GFLOP, bytes(32))
        served += 1
    assert (seller.promised - before) + 50_000 <= served * 1000 <= (seller.promised - before) + 51_000


def test_receipts_are_due_after_32_calls_or_half_the_credit():
    seller, payer = pair()
    assert [call(seller, payer) for _ in range(29)] == [False] * 29
    assert call(seller, payer), "30,000 of 60,000 are used"
    exchange(seller, payer)
    seller, payer = pair()
    dues = [call(seller, payer, 1000) for _ in range(RECEIPT_CALLS)]
    assert dues == [False] * (RECEIPT_CALLS - 1) + [True]


def test_the_receipt_covers_the_answers_since_the_last_paid_one():
    seller, payer = pair()
    leaves = [bytes([n]) * 32 for n in range(5)]
    for leaf in leaves[:3]:
        seller.served(ONE, 1, leaf)
        payer.used(ONE, 1)
    receipt, voucher = exchange(seller, payer)
    assert receipt.use_root == voucher.use_root == merkle.root_of(leaves[:3])
    for leaf in leaves[3:]:
        seller.served(ONE, 1, leaf)
    assert seller.receipt().use_root == merkle.root_of(leaves[3:])


def test_vouchers_to_a_worker_that_lends_stay_a_hundred_calls_behind_until_the_channel_rests():
    seller = SellerChannel(NET, KEY, PAYER, 5_000_000, 50_000)
    payer = PayerChannel(NET, KEY, 5_000_000, 50_000, lag_calls=100)
    payer.lends = seller.lends
    assert payer.lends == 50_000
    assert payer.first_voucher().cumulative == 0
    seller.accept(payer.first_voucher(), b"s")
    for count in range(1, 1001):
        call(seller, payer, 100_000)  # 100 microcredits: the worker never waits
        if count % 20 == 0:
            exchange(seller, payer)
            assert seller.promised == max(0, count - 100) * 100
    assert payer.catch_up().cumulative == 90_000
    payer.at_rest()
    exchange(seller, payer)
    assert seller.promised == seller.earned == 100_000


def test_what_lags_is_at_most_half_of_what_is_lent_so_that_large_calls_never_stall():
    seller = SellerChannel(NET, KEY, PAYER, 5_000_000, 50_000)
    payer = PayerChannel(NET, KEY, 5_000_000, 50_000, lag_calls=100)
    payer.lends = seller.lends
    seller.accept(payer.first_voucher(), b"s")
    for _ in range(100):
        call(seller, payer, 10 * GFLOP)  # 10,000 microcredits
        exchange(seller, payer)
    assert seller.earned - seller.promised == 25_000


def test_the_payer_accepts_one_doubtful_call_but_no_more():
    seller, payer = pair()
    for _ in range(10):
        call(seller, payer)
    seller.served(ONE, GFLOP, bytes(32))
    assert payer.excess(seller.receipt()) == 0, "one answer may still be under way"
    seller.served(ONE, GFLOP, bytes(32))
    assert payer.excess(seller.receipt()) == 1000
    payer.used(ONE, GFLOP)
    assert payer.excess(seller.receipt()) == 0


def test_a_worker_whose_first_answers_were_lost_is_no_cheat_and_gains_nothing_by_it():
    """It computed, the answer never came (it was killed, or another replica was faster): no reason to part for good."""
    seller, payer = pair(prepay=60_000)
    for calls in range(1, 21):
        seller.served(ONE, GFLOP, bytes(32))
        receipt = seller.receipt()
        assert payer.excess(receipt) == 0
        assert payer.pay(receipt).cumulative == 60_000, "no more than was promised before"
        assert receipt.cumulative == 1000 * calls
    seller.served(ONE, GFLOP, bytes(32))
    assert payer.excess(seller.receipt()) > 0, "a third of W0, all lost answers together"
    payer.used(ONE, GFLOP)
    assert payer.excess(seller.receipt()) == 0


def test_what_the_payer_gave_up_itself_stops_no_channel():
    """Hedges, timeouts and requests that were left: the worker may have computed them, and counts them."""
    seller, payer = pair(lock=100_000_000, credit=10_000_000)
    for _ in range(20):
        call(seller, payer)
    exchange(seller, payer)
    for _ in range(5):  # between two receipts
        seller.served(ONE, GFLOP, bytes(32))
        payer.lost(ONE, GFLOP)
    receipt, voucher = exchange(seller, payer)
    assert payer.spent == 20_000
    assert receipt.cumulative == seller.earned == 25_000
    assert payer.lost_nano == 0, "it is used up"
    for _ in range(3):  # what nobody gave up is no more in doubt than before
        seller.served(ONE, GFLOP, bytes(32))
    assert payer.excess(seller.receipt()) == 2_000
    assert voucher.cumulative >= receipt.cumulative


def test_what_may_be_given_up_is_bounded():
    seller, payer = pair(lock=100_000_000, credit=10_000_000)
    call(seller, payer)
    for _ in range(100):
        payer.lost(ONE, GFLOP)
        seller.served(ONE, GFLOP, bytes(32))
    assert payer.excess(seller.receipt()) >= (100 - LOST_CALLS_MAX - 2) * 1_000


def test_one_percent_of_the_window_may_be_in_doubt():
    payer = PayerChannel(NET, KEY, 10**9, 0)
    seller = SellerChannel(NET, KEY, PAYER, 10**9, 10**9)
    for _ in range(990):
        payer.used(ONE, GFLOP)
    for _ in range(1000):
        seller.served(ONE, GFLOP, bytes(32))
    assert payer.excess(seller.receipt()) == 0
    for _ in range(2):
        seller.served(ONE, GFLOP, bytes(32))
    assert payer.excess(seller.receipt()) > 0


def test_a_payer_never_signs_above_the_lock_nor_far_above_its_count():
    seller, payer = pair(lock=60_000)
    for _ in range(61):
        if seller.nano > seller.limit_nano:
            break
        call(seller, payer)
        exchange(seller, payer)
        assert payer.promised <= 60_000
        assert payer.promised <= max(50_000, payer.spent + 50_000)
    with pytest.raises(RiosError, match="owes") as caught:
        seller.admit()
    assert "top the channel up" in caught.value.hint


def test_vouchers_never_fall_and_stay_inside_the_lock():
    seller, _ = pair()
    seller.accept(Voucher(NET, KEY, 1, 70_000, bytes(32)), b"s")
    for wrong in (
        Voucher(NET, KEY, 2, 69_999, bytes(32)),
        Voucher(NET, KEY, 2, 1_000_001, bytes(32)),
        Voucher(bytes(16), KEY, 2, 80_000, bytes(32)),
        Voucher(NET, bytes(32), 2, 80_000, bytes(32)),
    ):
        with pytest.raises(RiosError):
            seller.accept(wrong, b"s")
    assert seller.promised == 70_000


def test_a_restored_payer_takes_up_its_newest_voucher_and_misses_some_counts_once():
    seller, payer = pair()
    for _ in range(20):
        call(seller, payer)
    exchange(seller, payer)
    restored = PayerChannel(NET, KEY, 1_000_000, 50_000)
    restored.first_voucher()
    restored.adopt(seller.voucher)
    restored.resume(50_000)
    assert restored.promised == seller.promised
    assert restored.excess(seller.receipt()) == 0
    restored.pay(seller.receipt())
    for _ in range(32):
        seller.served(ONE, GFLOP, bytes(32))
    assert restored.excess(seller.receipt()) > 0, "50 calls in all"


def test_what_a_killed_payer_has_forgotten_may_come_with_more_than_one_receipt():
    """A receipt from before the kill comes again first; the next one brings the rest, once and not more."""
    seller, payer = pair(lock=100_000_000, credit=10_000_000)
    for _ in range(20):
        call(seller, payer)
    exchange(seller, payer)
    killed = PayerChannel(payer.net, payer.id, payer.lock, payer.prepay)
    killed.calls, killed.nano, killed.voucher = payer.calls, payer.nano, payer.voucher
    killed.receipt_n, killed.receipt_cumulative = payer.receipt_n, payer.receipt_cumulative
    killed.resume(50_000)
    for missing in (5, 30):
        for _ in range(missing):
            seller.served(ONE, GFLOP, bytes(32))
        receipt = seller.receipt()
        assert killed.excess(receipt) == 0
        killed.pay(receipt)
    for _ in range(30):
        seller.served(ONE, GFLOP, bytes(32))
    assert killed.excess(seller.receipt()) > 0, "55 calls were allowed for, once"


def test_a_receipt_that_answers_overtook_brings_no_old_doubt_back():
    """Three calls were given up and their doubt accepted. Then a receipt is looked at late, when more answers than
    that have come since: the gap is still there, and the last receipt shows it again."""
    seller, payer = pair()
    for _ in range(10):
        call(seller, payer)
    for _ in range(3):
        seller.served(ONE, GFLOP, bytes(32))
        payer.lost(ONE, GFLOP)
    exchange(seller, payer)
    late = seller.receipt()
    for _ in range(10):
        call(seller, payer)
    payer.pay(late)
    exchange(seller, payer)
    assert payer.lost_nano == 0, "what was given up counts once"
    seller.served(ONE, GFLOP, bytes(32))
    seller.served(ONE, GFLOP, bytes(32))
    assert payer.excess(seller.receipt()) == 1000, "one more call may be in doubt, not two"


def test_a_payer_that_is_restarted_again_and_again_keeps_its_doubt():
    """What was missing after one restart is missing after the next as well; only what is new needs the allowance."""
    seller, payer = pair()
    for _ in range(4):
        for _ in range(30):
            call(seller, payer)
        exchange(seller, payer)
        kept = payer.nano, payer.receipt_n, payer.counted_there
        for _ in range(30):
            call(seller, payer)
        again = PayerChannel(NET, KEY, payer.lock, payer.prepay)
        again.nano, again.receipt_n, again.receipt_cumulative = kept
        again.adopt(payer.voucher)
        again.resume(50_000)
        payer = again
        exchange(seller, payer)
    assert payer.lock > payer.promised >= seller.earned
