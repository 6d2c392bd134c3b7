"""Certificates: votes of a quorum of distinct witnesses for one object, checked and collected.

Owns the only places where a quorum is counted. Batches make it cheap: a header's signature is checked once, and the
inner nodes that one proven path has shown are reused by its neighbours.
"""

from hashlib import sha256

import msgspec

from config.errors import IntegrityError
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import (
    CERTIFICATE_BYTES_MAX,
    SMALL_BYTES_MAX,
    Certificate,
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

    __slots__ = ("nodes", "root", "signature", "witness")

    def __init__(self, witness: bytes, root: bytes, signature: bytes) -> None:
        self.witness = witness
        self.root = root
        self.signature = signature
        self.nodes: dict[int, bytes] = {}


class Verifier:
    """Checks certificates of one network. Remembers proven headers (bounded); holds no other state."""

    def __init__(self, genesis: Genesis) -> None:
        self.genesis = genesis
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
            check_freezes(self.genesis, body)
        elif body.voucher.net != self.genesis.net:  # type: ignore[union-attr] # the only other kind is a claim
            raise RuleError("network", "the claim belongs to another network")
        if certificate.epoch != 0:
            raise RuleError("epoch", f"no committee of epoch {certificate.epoch} is known")
        witnesses = {self.check_vote(item.id, vote) for vote in certificate.votes}
        if len(witnesses) < self.genesis.quorum:
            raise RuleError("quorum", f"{len(witnesses)} distinct witnesses, {self.genesis.quorum} are needed")

    def check_vote(self, item_id: bytes, vote: Vote) -> bytes:
        """The witness that voted for ``item_id`` by ``vote``."""
        header = self._headers.get(vote.header)
        if header is None or header.signature != vote.signature:
            header = self._open_header(vote)
        if vote.index >> len(vote.path):
            raise RuleError("path", "a vote's index does not fit its path")
        if not _leads_to(header, item_id, vote):
            raise RuleError("path", "a vote's path does not lead to its signed root")
        return header.witness

    def _open_header(self, vote: Vote) -> _Header:
        votes = codec.decode(Votes, vote.header, bytes_max=SMALL_BYTES_MAX)
        if votes.net != self.genesis.net or votes.epoch != 0 or votes.witness not in self.genesis.witnesses:
            raise RuleError("witness", "a vote is not by a witness of this network's epoch")
        if not verify(votes.witness, b"", codec.digest(Votes.TAG, vote.header), vote.signature):
            raise RuleError("signature", "a batch of votes is not signed by its witness")
        if len(self._headers) >= _HEADERS_MAX:
            self._headers.pop(next(iter(self._headers)))
        header = self._headers[vote.header] = _Header(votes.witness, votes.root, vote.signature)
        return header


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
    """Collects votes for one object until they are a certificate."""

    def __init__(self, verifier: Verifier, signed: Signed) -> None:
        self.item = parse(signed)
        self._verifier = verifier
        self._votes: dict[bytes, Vote] = {}

    def add(self, vote: Vote) -> None:
        """Count a vote.

        Raises :class:`config.errors.IntegrityError` if it proves nothing.
        """
        self._votes[self._verifier.check_vote(self.item.id, vote)] = vote

    @property
    def missing(self) -> int:
        """How many distinct witnesses are still needed."""
        return max(0, self._verifier.genesis.quorum - len(self._votes))

    def certificate(self) -> Certificate:
        """The certificate; call it when nothing is missing."""
        if self.missing:
            raise IntegrityError("integrity", f"{self.missing} votes are missing")
        return Certificate(self.item.signed, 0, tuple(self._votes.values()))
