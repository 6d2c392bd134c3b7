"""A small network's final objects, made by the real core: entries, channels, claims, their certificates."""

from collections.abc import Sequence

from ledger.core.certificate import Certificate, Verifier
from ledger.core.genesis import Genesis
from ledger.core.objects import Claim, Entry, Item, Op, Open, Signed, Voucher, channel_id, parse, sign
from ledger.core.state import State
from ledger.core.witness import Witness
from ledger.records import Final
from p2p.core.identity import Identity

START_MS = 1_800_000_000_000


def identity(n: int) -> Identity:
    """Seeded identity number n."""
    return Identity.from_seed(n.to_bytes(32, "big"))


class Maker:
    """Makes certified objects one by one; ``people[0]`` is issuer and root, the first ``3f+1`` are witnesses."""

    def __init__(self, people: int = 4, f: int = 0, **genesis) -> None:
        self.people = [identity(n + 1) for n in range(people)]
        keys = [p.public_key for p in self.people]
        self.genesis = Genesis(issuer=keys[0], root=keys[0], witnesses=tuple(keys[: 3 * f + 1]), f=f, **genesis)
        self.state = State(self.genesis)
        self.witnesses = [Witness(p, self.state) for p in self.people[: 3 * f + 1]]
        self.verifier = Verifier(self.genesis)
        self.finals: list[Final] = []

    def entry(self, who: int, *ops: Op) -> Item:
        """One more entry of a person's chain, final."""
        person = self.people[who]
        account = self.state.account(person.public_key)
        body = Entry(self.genesis.net, person.public_key, account.seq + 1, account.head, ops)
        return self._final(sign(person, body))

    def open(self, payer: int, worker: int, amount: int, expiry_ms: int = START_MS * 2) -> bytes:
        """A channel's id."""
        key = self.people[worker].public_key
        return channel_id(self.entry(payer, Open(key, key, amount, expiry_ms)).id, 0)

    def voucher(self, channel: bytes, cumulative: int) -> tuple[Voucher, bytes]:
        """A voucher with its payer's signature."""
        payer = self.person(self.state.channels[channel].payer)
        voucher = Voucher(self.genesis.net, channel, 1, cumulative, bytes(32))
        return voucher, sign(payer, voucher).signature

    def claim(self, channel: bytes, cumulative: int) -> Item:
        """A final claim."""
        known = self.state.channels[channel]
        body = Claim(known.payer, known.seq, known.op_index, *self.voucher(channel, cumulative))
        return self._final(sign(self.person(known.signer), body))

    def person(self, key: bytes) -> Identity:
        """Whose key it is."""
        return next(p for p in self.people if p.public_key == key)

    def _final(self, signed: Signed) -> Item:
        item = parse(signed)
        votes = []
        for witness in self.witnesses[: self.genesis.quorum]:
            (witness.consider_entry if isinstance(item.object, Entry) else witness.consider_claim)(item)
            votes.append(witness.seal().votes[0])
        certificate = Certificate(signed, 0, tuple(votes))
        self.verifier.check(item, certificate)
        self.state.add(item)
        self.finals.append(Final(item, certificate, START_MS + len(self.finals)))
        return item

    @property
    def certificates(self) -> Sequence[Certificate]:
        """All of them, in an order that applies."""
        return [final.certificate for final in self.finals]
