"""Ed25519 identities: keys, peer ids, signatures.

Owns: the mapping between a public key and a libp2p peer id, and the one way in which signatures are checked.
Does not own: key files (``p2p/keyfile``).

Invariants:
1. A signature is accepted only if libsodium verifies it *and* the public key is a valid point of the prime-order
   group: libraries disagree on hostile keys, and replicated state must not.
2. Every signature covers a domain tag, so that nothing signed for one purpose is valid for another.
"""

from dataclasses import dataclass
from functools import lru_cache

import base58
from nacl import _sodium
from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.signing import SigningKey

from config.errors import IntegrityError
from config.vocabulary import Account, PeerId

# identity multihash (code 0, 36 bytes) of the protobuf {Type: Ed25519, Data: 32 bytes}: libp2p peer-ids spec
_PEER_ID_PREFIX = b"\x00\x24\x08\x01\x12\x20"


@lru_cache(maxsize=4096)
def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of a raw 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        raise IntegrityError("integrity", f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode())


@lru_cache(maxsize=4096)
def public_key_of(peer_id: str) -> Account:
    """The raw public key inside an Ed25519 peer id.

    Raises :class:`IntegrityError` for anything that is not one.
    """
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        raw = b""
    # the decoder passes over white space: an id must have one spelling
    if len(raw) != 38 or not raw.startswith(_PEER_ID_PREFIX) or base58.b58encode(raw).decode() != peer_id:
        raise IntegrityError("integrity", f"{peer_id[:80]!r} is not an Ed25519 peer id")
    return Account(raw[6:])


@lru_cache(maxsize=4096)
def is_valid_key(public_key: bytes) -> bool:
    """Whether a public key lies in the prime-order group (no small or mixed order)."""
    return len(public_key) == 32 and bool(crypto_core_ed25519_is_valid_point(public_key))


# what nacl.signing.VerifyKey.verify ends in, without its copies of the message: 4 % of a verification
_open = _sodium.lib.crypto_sign_open
_NULL = _sodium.ffi.NULL


def verify(public_key: bytes, tag: bytes, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is ``public_key``'s over ``tag || message``. Never raises on hostile input."""
    if len(signature) != 64 or not is_valid_key(public_key):
        return False
    return _opens(public_key, signature + tag + message)


def _opens(public_key: bytes, signed: bytes) -> bool:
    """Whether a signature and the message behind it fit; the curve arithmetic alone."""
    return bool(_open(_NULL, _NULL, signed, len(signed), public_key) == 0)


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """A private key and what follows from it. The repr shows the peer id only."""

    signing_key: SigningKey
    public_key: Account
    peer_id: PeerId

    @classmethod
    def from_seed(cls, seed: bytes) -> "Identity":
        """The identity of a 32-byte Ed25519 seed."""
        key = SigningKey(seed)
        public = Account(bytes(key.verify_key))
        return cls(key, public, peer_id_of(public))

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes."""
        return bytes(self.signing_key)

    def sign(self, tag: bytes, message: bytes) -> bytes:
        """A 64-byte signature over ``tag || message``."""
        return self.signing_key.sign(tag + message).signature

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"
