"""The thief of the bank test: an account that signs two entries for one slot, and one that claims above a freeze.

Not a test. It does what anybody can do who has a key: it asks each witness again and again for votes, for all that it
would like to have, keeps every vote, and keeps certificates to itself, so that witnesses go on. Witnesses are killed
and cut off meanwhile, again and again: one that forgot what it promised would be found. What it gets is checked here:
two certificates in one slot, or one for a claim above what a quorum of freezes says, are violations. At the end every
certificate is shown: it is as final as any other.
"""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
PAUSE_S = 0.3
CASES_MAX = 6
"""So many attempts go on at the same time; the oldest is given up for a new one."""
NEW_CASE_S = 12.0
HOUR_MS = 3600 * 1000
CLAIMED = FUNDS // 3
SHOWN_MAX = 100


class _Wanted:
    """Something signed that is to become final, and the votes for it so far."""

    def __init__(self, verifier: Verifier, signed: Signed) -> None:
        self.signed = signed
        self.collector = Collector(verifier, signed)
        self.voters: set[str] = set()
        self.certificate: Certificate | None = None


class Thief(threading.Thread):
    """Goes on with its cases until told to end; :meth:`finish` shows what it got."""

    def __init__(self, bank: Bank, seed: int, judge: Judge) -> None:
        super().__init__(daemon=True)
        self.bank = bank
        self.judge = judge
        self.random = random.Random(f"thief {seed}")
        self.verifier = Verifier(bank.genesis)
        self._cases: list[_SpendTwice | _ClaimAboveFreeze] = []
        self._lock = threading.Lock()
        self.ended = threading.Event()
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """See the class."""
        number, next_s = 0, 0.0
        while not self.ended.wait(PAUSE_S):
            if time.monotonic() >= next_s and self._begin(number):
                number, next_s = number + 1, time.monotonic() + NEW_CASE_S
            for case in list(self._cases):
                if not self.ended.is_set():
                    case.step()

    def _begin(self, number: int) -> bool:
        """Start a case with an account of its own; whether a client gave it money."""
        me = Identity.from_seed(self.random.randbytes(32))
        client = self.random.choice(self.bank.clients)
        answer = client.ask("entry", ops=[["transfer", me.public_key.hex(), FUNDS]])
        if not answer or "ok" not in answer:
            return False
        told = answer["ok"]
        self.judge.final(told["account"], told["seq"], told["entry"])
        case = (_ClaimAboveFreeze if number % 3 == 1 else _SpendTwice)(self, me)
        self._cases.append(case)
        self.counts[case.told] += 1
        if len(self._cases) > CASES_MAX:
            self._cases.pop(0).finish()
        return True

    def finish(self) -> None:
        """Everybody is up and can be reached: a last try at everything, then all is shown."""
        for case in self._cases:
            case.step()
            case.step()
            case.finish()

    # what cases need

    def entry(self, me: Identity, seq: int, prev: bytes, *ops: Op) -> _Wanted:
        """An entry it signs."""
        return _Wanted(self.verifier, sign(me, Entry(self.bank.genesis.net, me.public_key, seq, prev, ops)))

    def hunt(self, wanted: _Wanted) -> None:
        """Ask every witness that has not voted for it."""
        witnesses = [witness for witness in self.bank.witnesses if witness.name not in wanted.voters]
        with ThreadPoolExecutor(len(witnesses) or 1) as all_at_once:
            for _ in all_at_once.map(lambda witness: self.vote(witness, wanted), witnesses):
                pass

    def vote(self, witness: Member, wanted: _Wanted) -> None:
        """Ask one witness."""
        told = self.send(witness, "ledger.submit", object=codec.encode(wanted.signed))
        if "certificate" in told:
            self._certified(certificates.decode(bytes.fromhex(told["certificate"])))
        elif "vote" in told:
            with self._lock:
                self._voted(witness, wanted, bytes.fromhex(told["vote"]))

    def _voted(self, witness: Member, wanted: _Wanted, vote: bytes) -> None:
        self.counts["votes got"] += 1
        wanted.voters.add(witness.name)
        wanted.collector.add(codec.decode(Vote, vote, bytes_max=SMALL_BYTES_MAX + 2048))
        if not wanted.collector.missing and wanted.certificate is None:
            wanted.certificate = wanted.collector.certificate()
            self._certified(wanted.certificate)

    def _certified(self, certificate: Certificate) -> None:
        item = self.verifier.open(certificate)
        if isinstance(item.object, Entry):
            self.judge.final(*slot_of(certificate.object))
        else:
            self.judge.claimed(item.object.voucher.channel.hex(), item.object.voucher.cumulative)

    def show(self, wanted: _Wanted) -> None:
        """To one node after the other until one has taken it (or has taken another in its place, which is judged
        elsewhere): what is final must not get lost with the thief."""
        if wanted.certificate is None:
            return
        self.counts["certificates it got"] += 1
        members = list(self.bank.members.values())
        data, net = certificates.encode(wanted.certificate).hex(), self.bank.genesis.net
        for _ in range(SHOWN_MAX):
            member = self.random.choice(members)
            if self.send(member, "ledger.push", buffers=[data], net=net) is not _NOTHING:
                return
        self.judge.wrong("nobody takes a certificate that the thief shows")

    def send(
        self, member: Member, method: str, buffers: list[str] | None = None, me: Identity | None = None, **header: bytes
    ) -> dict[str, Any]:
        """Over one of the clients' networks, or beside one as somebody else; what came back, :data:`_NOTHING` if
        nothing useful did."""
        running = [one for one in self.bank.clients if one is not member and one.running]
        told = None
        if running:
            told = self.random.choice(running).ask(
                "ask",
                seconds=ASK_S,
                peer=member.key,
                method=method,
                header={name: value.hex() for name, value in header.items()},
                buffers=buffers or [],
                seed=me.seed.hex() if me is not None else "",
            )
        if told is None or "error" in told:
            rule = told["error"][1].partition(":")[0] if told else ""
            if rule in ("equivocation", "frozen", "fork"):
                self.counts[f"refused: {rule}"] += 1
            return {"fork": True} if rule == "fork" else _NOTHING
        return dict(told["ok"])

    def now_ms(self) -> int | None:
        """The ledger's clock."""
        for client in self.bank.clients:
            told = client.ask("now", seconds=ASK_S)
            if told and "ok" in told:
                return int(told["ok"]["now_ms"])
        return None


