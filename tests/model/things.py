"""What there is in the model: keys, entries, a claim, and everything that the lying witness may say.

Not a test. n = 4, f = 1 in both epochs: honest witnesses and one liar, who votes for everything, freezes at anything,
and hands over whatever has evidence. The payer and the payee are dishonest, too: they sign all there is.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

from config.errors import IntegrityError
from ledger.core import merkle
from ledger.core.certificate import Verifier
from ledger.core.committee import CommitteeChain
from ledger.core.genesis import Genesis
from ledger.core.objects import (
    HANDOVER_BYTES_MAX,
    NO_HEAD,
    Certificate,
    Claim,
    Committee,
    Entry,
    Freeze,
    Frontier,
    Grant,
    Handover,
    Held,
    Item,
    Op,
    Open,
    Reclaim,
    Shown,
    Signed,
    Transfer,
    Vote,
    Votes,
    Voucher,
    channel_id,
    parse,
    sign,
)
from ledger.core.rules import check_freezes
from ledger.core.witness import FIRST_PREV
from p2p.core import codec
from p2p.core.identity import Identity
from tests.model import fastsign
from tests.model.canon import Canon, Names

LATE_MS = 1 << 40
"""Past every expiry: a freeze may come at any time."""
CLAIMED = 50
LIAR_HEADERS = 3
"""So many batches the liar signs for one object."""


class Things:
    """Keys and objects of one scenario (its ``slot`` or its ``channel``)."""

    persist_votes = persist_freezes = True

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.names = Names()
        self.honest = [[self._key(f"{c}{n}", ("old", "new")[e]) for n in range(3)] for e, c in enumerate("wv")]
        self.liar = [self._key(f"{c}3", ("old liar", "new liar")[e]) for e, c in enumerate("wv")]
        issuer, root, self.payer, payee, other = (self._key(name, name) for name in ("issuer", "root", "p", "q", "r"))
        keys = [tuple(i.public_key for i in (*self.honest[e], self.liar[e])) for e in (0, 1)]
        self.genesis = Genesis(
            issuer=issuer.public_key, root=root.public_key, witnesses=keys[0], f=1, min_lock=10, min_claim_step=1
        )
        self.items: dict[str, Item] = {}
        self.contents: dict[Canon, Handover] = {}
        self._entry("grant", issuer, 1, NO_HEAD, Grant(self.payer.public_key, 100))
        self._entry("change", root, 1, NO_HEAD, Committee(1, keys[1], 1))
        self._committees = [CommitteeChain(self.genesis), CommitteeChain(self.genesis)]
        change = self.items["change"]
        self._committees[1].adopt(Committee(1, keys[1], 1), change.id)
        self._verifiers = [Verifier(self.genesis, self._committees[1]) for _ in (0, 1)]
        opened = self._entry("open", self.payer, 1, NO_HEAD, Open(payee.public_key, payee.public_key, 60, 0))
        self.channel = channel_id(opened.id, 0)
        self.names.give(self.channel, "channel")
        voucher = Voucher(self.genesis.net, self.channel, 1, CLAIMED, bytes(32))
        self.shown = Shown(voucher, sign(self.payer, voucher).signature)
        if kind == "slot":
            self._entry("e1", self.payer, 1, NO_HEAD, Transfer(payee.public_key, 70))
            self._entry("e2", self.payer, 1, NO_HEAD, Transfer(other.public_key, 80))
            self.wanted = ("e1", "e2")
        else:
            claim = Claim(self.payer.public_key, 1, 0, voucher, self.shown.signature)
            self._add("claim", sign(payee, claim))
            self.wanted = ("claim",)
        self._certified: dict[tuple[str, int, int], bool] = {}
        self._reclaims: dict[tuple[int, int, tuple[int, ...]], str | None] = {}

    def _key(self, name: str, shown: str) -> Identity:
        identity = fastsign.of(name)
        self.names.give(identity.public_key, shown)
        return identity

    def _entry(self, name: str, author: Identity, seq: int, prev: bytes, *ops: Op) -> Item:
        return self._add(name, sign(author, Entry(self.genesis.net, author.public_key, seq, prev, ops)))

    def _add(self, name: str, signed: Signed) -> Item:
        item = self.items[name] = parse(signed)
        self.names.give(item.id, name)
        return item

    def base(self, epoch: int) -> Sequence[str]:
        """What is final for everybody from the start."""
        return ("grant", *(("open",) if self.kind == "channel" else ()), *(("change",) if epoch else ()))

    def persisted(self, gave: Iterable[str]) -> Sequence[str]:
        """The votes that are on a witness's disk."""
        return sorted(gave) if self.persist_votes else ()

    def slot_of(self, name: str) -> tuple[bytes, int] | None:
        """The slot of an entry."""
        body = self.items[name].object
        return (body.account, body.seq) if isinstance(body, Entry) else None

    # certificates

    def certified(self, name: str, epoch: int, honest: int) -> bool:
        """Whether so many honest votes, with all the liar gives, are a certificate: the real check on real votes."""
        key = (name, epoch, honest)
        known = self._certified.get(key)
        if known is None:
            known = self._certified[key] = self._is_certificate(name, epoch, honest)
        return known

    def _is_certificate(self, name: str, epoch: int, honest: int) -> bool:
        item = self.items[name]
        votes = [self._vote(identity, epoch, item, 0) for identity in self.honest[epoch][:honest]]
        votes += [self._vote(self.liar[epoch], epoch, item, batch_no) for batch_no in range(7, 7 + LIAR_HEADERS)]
        try:
            self._verifiers[epoch].open(Certificate(item.signed, epoch, tuple(votes)))
        except IntegrityError:
            return False
        return True

    def _vote(self, identity: Identity, epoch: int, item: Item, batch_no: int) -> Vote:
        root = merkle.root_of([item.id])
        header = Votes(self.genesis.net, epoch, identity.public_key, batch_no, FIRST_PREV, root)
        signed = sign(identity, header)
        return Vote(signed.body, signed.signature, 0, ())

    # freezes and reclaims

    def total_of(self, signed: Signed) -> int:
        """The total of a freeze."""
        return codec.decode(Freeze, signed.body, bytes_max=4096).total

    def reclaim(self, total: int, epoch: int, frozen: tuple[int, ...]) -> str | None:
        """The name of a reclaim with ``total`` out of honest freezes at ``frozen`` and the liar's, if they suffice."""
        key = (total, epoch, frozen)
        if key not in self._reclaims:
            self._reclaims[key] = self._make_reclaim(*key)
        return self._reclaims[key]

    def _make_reclaim(self, total: int, epoch: int, frozen: tuple[int, ...]) -> str | None:
        fitting = sorted(each for each in frozen if each <= total)
        for count in range(len(fitting) + 1):  # as few honest ones as will do: fewest different reclaims
            name = self._try_reclaim(total, epoch, fitting[:count])
            if name is not None:
                return name
        return None

    def _try_reclaim(self, total: int, epoch: int, used: list[int]) -> str | None:
        owners = [*zip(self.honest[epoch], used, strict=False), *[(self.liar[epoch], total)] * LIAR_HEADERS]
        freezes = tuple(self._freeze(identity, epoch, each) for identity, each in owners)
        op = Reclaim(self.channel, total, freezes)
        opened = self.items["open"]
        entry = Entry(self.genesis.net, self.payer.public_key, 2, opened.id, (op,))
        try:
            check_freezes(self._committees[epoch], entry)
        except IntegrityError:
            return None
        told = ", ".join([*map(str, used), f"liar's {total}"])
        name = f"reclaim of {total} in epoch {epoch} ({told})"
        if name not in self.items:
            self._add(name, sign(self.payer, entry))
        return name

    def _freeze(self, identity: Identity, epoch: int, total: int) -> Signed:
        voucher, signature = (self.shown.voucher, self.shown.signature) if total else (None, None)
        return sign(
            identity, Freeze(self.genesis.net, epoch, identity.public_key, self.channel, total, voucher, signature)
        )

    def reclaimed(self, name: str) -> int | None:
        """X* of a reclaim."""
        body = self.items[name].object
        op = body.ops[0] if isinstance(body, Entry) else None
        return op.total if isinstance(op, Reclaim) else None

    # handovers

    def open_handover(self, signed: Signed) -> Handover:
        """Its body."""
        return codec.decode(Handover, signed.body, bytes_max=HANDOVER_BYTES_MAX)

    def keep(self, body: Handover) -> Canon:
        """Its content, by which it is known."""
        lines = (body.frontier, sorted(body.locks, key=lambda s: s.body), body.claims, body.freezes)
        content = tuple(map(self.names.canon, lines))
        self.contents.setdefault(content, body)
        return content

    def lies(self, reclaims: Iterable[str]) -> list[Canon]:
        """Everything that the liar may hand over: with evidence, and the frontier everybody has anyway (one that
        nobody can reach would not count)."""
        names = [name for name in (*self.wanted, *reclaims) if self.slot_of(name)]
        locks = [set(some) for count in range(len(names) + 1) for some in combinations(names, count)]
        held: list[tuple[Any, ...]] = [()]
        shown: list[tuple[Any, ...]] = [()]
        if self.kind == "channel":
            held += [(Held(self.channel, 0, None),), (Held(self.channel, CLAIMED, self.shown),)]
            shown += [(self.shown,)]
        return [
            self.keep(
                Handover(
                    self.genesis.net, 0, self.liar[0].public_key, Frontier((), ()),
                    tuple(self.items[name].signed for name in sorted(some)), vouchers, freezes,
                )
            )
            for some, vouchers, freezes in product(locks, shown, held)
            if not (vouchers and freezes and freezes[0].shown)  # the freeze brings the same voucher
        ]  # fmt: skip
