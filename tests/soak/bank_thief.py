"""The thief of the bank test: an account that signs two entries for one slot, and one that claims above a freeze.

Not a test. It does what anybody can do who has a key: it asks each witness again and again for votes, for all that it
would like to have, and keeps every vote. Witnesses are killed and cut off meanwhile. What it gets is checked here:
two certificates in one slot, or one for a claim above what a quorum of freezes says, are violations; every
certificate is then shown to some node.
"""

import random
import threading
import time
from collections import Counter
from itertools import product
from typing import Any

from ledger.core import certificate as certificates
from ledger.core.certificate import Collector, Verifier
from ledger.core.objects import (
    NO_HEAD,
    SMALL_BYTES_MAX,
    Certificate,
    Claim,
    Entry,
    Freeze,
    Op,
    Open,
    Reclaim,
    Signed,
    Transfer,
    Vote,
    Voucher,
    channel_id,
    parse,
    sign,
)
from p2p.core import codec
from p2p.core.identity import Identity
from tests.soak.bank_judge import Judge, slot_of
from tests.soak.bank_rig import Bank, Member

FUNDS = 100_000
ASK_S = 7.0
ROUND_S = 12.0
HOUR_MS = 3600 * 1000


class _Wanted:
    """Something signed that is to become final, and the votes for it so far."""

    def __init__(self, verifier: Verifier, signed: Signed) -> None:
        self.signed = signed
        self.collector = Collector(verifier, signed)
        self.certificate: Certificate | None = None


