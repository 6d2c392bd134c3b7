"""Watches every vote, freeze and certificate the moment it exists, before anybody removes duplicates.

An object counts as final as soon as the votes that honest witnesses gave and the votes that the lying ones *could*
give make a quorum, whether or not somebody collected them: an adversary may have. So what is checked is the strongest
reading of the invariants. Numbers: I1..I6 of LEDGER.md, W2..W9 its rules for a single honest witness.
"""

from collections import Counter
from hashlib import sha256

from ledger.core.genesis import Genesis
from ledger.core.objects import (
    Certificate,
    Claim,
    Committee,
    Entry,
    Freeze,
    Handover,
    Issuer,
    Item,
    Signed,
    Vote,
    Votes,
    Voucher,
    parse,
)
from p2p.core import codec
from tests.sim.model import Model, Violation, signed_by


class Checker:
    """One simulation's."""

    def __init__(self, genesis: Genesis) -> None:
        self.model = Model(genesis)
        self.listed: set[bytes] = set()
        """Ids of the changes of the committee that operators agreed to."""
        self.liars: set[bytes] = set()
        """Keys of lying witnesses, of any epoch."""
        self.handed: dict[tuple[bytes, int], Handover] = {}
        """Handovers of honest witnesses, by (key, epoch)."""
        self.released: Counter[tuple[bytes, int]] = Counter()
        """How many different votes and freezes of a witness (key, epoch) have left it."""
        self.from_backup: set[bytes] = set()
        """Honest accounts whose database was put back."""
        self.restored: set[tuple[bytes, int]] = set()
        """Honest witnesses (key, epoch) whose database was put back to an older state."""
        self.votes: dict[tuple[int, bytes], set[bytes]] = {}
        self.final: dict[bytes, Item] = {}
        self._items: dict[bytes, Item] = {}
        self._slot_vote: dict[tuple[bytes, int, bytes, int], bytes] = {}
        self._claim_votes: dict[tuple[bytes, int, bytes], int] = {}
        self._freezes: dict[tuple[bytes, int, bytes], int] = {}
        self._known_certificates: set[tuple[bytes, tuple[bytes, ...]]] = set()
        self._promised: dict[bytes, int] = {}
        self._signed: dict[tuple[bytes, int], bytes] = {}

    # what witnesses send

    def vote(self, item: Item, vote: Vote) -> None:
        """A vote left an honest witness."""
        header = self._header(item, vote)
        if header is None:
            raise Violation("valid", "an honest witness sent a vote that proves nothing")
        witness, epoch = header.witness, header.epoch
        if (witness, epoch) in self.restored:
            raise Violation("W9", "a witness voted after it was restored from a backup")
        handed = self.handed.get((witness, epoch))
        if handed is not None and not self._covers(handed, item):
            raise Violation("W6", "a witness voted for something that its handover does not say")
        if isinstance(item.object, Entry):
            slot = (witness, epoch, item.object.account, item.object.seq)
            if self._slot_vote.setdefault(slot, item.id) != item.id:
                raise Violation("W2", f"an honest witness voted twice in slot {item.object.seq}")
        else:
            voucher = item.object.voucher
            frozen = self._freezes.get((witness, epoch, voucher.channel))
            if (epoch, item.id) in self.votes and witness in self.votes[epoch, item.id]:
                return  # the same vote again
            if frozen is not None and voucher.cumulative > frozen:
                raise Violation("W4", f"a vote for a claim of {voucher.cumulative} above the own freeze at {frozen}")
            key = (witness, epoch, voucher.channel)
            self._claim_votes[key] = max(self._claim_votes.get(key, 0), voucher.cumulative)
        self._items[item.id] = item
        voters = self.votes.setdefault((epoch, item.id), set())
        self.released[witness, epoch] += witness not in voters
        voters.add(witness)
        self._maybe_final(item, epoch, voters)

    def _maybe_final(self, item: Item, epoch: int, voters: set[bytes]) -> None:
        committee = self.model.epochs[epoch]
        if len(voters) + len(self.liars.intersection(committee.keys)) >= committee.quorum:
            self._final(item)

    def _final(self, item: Item) -> None:
        if item.id not in self.final:
            self.final[item.id] = item
            change = isinstance(item.object, Entry) and isinstance(item.object.ops[0], Committee | Issuer)
            if change and item.id not in self.listed:
                raise Violation("W6", "a committee is final that no operator has listed")
            self.model.add(item)

    def freeze(self, signed: Signed, now_ms: int) -> None:
        """A freeze left an honest witness whose clock says ``now_ms``."""
        body = codec.decode(Freeze, signed.body, bytes_max=4096)
        channel = self.model.channels.get(body.channel)
        if channel is None or self.model.freeze(channel, body.channel, signed) is None:
            raise Violation("valid", "an honest witness sent a freeze that is none")
        if now_ms < channel.expiry_ms:
            raise Violation("W5", f"a freeze {channel.expiry_ms - now_ms} ms before the channel expires")
        key = (body.witness, body.epoch, body.channel)
        # what its old copy still knows it may say again
        if (body.witness, body.epoch) in self.restored and key not in self._freezes:
            raise Violation("W9", "a witness froze after it was restored from a backup")
        handed = self.handed.get((body.witness, body.epoch))
        if handed is not None and not self._covers_freeze(handed, body.channel, body.total):
            raise Violation("W6", "a witness froze a channel that its handover does not say is frozen")
        self.released[body.witness, body.epoch] += key not in self._freezes
        if self._freezes.setdefault(key, body.total) != body.total:
            raise Violation("W5", f"a freeze at {self._freezes[key]} became one at {body.total}")
        if body.total < self._claim_votes.get(key, 0):
            raise Violation("W5", f"a freeze at {body.total} below the own vote for {self._claim_votes[key]}")

    def handover(self, signed: Signed) -> None:
        """A handover left an honest node: if its author is honest, it says everything that the author signed."""
        body = codec.decode(Handover, signed.body, bytes_max=1 << 26)
        if body.witness in self.liars:
            return
        if body.witness not in self.model.epochs[body.epoch].keys:
            raise Violation("valid", "a handover by somebody who was no witness")
        other = self.handed.setdefault((body.witness, body.epoch), body)
        if other != body:
            raise Violation("W6", "a witness handed over twice, differently")
        if other is not body:
            return
        for (epoch, item_id), voters in self.votes.items():
            if epoch == body.epoch and body.witness in voters and not self._covers(body, self._items[item_id]):
                raise Violation("W7", "a handover leaves out a vote")
        for (witness, epoch, channel), total in self._freezes.items():
            if (witness, epoch) == (body.witness, body.epoch) and not self._covers_freeze(body, channel, total):
                raise Violation("W7", "a handover leaves out a freeze")

    def _covers(self, handover: Handover, item: Item) -> bool:
        """Whether a handover says that this object may be final."""
        if isinstance(item.object, Entry):
            reached = dict(handover.frontier.accounts).get(item.object.account, 0)
            return item.object.seq <= reached or any(parse(lock).id == item.id for lock in handover.locks)
        voucher = item.object.voucher
        paid = dict(handover.frontier.channels).get(voucher.channel, 0)
        shown = [each.voucher.cumulative for each in handover.claims if each.voucher.channel == voucher.channel]
        return self._is_closed(voucher.channel) or voucher.cumulative <= max([paid, *shown])

    def _covers_freeze(self, handover: Handover, channel: bytes, total: int) -> bool:
        return self._is_closed(channel) or any(h.channel == channel and h.total <= total for h in handover.freezes)

    def _is_closed(self, channel: bytes) -> bool:
        known = self.model.channels.get(channel)
        return known is not None and known.closed_at is not None

    # what honest accounts send

    def submitted(self, account: bytes, signed: Signed) -> None:
        """An honest wallet sent an entry: never another one for the same slot. Rule 9 lets one from a backup do so once
        nobody holds the first any more: what comes of that is I1's and I6's business."""
        item = parse(signed)
        if not isinstance(item.object, Entry) or item.object.account != account or account in self.from_backup:
            return
        if self._signed.setdefault((account, item.object.seq), item.id) != item.id:
            raise Violation("W9", f"an honest wallet signed two entries {item.object.seq}")

    def promised(self, account: bytes, signed: Signed) -> None:
        """A voucher left an honest payer."""
        voucher = codec.decode(Voucher, signed.body, bytes_max=4096)
        channel = self.model.channels.get(voucher.channel)
        if channel is None or channel.payer != account or voucher.cumulative > channel.lock:
            raise Violation("M1", f"a voucher of {voucher.cumulative} that its payer's lock does not cover")
        before = self._promised.get(voucher.channel, 0)
        if voucher.cumulative < before and account not in self.from_backup:
            raise Violation("M1", f"a voucher fell from {before} to {voucher.cumulative}")
        self._promised[voucher.channel] = max(before, voucher.cumulative)

    # what nodes take in

    def accepted(self, item: Item, certificate: Certificate) -> None:
        """An honest node wrote an object with its certificate: it must be one."""
        key = (item.id, tuple(vote.header for vote in certificate.votes))
        if key in self._known_certificates:
            return
        if parse(certificate.object).id != item.id:
            raise Violation("valid", "a certificate for another object was accepted")
        if certificate.epoch >= len(self.model.epochs):
            raise Violation("valid", f"a certificate of epoch {certificate.epoch} was accepted")
        committee = self.model.epochs[certificate.epoch]
        witnesses = set()
        for vote in certificate.votes:
            header = self._header(item, vote)
            if header is None or header.epoch != certificate.epoch or header.witness not in committee.keys:
                raise Violation("valid", "a certificate with a vote that proves nothing was accepted")
            sent = self.votes.get((header.epoch, item.id), set()) | self.liars
            if header.witness not in sent:
                raise Violation("valid", "a certificate with a vote that was never sent was accepted")
            witnesses.add(header.witness)
        if len(witnesses) < committee.quorum:
            raise Violation("quorum", f"a certificate of {len(witnesses)} witnesses was accepted")
        self._final(item)
        self._known_certificates.add(key)

    def _header(self, item: Item, vote: Vote) -> Votes | None:
        """The signed batch a vote belongs to, if it leads there."""
        header = codec.decode(Votes, vote.header, bytes_max=4096)
        node = sha256(b"\0" + item.id).digest()
        for level, sibling in enumerate(vote.path):
            pair = sibling + node if vote.index >> level & 1 else node + sibling
            node = sha256(b"\1" + pair).digest()
        good = header.net == self.model.genesis.net and header.epoch < len(self.model.epochs) and node == header.root
        good = good and signed_by(header.witness, Votes.TAG, vote.header, vote.signature)
        return header if good and header.witness in self.model.epochs[header.epoch].keys else None

    def highest_claim(self, channel: bytes) -> int:
        """The highest claim on a channel that is final by anybody's reading."""
        return max(
            (
                item.object.voucher.cumulative
                for item in self.final.values()
                if isinstance(item.object, Claim) and item.object.voucher.channel == channel
            ),
            default=0,
        )
