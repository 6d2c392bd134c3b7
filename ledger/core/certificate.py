"""Certificates: votes of a quorum of distinct witnesses for one object, checked and collected.

Owns the only places where a quorum is counted. Batches make it cheap: a header's signature is checked once, and the
inner nodes that one proven path has shown are reused by its neighbours.
"""

from hashlib import sha256

import msgspec

from config.errors import IntegrityError
from ledger.core import quorums
from ledger.core.committee import CommitteeChain
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import (
    CERTIFICATE_BYTES_MAX,
    SMALL_BYTES_MAX,
    Certificate,
    Committee,
    Entry,
    Item,
    Signed,
    Vote,
    Votes,
    parse,
)
from ledger.core.rules import check_entry_signature, check_freezes
from p2p.core import codec
from p2p.core.identity import verify

_HEADERS_MAX = 4096
_decoder = msgspec.msgpack.Decoder(Certificate)


class _Header:
    """A proven batch header: who signed it, its root, and the tree nodes shown so far by (level, index)."""

    __slots__ = ("batch_no", "epoch", "nodes", "root", "signature", "witness")

    def __init__(self, votes: Votes, signature: bytes) -> None:
        self.witness = votes.witness
        self.epoch = votes.epoch
        self.batch_no = votes.batch_no
        self.root = votes.root
        self.signature = signature
        self.nodes: dict[int, bytes] = {}


class Verifier:
    """Checks certificates of one network against the committee of their epoch.

    ``committees`` is the chain of a state, which grows with it; without one only epoch 0 is known. Remembers proven
    headers (bounded); holds no other state.
    """

    def __init__(self, genesis: Genesis, committees: CommitteeChain | None = None) -> None:
        self.genesis = genesis
        self.committees = committees or CommitteeChain(genesis)
        self._headers: dict[bytes, _Header] = {}

    def open(self, certificate: Certificate) -> Item:
        """The item a certificate proves final.

        Raises :class:`config.errors.IntegrityError` (mostly :class:`RuleError`) if anything in it is wrong. A claim's
        own signatures are checked when its channel is known (``state``).
        """
        item = parse(certificate.object)
        self.check(item, certificate)
        return item

    def check(self, item: Item, certificate: Certificate) -> None:
        """Network, signature of the author, quorum."""
        body = item.object
        if type(body) is Entry:
            if body.net != self.genesis.net:
                raise RuleError("network", "the entry belongs to another network")
            check_entry_signature(item, body)
            check_freezes(self.committees, body)
            if type(body.ops[0]) is Committee:
                check_certifier(body.ops[0], certificate.epoch)
        elif body.voucher.net != self.genesis.net:  # type: ignore[union-attr] # the only other kind is a claim
            raise RuleError("network", "the claim belongs to another network")
        epoch, check_vote = certificate.epoch, self.check_vote
        needed, item_id = self.committees.of(epoch).quorum, item.id
        witnesses = quorums.distinct([check_vote(item_id, vote, epoch) for vote in certificate.votes])
        if len(witnesses) < needed:
            raise RuleError("quorum", f"{len(witnesses)} distinct witnesses, {needed} are needed")

    def check_vote(self, item_id: bytes, vote: Vote, epoch: int = 0) -> bytes:
        """The witness of ``epoch`` that voted for ``item_id`` by ``vote``."""
        header = self._headers.get(vote.header)
        if header is None or header.signature != vote.signature:
            header = self._open_header(vote)
        if header.epoch != epoch:
            raise RuleError("epoch", f"a vote of epoch {header.epoch} stands among those of epoch {epoch}", wait=True)
        if vote.index >> len(vote.path):
            raise RuleError("path", "a vote's index does not fit its path")
        if not _leads_to(header, item_id, vote):
            raise RuleError("path", "a vote's path does not lead to its signed root")
        return header.witness

    def _open_header(self, vote: Vote) -> _Header:
        votes = codec.decode(Votes, vote.header, bytes_max=SMALL_BYTES_MAX)
        if votes.net != self.genesis.net or votes.witness not in self.committees.of(votes.epoch).members:
            raise RuleError("witness", "a vote is not by a witness of this network's epoch")
        if not verify(votes.witness, b"", codec.digest(Votes.TAG, vote.header), vote.signature):
            raise RuleError("signature", "a batch of votes is not signed by its witness")
        if len(self._headers) >= _HEADERS_MAX:
            self._headers.pop(next(iter(self._headers)))
        header = self._headers[vote.header] = _Header(votes, vote.signature)
        return header

    def batch_no(self, vote: Vote, witness: bytes, epoch: int) -> int | None:
        """The number of the batch a checked vote stands in, if it is by ``witness`` in ``epoch``."""
        header = self._headers.get(vote.header)
        mine = header is not None and header.witness == witness and header.epoch == epoch
        return header.batch_no if header is not None and mine else None


