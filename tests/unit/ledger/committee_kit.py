"""A small network for tests of committees: several epochs of witnesses over the real core, every step by hand.

Everybody has a state of its own; ``show`` brings certificates (and what they build on) to whom a test names. Liars are
plain identities: tests sign for them whatever they like.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from config.errors import LocalError
from ledger.core import merkle
from ledger.core.certificate import Collector, Verifier
from ledger.core.genesis import Genesis
from ledger.core.handover import frontier_of
from ledger.core.objects import (
    Certificate,
    Claim,
    Committee,
    Entry,
    Freeze,
    Frontier,
    Grant,
    Handover,
    Item,
    Open,
    Reclaim,
    Signed,
    Vote,
    Votes,
    Voucher,
    channel_id,
    parse,
    sign,
)
from ledger.core.state import State
from ledger.core.witness import VOTING, Witness
from ledger.records import Record
from ledger.store import Store
from p2p.core.identity import Identity

ROOT, PAYER, PAYEE, OTHER, ISSUER = (Identity.from_seed(bytes([n]) * 32) for n in range(1, 6))
EXPIRY_MS = 1000
LATE_MS = 2000


def member(epoch: int, n: int) -> Identity:
    """The key of witness ``n`` in an epoch."""
    return Identity.from_seed(bytes([100 + epoch, n]) * 16)


@contextmanager
def full_disk(store: Store) -> Iterator[None]:
    """Whatever is committed meanwhile finds no room."""

    def refuse(records: Sequence[Record]) -> None:
        raise LocalError("disk_full", f"no room for {len(records)} records")

    store.commit = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        del store.commit


class Node:
    """Somebody with a copy of the ledger, perhaps a witness of one epoch."""

    def __init__(self, genesis: Genesis) -> None:
        self.state = State(genesis)
        self.verifier = Verifier(genesis, self.state.committees)
        self.witness: Witness | None = None

    def learn(self, certificates: Iterable[Certificate]) -> None:
        for certificate in certificates:
            self.state.add(self.verifier.open(certificate))
            self.state.check_invariants()
        assert not self.state.broken, self.state.broken
        self.saw(certificates)

    def saw(self, certificates: Iterable[Certificate]) -> None:
        """What a witness keeps of final objects."""
        if self.witness is not None:
            for certificate in certificates:
                item = parse(certificate.object)
                if isinstance(item.object, Claim):
                    self.witness.saw_voucher(item.object.voucher, item.object.voucher_signature)
                self.witness.forget_slot(item)


class Net:
    """Epochs of 3f + 1 witnesses each and an observer who knows everything final that it is shown."""

    def __init__(self, f: int = 1, epochs: int = 3) -> None:
        self.f = f
        n = 3 * f + 1
        self.keys = [[member(epoch, i) for i in range(n)] for epoch in range(epochs)]
        self.genesis = Genesis(
            issuer=ISSUER.public_key,
            root=ROOT.public_key,
            witnesses=tuple(key.public_key for key in self.keys[0]),
            f=f,
            min_lock=10,
            min_claim_step=1,
        )
        self.observer = Node(self.genesis)
        self.final: list[Certificate] = []
        self.nodes = [[Node(self.genesis) for _ in range(n)] for _ in range(epochs)]
        for key, node in zip(self.keys[0], self.nodes[0], strict=True):
            node.witness = Witness(key, node.state)

    # objects

    def entry(self, who: Identity, *ops, seq: int | None = None, prev: bytes | None = None) -> Signed:
        account = self.observer.state.account(who.public_key)
        seq = account.seq + 1 if seq is None else seq
        return sign(who, Entry(self.genesis.net, who.public_key, seq, prev or account.head, tuple(ops)))

    def voucher(self, channel: bytes, total: int, payer: Identity = PAYER) -> tuple[Voucher, bytes]:
        voucher = Voucher(self.genesis.net, channel, 1, total, bytes(32))
        return voucher, sign(payer, voucher).signature

    def claim(self, channel: bytes, total: int) -> Signed:
        known = self.observer.state.channels[channel]
        return sign(PAYEE, Claim(known.payer, known.seq, known.op_index, *self.voucher(channel, total)))

    def freeze_by(self, liar: Identity, epoch: int, channel: bytes, total: int = 0) -> Signed:
        voucher, signature = self.voucher(channel, total) if total else (None, None)
        return sign(liar, Freeze(self.genesis.net, epoch, liar.public_key, channel, total, voucher, signature))

    def vote_by(self, liar: Identity, epoch: int, item: Item, number: int = 0) -> Vote:
        root = merkle.root_of([item.id])
        header = sign(liar, Votes(self.genesis.net, epoch, liar.public_key, number, bytes(32), root))
        return Vote(header.body, header.signature, 0, ())

    def handover_by(self, liar: Identity, epoch: int, *, locks=(), claims=(), freezes=(), frontier=None) -> Signed:
        frontier = frontier or frontier_of(self.observer.state)
        body = Handover(self.genesis.net, epoch, liar.public_key, frontier, tuple(locks), tuple(claims), tuple(freezes))
        return sign(liar, body)

    # steps

    def votes(self, epoch: int, who: Sequence[int], signed: Signed) -> list[Vote]:
        """What honest witnesses answer; the first refusal is raised."""
        item, out = parse(signed), []
        for n in who:
            witness = self.nodes[epoch][n].witness
            assert witness is not None
            if isinstance(item.object, Entry):
                witness.consider_entry(item)
            else:
                witness.consider_claim(item)
            batch = witness.seal()
            assert batch is not None
            assert batch.items == (item,)
            out.append(batch.votes[0])
        return out

    def certify(self, epoch: int, signed: Signed, votes: Iterable[Vote]) -> Certificate:
        """A certificate, as everybody can check it."""
        collector = Collector(self.observer.verifier, signed, epoch)
        for vote in votes:
            collector.add(vote)
        return collector.certificate()

    def settle(self, signed: Signed, who: Sequence[int] | None = None, epoch: int | None = None) -> Item:
        """Final, and known to everybody who is a witness now."""
        epoch = self.observer.state.committees.epoch if epoch is None else epoch
        chosen = range(2 * self.f + 1) if who is None else who
        certificate = self.certify(epoch, signed, self.votes(epoch, chosen, signed))
        self.publish(certificate)
        return parse(signed)

    def publish(self, certificate: Certificate) -> None:
        self.final.append(certificate)
        self.observer.learn([certificate])
        for row in self.nodes:
            for node in row:
                if node.witness is not None:
                    node.learn([certificate])

    def fund(self) -> bytes:
        """Money for the payer and a channel; the channel's id."""
        self.settle(self.entry(ISSUER, Grant(PAYER.public_key, 100), Grant(OTHER.public_key, 100)))
        opened = self.settle(self.entry(PAYER, Open(PAYEE.public_key, PAYEE.public_key, 50, EXPIRY_MS)))
        return channel_id(opened.id, 0)

    def change(self, epoch: int) -> None:
        """Certify committee ``epoch`` and tell all witnesses; nobody has handed over yet."""
        keys = tuple(key.public_key for key in self.keys[epoch])
        signed = self.entry(ROOT, Committee(epoch, keys, self.f))
        for node in self.nodes[epoch - 1]:
            if node.witness is not None:
                node.witness.listed.add(parse(signed).id)
        self.settle(signed)
        for key, node in zip(self.keys[epoch], self.nodes[epoch], strict=True):
            node.learn(self.final)
            node.witness = Witness(key, node.state, epoch)
            node.saw(self.final)

    def handovers(self, epoch: int, who: Sequence[int]) -> list[Signed]:
        """The handovers of honest witnesses of an epoch."""
        out = []
        for n in who:
            witness = self.nodes[epoch][n].witness
            assert witness is not None
            effect = witness.advance()
            if effect is not None:
                witness.confirm_handover()
            assert witness.handover is not None
            out.append(witness.handover)
        return out

    def begin(self, epoch: int, handovers: Iterable[Signed], who: Sequence[int] | None = None) -> None:
        """Give handovers to new witnesses."""
        for n in range(3 * self.f + 1) if who is None else who:
            witness = self.nodes[epoch][n].witness
            assert witness is not None
            for signed in handovers:
                witness.receive(signed)
            witness.advance()

    def is_voting(self, epoch: int, n: int) -> bool:
        witness = self.nodes[epoch][n].witness
        return witness is not None and witness.phase == VOTING

    def reclaim(self, channel: bytes, freezes: Sequence[Signed], total: int) -> Signed:
        return self.entry(PAYER, Reclaim(channel, total, tuple(freezes)))


EMPTY = Frontier((), ())
