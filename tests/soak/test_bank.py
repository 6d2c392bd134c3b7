"""The bank test's judge against made-up histories, and a very short bank test.

``make bank MINUTES=5`` runs it for long.
"""

import json
import os
from pathlib import Path

import pytest

from ledger.core.genesis import Genesis
from ledger.core.objects import (
    NO_HEAD,
    Claim,
    Entry,
    Grant,
    Item,
    Open,
    Reclaim,
    Transfer,
    Voucher,
    channel_id,
    parse,
    sign,
)
from p2p.core.identity import Identity
from tests.soak.bank import run
from tests.soak.bank_judge import Judge, count

MINUTES = float(os.environ.get("BANK_MINUTES", "0.25"))
A, B, ISSUER = (Identity.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
NET = Genesis(issuer=ISSUER.public_key, root=ISSUER.public_key, witnesses=(A.public_key,)).net


def entry(author: Identity, seq: int, *ops) -> Item:
    return parse(sign(author, Entry(NET, author.public_key, seq, NO_HEAD, ops)))


def told(balances: dict[str, int], supply: int, seq: int = 1, channels=None) -> dict:
    accounts = {key: [seq, "00", balance] for key, balance in balances.items()}
    return {"accounts": accounts, "channels": channels or {}, "supply": supply, "broken": []}


def test_a_right_read_is_right():
    judge = Judge(tried_grants=100)
    judge.read("w0", told({"a": 60, "b": 30}, 100, channels={"c": ["a", "b", 20, 10, 0, None]}), "a", 1)
    assert not judge.violations
    assert judge.reads["w0"] == 1


@pytest.mark.parametrize(
    ("read", "floor", "rule"),
    [
        (told({"a": 60, "b": 30}, 100), 0, "I2"),
        (told({"a": 110, "b": -10}, 100), 0, "I3"),
        (told({"a": 110}, 100, channels={"c": ["a", "b", 20, 30, 0, None]}), 0, "I4"),
        (told({"a": 200}, 200), 0, "I2"),
        (told({"a": 100}, 100), 2, "acknowledged"),
        (told({"a": 100}, 100) | {"broken": ["above X*"]}, 0, "breaks a rule"),
    ],
)
def test_a_wrong_read_is_a_violation(read, floor, rule):
    judge = Judge(tried_grants=100)
    judge.read("w0", read, "a", floor)
    assert rule in judge.violations[0]


def test_two_final_entries_in_a_slot_are_a_violation():
    judge = Judge()
    judge.final("aa", 1, "11")
    judge.final("aa", 1, "11")
    assert not judge.violations
    judge.final("aa", 1, "22")
    assert "I1" in judge.violations[0]


def test_counting_again_in_any_order():
    opened = entry(A, 1, Open(B.public_key, B.public_key, 50, 0), Transfer(B.public_key, 5))
    key = channel_id(opened.id, 0)
    voucher = Voucher(NET, key, 1, 30, bytes(32))
    claim = parse(sign(B, Claim(A.public_key, 1, 0, voucher, sign(A, voucher).signature)))
    granted = entry(ISSUER, 1, Grant(A.public_key, 100))
    items = [claim, opened, granted]
    counted = count(items)
    assert counted.balances == {A.public_key.hex(): 45, B.public_key.hex(): 35}
    assert (counted.supply, counted.locked, counted.paid[key.hex()]) == (100, 20, 30)
    closed = count([*items, entry(A, 2, Reclaim(key, 30, (opened.signed,)))])
    assert closed.balances == {A.public_key.hex(): 65, B.public_key.hex(): 35}
    assert (closed.locked, closed.wrong) == (0, [])
    assert "I4" in count([*items, entry(A, 2, Reclaim(key, 20, (opened.signed,)))]).wrong[0]
    assert "I1" in count([*items, entry(A, 1, Transfer(B.public_key, 6))]).wrong[0]


@pytest.mark.timeout(60 * MINUTES + 400)
def test_killed_and_cut_off_nobody_loses_or_makes_a_credit(tmp_path: Path):
    found = run(tmp_path, MINUTES, seed=1, speed=600)
    print("\n" + json.dumps(found))
    assert not found["violations"]
    assert found["acknowledged_entries"] >= 6  # the first grants and the last payments, on the slowest machine
    assert found["reads"] >= 7
    assert found["nemesis"]["kill witness"] >= 1