def check_certifier(op: Committee, epoch: int) -> None:
    """Rule 6: a committee is certified by the one before it."""
    if op.epoch != epoch + 1:
        raise RuleError("epoch", f"the committee of epoch {op.epoch} is certified by epoch {epoch}")


def _leads_to(header: _Header, item_id: bytes, vote: Vote) -> bool:
    """Whether the path proves the id, stopping at the first node that an earlier path has proven."""
    depth = len(vote.path)
    # a heap's position, 1 for the root; paths of other depths start from positions of their own
    position = (depth << 16) | (1 << depth) | vote.index
    known = header.nodes
    node = sha256(b"\0" + item_id).digest()
    seen: dict[int, bytes] = {}
    index = vote.index
    for level, sibling in enumerate(vote.path):
        if known.get(position) == node:
            break
        seen[position] = node
        seen[position ^ 1] = sibling
        # inlined merkle.node_hash: this runs for every vote of every certificate
        node = sha256(b"\1" + sibling + node if index & 1 else b"\1" + node + sibling).digest()
        index >>= 1
        position = (depth << 16) | (1 << (depth - level - 1)) | index
    else:
        if node != header.root:
            return False
    known.update(seen)
    return True


def encode(certificate: Certificate) -> bytes:
    """The bytes of a certificate, as they travel."""
    return codec.encode(certificate)


def decode(data: bytes) -> Certificate:
    """A certificate somebody sent; nothing but its form is checked.

    The wrapper has no id and need not be canonical; the bodies in it do (``parse``, the batch header). Raises
    :class:`config.errors.IntegrityError`.
    """
    if len(data) > CERTIFICATE_BYTES_MAX:
        raise IntegrityError("too_large", f"certificate of {len(data)} bytes exceeds {CERTIFICATE_BYTES_MAX}")
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise IntegrityError("integrity", f"malformed certificate: {error}") from error


class Collector:
    """Collects votes of one epoch (the newest unless told) for one object until they are a certificate."""

    def __init__(self, verifier: Verifier, signed: Signed, epoch: int | None = None) -> None:
        self.item = parse(signed)
        self.epoch = verifier.committees.epoch if epoch is None else epoch
        self._verifier = verifier
        self._committee = verifier.committees.of(self.epoch)
        self._votes: dict[bytes, Vote] = {}

    def add(self, vote: Vote) -> None:
        """Count a vote.

        Raises :class:`config.errors.IntegrityError` if it proves nothing.
        """
        self._votes[self._verifier.check_vote(self.item.id, vote, self.epoch)] = vote

    @property
    def missing(self) -> int:
        """How many distinct witnesses are still needed."""
        return max(0, self._committee.quorum - len(self._votes))

    def certificate(self) -> Certificate:
        """The certificate; call it when nothing is missing."""
        if self.missing:
            raise IntegrityError("integrity", f"{self.missing} votes are missing")
        return Certificate(self.item.signed, self.epoch, tuple(self._votes.values()))
