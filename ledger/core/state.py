"""The replicated state: a pure function of the *set* of final objects.

Owns balances, chains' heads, channels, the committee chain, and the objects that wait for what they build on.
Everything handed to :meth:`State.add` must carry a certificate that was checked before (``certificate``).

Invariants:
I1 one final entry per (account, seq). I2 balances + open locks - paid = supply. I3 no negative balance.
I4 paid <= lock, and paid = X* on a closed channel. I5 the same set of objects gives the same digest in any order.
A transition checks everything on a scratch first and mutates last.
"""

from collections.abc import Iterator
from hashlib import sha256

from config.errors import IntegrityError
from ledger.core.committee import CommitteeChain
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import Claim, Committee, Entry, Issuer, Item, channel_id
from ledger.core.rules import AccountState, ChannelState, Scratch, check_claim, check_claim_signatures, check_entry

WAITING_MAX = 1 << 20


class State:
    """Accounts, channels, supply, committees; see the module's invariants."""

    __slots__ = (
        "accounts",
        "applied",
        "broken",
        "channels",
        "committees",
        "genesis",
        "supply",
        "touched",
        "waiting_claims",
        "waiting_entries",
    )

    def __init__(self, genesis: Genesis) -> None:
        self.genesis = genesis
        self.committees = CommitteeChain(genesis)
        self.accounts: dict[bytes, AccountState] = {}
        self.channels: dict[bytes, ChannelState] = {}
        self.supply = 0
        self.applied = 0
        self.waiting_entries: dict[bytes, dict[int, Item]] = {}
        self.waiting_claims: dict[bytes, Item] = {}
        self.broken: dict[bytes, str] = {}
        """Certified objects that break a rule all the same (id -> why): more than f witnesses lied."""
        self.touched: set[bytes] = set()
        """Keys of accounts and channels changed since somebody (``sync``) last cleared it."""

    # accessors

    def account(self, key: bytes) -> AccountState:
        """The account, created empty on first sight."""
        account = self.accounts.get(key)
        if account is None:
            account = self.accounts[key] = AccountState()
        return account

    def balance(self, key: bytes) -> int:
        """Free microcredits."""
        account = self.accounts.get(key)
        return account.balance if account else 0

    def has_entry(self, account: bytes, seq: int) -> bool:
        """Whether the slot is filled, applied or waiting."""
        known = self.accounts.get(account)
        return (known is not None and seq <= known.seq) or seq in self.waiting_entries.get(account, ())

    def claimed(self, channel: bytes) -> int:
        """The highest final claim known: applied or waiting."""
        known = self.channels.get(channel)
        waiting = self.waiting_claims.get(channel)
        total = known.paid if known else 0
        if waiting is not None and isinstance(waiting.object, Claim):
            total = max(total, waiting.object.voucher.cumulative)
        return total

    def is_gone(self, claim: Claim) -> bool:
        """Whether a claim's channel, which is not known, cannot come any more: the entry that it names is applied."""
        account = self.accounts.get(claim.account)
        return account is not None and account.seq >= claim.seq

    def waiting(self) -> int:
        """How many objects wait for others."""
        return sum(map(len, self.waiting_entries.values())) + len(self.waiting_claims)

    # transitions

    def add(self, item: Item) -> bool:
        """Take in a final object; whether it was new.

        Raises :class:`RuleError` ``fork`` when it contradicts another final object: more than f witnesses lied.
        """
        body = item.object
        if type(body) is Entry:
            account = self.accounts.get(body.account)
            seq = account.seq if account is not None else 0
            if body.seq == seq + 1 and body.account not in self.waiting_entries:
                if self._try_entry(item, body):
                    return True
            elif self.has_entry(body.account, body.seq):
                self._check_same(item, body)
                return False
            self._wait(item, body)
            self._drain([body.account])
            return True
        assert isinstance(body, Claim)
        channel = body.voucher.channel
        if body.voucher.cumulative <= self.claimed(channel):
            return False
        known = self.channels.get(channel)
        if known is None and self.is_gone(body):
            raise RuleError("closed", "the claim's channel is closed, or was never opened")
        if known is None and len(self.waiting_claims) >= WAITING_MAX:
            raise RuleError("waiting", "too many claims wait for their channels", wait=True)
        if known is not None:
            self._check_claim(known, channel, item, body)
        self.waiting_claims[channel] = item
        self._drain(self._settle(channel))
        return True

    def _wait(self, item: Item, entry: Entry) -> None:
        slots = self.waiting_entries.setdefault(entry.account, {})
        if len(slots) >= WAITING_MAX:
            raise RuleError("waiting", "too many entries of one account wait", wait=True)
        slots[entry.seq] = item

    def _check_same(self, item: Item, entry: Entry) -> None:
        waiting = self.waiting_entries.get(entry.account, {}).get(entry.seq)
        account = self.accounts.get(entry.account)
        known = waiting.id if waiting else account.head if account and account.seq == entry.seq else item.id
        if known != item.id:
            raise RuleError("fork", f"two final entries {known.hex()} and {item.id.hex()} in one slot")

    def _drain(self, wake: list[bytes]) -> None:
        """Apply what can be applied now, starting from accounts that changed. Ends: every step applies an object."""
        while wake:
            account = wake.pop()
            slots = self.waiting_entries.get(account)
            while slots:
                item = slots.get(self.account(account).seq + 1)
                if item is None or not isinstance(item.object, Entry):
                    break
                try:
                    wake_more = self._apply(item, item.object)
                except RuleError as error:
                    self.broken[item.id] = error.message
                    break
                if wake_more is None:
                    break
                del slots[item.object.seq]
                wake += wake_more
            if slots is not None and not slots:
                self.waiting_entries.pop(account, None)

    def _try_entry(self, item: Item, entry: Entry) -> bool:
        wake = self._apply(item, entry)
        if wake is None:
            return False
        if self.waiting_entries:
            self._drain(wake)
        return True

    def _apply(self, item: Item, entry: Entry) -> list[bytes] | None:
        """Apply one entry; the accounts whose waiting entries may go on, or None if it has to wait itself."""
        try:
            scratch = check_entry(self.committees, self.accounts, self.channels, self.supply, entry)
        except RuleError as error:
            if error.wait:
                return None
            raise
        return self._process_entry(item, entry, scratch)

    def _process_entry(self, item: Item, entry: Entry, scratch: Scratch) -> list[bytes]:
        owner = self.account(entry.account)
        owner.seq = entry.seq
        owner.head = item.id
        owner.balance -= scratch.spend
        self.supply += scratch.granted
        self.applied += 1
        touched = self.touched
        touched.add(entry.account)
        wake = [entry.account]
        for to, amount in scratch.credits:
            self.account(to).balance += amount
            wake.append(to)
        for index, op in scratch.opens:
            key = channel_id(item.id, index)
            self.channels[key] = ChannelState(
                entry.account, op.signer, op.payout, op.amount, op.expiry_ms, entry.seq, index
            )
            touched.add(key)
            wake += self._settle(key)
        for key, amount in scratch.topups:
            self.channels[key].lock += amount
            wake += self._settle(key)
        for key, total in scratch.reclaims:
            channel = self.channels[key]
            self.account(channel.payout).balance += total - channel.paid
            owner.balance += channel.lock - total
            channel.paid = channel.closed_at = total
            touched.add(key)
            wake += [channel.payout, *self._settle(key)]
        change = scratch.change
        if type(change) is Committee:
            self.committees.adopt(change, item.id)
        elif type(change) is Issuer:
            self.committees.replace_issuer(change)
            wake.append(change.key)
        return wake

    def _settle(self, key: bytes) -> list[bytes]:
        """Apply the claim that waits for a channel, as far as its lock goes; the accounts that were credited."""
        item = self.waiting_claims.get(key)
        channel = self.channels.get(key)
        if item is None or channel is None:
            return []
        claim = item.object
        assert isinstance(claim, Claim)
        total = claim.voucher.cumulative
        if total <= channel.lock or channel.closed_at is not None:
            del self.waiting_claims[key]
        try:
            self._check_claim(channel, key, item, claim)
        except RuleError as error:
            self.waiting_claims.pop(key, None)
            if error.rule != "signature":  # which no vote is about: somebody put another one under a final claim
                self.broken[item.id] = error.message
            return []
        # a final claim stands for every lower one: what the lock holds is paid before the top-up for the rest comes,
        # which may need just that money
        covered = min(total, channel.lock)
        if channel.closed_at is not None or covered <= channel.paid:
            return []
        self.account(channel.payout).balance += covered - channel.paid
        channel.paid = covered
        self.touched.add(key)
        return [channel.payout]

    @staticmethod
    def _check_claim(channel: ChannelState, key: bytes, item: Item, claim: Claim) -> None:
        check_claim(channel, key, claim)
        check_claim_signatures(channel, item)
        if channel.closed_at is not None and claim.voucher.cumulative > channel.closed_at:
            raise RuleError("fork", f"a final claim lies above the {channel.closed_at} its channel was closed with")

    # computations

    def digest(self) -> bytes:
        """One hash over all of it: equal on every node that knows the same objects."""
        total = sha256(b"rios/state/1\0" + self.genesis.net)
        for part in self._lines():
            total.update(part)
        return total.digest()

    def _lines(self) -> Iterator[bytes]:
        for key in sorted(self.accounts):
            a = self.accounts[key]
            if a.seq or a.balance:
                yield key + a.seq.to_bytes(8, "big") + a.head + a.balance.to_bytes(8, "big")
        for key in sorted(self.channels):
            c = self.channels[key]
            if c.closed_at is None:  # what a closed one did stands in the balances; a checkpoint drops it
                yield key + c.payer + c.payout + c.lock.to_bytes(8, "big") + c.paid.to_bytes(8, "big") + b"\0"
        yield self.supply.to_bytes(8, "big")
        yield from self.committees.lines()

    def check_invariants(self) -> None:
        """Raise :class:`IntegrityError` naming the first broken invariant (I2, I3, I4)."""
        locked = 0
        for key, channel in self.channels.items():
            if not 0 <= channel.paid <= channel.lock:
                raise IntegrityError("integrity", f"I4: channel {key.hex()} paid {channel.paid} of {channel.lock}")
            if channel.closed_at is None:
                locked += channel.lock - channel.paid
        for key, account in self.accounts.items():
            if account.balance < 0:
                raise IntegrityError("integrity", f"I3: account {key.hex()} has {account.balance}")
        total = sum(account.balance for account in self.accounts.values()) + locked
        if total != self.supply or self.supply > self.genesis.max_supply:
            raise IntegrityError("integrity", f"I2: balances and locks make {total}, granted were {self.supply}")
