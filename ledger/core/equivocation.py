"""Proof that an account signed two entries for one slot: anybody can check it, nobody can make it for another account.

Owns the check and the encoding in which proofs travel. Consequences (no new service for the account) are drawn
elsewhere; funds and final entries of the account are untouched, its payees are paid.
"""

from ledger.core.errors import RuleError
from ledger.core.objects import ENTRY_BYTES_MAX, Entry, Equivocation, Signed, parse
from ledger.core.rules import check_entry_signature
from p2p.core import codec

PROOF_BYTES_MAX = 2 * ENTRY_BYTES_MAX + 1024


def check_proof(net: bytes, proof: Equivocation) -> tuple[bytes, int]:
    """The (account, seq) in which ``proof`` shows two entries.

    Raises :class:`config.errors.IntegrityError` (mostly :class:`RuleError` ``equivocation``) if it proves nothing.
    """
    a, b = (_signed_entry(net, signed) for signed in (proof.a, proof.b))
    if (a.account, a.seq) != (b.account, b.seq):
        raise RuleError("equivocation", "the two entries are not for one slot")
    if proof.a.body == proof.b.body:
        raise RuleError("equivocation", "the two entries are the same")
    return a.account, a.seq


def account_of(proof: Equivocation) -> bytes:
    """Whom a proof is about, before any check. Raises :class:`config.errors.IntegrityError` if about nobody."""
    body = parse(proof.a).object
    if not isinstance(body, Entry):
        raise RuleError("equivocation", "a proof is made of two entries of this network")
    return body.account


def _signed_entry(net: bytes, signed: Signed) -> Entry:
    item = parse(signed)
    if not isinstance(item.object, Entry) or item.object.net != net:
        raise RuleError("equivocation", "a proof is made of two entries of this network")
    check_entry_signature(item, item.object)
    return item.object


def encode(proof: Equivocation) -> bytes:
    """The bytes of a proof as it travels: one encoding for either order of the two."""
    a, b = sorted((proof.a, proof.b), key=lambda signed: signed.body)
    return codec.encode(Equivocation(a, b))


def decode(data: bytes) -> Equivocation:
    """A proof somebody sent; :func:`check_proof` says whether it proves anything."""
    return codec.decode(Equivocation, data, bytes_max=PROOF_BYTES_MAX)