class _SpendTwice:
    """Two entries for one slot; half of the witnesses see one first, half the other."""

    told = "tried to spend twice"

    def __init__(self, thief: Thief, me: Identity) -> None:
        self._thief = thief
        payees = thief.random.sample(thief.bank.clients, 2)
        self._both = [
            thief.entry(me, 1, NO_HEAD, Transfer(client.identity.public_key, FUNDS - 10 * n))
            for n, client in enumerate(payees)
        ]
        with ThreadPoolExecutor(len(thief.bank.witnesses)) as all_at_once:
            for n, witness in enumerate(thief.bank.witnesses):
                all_at_once.submit(thief.vote, witness, self._both[n % 2])

    def step(self) -> None:
        """Ask again."""
        for wanted in self._both:
            self._thief.hunt(wanted)

    def finish(self) -> None:
        """Show what there is."""
        for wanted in self._both:
            self._thief.show(wanted)
        if not any(wanted.certificate for wanted in self._both):
            self._thief.counts["its slot is wedged"] += 1


class _ClaimAboveFreeze:
    """A channel to itself, frozen as low as can be had, then a claim above that, and the reclaim."""

    told = "tried to claim above a freeze"

    def __init__(self, thief: Thief, me: Identity) -> None:
        self._thief = thief
        self._me = me
        self._freezes: dict[str, tuple[int, Signed]] = {}
        self._expiry_ms = (thief.now_ms() or 0) + HOUR_MS // 2
        payee = me.public_key
        self._opened = thief.entry(me, 1, NO_HEAD, Open(payee, payee, FUNDS // 2, self._expiry_ms))
        self._head = parse(self._opened.signed).id
        self._channel = channel_id(self._head, 0)
        voucher = Voucher(thief.bank.genesis.net, self._channel, 1, CLAIMED, bytes(32))
        claim = Claim(me.public_key, 1, 0, voucher, sign(me, voucher).signature)
        self._claim = _Wanted(thief.verifier, sign(me, claim))
        self._shown = False

    def step(self) -> None:
        """First the channel; then one witness sees the claim, all freeze, and all are asked to vote for the claim."""
        thief = self._thief
        if self._opened.certificate is None:
            thief.hunt(self._opened)
            if self._opened.certificate is not None:
                thief.show(self._opened)
            return
        if not self._shown:
            thief.vote(thief.random.choice(thief.bank.witnesses), self._claim)
            self._shown = True
        if len(self._freezes) < thief.bank.genesis.quorum and (thief.now_ms() or 0) > self._expiry_ms:
            self._freeze()
        if self._total() is not None:
            thief.hunt(self._claim)
            self._compare()

    def _freeze(self) -> None:
        for witness in self._thief.bank.witnesses:
            if witness.name not in self._freezes:
                told = self._thief.send(witness, "ledger.freeze", me=self._me, channel=self._channel)
                if "freeze" in told:
                    signed = codec.decode(Signed, bytes.fromhex(told["freeze"]), bytes_max=SMALL_BYTES_MAX * 2)
                    freeze = codec.decode(Freeze, signed.body, bytes_max=SMALL_BYTES_MAX)
                    self._freezes[witness.name] = (freeze.total, signed)
                    self._thief.counts["freezes got"] += 1

    def _lowest(self) -> list[tuple[int, Signed]]:
        """A quorum of freezes, as low as can be had."""
        freezes = sorted(self._freezes.values(), key=lambda pair: pair[0])
        return freezes[: self._thief.bank.genesis.quorum]

    def _total(self) -> int | None:
        """X*, once there is one."""
        lowest = self._lowest()
        return lowest[-1][0] if len(lowest) == self._thief.bank.genesis.quorum else None

    def _compare(self) -> None:
        total = self._total()
        if self._claim.certificate is not None and total is not None and total < CLAIMED:
            self._thief.judge.wrong(f"I4: a claim of {CLAIMED} is certified above a quorum of freezes at {total}")

    def finish(self) -> None:
        """Show the claim, then reclaim."""
        self._compare()
        self._thief.show(self._claim)
        total = self._total()
        if total is not None:
            freezes = tuple(signed for _, signed in self._lowest())
            reclaim = self._thief.entry(self._me, 2, self._head, Reclaim(self._channel, total, freezes))
            self._thief.hunt(reclaim)
            self._thief.show(reclaim)


_NOTHING: dict[str, Any] = {}