class Thief(threading.Thread):
    """One attempt after the other until told to end."""

    def __init__(self, bank: Bank, seed: int, judge: Judge) -> None:
        super().__init__(daemon=True)
        self._bank = bank
        self._judge = judge
        self._random = random.Random(f"thief {seed}")
        self._verifier = Verifier(bank.genesis)
        self.ended = threading.Event()
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """See the class."""
        number = 0
        while not self.ended.is_set():
            number += 1
            me = Identity.from_seed(self._random.randbytes(32))
            if self._fund(me):
                (self._spend_twice if number % 3 else self._claim_above_a_freeze)(me)
            self.ended.wait(0.5)

    def _fund(self, me: Identity) -> bool:
        client = self._random.choice(self._bank.clients)
        answer = client.ask("entry", ops=[["transfer", me.public_key.hex(), FUNDS]])
        if not answer or "ok" not in answer:
            return False
        told = answer["ok"]
        self._judge.final(told["account"], told["seq"], told["entry"])
        return True

    def _entry(self, me: Identity, seq: int, prev: bytes, *ops: Op) -> _Wanted:
        return _Wanted(self._verifier, sign(me, Entry(self._bank.genesis.net, me.public_key, seq, prev, ops)))

    # two entries in one slot

    def _spend_twice(self, me: Identity) -> None:
        first, second = self._random.sample(self._bank.clients, 2)
        both = [
            self._entry(me, 1, NO_HEAD, Transfer(client.identity.public_key, FUNDS - 10 * n))
            for n, client in enumerate((first, second))
        ]
        self.counts["tried to spend twice"] += 1
        for n, witness in enumerate(self._bank.witnesses):  # half of them see one first, half the other
            self._vote(witness, both[n % 2])
        self._hunt(both, ROUND_S)
        if not any(wanted.certificate for wanted in both):
            self.counts["its slot is wedged"] += 1

    def _hunt(self, wanted: list[_Wanted], seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not self.ended.is_set():
            pairs = list(product(self._bank.witnesses, wanted))
            self._random.shuffle(pairs)
            for witness, one in pairs:
                if one.certificate is None:
                    self._vote(witness, one)
            if all(one.certificate for one in wanted):
                return
            self.ended.wait(0.3)

    def _vote(self, witness: Member, wanted: _Wanted) -> None:
        told = self._send(witness, "ledger.submit", object=codec.encode(wanted.signed))
        if "certificate" in told:
            self._certified(certificates.decode(bytes.fromhex(told["certificate"])))
        elif "vote" in told:
            self.counts["votes got"] += 1
            vote = codec.decode(Vote, bytes.fromhex(told["vote"]), bytes_max=SMALL_BYTES_MAX + 2048)
            wanted.collector.add(vote)
            if not wanted.collector.missing and wanted.certificate is None:
                wanted.certificate = wanted.collector.certificate()
                self._certified(wanted.certificate)
                self._show(wanted.certificate)

    def _certified(self, certificate: Certificate) -> None:
        item = self._verifier.open(certificate)
        if isinstance(item.object, Entry):
            self.counts["entries it got certified"] += 1
            self._judge.final(*slot_of(certificate.object))
        else:
            self._judge.claimed(item.object.voucher.channel.hex(), item.object.voucher.cumulative)

    def _show(self, certificate: Certificate) -> None:
        """To every node in turn until one has taken it: what is final must not get lost with the thief."""
        members = list(self._bank.members.values())
        data = certificates.encode(certificate).hex()
        while not self.ended.is_set():
            member = self._random.choice(members)
            if self._send(member, "ledger.push", buffers=[data], net=self._bank.genesis.net) is not _NOTHING:
                return

    def _send(self, member: Member, method: str, buffers: list[str] | None = None, **header: bytes) -> dict[str, Any]:
        """Over one of the clients' networks; what came back, :data:`_NOTHING` if nothing useful did."""
        client = self._random.choice([one for one in self._bank.clients if one is not member])
        told = client.ask(
            "ask",
            seconds=ASK_S,
            peer=member.key,
            method=method,
            header={name: value.hex() for name, value in header.items()},
            buffers=buffers or [],
        )
        if told is None or "error" in told:
            rule = told["error"][1].partition(":")[0] if told else ""
            if rule in ("equivocation", "frozen"):
                self.counts[f"refused: {rule}"] += 1
            return _NOTHING
        return dict(told["ok"])

    # a claim above a freeze

    def _claim_above_a_freeze(self, me: Identity) -> None:
        now_ms = int(self._ask_now() or 0)
        if not now_ms:
            return
        self.counts["tried to claim above a freeze"] += 1
        expiry_ms = now_ms + HOUR_MS // 2
        opened = self._entry(me, 1, NO_HEAD, Open(me.public_key, me.public_key, FUNDS // 2, expiry_ms))
        self._hunt([opened], ROUND_S)
        if opened.certificate is None:
            return
        entry = parse(opened.signed)
        key = channel_id(entry.id, 0)
        voucher = sign(me, Voucher(self._bank.genesis.net, key, 1, FUNDS // 3, bytes(32)))
        body = codec.decode(Voucher, voucher.body, bytes_max=SMALL_BYTES_MAX)
        claim = _Wanted(self._verifier, sign(me, Claim(me.public_key, 1, 0, body, voucher.signature)))
        self._vote(self._bank.witnesses[self._random.randrange(4)], claim)  # one honours it in its freeze, or nobody
        time.sleep(max(0.0, (expiry_ms - now_ms) / 1000 / self._bank.speed))
        freezes = self._freezes(key)
        self._hunt([claim], ROUND_S)
        self._compare(me, entry.id, key, freezes, claim)

    def _ask_now(self) -> int | None:
        for client in self._bank.clients:
            told = client.ask("now")
            if told and "ok" in told:
                return int(told["ok"]["now_ms"])
        return None

    def _freezes(self, key: bytes) -> list[tuple[int, Signed]]:
        """Everybody's freeze of a channel, lowest first."""
        found: dict[str, tuple[int, Signed]] = {}
        ends = time.monotonic() + ROUND_S
        while time.monotonic() < ends and len(found) < len(self._bank.witnesses) and not self.ended.is_set():
            for witness in self._bank.witnesses:
                told = self._send(witness, "ledger.freeze", channel=key) if witness.name not in found else {}
                if "freeze" in told:
                    signed = codec.decode(Signed, bytes.fromhex(told["freeze"]), bytes_max=SMALL_BYTES_MAX * 2)
                    freeze = codec.decode(Freeze, signed.body, bytes_max=SMALL_BYTES_MAX)
                    found[witness.name] = (freeze.total, signed)
            self.ended.wait(0.3)
        self.counts["freezes got"] += len(found)
        return sorted(found.values(), key=lambda pair: pair[0])

    def _compare(
        self, me: Identity, head: bytes, key: bytes, freezes: list[tuple[int, Signed]], claim: _Wanted
    ) -> None:
        quorum = freezes[: self._bank.genesis.quorum]
        if len(quorum) < self._bank.genesis.quorum:
            return
        total = quorum[-1][0]
        if claim.certificate is not None and total < FUNDS // 3:
            self._judge.wrong(f"I4: a claim of {FUNDS // 3} is certified above a quorum of freezes at {total}")
        reclaim = self._entry(me, 2, head, Reclaim(key, total, tuple(signed for _, signed in quorum)))
        self._hunt([reclaim], ROUND_S)


_NOTHING: dict[str, Any] = {}
